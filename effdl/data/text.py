"""Texts as a model's input: columns of a .csv and a tokenizer file."""

from __future__ import annotations

import csv
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from effdl.data.feeds import Array, Feed, Feeds, LazyFeeds, spread
from effdl.data.labels import numbers
from effdl.data.spec import Labelled, Source, embeds_pairs
from effdl.errors import DataError, UsageError, nearest
from effdl.graph.dims import dims_of, model_inputs

LONGEST = 512
"""Tokens of a text where neither the user, nor the tokenizer, nor the model says how many."""
_HEADERS = ("label", "labels", "score", "target", "class")


def load_texts(spec: Source, model: ir.Model, batch: int = 1) -> dict[str, Any]:
    """Return the fields of a Dataset: texts become tokens when they are asked for.

    Every feed has one text, without padding, unless the model has a fixed batch size or length.

    Args:
        spec: a .csv or .tsv with its tokenizer and text columns.
        model: with inputs named as input_ids, attention_mask, token_type_ids or position_ids.
        batch: texts per feed, padded to the longest, where the model's batch is dynamic.

    Raises:
        UsageError: tokenizers is not installed, or an option is missing.
        DataError: no such column, a tokenizer that cannot be read, or inputs no text can feed.
    """
    path = spec.path
    columns = [spec.text] if isinstance(spec.text, str) else list(spec.text or ())
    columns = [c.strip() for part in columns for c in part.split(",") if c.strip()]
    rows, header = _table(path, columns)
    if not 1 <= len(columns) <= 2:
        has = f"the file has {', '.join(header)}" if header else "columns are numbered from 1"
        raise UsageError(
            "which column has the text?", hint=f"--text COLUMN; {has}", where=str(path)
        )
    if spec.tokenizer is None:
        raise UsageError(
            "texts need a tokenizer", hint="--tokenizer tokenizer.json", where=str(path)
        )
    places = [_place(c, header, rows[0], path) for c in columns]
    labels, why, notes = _labels(spec, rows, header, path)
    chosen = spread(len(rows), spec.limit)
    texts = [[rows[k][p] for p in places] for k in chosen]
    cosine = embeds_pairs(spec)
    if spec.pairs is not None and len(columns) != 2:
        raise UsageError("pairs are two text columns", hint="--text first,second", where=str(path))
    if cosine:
        texts = [[text] for pair in texts for text in pair]
    batches = _Encoder(spec.tokenizer, spec.length, model, str(path)).feeds(texts, batch)
    return {
        "feeds": Feeds(batches, path.name, True),
        "labels": labels[chosen] if labels is not None else None,
        "source": path.name,
        "pairs": cosine,
        "why_unlabelled": why,
        "notes": notes,
    }


def _labels(
    spec: Source, rows: list[list[str]], header: list[str], path: Path
) -> tuple[Array | None, str, tuple[str, ...]]:
    """Return the labels, or why there are none, and the classes if they are words."""
    if not isinstance(spec, Labelled):
        return None, "", ()
    column = spec.labels or next((h for h in header if h.lower() in _HEADERS), None)
    if column is None:
        has = f"; the file has {', '.join(header)}" if header else ""
        return None, f"--labels COLUMN names the column that holds them{has}", ()
    place = _place(column, header, rows[0], path)
    labels, words = numbers([row[place].strip() for row in rows], str(path))
    shown = ", ".join(words[:4]) + (", ..." if len(words) > 4 else "")
    notes = (f"{len(words)} classes in alphabetical order: {shown}",) if words else ()
    return labels, "", notes


def _table(path: Path, columns: Sequence[str]) -> tuple[list[list[str]], list[str]]:
    """Return the rows and the header line; there is none where all columns are numbers."""
    sign = "\t" if path.suffix.lower() == ".tsv" else ","
    try:
        with path.open(newline="", encoding="utf-8-sig") as f:
            rows = [row for row in csv.reader(f, delimiter=sign) if row]
    except UnicodeDecodeError:
        raise DataError("not a text file in UTF-8", where=str(path)) from None
    except (OSError, csv.Error) as e:
        raise DataError(f"cannot be read: {e}", where=str(path)) from None
    header: list[str] = []
    if rows and not (columns and all(c.isdigit() for c in columns)):
        header, rows = [h.strip() for h in rows[0]], rows[1:]
    if not rows:
        raise DataError("there is no line with a sample", where=str(path))
    width = len(header or rows[0])
    for number, row in enumerate(rows, 2 if header else 1):
        if len(row) != width:
            raise DataError(
                f"sample {number - bool(header)} has {len(row)} columns, not {width}",
                hint='a text with a comma in it needs quotes: "one, two"',
                where=str(path),
            )
    return rows, header


