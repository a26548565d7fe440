"""Reads recipes: a preset's name, a YAML file or plain data."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from effdl import passes
from effdl.errors import RecipeError, nearest
from effdl.passes.base import NodePass, Pass
from effdl.recipe.explain import coercions, faults, show
from effdl.recipe.located import Located, from_plain, one_line, parse, plain, with_value
from effdl.recipe.model import Head, Recipe, Step
from effdl.recipe.shipped import preset_names, preset_text
from effdl.recipe.writer import to_dict

PATHS = (
    ("data", "calibration"),
    ("data", "calibration", "path"),
    ("data", "calibration", "tokenizer"),
    ("data", "evaluation", "path"),
    ("data", "evaluation", "tokenizer"),
    ("data", "evaluation", "labels"),
)
"""Where a recipe has file names; labels are one where they end like one."""
Spec = str | Path | Mapping[str, Any] | Recipe
"""The name of a preset, a YAML file, plain data, or a recipe that is one already."""


def load(spec: Spec) -> Recipe:
    """Return the recipe that ``spec`` names, checked.

    Args:
        spec: the name of a shipped preset, a YAML file, plain data of the same form, or a Recipe.

    Raises:
        RecipeError: its first fault; ``where`` is file:line:column.
    """
    if isinstance(spec, Recipe):
        return spec
    recipe, errors = read(locate(spec))
    if errors or recipe is None:
        raise errors[0]
    return recipe


def locate(spec: Spec) -> Located:
    """Return the values of a recipe with their places, not checked yet.

    Raises:
        RecipeError: no such preset or file, or it is no YAML.
    """
    if isinstance(spec, Recipe):
        return _source_of(spec)
    if isinstance(spec, Mapping):
        return from_plain(spec, "recipe")
    text, name, folder = _text(spec)
    return parse(text, name, folder)


def _source_of(recipe: Recipe) -> Located:
    """Return what the recipe was read from, unless it was changed since (``model_copy``)."""
    source = recipe.source
    if source is not None and read(source)[0] == recipe:
        return source
    return from_plain(to_dict(recipe), "recipe", source.folder if source is not None else None)


def read(tree: Located) -> tuple[Recipe | None, list[RecipeError]]:
    """Check the values of a recipe; returns it, or all of its faults in the order of the file."""
    if not isinstance(tree.value, dict):
        hint = "put the list below passes:" if isinstance(tree.value, list) else "effdl recipe init"
        message = f"a recipe is a mapping with name, description and passes, not {show(tree)}"
        return None, [RecipeError(message, hint=hint, where=tree.where)]
    head, errors = _read_head(tree)
    steps: list[Step] = []
    for item in _items(tree, errors):
        step, wrong = _read_step(item)
        errors += wrong
        if step is not None:
            steps.append(step)
    errors += _wrong_order(steps)
    if errors or head is None:
        return None, [one_line(e) for e in sorted(errors, key=_position)]
    recipe = Recipe(**{k: getattr(head, k) for k in Head.model_fields}, passes=tuple(steps))
    recipe._source = tree
    return recipe, []


def _text(spec: str | Path) -> tuple[str, str, Path]:
    """Return the text of a recipe, its name for errors, and the folder its relative paths start in."""
    known = preset_names()
    if isinstance(spec, str) and spec in known:
        return preset_text(spec), f"{spec}.yaml", Path()
    path = Path(spec)
    where = str(spec)
    if path.is_dir():
        raise RecipeError("this is a folder, not a recipe", where=where)
    try:
        return path.read_text(encoding="utf-8-sig"), where, path.parent
    except FileNotFoundError:
        is_file = path.suffix in (".yaml", ".yml") or len(path.parts) > 1
        what = "no such recipe file" if is_file else f"there is no preset or file '{spec}'"
        hint = nearest(path.stem, known)
        raise RecipeError(what, hint=hint, where=where if is_file else "") from None
    except UnicodeDecodeError:
        raise RecipeError("not a text file in UTF-8", where=where) from None
    except OSError as e:
        raise RecipeError(f"cannot be read: {e.strerror or e}", where=where) from None


def _read_head(tree: Located) -> tuple[Head | None, list[RecipeError]]:
    assert isinstance(tree.value, dict)
    given = replace(tree, value={k: v for k, v in tree.value.items() if k != "passes"})
    try:
        head = Head.model_validate(plain(_resolve_paths(given)))
    except ValidationError as e:
        errors = faults(e, given, Head)
        return None, [_suggest_passes(x) for x in errors]
    return head, list(coercions(given, head))


def _suggest_passes(error: RecipeError) -> RecipeError:
    """Count ``passes`` among the known keys: ``pases`` is meant for it."""
    if error.message.startswith("unknown key") and " in " not in error.message:
        key = error.message.split("'")[1]
        return RecipeError(
            error.message, hint=nearest(key, [*Head.model_fields, "passes"]), where=error.where
        )
    return error


def _resolve_paths(head: Located) -> Located:
    """Put the recipe's folder before the relative data paths in it."""
    for keys in PATHS:
        here: Located | None = head
        for key in keys:
            here = here.get(key) if here is not None else None
        if here is None or not isinstance(here.value, str) or not here.value:
            continue
        if keys[-1] != "labels" or Path(here.value).suffix in (".csv", ".tsv", ".npy"):
            head = with_value(head, keys, replace(here, value=str(here.folder / here.value)))
    return head


