"""Reports as plain data, for ``--json`` and files."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

SCHEMA = 2


def to_json(report: Any) -> dict[str, Any]:
    """Return a report as plain data with ``"schema"``; infinities and NaN become None."""
    return {"schema": SCHEMA, **_plain(dataclasses.asdict(report))}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
