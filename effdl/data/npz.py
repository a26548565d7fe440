"""Samples from a numpy file: one array per graph input, named as the input, first axis the samples."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from effdl.data.feeds import Array, Feeds
from effdl.errors import DataError, nearest
from effdl.graph.dims import Dims, dims_of, model_inputs

_ROWS = 1024
"""Samples looked at in one go, so that a mapped file is never in memory as a whole."""


def load_npz(path: Path, model: ir.Model, *, batch: int = 1) -> Feeds:
    """Read the samples of every input from an ``.npz``, or a ``.npy`` for a model with one input.

    Arrays that are no input, such as labels, are left alone.

    Args:
        path: the file.
        model: whose inputs to feed.
        batch: samples per feed where the model's batch is dynamic; a fixed one is used as it is.

    Raises:
        DataError: no such file, not a numpy file, pickled objects, or arrays that do not fit the
            model; names the input and both shapes.
    """
    return from_arrays(
        read_inputs(path, model), model, batch=batch, source=path.name, where=str(path)
    )


def read_inputs(path: Path, model: ir.Model) -> dict[str, Array]:
    """Read the arrays of the model's inputs; the others of the file are there by name, but empty."""
    inputs = [v.name or "" for v in model_inputs(model)]
    arrays = _read(path, inputs)
    if "" in arrays and inputs:  # a .npy has no names
        if len(inputs) > 1:
            raise DataError(
                f"a .npy holds one array, the model has {len(inputs)} inputs",
                hint=f"save an .npz with the arrays {', '.join(inputs)}",
                where=str(path),
            )
        arrays = {inputs[0]: arrays[""]}
    return arrays


def read_array(path: Path) -> Array:
    """Map the array of a ``.npy`` file into memory: only what is used of it is read.

    Raises:
        DataError: no such file, or no .npy of plain numbers.
    """
    where = str(path)
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)  # type: ignore[no-any-return]
    except FileNotFoundError:
        raise DataError("no such file", where=where) from None
    except (ValueError, EOFError, pickle.UnpicklingError, OSError) as e:
        raise _unreadable(e, where) from None


def load_labels(path: Path, key: str) -> Array:
    """Read the array ``key``, such as ``labels``, from an ``.npz``.

    Raises:
        DataError: no such file or array.
    """
    arrays = _read(path, [key])
    if key not in arrays:
        raise DataError(f"no array '{key}' in the file", hint=nearest(key, arrays), where=str(path))
    return arrays[key]


def from_arrays(
    arrays: Mapping[str, Array],
    model: ir.Model,
    *,
    batch: int = 1,
    source: str = "arrays",
    where: str = "",
) -> Feeds:
    """Cut arrays into feeds.

    An array of its input's rank is cut along the first axis, ``batch`` samples a feed (or the
    model's own number, when that is fixed). An array of one rank more holds a whole input per entry.
    A single number for an input that is one goes into every feed.

    Args:
        arrays: by input name; others are left alone.
        model: whose inputs to feed.
        batch: samples per feed where the first axis of an input is dynamic.
        source: what the feeds call their origin.
        where: the file, for messages.

    Raises:
        DataError: an input without array, a wrong type or shape, arrays with different numbers of
            samples, or none at all.
    """
    cut: dict[str, list[Array]] = {}
    constants: dict[str, Array] = {}
    try:
        for value in model_inputs(model):
            name = value.name or ""
            if name not in arrays:
                raise DataError(f"no array for input '{name}'", hint=_have(name, arrays))
            array = _cast(np.asarray(arrays[name]), value)
            if array.ndim == 0 and not (dims_of(value.shape) or ()):
                constants[name] = array
            else:
                cut[name] = _cut(array, value, batch)
        count = _count(cut)
        _same_names(model, {**{n: p[0] for n, p in cut.items()}, **constants})
    except DataError as e:
        raise DataError(e.message, hint=e.hint, where=where) from None
    feeds = tuple({**{n: p[k] for n, p in cut.items()}, **constants} for k in range(count))
    return Feeds(feeds, source, True)


def _read(path: Path, wanted: list[str]) -> dict[str, Array]:
    """Return the arrays of the file; the name of those not in ``wanted`` with an empty array."""
    where = str(path)
    if path.is_dir():
        raise DataError("this is a folder, not an .npz file", where=where)
    try:
        loaded = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise DataError("no such file", where=where) from None
    except (ValueError, EOFError, zipfile.BadZipFile, pickle.UnpicklingError, OSError) as e:
        raise _unreadable(e, where) from None
    if isinstance(loaded, np.ndarray):
        return {"": loaded}
    with loaded:
        arrays: dict[str, Array] = {}
        for name in loaded.files:
            if name not in wanted:
                arrays[name] = np.empty(0)
                continue
            try:
                arrays[name] = loaded[name]
            except (ValueError, EOFError, zipfile.BadZipFile, zipfile.error, OSError) as e:
                raise _unreadable(e, where, name) from None
    return arrays


