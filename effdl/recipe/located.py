"""YAML as plain values that know where they were written."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from effdl.errors import RecipeError

Scalar = str | int | float | bool | None
_LIMIT = 20_000
"""Values of a recipe, aliases written out: far above any real one, far below what fills memory."""
_TAG = "tag:yaml.org,2002:"
# YAML 1.1, which PyYAML reads, takes 1e-3 for text.
_EXPONENT = re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")


class _Loader(yaml.SafeLoader):
    """The safe loader; ``1e-3`` is a number."""


class Dumper(yaml.SafeDumper):
    """The safe dumper that quotes what ``parse`` would take for a number."""


for _class in (_Loader, Dumper):
    _class.add_implicit_resolver(_TAG + "float", _EXPONENT, list("-+0123456789"))

_HINTS = {
    "'\\t'": "YAML indents with spaces, not with tabs",
    "mapping values are not allowed": "a value with ': ' in it needs quotes",
    "scanning an alias": "a value that starts with * needs quotes: '*head'",
    "undefined alias": "a value that starts with * needs quotes: '*head'",
    "could not find expected ':'": "a key ends with a colon",
    "expected the node content": "a value that starts with %, @ or ` needs quotes",
}


@dataclass(frozen=True)
class Located:
    """A value of a recipe.

    Args:
        value: a scalar, a list or a mapping of further values; keys are always text.
        where: file:line:column of the value.
        key_where: that of its key, empty in a list.
        folder: where its relative paths start.
        size: how many values are in it.
    """

    value: Scalar | list[Located] | dict[str, Located]
    where: str
    key_where: str = ""
    folder: Path = Path()
    size: int = 1

    @property
    def key(self) -> str:
        """Place of the key, or of the value where there is no key."""
        return self.key_where or self.where

    def get(self, key: str) -> Located | None:
        """Return the value of ``key``; None when it is absent or this is no mapping."""
        return self.value.get(key) if isinstance(self.value, dict) else None


def parse(text: str, name: str, folder: Path | None = None) -> Located:
    """Read YAML text.

    Args:
        text: the YAML.
        name: what to call it in errors, such as its file name.
        folder: where relative paths in it start; the working folder when None.

    Raises:
        RecipeError: a syntax error, a duplicate key, a tag of another language, nothing at all.
    """
    try:
        loader = _Loader(text)
    except yaml.reader.ReaderError as e:
        raise _bad_character(e, text, name) from None
    loader.name = name
    try:
        node = loader.get_single_node()
        if node is None:
            raise RecipeError("the recipe is empty", hint="effdl recipe init", where=name)
        return _Converter(loader, name, folder or Path()).convert(node)
    except RecipeError as e:
        raise one_line(e) from None
    except yaml.MarkedYAMLError as e:
        raise _syntax_error(e, name) from None
    except RecursionError:
        raise RecipeError("values are nested too deeply", where=name) from None
    finally:
        loader.dispose()


def from_plain(data: object, where: str, folder: Path | None = None) -> Located:
    """Make located values of plain Python data; all of them are at ``where``.

    Raises:
        RecipeError: a value that YAML has no plain form for.
    """
    folder = folder or Path()
    if isinstance(data, Mapping):
        pairs = {str(k): from_plain(v, where, folder) for k, v in data.items()}
        return Located(pairs, where, where, folder)
    if isinstance(data, list | tuple):
        return Located([from_plain(v, where, folder) for v in data], where, where, folder)
    if isinstance(data, Path):
        data = str(data)
    if data is not None and not isinstance(data, str | int | float | bool):
        raise RecipeError(f"a recipe cannot hold a {type(data).__name__}", where=where)
    return Located(data, where, where, folder)


def plain(located: Located) -> Any:
    """Return the values without their places."""
    if isinstance(located.value, dict):
        return {k: plain(v) for k, v in located.value.items()}
    if isinstance(located.value, list):
        return [plain(v) for v in located.value]
    return located.value


def one_line(error: RecipeError) -> RecipeError:
    """Write the control characters of quoted text out, so that the message stays one line."""
    message, hint = (
        "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
        for text in (error.message, error.hint)
    )
    return RecipeError(message, hint=hint, where=error.where)


def with_value(located: Located, keys: tuple[str | int, ...], new: Located) -> Located:
    """Return a copy in which the value at the path ``keys`` is ``new``; missing mappings are made."""
    if not keys:
        return replace(new, key_where=located.key_where or new.key_where)
    first, rest = keys[0], keys[1:]
    if isinstance(first, int):
        assert isinstance(located.value, list)
        items = list(located.value)
        items[first] = with_value(items[first], rest, new)
        return replace(located, value=items)
    pairs = dict(located.value) if isinstance(located.value, dict) else {}
    below = pairs.get(first, Located({}, new.where, new.where, new.folder))
    pairs[first] = with_value(below, rest, new)
    return replace(located, value=pairs)


class _Converter:
    """Turns composed YAML nodes into located values; an anchor's value is made once."""

    def __init__(self, loader: _Loader, name: str, folder: Path) -> None:
        self._loader = loader
        self._name = name
        self._folder = folder
        self._done: dict[int, Located] = {}
        self._open: set[int] = set()

    def convert(self, node: yaml.Node) -> Located:
        if id(node) in self._done:
            return self._done[id(node)]
        where = self._where(node.start_mark)
        if id(node) in self._open:
            raise RecipeError("an alias that contains itself", where=where)
        self._open.add(id(node))
        value: Scalar | list[Located] | dict[str, Located]
        size = 1
        if isinstance(node, yaml.MappingNode):
            value = self._mapping(node)
            size += sum(v.size for v in value.values())
        elif isinstance(node, yaml.SequenceNode):
            value = [self.convert(v) for v in node.value]
            size += sum(v.size for v in value)
        else:
            assert isinstance(node, yaml.ScalarNode)
            value = self._scalar(node, where)
        if size > _LIMIT:
            raise RecipeError(f"more than {_LIMIT} values", where=where)
        self._open.remove(id(node))
        self._done[id(node)] = Located(value, where, "", self._folder, size)
        return self._done[id(node)]

    def _mapping(self, node: yaml.MappingNode) -> dict[str, Located]:
        first: dict[str, str] = {}
        for key, _ in node.value:
            where = self._where(key.start_mark)
            if not isinstance(key, yaml.ScalarNode):
                raise RecipeError("a key must be a plain word", where=where)
            if key.value in first:
                line = first[key.value].rsplit(":", 2)[1]
                raise RecipeError(
                    f"the key '{key.value}' is given twice, first in line {line}", where=where
                )
            first[key.value] = where
        self._loader.flatten_mapping(node)  # writes merge keys (<<: *anchor) out
        return {
            k.value: replace(self.convert(v), key_where=self._where(k.start_mark))
            for k, v in node.value
        }

    def _scalar(self, node: yaml.ScalarNode, where: str) -> Scalar:
        kind = node.tag.removeprefix(_TAG)
        text = str(node.value)
        if kind in ("str", "timestamp", "value", "merge"):
            return text
        make = {
            "null": lambda _: None,
            "bool": self._loader.construct_yaml_bool,
            "int": self._loader.construct_yaml_int,
            "float": self._loader.construct_yaml_float,
        }.get(kind)
        if make is None:
            raise RecipeError(f"the YAML tag '{node.tag}' is not allowed", where=where)
        try:
            result: Scalar = make(node)
        except (ValueError, KeyError):
            raise RecipeError(f"'{text}' is no {kind}", where=where) from None
        return result

    def _where(self, mark: yaml.Mark) -> str:
        return f"{self._name}:{mark.line + 1}:{mark.column + 1}"


def _syntax_error(e: yaml.MarkedYAMLError, name: str) -> RecipeError:
    mark = e.problem_mark or e.context_mark
    where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
    text = e.problem or e.context or "cannot be read"
    full = f"{e.context} {e.problem}"
    hint = next((h for sign, h in _HINTS.items() if sign in full), "")
    return RecipeError(f"not valid YAML: {text}", hint=hint, where=where)


def _bad_character(e: yaml.reader.ReaderError, text: str, name: str) -> RecipeError:
    before = text[: e.position]
    line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
    code = ord(e.character) if isinstance(e.character, str) else e.character
    return RecipeError(
        f"a character that YAML does not allow: U+{code:04X}", where=f"{name}:{line}:{column}"
    )
