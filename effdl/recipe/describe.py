"""What passes there are and what they take, read from their classes."""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from effdl import passes
from effdl.passes.base import Pass

HEADINGS = ("What it does", "When it helps", "When it does not", "Example")
_HEADING = re.compile(r"^(What it does|When it helps|When it does not|Example):[ \t]*", re.M)
_JSON_TYPES = {
    "boolean": "true or false",
    "integer": "whole number",
    "number": "number",
    "string": "text",
    "null": "null",
    "object": "mapping",
}
_BOUNDS = {
    "minimum": "at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
}


@dataclass(frozen=True)
class OptionInfo:
    """One option of a pass.

    Args:
        name: its key in a recipe.
        type: what it takes, in words.
        default: as YAML; None when it must be given.
        description: what it does.
    """

    name: str
    type: str
    default: str | None
    description: str


@dataclass(frozen=True)
class PassInfo:
    """One pass.

    Args:
        name: what a recipe calls it.
        summary: one line.
        sections: the text below each of ``HEADINGS``.
        lossy: whether outputs may change beyond rounding.
        needs_data: whether it needs calibration data.
        min_opset: the opset below which it does nothing, 0 when there is none.
        not_after: globs of passes that must not come before it, with the reason.
        options: its options, in their order.
    """

    name: str
    summary: str
    sections: dict[str, str]
    lossy: bool
    needs_data: bool
    min_opset: int
    not_after: dict[str, str]
    options: tuple[OptionInfo, ...]


def describe_passes() -> list[PassInfo]:
    """Describe all passes, sorted by name."""
    return [describe_pass(name) for name in passes.names()]


@cache
def describe_pass(name: str) -> PassInfo:
    """Describe one pass.

    Raises:
        RecipeError: no such pass.
    """
    cls = passes.get(name)
    summary, sections = _sections(cls)
    return PassInfo(
        name,
        summary,
        sections,
        cls.lossy,
        cls.needs_data,
        cls.min_opset,
        dict(cls.not_after),
        _options(cls),
    )


def _sections(cls: type[Pass]) -> tuple[str, dict[str, str]]:
    """Split a class docstring at its headings."""
    text = inspect.getdoc(cls) or ""
    pieces = _HEADING.split(text)
    sections = dict(zip(pieces[1::2], pieces[2::2], strict=True))
    for key, body in sections.items():
        sections[key] = inspect.cleandoc(body) if key == "Example" else _line(body)
    return _line(pieces[0]), sections


def _line(text: str) -> str:
    return " ".join(text.replace("``", "`").split())


def _options(cls: type[Pass]) -> tuple[OptionInfo, ...]:
    whole = cls.model_json_schema()
    found = []
    for name, field in cls.model_fields.items():
        schema = whole["properties"][field.alias or name]
        default = None if field.is_required() else _yaml(schema.get("default"))
        found.append(
            OptionInfo(name, type_text(schema, whole), default, _line(field.description or ""))
        )
    return tuple(found)


def type_text(schema: dict[str, Any], whole: dict[str, Any]) -> str:
    """Say in words what a JSON Schema takes; ``whole`` holds the definitions it refers to."""
    if "$ref" in schema:
        return type_text(whole["$defs"][schema["$ref"].rsplit("/", 1)[1]], whole)
    if "allOf" in schema and len(schema["allOf"]) == 1:
        return type_text(schema["allOf"][0], whole)
    branches = schema.get("anyOf") or schema.get("oneOf")
    if branches:
        return " or ".join(dict.fromkeys(type_text(b, whole) for b in branches))
    if "enum" in schema:
        *most, last = (_yaml(v) for v in schema["enum"])
        return f"{', '.join(most)} or {last}" if most else last
    if "const" in schema:
        return _yaml(schema["const"])
    kind = schema.get("type", "anything")
    if kind == "array":
        return _array_text(schema, whole)
    if kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"mapping of name to {type_text(schema['additionalProperties'], whole)}"
    words = _JSON_TYPES.get(kind, kind)
    bounds = [f"{word} {schema[key]}" for key, word in _BOUNDS.items() if key in schema]
    return f"{words} {' and '.join(bounds)}" if bounds else words


def _array_text(schema: dict[str, Any], whole: dict[str, Any]) -> str:
    if "prefixItems" in schema:
        return f"[{', '.join(type_text(i, whole) for i in schema['prefixItems'])}]"
    return f"list of {type_text(schema.get('items', {}), whole)}"


def _yaml(value: Any) -> str:
    """Return a value as it is written in a recipe."""
    return (
        value
        if isinstance(value, str) and re.fullmatch(r"[A-Za-z_]\w*", value)
        else json.dumps(value)
    )
