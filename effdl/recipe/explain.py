"""Turns what pydantic says into one sentence at one place: what is given, what is wanted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args, is_typeddict

from pydantic import BaseModel, ValidationError

from effdl.errors import RecipeError, nearest
from effdl.recipe.located import Located

_WANTED = {
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "path_type": "a path",
    "tuple_type": "a list",
    "list_type": "a list",
    "set_type": "a list",
    "frozen_set_type": "a list",
    "dict_type": "a mapping",
    "mapping_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "dataclass_type": "a mapping",
    "none_required": "null",
}
_BOUNDS = {
    "greater_than": ("greater than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
    "multiple_of": ("a multiple of", "multiple_of"),
}
_MESSAGES = ("value_error", "assertion_error")


@dataclass(frozen=True)
class _Fault:
    path: tuple[str | int, ...]
    rest: str
    kind: str
    wanted: str


def faults(
    error: ValidationError, given: Located, model: type[BaseModel], owner: str = ""
) -> list[RecipeError]:
    """Explain why ``given`` is no ``model``.

    Args:
        error: what pydantic raised.
        given: the mapping that was validated.
        model: what it should have been.
        owner: name of the pass whose options these are; empty for the head of a recipe.
    """
    found = [_fault(e, given) for e in error.errors(include_url=False)]
    # A union reports every branch; the one that got furthest into the value is the one that was meant.
    deepest = [f for f in found if not any(_inside(g.path, f.path) for g in found)]
    paths = dict.fromkeys(f.path for f in deepest)
    return [
        _explain([f for f in deepest if f.path == path], path, given, model, owner)
        for path in paths
    ]


def coercions(given: Located, result: BaseModel, owner: str = "") -> Iterator[RecipeError]:
    """Yield an error for every value that pydantic took for another kind: ``"8"`` for 8, true for 1."""
    assert isinstance(given.value, dict)
    for key, value in given.value.items():
        for path, place, kind in _coerced(value, getattr(result, key, None), (key,)):
            yield RecipeError(
                f"{_subject(path, owner)} must be {kind}, not {show(place)}", where=place.where
            )


def show(value: Located) -> str:
    """Return a value as an error message shows it."""
    match value.value:
        case bool():
            return "true" if value.value else "false"
        case None:
            return "nothing"
        case str() as text:
            return f"'{text}'" if len(text) <= 60 else f"'{text[:57]}...'"
        case list():
            return "a list"
        case dict():
            return "a mapping"
        case number:
            return str(number)


def _fault(error: Any, given: Located) -> _Fault:
    path: list[str | int] = []
    rest = ""
    here = given
    for part in error["loc"]:
        below = _below(here, part)
        if below is None:
            rest = str(part)  # the name of a union's branch, or of a key that is missing
        else:
            path.append(part if isinstance(part, int) else str(part))
            here, rest = below, ""
    kind = str(error["type"])
    wanted = _wanted(kind, error.get("ctx", {}))
    if kind in _MESSAGES:
        wanted = str(error["ctx"]["error"])
    return _Fault(tuple(path), rest, kind, wanted or str(error["msg"]))


def _below(value: Located, key: str | int) -> Located | None:
    if isinstance(value.value, list) and isinstance(key, int) and key < len(value.value):
        return value.value[key]
    return value.get(str(key))


def _at(value: Located, path: Iterable[str | int]) -> Located:
    for key in path:
        below = _below(value, key)
        assert below is not None
        value = below
    return value


def _wanted(kind: str, context: Mapping[str, Any]) -> str:
    if kind in _WANTED:
        return _WANTED[kind]
    if kind in _BOUNDS:
        words, key = _BOUNDS[kind]
        return f"{words} {context[key]:g}"
    if kind in ("literal_error", "enum"):
        return str(context["expected"])
    if kind == "string_pattern_mismatch":
        return f"text like {context['pattern']}"
    if kind == "string_too_short":
        return "text that is not empty"
    if kind == "too_short":
        return f"a list of at least {context['min_length']}"
    if kind == "too_long":
        return f"a list of at most {context['max_length']}"
    return ""


def _inside(path: tuple[str | int, ...], other: tuple[str | int, ...]) -> bool:
    return len(path) > len(other) and path[: len(other)] == other


def _explain(
    found: list[_Fault],
    path: tuple[str | int, ...],
    given: Located,
    model: type[BaseModel],
    owner: str,
) -> RecipeError:
    place = _at(given, path)
    kinds = {f.kind for f in found}
    if "extra_forbidden" in kinds:
        return _unknown(path, place, model, owner)
    if "missing" in kinds:
        key = next(f.rest for f in found if f.kind == "missing")
        return _missing(path, place, key, owner)
    subject = _subject(path, owner)
    told = next((f.wanted for f in found if f.kind in _MESSAGES), "")
    if told:
        return RecipeError(f"{subject}: {told.rstrip('.')}", where=place.where)
    if place.value is None and not path:
        return RecipeError(f"{subject} is empty", where=place.where)
    wanted = " or ".join(dict.fromkeys(f.wanted for f in found))
    hint = ""
    if isinstance(place.value, str):
        words = [w for f in found if f.kind == "literal_error" for w in _quoted(f.wanted)]
        hint = nearest(place.value, words)
        hint = hint if hint.startswith("did you mean") else ""
    return RecipeError(
        f"{subject} must be {wanted}, not {show(place)}", hint=hint, where=place.where
    )


def _unknown(
    path: tuple[str | int, ...], place: Located, model: type[BaseModel], owner: str
) -> RecipeError:
    key = str(path[-1])
    known = _keys(model, path[:-1])
    above = ".".join(str(p) for p in path[:-1])
    if owner and not above:
        text = f"unknown option '{key}' of {owner}"
        hint = nearest(key, known) if known else f"{owner} has no options"
        return RecipeError(text, hint=hint, where=place.key)
    inside = f"{owner}.{above}".strip(".") if owner else above
    text = f"unknown key '{key}' in {inside}" if inside else f"unknown key '{key}'"
    return RecipeError(text, hint=nearest(key, known), where=place.key)


def _missing(path: tuple[str | int, ...], place: Located, key: str, owner: str) -> RecipeError:
    if path:
        return RecipeError(f"{_subject(path, owner)} needs '{key}'", where=place.where)
    if owner:
        hint = f"{owner}: {{{key}: ...}}; effdl passes {owner} shows what it takes"
        return RecipeError(f"{owner} needs the option '{key}'", hint=hint, where=place.where)
    hint = f"{key}: say in a line what the recipe does" if key == "description" else f"{key}: ..."
    return RecipeError(f"the recipe has no '{key}'", hint=hint, where=place.where)


def _subject(path: tuple[str | int, ...], owner: str) -> str:
    words = ""
    for part in path:
        words += f"[{part + 1}]" if isinstance(part, int) else f".{part}" if words else part
    if not owner:
        return f"'{words}'" if words else "the recipe"
    return f"option '{words}' of {owner}" if words else owner


def _quoted(text: str) -> list[str]:
    return text.split("'")[1::2]


def _keys(model: Any, path: tuple[str | int, ...]) -> list[str]:
    """Keys that are allowed in the mapping at ``path`` of a model."""
    if not path:
        fields = model.__annotations__ if is_typeddict(model) else model.model_fields
        return sorted(fields)
    if is_typeddict(model):
        annotation: Any = model.__annotations__.get(str(path[0]))
    else:
        info = model.model_fields.get(str(path[0]))
        annotation = info.annotation if info else None
    for kind in _kinds(annotation):
        return _keys(kind, path[1:])
    return []


def _kinds(annotation: Any) -> Iterator[Any]:
    """Yield the mapping types in an annotation such as ``list[Model] | None``."""
    if is_typeddict(annotation) or (
        isinstance(annotation, type) and issubclass(annotation, BaseModel)
    ):
        yield annotation
    for arg in get_args(annotation):
        yield from _kinds(arg)


def _coerced(
    given: Located, result: Any, path: tuple[str | int, ...]
) -> Iterator[tuple[tuple[str | int, ...], Located, str]]:
    if isinstance(given.value, dict):
        for key, value in given.value.items():
            if isinstance(result, Mapping):
                yield from _coerced(value, result.get(key), (*path, key))
            elif isinstance(result, BaseModel):
                yield from _coerced(value, getattr(result, key, None), (*path, key))
    elif isinstance(given.value, list):
        if isinstance(result, list | tuple) and len(result) == len(given.value):
            for i, (value, item) in enumerate(zip(given.value, result, strict=True)):
                yield from _coerced(value, item, (*path, i))
    elif isinstance(result, bool) and not isinstance(given.value, bool):
        yield path, given, "true or false"
    elif _is_number(result) and isinstance(given.value, bool | str):
        yield path, given, "a whole number" if isinstance(result, int) else "a number"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