def _items(tree: Located, errors: list[RecipeError]) -> list[Located]:
    """Return the steps as written; what is wrong with the list itself goes to ``errors``."""
    found = tree.get("passes")
    if found is None:
        meant = any("did you mean 'passes'" in e.hint for e in errors)
        if not meant:
            errors.append(
                RecipeError("the recipe has no passes", hint="passes: [simplify]", where=tree.where)
            )
        return []
    if isinstance(found.value, list) and found.value:
        return found.value
    if found.value in (None, []):
        errors.append(
            RecipeError("the recipe has no passes", hint="passes: [simplify]", where=found.key)
        )
    else:
        hint = "write each pass as a list item: - simplify"
        errors.append(
            RecipeError(f"'passes' must be a list, not {show(found)}", hint=hint, where=found.where)
        )
    return []


def _read_step(item: Located) -> tuple[Step | None, list[RecipeError]]:
    """Read one step: a name, or one name with a mapping of options."""
    if isinstance(item.value, str):
        name, options = item.value, Located({}, item.where)
    elif isinstance(item.value, dict) and len(item.value) == 1:
        name, options = next(iter(item.value.items()))
        if options.value is None:
            options = replace(options, value={})
    elif isinstance(item.value, dict) and item.value:
        first, second = list(item.value)[:2]
        message = f"a step is one pass, but '{first}' and '{second}' stand side by side"
        hint = f"options are indented below the pass: {first}: {{{second}: ...}}"
        return None, [RecipeError(message, hint=hint, where=item.where)]
    else:
        message = f"a step is the name of a pass, or a name with its options, not {show(item)}"
        return None, [RecipeError(message, where=item.where)]
    where = options.key
    try:
        cls = passes.get(name)
    except RecipeError as e:
        return None, [RecipeError(e.message, hint=e.hint, where=where)]
    if not isinstance(options.value, dict):
        message = f"the options of {name} must be a mapping, not {show(options)}"
        return None, [RecipeError(message, hint=_option_hint(name, cls), where=options.where)]
    return _read_options(name, cls, options, where)


def _option_hint(name: str, cls: type[Pass]) -> str:
    option = next(iter(cls.model_fields), None)
    return f"{name}: {{{option}: ...}}" if option else f"{name} has no options"


def _read_options(
    name: str, cls: type[Pass], options: Located, where: str
) -> tuple[Step | None, list[RecipeError]]:
    try:
        made = cls.model_validate(plain(options))
    except ValidationError as e:
        return None, faults(e, options, cls, name)
    errors = [*coercions(options, made, name)]
    if isinstance(made, NodePass):
        errors += _bad_patterns(options)
    if errors:
        return None, errors
    given = made.model_dump(mode="json", include=set(made.model_fields_set))
    return Step(name, given, made, where), []


def _bad_patterns(options: Located) -> Iterator[RecipeError]:
    for key in ("targets", "ignore"):
        given = options.get(key)
        for item in given.value if given and isinstance(given.value, list) else []:
            if isinstance(item.value, str) and item.value.startswith("re:"):
                try:
                    re.compile(item.value[3:])
                except re.error as e:
                    message = f"bad regular expression '{item.value[3:]}': {e}"
                    yield RecipeError(message, where=item.where)


def _wrong_order(steps: list[Step]) -> Iterator[RecipeError]:
    for i, step in enumerate(steps):
        for glob, reason in step.pass_.not_after.items():
            earlier = next((s.name for s in steps[:i] if fnmatchcase(s.name, glob)), None)
            if earlier is not None:
                message = f"{step.name} cannot come after {earlier}: {reason}"
                yield RecipeError(message, hint=f"put it before {earlier}", where=step.where)
                break


def _position(error: RecipeError) -> tuple[int, int]:
    found = re.search(r":(\d+):(\d+)$", error.where)
    return (int(found[1]), int(found[2])) if found else (0, 0)
