"""Labels that are written beside the samples: as words or numbers, in a table or an array."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from effdl.data.feeds import Array
from effdl.data.npz import read_array
from effdl.errors import DataError, UsageError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
"""Of files that are pictures."""


def picture_labels(given: str, files: list[Path], folder: Path) -> tuple[Array, list[str]]:
    """Read the labels of pictures from a file.

    Args:
        given: a .csv of (file, label) or a .npy in the order of ``files``; looked for in the working
            folder, then in that of the pictures.
        files: the pictures.
        folder: where they lie.

    Returns:
        The labels, and the classes where they are words.

    Raises:
        DataError: a picture without label, or another number of labels.
        UsageError: another kind of file.
    """
    path = Path(given)
    path = path if path.exists() or path.is_absolute() else folder / given
    if path.suffix == ".npy":
        labels = read_array(path)
        if len(labels) != len(files):
            raise DataError(
                f"{len(labels)} labels for {len(files)} pictures",
                hint="one label per picture, in the order of the file names",
                where=str(path),
            )
        return labels, []
    if path.suffix not in (".csv", ".tsv"):
        raise UsageError(
            f"labels of pictures are a .csv or .npy file, not '{given}'",
            hint="or no --labels at all where each class has a sub-folder",
        )
    found = _label_table(path)
    texts = []
    for file in files:
        text = found.get(str(file.relative_to(folder)), found.get(file.name))
        if text is None:
            raise DataError(f"no label for the picture {file.name}", where=str(path))
        texts.append(text)
    return numbers(texts, str(path))


def _label_table(path: Path) -> dict[str, str]:
    """Read (file, label) lines; a line whose first word is no picture is a header."""
    sign = "\t" if path.suffix == ".tsv" else ","
    try:
        with path.open(newline="", encoding="utf-8-sig") as f:
            rows = [row for row in csv.reader(f, delimiter=sign) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise DataError(f"cannot be read: {e}", where=str(path)) from None
    if rows and Path(rows[0][0]).suffix.lower() not in SUFFIXES:
        rows = rows[1:]
    bad = next((row for row in rows if len(row) < 2), None)
    if bad is not None or not rows:
        raise DataError(
            "expected a picture's file name and its label in each line",
            hint="cat_01.jpg,3",
            where=str(path),
        )
    return {row[0].strip(): row[1].strip() for row in rows}


def numbers(texts: Sequence[str], where: str) -> tuple[Array, list[str]]:
    """Return labels written as text as numbers; words become classes in alphabetical order.

    Returns:
        int64 where all are whole numbers, else float64; and the words, if these are words.
    """
    kinds = [_kind(t) for t in texts]
    if all(k is int for k in kinds):
        return np.array([int(t) for t in texts], np.int64), []
    if str not in kinds:
        return np.array([float(t) for t in texts], np.float64), []
    if any(k is not str for k in kinds):
        odd = next(t for t, k in zip(texts, kinds, strict=True) if k is str)
        raise DataError(
            f"some labels are numbers and some are words, such as '{odd}'",
            hint="is the first line a header? then name the columns by its words",
            where=where,
        )
    words = sorted(set(texts))
    place = {w: k for k, w in enumerate(words)}
    return np.array([place[t] for t in texts], np.int64), words


def _kind(text: str) -> type:
    for kind in (int, float):
        try:
            kind(text)
        except ValueError:
            continue
        return kind
    return str