def _unreadable(e: Exception, where: str, name: str = "") -> DataError:
    place = f"array '{name}' " if name else "the file "
    if "Object arrays" in str(e):
        return DataError(
            f"{place}holds Python objects, not numbers",
            hint="save plain number arrays: numpy.savez(path, name=array)",
            where=where,
        )
    if isinstance(e, OSError) and e.strerror:
        return DataError(f"cannot be read: {e.strerror}", where=where)
    return DataError(
        f"{place}is no numpy array file, or damaged",
        hint="write it with numpy.savez(path, name=array)",
        where=where,
    )


def _have(name: str, arrays: Mapping[str, Array]) -> str:
    found = ", ".join(sorted(arrays)) or "nothing"
    near = nearest(name, arrays)
    near = f"; {near}" if near.startswith("did you mean") else ""
    return f"the file has {found}{near}"


def _cast(array: Array, value: ir.Value) -> Array:
    """Return ``array`` in the input's type, when no number changes by more than rounding."""
    name = value.name or ""
    if value.dtype is None or not isinstance(value.type, ir.TensorType):
        raise DataError(f"input '{name}' is no tensor: it cannot be fed from a numpy file")
    if value.dtype == ir.DataType.STRING:
        if array.dtype.kind not in "US":
            raise DataError(f"input '{name}' wants text, the array is {array.dtype}")
        return array.astype(np.object_)
    wanted = value.dtype.numpy()
    kinds = array.dtype.kind + wanted.kind
    if array.dtype.kind == "f" and _has_nan(np.atleast_1d(array)):
        raise DataError(f"the array of input '{name}' has NaN in it")
    if array.dtype == wanted:
        return array
    if kinds == "ff":
        with np.errstate(over="ignore"):
            cast: Array = array.astype(wanted)
        if np.isinf(cast).any() and not np.isinf(array).any():
            raise DataError(f"the array of input '{name}' overflows in {wanted}")
        return cast
    if array.dtype.kind in "iu" and wanted.kind in "iu":
        cast = array.astype(wanted)
        if not np.array_equal(cast, array):
            raise DataError(f"the array of input '{name}' has numbers outside {wanted}")
        return cast
    raise DataError(
        f"input '{name}' wants {wanted}, the array is {array.dtype}",
        hint=f"preprocess it as the model expects and save it as {wanted}",
    )


def _has_nan(array: Array) -> bool:
    return any(np.isnan(array[k : k + _ROWS]).any() for k in range(0, len(array), _ROWS))


def _cut(array: Array, value: ir.Value, batch: int) -> list[Array]:
    """Return one array per feed, views of ``array``."""
    name = value.name or ""
    shape = dims_of(value.shape)
    if array.ndim == 0:
        raise _misfit(name, array, shape)
    if len(array) == 0:
        raise DataError(f"the array of input '{name}' has no samples")
    if shape is not None and array.ndim == len(shape) + 1:
        if not _fits(array.shape[1:], shape):
            raise _misfit(name, array, shape)
        return [np.asarray(sample) for sample in array]
    if shape is not None and (array.ndim != len(shape) or not _fits(array.shape[1:], shape[1:])):
        raise _misfit(name, array, shape)
    fixed = shape[0] if shape else None
    step = fixed if isinstance(fixed, int) else batch
    if isinstance(fixed, int) and (fixed == 0 or len(array) % fixed):
        raise DataError(
            f"input '{name}' takes batches of {fixed}, {len(array)} samples cannot be cut into these",
            hint=f"give a multiple of {fixed} samples",
        )
    return [array[k : k + step] for k in range(0, len(array), step)]


def _fits(got: tuple[int, ...], wanted: Dims) -> bool:
    return len(got) == len(wanted) and all(
        not isinstance(w, int) or g == w for g, w in zip(got, wanted, strict=True)
    )


def _misfit(name: str, array: Array, shape: Dims | None) -> DataError:
    inner = [str(d if d is not None else "?") for d in (shape or ())]
    one = ["samples", *inner] if not inner else ["samples", *inner[1:]]
    return DataError(
        f"input '{name}' wants [{', '.join(one)}], the array is {list(array.shape)}",
        hint="the first axis is the samples, the others are those of the input",
    )


def _count(cut: Mapping[str, list[Array]]) -> int:
    counts = {name: len(parts) for name, parts in cut.items()}
    if not counts:
        return 1
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} {n}" for name, n in counts.items())
        raise DataError(
            f"the inputs have different numbers of samples: {listed}",
            hint="every array needs one entry per sample along its first axis",
        )
    return next(iter(counts.values()))


def _same_names(model: ir.Model, feed: Mapping[str, Array]) -> None:
    """Check on one feed that dimensions of the same name are equal."""
    sizes: dict[str, tuple[int, str]] = {}
    for value in model_inputs(model):
        name = value.name or ""
        for d, size in zip(dims_of(value.shape) or (), feed[name].shape, strict=False):
            if isinstance(d, str) and sizes.setdefault(d, (size, name))[0] != size:
                other, first = sizes[d]
                raise DataError(
                    f"dimension '{d}' is {other} in input '{first}' and {size} in input '{name}'"
                )
