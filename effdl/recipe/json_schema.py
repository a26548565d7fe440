"""The JSON Schema of a recipe, which editors complete and check by."""

from __future__ import annotations

from typing import Any

from effdl import passes
from effdl.recipe.describe import describe_pass
from effdl.recipe.model import Head


def schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of a recipe, all options of all passes included."""
    head = Head.model_json_schema()
    definitions: dict[str, Any] = head.pop("$defs", {})
    bare: list[dict[str, Any]] = []
    with_options: dict[str, Any] = {}
    for name in passes.names():
        options = passes.get(name).model_json_schema()
        definitions |= options.pop("$defs", {})
        info = describe_pass(name)
        options["description"] = info.summary
        options.pop("title", None)
        definitions[name] = options
        reference = {"$ref": f"#/$defs/{name}"}
        if options.get("required"):
            with_options[name] = reference
        else:
            bare.append({"const": name, "description": info.summary})
            with_options[name] = {"anyOf": [reference, {"type": "null"}]}
    step = {
        "anyOf": [
            *bare,
            {
                "type": "object",
                "properties": with_options,
                "additionalProperties": False,
                "minProperties": 1,
                "maxProperties": 1,
            },
        ]
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "effdl recipe",
        "description": "What effdl does to a model, pass by pass.",
        "type": "object",
        "properties": head["properties"]
        | {
            "passes": {
                "type": "array",
                "minItems": 1,
                "description": "The steps, in order: names, or names with options.",
                "items": step,
            }
        },
        "required": ["name", "description", "passes"],
        "additionalProperties": False,
        "$defs": definitions,
    }
