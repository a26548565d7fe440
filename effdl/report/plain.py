"""Reports as plain data, for ``--json`` and files, and back."""

from __future__ import annotations

import dataclasses
import math
import re
import types
from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from effdl.errors import UsageError

SCHEMA = 2
R = TypeVar("R")
_HINT = "effdl optimize ... --report run.json writes one"


def to_json(report: Any) -> dict[str, Any]:
    """Return a report as plain data with ``"schema"``.

    JSON has no infinities and no NaN: minus infinity becomes ``"-inf"`` and NaN ``"nan"``; plus infinity
    becomes None, and ``"inf"`` where None already says that there is no number. In free data, such as a
    recipe, all three become None.
    """
    return {"schema": SCHEMA, **_object(report)}


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _object(report: Any) -> dict[str, Any]:
    kind: Any = type(report)
    hints = _hints(kind)
    return {
        f.name: _plain(getattr(report, f.name), hints[f.name]) for f in dataclasses.fields(report)
    }


def _plain(value: Any, hint: Any) -> Any:
    """Return ``value``, which its class says is a ``hint``, as plain data."""
    if dataclasses.is_dataclass(value):
        return _object(value)
    if isinstance(value, float) and not math.isfinite(value):
        return _no_number(value, hint)
    if get_origin(hint) in (Union, types.UnionType):
        kind = tuple if isinstance(value, list | tuple) else dict
        hint = next((k for k in get_args(hint) if get_origin(k) is kind), Any)
    inner = get_args(hint)
    if isinstance(value, dict):
        return {str(k): _plain(v, inner[1] if inner else Any) for k, v in value.items()}
    if isinstance(value, list | tuple):
        fixed = len(inner) == len(value) and Ellipsis not in inner
        kinds = inner if fixed else (inner[0] if inner else Any,) * len(value)
        return [_plain(v, k) for v, k in zip(value, kinds, strict=True)]
    return value


def _no_number(value: float, hint: Any) -> str | None:
    if hint is Any or (value == math.inf and types.NoneType not in get_args(hint)):
        return None
    return str(float(value))


def from_json(kind: type[R], data: Any, *, where: str = "") -> R:
    """Read back what ``to_json`` made of a report.

    A number that must be there and is None in ``data`` was infinite, see ``to_json``.
    Fields that an older version did not know get their defaults, fields it does not know are left out.

    Args:
        kind: the class of the report, such as ``RunReport``.
        data: the parsed JSON.
        where: its file, for messages.

    Raises:
        UsageError: another schema version, or not a report of this kind.
    """
    if not isinstance(data, Mapping) or "schema" not in data:
        raise UsageError(
            'this is no report of effdl: it has no "schema"',
            hint=_HINT,
            where=where,
        )
    if data["schema"] != SCHEMA:
        raise UsageError(
            f"the report has schema {data['schema']}, this effdl reads schema {SCHEMA}",
            hint="make the report again with this version of effdl",
            where=where,
        )
    words = re.sub(r"(?<!^)(?=[A-Z])", " ", kind.__name__).lower()
    report = _Reader(words, where).read(kind, {k: v for k, v in data.items() if k != "schema"}, "")
    assert isinstance(report, kind)
    return report


class _Reader:
    """Turns plain data into the type that an annotation says; names the place that does not fit."""

    def __init__(self, words: str, where: str) -> None:
        self.words = words
        self.where = where

    def read(self, hint: Any, value: Any, path: str) -> Any:
        """Return ``value`` as ``hint``; ``path`` is its place in the report."""
        origin, arguments = get_origin(hint), get_args(hint)
        if hint is Any:
            return value
        if origin in (Union, types.UnionType):
            return self._union(arguments, value, path)
        if origin is tuple:
            return self._tuple(arguments, value, path)
        if origin is dict:
            if not isinstance(value, Mapping):
                raise self._wrong("an object", value, path)
            return {k: self.read(arguments[1], v, f"{path}.{k}") for k, v in value.items()}
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, Mapping):
                raise self._wrong("an object", value, path)
            return self._fields(hint, value, path)
        if hint is float:
            if value is None:
                return math.inf
            if value in ("-inf", "inf", "nan"):
                return float(value)
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise self._wrong("a number", value, path)
        elif type(value) is not hint:
            names = {int: "a whole number", str: "a text", bool: "true or false"}
            raise self._wrong(names[hint], value, path)
        return value

    def _union(self, kinds: tuple[Any, ...], value: Any, path: str) -> Any:
        if value is None and types.NoneType in kinds:
            return None
        rest = [k for k in kinds if k is not types.NoneType]
        exact = [k for k in rest if type(value) is k]
        return self.read((exact or rest)[0], value, path)

    def _tuple(self, kinds: tuple[Any, ...], value: Any, path: str) -> Any:
        if not isinstance(value, list | tuple):
            raise self._wrong("a list", value, path)
        if kinds[1:] == (Ellipsis,):
            kinds = (kinds[0],) * len(value)
        if len(value) != len(kinds):
            raise self._wrong(f"a list of {len(kinds)}", value, path)
        pairs = enumerate(zip(kinds, value, strict=True))
        return tuple(self.read(kind, v, f"{path}[{k}]") for k, (kind, v) in pairs)

    def _fields(self, kind: Any, value: Mapping[str, Any], path: str) -> Any:
        hints = _hints(kind)
        known = {}
        for field in dataclasses.fields(kind):
            name = f"{path}.{field.name}" if path else field.name
            has_default = (field.default, field.default_factory) != (dataclasses.MISSING,) * 2
            if field.name in value:
                known[field.name] = self.read(hints[field.name], value[field.name], name)
            elif not has_default:
                raise self._fault(f"{name} is missing")
        return kind(**known)

    def _wrong(self, expected: str, value: Any, path: str) -> UsageError:
        found = "null" if value is None else repr(value)
        return self._fault(f"{path} should be {expected}, not {found[:40]}")

    def _fault(self, what: str) -> UsageError:
        return UsageError(f"this is no {self.words}: {what}", hint=_HINT, where=self.where)
