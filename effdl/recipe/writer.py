"""A recipe as plain data and as YAML text."""

from __future__ import annotations

import json
from typing import Any

import yaml

from effdl.recipe.located import Dumper, plain
from effdl.recipe.model import Recipe


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe as plain data that ``load`` reads back, always in the same form.

    Only what the recipe gives is in it, defaults are not; data paths are as they were written.
    """
    head = recipe.model_dump(mode="json", exclude={"passes"}, exclude_none=True)
    head["data"] = _written_data(recipe)
    result: dict[str, Any] = {k: v for k, v in head.items() if v not in ({}, None)}
    result["passes"] = [{s.name: dict(s.options)} if s.options else s.name for s in recipe.passes]
    return result


def dump(recipe: Recipe) -> str:
    """Return a recipe as YAML text that ``load`` reads back; comments of its file are gone."""
    data = to_dict(recipe)
    steps = data.pop("passes")
    text = ""
    for key, value in data.items():
        inline = isinstance(value, dict)
        text += f"{key}: {_yaml(value, flow=True)}" if inline else _yaml({key: value}, flow=False)
    text += "passes:\n"
    for step in steps:
        text += f"  - {_yaml(step, flow=True)}" if isinstance(step, dict) else f"  - {step}\n"
    return text


def _yaml(data: Any, *, flow: bool) -> str:
    # PyYAML writes these line breaks of YAML 1.1 as they are and reads them back as a blank.
    breaks = any(c in json.dumps(data, ensure_ascii=False) for c in "\x85\u2028\u2029")
    text: str = yaml.dump(
        data,
        Dumper=Dumper,
        sort_keys=False,
        allow_unicode=not breaks,
        default_flow_style=flow,
        width=10_000,
    )
    return text


def _written_data(recipe: Recipe) -> dict[str, Any]:
    """Return the data section; a path joined to the recipe's folder may name the user's home."""
    given = recipe.data.model_dump(mode="json", exclude_none=True, exclude_unset=True)
    source = recipe.source.get("data") if recipe.source is not None else None
    written = plain(source) if source is not None else {}
    if "calibration" in given:
        given["calibration"] = written.get("calibration", given["calibration"])
    if "evaluation" in given:
        names = written.get("evaluation", {})
        names = {k: names[k] for k in ("path", "tokenizer", "labels") if k in names}
        given["evaluation"] |= {k: v for k, v in names.items() if v is not None}
    return given
