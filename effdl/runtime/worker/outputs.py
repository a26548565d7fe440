"""Outputs of runs as a file: arrays, lists, maps and None, in the order and with the names of the model."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

_STRUCTURE = "structure"


def pack(runs: list[dict[str, Any]], output: str) -> None:
    """Write runs to an ``.npz``: every array numbered, and ``structure``, JSON that says which is what.

    Outputs may be arrays, lists, maps of numbers, or None; ``unpack`` gives them back.
    """
    arrays: list[Any] = []
    structure = [[[name, _node(value, arrays)] for name, value in run.items()] for run in runs]
    named: dict[str, Any] = {f"arr_{k}": array for k, array in enumerate(arrays)}
    named[_STRUCTURE] = np.frombuffer(json.dumps(structure).encode(), np.uint8)
    with open(output, "wb") as f:
        np.savez(f, **named)


def unpack(path: str) -> list[dict[str, Any]]:
    """Read what ``pack`` wrote: one mapping from output name to value per run, in the model's order."""
    with np.load(path, allow_pickle=False) as data:
        structure = json.loads(data[_STRUCTURE].tobytes())
        return [{name: _value(node, data) for name, node in run} for run in structure]


def _node(value: Any, arrays: list[Any]) -> dict[str, Any]:
    if value is None:
        return {"none": True}
    if isinstance(value, dict):
        return {"map": [[k, _node(v, arrays)] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        return {"list": [_node(v, arrays) for v in value]}
    if isinstance(value, (int, float, str)):
        return {"plain": value}
    array = np.asarray(value)
    texts = array.dtype.kind in "OU"
    arrays.append(array.astype(np.str_) if texts else array)
    return {"array": len(arrays) - 1, "texts": texts}


def _value(node: dict[str, Any], data: Any) -> Any:
    if "none" in node:
        return None
    if "map" in node:
        return {k: _value(v, data) for k, v in node["map"]}
    if "list" in node:
        return [_value(v, data) for v in node["list"]]
    if "plain" in node:
        return node["plain"]
    array = data[f"arr_{node['array']}"]
    return array.astype(object) if node["texts"] else array
