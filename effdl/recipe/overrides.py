"""Changes to a recipe from the command line: ``passes.quantize_static.per_channel=false``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from effdl.data.spec import Preprocess, Source, parse_preprocess
from effdl.errors import EffdlError, RecipeError, UsageError, nearest
from effdl.recipe.located import Located, from_plain, parse, plain, with_value
from effdl.recipe.model import Budget, Data, Evaluation, Head, Recipe, TargetSpec
from effdl.recipe.reader import locate, read

_SECTIONS: dict[tuple[str, ...], list[str]] = {
    (): [*Head.model_fields, "passes"],
    ("target",): list(TargetSpec.__annotations__),
    ("data",): list(Data.model_fields),
    ("data", "calibration"): list(Source.model_fields),
    ("data", "calibration", "preprocess"): list(Preprocess.model_fields),
    ("data", "evaluation"): list(Evaluation.model_fields),
    ("data", "evaluation", "preprocess"): list(Preprocess.model_fields),
    ("budget",): list(Budget.model_fields),
}
_HINT = "passes.NAME.OPTION=VALUE, target=arm, data.calibration=calib.npz, budget.size=0.5"


def apply_overrides(recipe: Recipe, assignments: Iterable[str]) -> Recipe:
    """Return the recipe with single values changed, checked again.

    A pass is addressed by its name (the first of that name), by name and count from 1
    (``passes.simplify.2.max_growth``) or by its position from 1 (``passes.3.max_growth``). Values are
    YAML. Relative data paths start at the working folder.

    Args:
        recipe: stays as it is.
        assignments: KEY=VALUE, as after ``--set``.

    Raises:
        UsageError: no such key, pass or option, or a value that does not fit.
    """
    tree = locate(recipe)
    for assignment in assignments:
        tree = _apply(tree, assignment)
    changed, errors = read(tree)
    if changed is None or errors:
        first = errors[0]
        kind: type[EffdlError] = UsageError if first.where.startswith("--set ") else RecipeError
        raise kind(first.message, hint=first.hint, where=first.where)
    return changed


def _apply(tree: Located, assignment: str) -> Located:
    where = f"--set {assignment}"
    key, sign, text = assignment.partition("=")
    parts = key.strip().split(".")
    if not sign or not all(parts):
        raise UsageError("expected KEY=VALUE", hint=_HINT, where=where)
    value = _value(text, where)
    if parts[0] == "passes":
        return _apply_to_step(tree, parts[1:], value)
    return _apply_to_head(tree, tuple(parts), value)


def _value(text: str, where: str) -> Located:
    if not text.strip():
        return from_plain(None, where)
    try:
        return _at(parse(text, where), where)
    except RecipeError as e:
        raise UsageError(e.message, hint=e.hint, where=where) from None


def _at(value: Located, where: str) -> Located:
    """Say that ``value`` and all in it stand at ``where``: a column of a word helps nobody."""
    return from_plain(plain(value), where)


def _apply_to_head(tree: Located, keys: tuple[str, ...], value: Located) -> Located:
    for depth, key in enumerate(keys):
        known = _SECTIONS.get(keys[:depth])
        if known is None:
            above = ".".join(keys[:depth])
            raise UsageError(f"'{above}' has no parts", hint=f"{above}=VALUE", where=value.where)
        if key not in known:
            raise UsageError(
                f"unknown key '{'.'.join(keys[: depth + 1])}'",
                hint=nearest(key, known),
                where=value.where,
            )
    target = tree.get("target")
    if keys[0] == "target" and len(keys) == 2 and target and isinstance(target.value, str):
        tree = with_value(tree, ("target",), from_plain({"device": target.value}, target.where))
    return with_value(_in_detail(tree, keys), keys, value)


def _in_detail(tree: Located, keys: tuple[str, ...]) -> Located:
    """Make a mapping of a value that is written in short, where one of its parts is to be changed."""
    for place in (
        ("data", "calibration"),
        ("data", "calibration", "preprocess"),
        ("data", "evaluation", "preprocess"),
    ):
        here: Located | None = tree
        for key in place:
            here = here.get(key) if here is not None else None
        inside = len(keys) > len(place) and keys[: len(place)] == place
        if not inside or here is None or not isinstance(here.value, str):
            continue
        if place[-1] == "preprocess":
            options = parse_preprocess(here.value).model_dump(exclude_unset=True)
            tree = with_value(tree, place, from_plain(options, here.where))
        else:
            tree = with_value(tree, place, replace(here, value={"path": here}))
    return tree


def _apply_to_step(tree: Located, parts: list[str], value: Located) -> Located:
    found = tree.get("passes")
    steps = found.value if found is not None and isinstance(found.value, list) else []
    names = [_name(s) for s in steps]
    if not parts:
        raise UsageError("'passes' is changed option by option", hint=_HINT, where=value.where)
    index, option = _find(names, parts, value.where)
    if not option:
        raise UsageError(
            f"which option of {names[index]}?",
            hint=f"passes.{names[index]}.OPTION=VALUE",
            where=value.where,
        )
    step, name = steps[index], names[index]
    options = step.get(name)
    if options is None or options.value is None:
        empty = Located({}, step.where, step.where, step.folder)
        step = Located({name: empty}, step.where, step.key_where, step.folder)
    # Names of tensors and dimensions have dots in them: what follows the option is one key.
    keys = (option[0], ".".join(option[1:])) if len(option) > 1 else (option[0],)
    return with_value(tree, ("passes", index), with_value(step, (name, *keys), value))


def _find(names: list[str], parts: list[str], where: str) -> tuple[int, list[str]]:
    """Return which step ``parts`` names and what follows: the option."""
    first, rest = parts[0], parts[1:]
    if first.isdigit():
        number = int(first)
        if not 1 <= number <= len(names):
            raise UsageError(f"the recipe has {len(names)} passes, not {first}", where=where)
        return number - 1, rest
    places = [i for i, n in enumerate(names) if n == first]
    if not places:
        raise UsageError(
            f"the recipe has no pass '{first}'", hint=nearest(first, names), where=where
        )
    if rest and rest[0].isdigit():
        number = int(rest[0])
        if not 1 <= number <= len(places):
            times = "once" if len(places) == 1 else f"{len(places)} times"
            raise UsageError(f"{first} is in the recipe {times}", where=where)
        return places[number - 1], rest[1:]
    return places[0], rest


def _name(step: Located) -> str:
    """Return the name of the pass that a step of a checked recipe runs."""
    assert isinstance(step.value, str | dict)
    return step.value if isinstance(step.value, str) else next(iter(step.value))
