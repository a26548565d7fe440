"""Samples with their labels, from whatever they lie in."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from effdl.data.feeds import Array, Feeds, spread
from effdl.data.npz import from_arrays, load_labels, read_array, read_inputs
from effdl.data.spec import Labelled, Source
from effdl.errors import DataError, UsageError
from effdl.graph.dims import model_inputs

DEFAULT_LABELS = "label"
TABLES = (".csv", ".tsv")
ARRAYS = (".npz", ".npy")
_NOT_IN_A_FILE_NAME = re.compile(r"[^\w.-]")


@dataclass(frozen=True)
class Dataset:
    """Samples of a model's inputs.

    Args:
        feeds: one sample each, or a batch where the model's batch size is fixed.
        labels: one per sample, shape [samples, ...]; None where there are none.
        source: the file or folder, for messages.
        pairs: every two feeds are the sentences of a pair, scored by the cosine of their embeddings.
        why_unlabelled: what to do about missing labels.
        notes: what a reader of the score should know about the samples.
    """

    feeds: Feeds
    labels: Array | None
    source: str
    pairs: bool = False
    why_unlabelled: str = ""
    notes: tuple[str, ...] = ()


def load_dataset(spec: Source | Path | str, model: ir.Model, *, batch: int = 1) -> Dataset:
    """Read samples, and labels where ``spec`` is ``Labelled``.

    Args:
        spec: where they are; a path alone is a Source of that path.
        model: whose inputs to feed.
        batch: samples per feed where the model's batch is dynamic; a fixed one is used as it is.

    Raises:
        DataError: nothing there, or it does not fit the model.
        UsageError: options that do not belong to this kind of data, or one that it needs.
    """
    spec = spec if isinstance(spec, Source) else Source(path=Path(spec))
    path = spec.path
    if not path.exists():
        raise DataError("no such file or folder", where=str(path))
    if path.is_dir():
        if any(path.glob("*.npy")):
            _only(spec, "arrays")
            return _array_folder(spec, model, batch)
        _only(spec, "pictures", "preprocess")
        from effdl.data.images import load_images

        return Dataset(**load_images(spec, model, batch))
    if path.suffix.lower() in TABLES:
        _only(spec, "texts", "tokenizer", "text", "length", "pairs")
        from effdl.data.text import load_texts

        return Dataset(**load_texts(spec, model, batch))
    _only(spec, "arrays")
    return _array_file(spec, model, batch)


def _only(spec: Source, kind: str, *options: str) -> None:
    """Raise where ``spec`` has an option of another kind of data."""
    belongs = {"preprocess": "a folder of pictures"}
    for name in ("preprocess", "tokenizer", "text", "length", "pairs"):
        if getattr(spec, name) is not None and name not in options:
            wants = belongs.get(name, "a .csv with texts")
            raise UsageError(f"{name} is for {wants}, these are {kind}", where=str(spec.path))


def _array_file(spec: Source, model: ir.Model, batch: int) -> Dataset:
    path = spec.path
    labels, why = None, ""
    if isinstance(spec, Labelled):
        labels, why = _labels_of_file(path, spec.labels)
    return _cut(read_inputs(path, model), labels, model, spec, why, batch)


def _labels_of_file(path: Path, key: str | None) -> tuple[Array | None, str]:
    """Return the labels in an array file, or why there are none."""
    if path.suffix.lower() == ".npy" or (key is not None and Path(key).suffix == ".npy"):
        if key is None:
            return None, "a .npy holds no labels: --labels FILE.npy"
        return read_array(_beside(key, path.parent)), ""
    if key is not None:
        return load_labels(path, key), ""
    try:
        return load_labels(path, DEFAULT_LABELS), ""
    except DataError as e:
        if "no array" not in e.message:
            raise
        return None, f"--labels KEY names the array that holds them ({e.hint})"


def _array_folder(spec: Source, model: ir.Model, batch: int) -> Dataset:
    """A folder with one .npy per input, named as the input, which is mapped and not read as a whole."""
    folder = spec.path
    files = {f.stem: f for f in sorted(folder.glob("*.npy"))}
    labels, why = None, ""
    if isinstance(spec, Labelled):
        key = spec.labels or DEFAULT_LABELS
        if key in files:
            labels = read_array(files[key])
        elif Path(key).suffix == ".npy":
            labels = read_array(_beside(key, folder))
        elif spec.labels is not None:
            raise DataError(
                f"no {key}.npy in the folder", hint=f"it has {_names(files)}", where=str(folder)
            )
        else:
            why = f"--labels NAME names the file that holds them; the folder has {_names(files)}"
    arrays: dict[str, Array] = {}
    for value in model_inputs(model):
        name = value.name or ""
        file = files.get(name) or files.get(_NOT_IN_A_FILE_NAME.sub("_", name))
        if file is None:
            raise DataError(
                f"no {name}.npy for the model's input",
                hint=f"the folder has {_names(files)}",
                where=str(folder),
            )
        arrays[name] = read_array(file)
    return _cut(arrays, labels, model, spec, why, batch)


def _cut(
    arrays: dict[str, Array],
    labels: Array | None,
    model: ir.Model,
    spec: Source,
    why: str,
    batch: int,
) -> Dataset:
    """Make feeds of arrays, of evenly spread samples where there is a limit."""
    where, name = str(spec.path), spec.path.name
    inputs = [v.name for v in model_inputs(model)]
    counts = {len(a) for n, a in arrays.items() if n in inputs and a.ndim}
    if spec.limit is not None and len(counts) == 1:
        count = counts.pop()
        if labels is not None and len(labels) != count:
            raise DataError(
                f"{len(labels)} labels for {count} samples",
                hint="the data needs one label per sample",
                where=where,
            )
        chosen = spread(count, spec.limit)
        arrays = {n: a[chosen] if n in inputs and a.ndim else a for n, a in arrays.items()}
        labels = labels[chosen] if labels is not None else None
    feeds = from_arrays(arrays, model, batch=batch, source=name, where=where)
    return Dataset(feeds, labels, name, why_unlabelled=why)


def _beside(name: str, folder: Path) -> Path:
    """Return the file ``name``, looked for in the working folder, then in that of the data."""
    path = Path(name)
    return path if path.exists() or path.is_absolute() else folder / path


def _names(files: dict[str, Any]) -> str:
    return ", ".join(f"{n}.npy" for n in list(files)[:8])