def _place(column: str, header: list[str], row: list[str], path: Path) -> int:
    """Return which column of a row is meant."""
    if column in header:
        return header.index(column)
    if header:
        raise DataError(f"no column '{column}'", hint=nearest(column, header), where=str(path))
    if not column.isdigit() or not 1 <= int(column) <= len(row):
        raise DataError(
            f"no column '{column}' among 1 to {len(row)}",
            hint="columns that are numbers say that there is no header line: number all of them",
            where=str(path),
        )
    return int(column) - 1


class _Encoder:
    """Makes feeds of texts."""

    def __init__(self, file: Path, length: int | None, model: ir.Model, where: str) -> None:
        self._where = where
        self._roles = _roles(model, where)
        shapes = [dims_of(value.shape) or () for value in self._roles]
        self._batch = next((s[0] for s in shapes if s and isinstance(s[0], int)), None)
        fixed = next((s[1] for s in shapes if len(s) > 1 and isinstance(s[1], int)), None)
        self._tokenizer = _tokenizer(file)
        own = (self._tokenizer.truncation or {}).get("max_length")
        cut = min(n for n in (length or own or LONGEST, fixed) if n is not None)
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(cut)
        self._pad = _padding(self._tokenizer)
        self._fixed = fixed

    def feeds(self, texts: Sequence[Sequence[str]], wanted: int) -> LazyFeeds:
        """Return the feeds of texts, each one text or two joined."""
        batch = wanted if self._batch is None else self._batch
        if batch == 0 or (self._batch is not None and len(texts) % batch):
            raise DataError(
                f"the model takes batches of {batch}, {len(texts)} texts cannot be cut into these",
                hint=f"--limit N with a multiple of {batch}",
                where=self._where,
            )
        made = LazyFeeds(
            lambda k: self._feed(texts[k * batch : (k + 1) * batch]),
            range(-(-len(texts) // batch)),
        )
        made[0]  # what does not fit is told before the work
        return made

    def _feed(self, texts: Sequence[Sequence[str]]) -> Feed:
        encoded = [self._tokenizer.encode(*text) for text in texts]
        width = self._fixed or max(1, *(len(e.ids) for e in encoded))
        parts: Mapping[str, Array] = {
            "ids": _grid([e.ids for e in encoded], width, self._pad),
            "mask": _grid([e.attention_mask for e in encoded], width, 0),
            "types": _grid([e.type_ids for e in encoded], width, 0),
            "positions": np.tile(np.arange(width, dtype=np.int64), (len(texts), 1)),
        }
        feed: Feed = {}
        for value, role in self._roles.items():
            assert value.dtype is not None
            feed[value.name or ""] = parts[role].astype(value.dtype.numpy())
        return feed


def _grid(rows: Sequence[Sequence[int]], width: int, fill: int) -> Array:
    grid = np.full((len(rows), width), fill, np.int64)
    for target, row in zip(grid, rows, strict=True):
        target[: len(row)] = row
    return grid


def _roles(model: ir.Model, where: str) -> dict[ir.Value, str]:
    """Return what each input of the model takes of a text, by its name."""
    inputs = model_inputs(model)
    roles: dict[ir.Value, str] = {}
    for value in inputs:
        name = (value.name or "").lower()
        integer = value.dtype is not None and value.dtype.is_integer()
        if "mask" in name:
            roles[value] = "mask"
        elif "type" in name or "segment" in name:
            roles[value] = "types"
        elif "position" in name:
            roles[value] = "positions"
        elif integer and ("id" in name or "token" in name or len(inputs) == 1):
            roles[value] = "ids"
        else:
            raise DataError(
                f"input '{value.name}' is nothing that a tokenizer gives",
                hint="inputs are known by their names: input_ids, attention_mask, token_type_ids, "
                "position_ids; for others an .npz or a folder of .npy",
                where=where,
            )
    if "ids" not in roles.values():
        raise DataError("the model has no input for the tokens of a text", where=where)
    return roles


def _tokenizer(file: Path) -> Any:
    try:
        module = importlib.import_module("tokenizers")
    except ImportError:
        raise UsageError(
            "texts need tokenizers, which is not installed", hint="pip install 'effdl[data]'"
        ) from None
    if not file.is_file():
        raise DataError("no such tokenizer file", where=str(file))
    try:
        return module.Tokenizer.from_file(str(file))
    except Exception as e:  # the library raises plain Exception
        raise DataError(
            f"no tokenizer file: {str(e).splitlines()[0][:120]}",
            hint="the tokenizer.json that lies beside the model it was trained with",
            where=str(file),
        ) from None


def _padding(tokenizer: Any) -> int:
    """Return the token that fills up; masked out where the model has a mask."""
    for token in ("[PAD]", "<pad>", "<|endoftext|>"):
        number = tokenizer.token_to_id(token)
        if number is not None:
            return int(number)
    return 0
