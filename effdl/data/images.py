"""Pictures as a model's input: a folder, sub-folders as classes, and how a picture becomes numbers."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from effdl.data.feeds import Array, Feed, Feeds, LazyFeeds, spread
from effdl.data.labels import SUFFIXES, picture_labels
from effdl.data.spec import Labelled, Preprocess, Source, parse_preprocess
from effdl.errors import DataError, UsageError
from effdl.graph.dims import Dims, dims_of, model_inputs

Floats = npt.NDArray[np.float32]
_IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
_PRESETS: dict[str, dict[str, Any]] = {
    "imagenet": {"scale": 1 / 255, "resize": "crop", "crop": 0.875, "size": 224, **_IMAGENET},
    "unit": {"scale": 1 / 255},
    "signed": {"scale": 1 / 255, "mean": 0.5, "std": 0.5},
    "raw": {"scale": 1.0},
}


def load_images(spec: Source, model: ir.Model, batch: int = 1) -> dict[str, Any]:
    """Return the fields of a Dataset: pictures are opened when they are asked for.

    Args:
        spec: a folder, whose sub-folders are classes: numbers, or words in alphabetical order. Its
            ``labels`` may name a .csv (file, label) or a .npy in the order of the names.
        model: with one input, [batch, channels, height, width] or the like.
        batch: pictures per feed where the model's batch is dynamic.

    Raises:
        UsageError: Pillow is not installed, or the preprocessing does not fit the model's input.
        DataError: no pictures, labels that do not belong to them, or a picture that cannot be read.
    """
    folder = spec.path
    files, names = _files(folder)
    given = spec.labels if isinstance(spec, Labelled) else None
    labels: Array | None = None
    why = "sub-folders as classes, or --labels FILE.csv (file, label) or FILE.npy"
    notes: tuple[str, ...] = ()
    if given is not None:
        labels, classes = picture_labels(given, files, folder)
    elif names:
        found = [f.relative_to(folder).parts[0] for f in files]
        numbered = all(n.isdecimal() for n in names)  # 10 comes after 9, not after 1
        labels = np.array([int(n) if numbered else names.index(n) for n in found], np.int64)
        classes = [] if numbered else names
    else:
        classes = []
    if classes and isinstance(spec, Labelled):
        shown = ", ".join(classes[:4]) + (", ..." if len(classes) > 4 else "")
        notes = (f"{len(classes)} classes in alphabetical order: {shown}",)
    chosen = spread(len(files), spec.limit)
    picked = [files[k] for k in chosen]
    if labels is not None:
        labels = labels[chosen]
    batches = _feeds(picked, spec, model, batch)
    feeds = Feeds(batches, folder.name, True)
    return {
        "feeds": feeds,
        "labels": labels,
        "source": folder.name,
        "why_unlabelled": why,
        "notes": notes,
    }


def _files(folder: Path) -> tuple[list[Path], list[str]]:
    """Return the pictures, in the order of their names, and the classes if they lie in sub-folders."""
    classes = sorted(d.name for d in folder.iterdir() if d.is_dir() and not d.name.startswith("."))
    flat = _pictures(folder.iterdir())
    nested = [f for name in classes for f in _pictures((folder / name).rglob("*"))]
    if flat and nested:
        raise DataError(
            "pictures lie both in the folder and in its sub-folders",
            hint="either all in one folder, or all in sub-folders, one per class",
            where=str(folder),
        )
    if not flat and not nested:
        raise DataError(
            "no pictures in this folder, and no .npy files",
            hint=f"pictures end in {', '.join(SUFFIXES[:5])}...",
            where=str(folder),
        )
    return flat or nested, [] if flat else classes


def _pictures(files: Any) -> list[Path]:
    return sorted(f for f in files if f.suffix.lower() in SUFFIXES and not f.name.startswith("."))


@dataclass(frozen=True)
class _Plan:
    """How a picture becomes the array of one sample, everything decided.

    Args:
        size: (height, width), None: as the picture is.
        dtype: of the model's input; ``channels`` and ``last`` (NHWC) its layout.
    """

    name: str
    how: Preprocess
    size: tuple[int, int] | None
    resize: str
    crop: float
    color: str
    scale: float
    mean: Floats
    std: Floats
    last: bool
    dtype: np.dtype[Any]


def _feeds(files: Sequence[Path], spec: Source, model: ir.Model, wanted: int) -> LazyFeeds:
    value, shape = _input(model, spec)
    plan = _plan(spec, value, shape)
    fixed = shape[0] if len(shape) == 4 else 1
    batch = fixed if isinstance(fixed, int) else wanted
    if batch == 0 or (isinstance(fixed, int) and len(files) % batch):
        raise DataError(
            f"input '{plan.name}' takes batches of {batch}, {len(files)} pictures cannot be cut into these",
            hint=f"--limit N with a multiple of {batch}",
            where=str(spec.path),
        )
    pillow = _pillow()

    def make(number: int) -> Feed:
        part = [_array(f, plan, pillow) for f in files[number * batch : (number + 1) * batch]]
        shapes = {a.shape for a in part}
        if len(shapes) > 1:
            raise DataError(
                f"pictures of different sizes cannot share a batch of {batch}",
                hint="preprocess with a size",
                where=str(spec.path),
            )
        array = np.stack(part) if len(shape) == 4 else part[0]
        _check_shape(array, shape, plan, files[number * batch])
        return {plan.name: array}

    feeds = LazyFeeds(make, range(-(-len(files) // batch)))
    feeds[0]  # what does not fit is told before the work
    return feeds


def _input(model: ir.Model, spec: Source) -> tuple[ir.Value, Dims]:
    inputs = model_inputs(model)
    if len(inputs) != 1:
        names = ", ".join(f"'{v.name}'" for v in inputs) or "none"
        raise DataError(
            f"pictures feed a model with one input, this one has {len(inputs)} ({names})",
            hint="an .npz or a folder of .npy, one array per input",
            where=str(spec.path),
        )
    shape = dims_of(inputs[0].shape)
    if shape is None or len(shape) not in (3, 4):
        got = "has no known shape" if shape is None else f"is {list(shape)}"
        raise DataError(
            f"input '{inputs[0].name}' {got}: pictures are [batch, channels, height, width]",
            hint="an .npz or a folder of .npy with the arrays as the model wants them",
            where=str(spec.path),
        )
    return inputs[0], shape


def _plan(spec: Source, value: ir.Value, shape: Dims) -> _Plan:
    if spec.preprocess is None:
        raise UsageError(
            "how do the pictures become numbers?",
            hint="--preprocess imagenet, unit (0..1), signed (-1..1) or raw (0..255)",
            where=str(spec.path),
        )
    how = spec.preprocess
    how = parse_preprocess(how) if isinstance(how, str) else how
    base = _PRESETS[how.preset]
    given = {k: v for k, v in how.model_dump(exclude_none=True).items() if v is not None}
    options = {"resize": None, "crop": 1.0, "mean": 0.0, "std": 1.0, "size": None, **base, **given}
    if how.color == "BGR" and how.preset == "imagenet":
        options |= {
            k: v[::-1] for k, v in _IMAGENET.items() if getattr(how, k) is None
        }  # its numbers are those of RGB
    layout, count, inner = _layout(how, shape, value.name or "")
    size = options["size"]
    if how.size is None and all(isinstance(d, int) for d in inner):
        size = list(inner)
    if isinstance(size, int):
        size = [size, size]
    if how.resize is None and size is not None and options["resize"] is None:
        options["resize"] = "stretch"
    color = how.color or ("grey" if count == 1 else "RGB")
    channels = 1 if color == "grey" else 3
    if count is not None and count != channels:
        raise UsageError(
            f"input '{value.name}' has {count} channels, {color} has {channels}",
            where=str(spec.path),
        )
    assert value.dtype is not None
    plan = _Plan(
        name=value.name or "",
        how=how,
        size=None if size is None or options["resize"] == "none" else (size[0], size[1]),
        resize=options["resize"] or "none",
        crop=options["crop"],
        color=color,
        scale=options["scale"],
        mean=_per_channel(options["mean"], channels, color, "mean"),
        std=_per_channel(options["std"], channels, color, "std"),
        last=layout == "NHWC",
        dtype=value.dtype.numpy(),
    )
    changed = plan.scale != 1 or plan.mean.any() or (plan.std != 1).any()
    if plan.dtype.kind not in "fu" or (plan.dtype.kind == "u" and changed):
        raise UsageError(
            f"input '{plan.name}' takes {plan.dtype}, {how.preset} pictures are fractions",
            hint="--preprocess raw" if plan.dtype.kind == "u" else "an .npz with fitting numbers",
            where=str(spec.path),
        )
    return plan


def _per_channel(given: Any, channels: int, color: str, name: str) -> Floats:
    """Return one number, or one per channel in the order that the array will have."""
    array = np.atleast_1d(np.asarray(given, np.float32))
    if len(array) == 3 and channels == 1:
        return np.asarray(array.mean(keepdims=True))
    if len(array) not in (1, channels):
        raise UsageError(f"preprocessing: {name} has {len(array)} numbers for {channels} channels")
    return array


def _layout(how: Preprocess, shape: Dims, name: str) -> tuple[str, int | None, tuple[Any, ...]]:
    """Return the layout, the number of channels if fixed, and (height, width)."""
    c, h, w = shape[-3:]
    first = c in (1, 3)
    last = w in (1, 3) and not first
    layout = how.layout or ("NCHW" if first else "NHWC" if last else "")
    if not layout:
        raise UsageError(
            f"input '{name}' is {list(shape)}: which axis has the channels?",
            hint="layout=NCHW or layout=NHWC in the preprocessing",
        )
    if layout == "NHWC":
        return layout, w if isinstance(w, int) else None, (c, h)
    return layout, c if isinstance(c, int) else None, (h, w)


def _pillow() -> Any:
    try:
        importlib.import_module("PIL.ImageOps")
        return importlib.import_module("PIL.Image")
    except ImportError:
        raise UsageError(
            "pictures need Pillow, which is not installed", hint="pip install 'effdl[data]'"
        ) from None


def _array(file: Path, plan: _Plan, pillow: Any) -> Array:
    """Return the array of one picture, without an axis for samples."""
    from PIL import ImageOps, UnidentifiedImageError

    try:
        with pillow.open(file) as opened:
            if opened.mode[0] in "IF":
                raise DataError(
                    f"a picture with {opened.mode} pixels, not 8 bits a channel",
                    hint="save it with 8 bits, or as .npy",
                    where=str(file),
                )
            picture = ImageOps.exif_transpose(opened)
            picture = picture.convert("L" if plan.color == "grey" else "RGB")
    except (UnidentifiedImageError, pillow.DecompressionBombError, OSError, SyntaxError) as e:
        raise DataError(f"no picture that can be read: {e}", where=str(file)) from None
    pixels: Array = np.asarray(_resized(picture, plan, pillow))
    if plan.color == "grey":
        pixels = pixels[:, :, None]
    if plan.color == "BGR":
        pixels = pixels[:, :, ::-1]
    if plan.dtype.kind == "f":
        values = pixels.astype(np.float32) * np.float32(plan.scale)
        if plan.scale == 1 / 255:
            values = pixels.astype(np.float32) / np.float32(255)
        pixels = ((values - plan.mean) / plan.std).astype(plan.dtype)
    return np.ascontiguousarray(pixels if plan.last else pixels.transpose(2, 0, 1), plan.dtype)


def _resized(picture: Any, plan: _Plan, pillow: Any) -> Any:
    if plan.size is None:
        return picture
    height, width = plan.size
    how = pillow.Resampling[plan.how.interpolation.upper()]
    have_w, have_h = picture.size
    if plan.resize == "crop":
        share = max(width / plan.crop / have_w, height / plan.crop / have_h)
        side_w, side_h = max(width, round(have_w * share)), max(height, round(have_h * share))
        picture = _resize(picture, side_w, side_h, how)
        left, top = round((side_w - width) / 2), round((side_h - height) / 2)
        return picture.crop((left, top, left + width, top + height))
    if plan.resize == "letterbox":
        share = min(width / have_w, height / have_h)
        side_w = max(1, min(width, round(have_w * share)))
        side_h = max(1, min(height, round(have_h * share)))
        fill = plan.how.fill if picture.mode == "L" else (plan.how.fill,) * 3
        page = pillow.new(picture.mode, (width, height), fill)
        centred = plan.how.place == "centre"
        corner = ((width - side_w) // 2, (height - side_h) // 2) if centred else (0, 0)
        page.paste(_resize(picture, side_w, side_h, how), corner)
        return page
    return _resize(picture, width, height, how)


def _resize(picture: Any, width: int, height: int, how: Any) -> Any:
    return picture if picture.size == (width, height) else picture.resize((width, height), how)


def _check_shape(array: Array, shape: Dims, plan: _Plan, file: Path) -> None:
    wanted = [d if isinstance(d, int) else "?" for d in shape]
    fits = all(w in ("?", g) for w, g in zip(wanted, array.shape, strict=True))
    if not fits:
        raise DataError(
            f"input '{plan.name}' wants [{', '.join(map(str, wanted))}], the preprocessed picture is "
            f"{list(array.shape)}",
            hint="size and layout of the preprocessing",
            where=str(file),
        )
