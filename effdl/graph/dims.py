"""Dynamic dimensions of graph inputs: their names, the caller's values, and good guesses."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from effdl.errors import UsageError, nearest
from effdl.graph.walk import int_attr, is_op
from effdl.graph.weights import scalar, with_initial_values

Dims = tuple[int | str | None, ...]
"""A shape: integers for fixed dimensions, names or None for dynamic ones."""

BATCH = (1,)
SEQUENCE = (64, 128, 32, 16, 8, 256, 512, 4, 2, 1)
IMAGE = (224, 256, 320, 416, 512, 640, 128, 64, 32, 28)
SIGNAL = (576, 512, 256, 16000, 1024, 4000, 64, 16, 1)
AUDIO = (16000, 576, 512, 256, 8000, 32000, 4000, 1024)
PAST = (16, 8, 1)
CHANNELS = (3, 1, 4)
ATTEMPTS = max(map(len, (SEQUENCE, IMAGE, SIGNAL, AUDIO)))
"""Number of guesses ``guess_dims`` has: the lengths above are tried in this order."""

# What a name says about a dimension, first match wins.
_NAMES = (
    (re.compile(r"batch|^(n|b|bs|bsz)$"), BATCH),
    (re.compile(r"past|cache"), PAST),
    (re.compile(r"audio|wav|signal|samples|speech"), AUDIO),
    (re.compile(r"height|width|^(h|w)$|image"), IMAGE),
    (re.compile(r"seq|len|time|token|step|frame|word|char|position|^(t|l)$"), SEQUENCE),
    (re.compile(r"channel|^c$"), CHANNELS),
)
_GENERATED = re.compile(r".*_dynamic_axes_\d+|(unk|dim|axis|s|d)_*\d+|\?|-1")
_RECURRENT = ("LSTM", "GRU", "RNN")
_SAME_SHAPE = ("Identity", "Cast", "QuantizeLinear", "DequantizeLinear", "Dropout")


def dims_of(shape: ir.Shape | None) -> Dims | None:
    """Return a shape as a tuple, None when the rank is unknown."""
    if shape is None:
        return None
    return tuple(_dim(d) for d in shape)


def _dim(d: int | ir.SymbolicDim) -> int | str | None:
    if isinstance(d, int):
        return d if d >= 0 else None  # exporters write -1 for dynamic
    return d.value or None


def model_inputs(model: ir.Model) -> list[ir.Value]:
    """Return the graph inputs that a caller must feed: those without an initial value."""
    optional = with_initial_values(model.graph)
    return [v for v in model.graph.inputs if v.name not in optional]


def input_dims(model: ir.Model) -> Iterator[tuple[str, ir.Value, int]]:
    """Yield (name, input, axis) of every dynamic dimension; ``input:axis`` names an unnamed one."""
    for value in model_inputs(model):
        for axis, d in enumerate(dims_of(value.shape) or ()):
            if not isinstance(d, int):
                yield d or f"{value.name}:{axis}", value, axis


def dynamic_dims(model: ir.Model) -> dict[str, list[str]]:
    """Return the dynamic dimensions of the graph inputs and where each is used.

    Returns:
        ``{"batch": ["image[0]", "mask[0]"], "x:1": ["x[1]"]}``: the dimension's name, or
        ``input:axis`` for one without a name.
    """
    places: dict[str, list[str]] = {}
    for name, value, axis in input_dims(model):
        places.setdefault(name, []).append(f"{value.name}[{axis}]")
    return places


def check_dims(model: ir.Model, dims: Mapping[str, int] | None) -> dict[str, int]:
    """Return ``dims`` by the names of ``dynamic_dims``; ``input:axis`` also names a named dimension.

    Raises:
        UsageError: a name that the model does not have, a fixed dimension, or a value below 1.
    """
    known = _spellings(model)
    checked: dict[str, int] = {}
    for name, number in (dims or {}).items():
        if name not in known:
            raise _unknown_dim(model, name)
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise UsageError(
                f"dimension '{name}' must be a whole number of at least 1, not {number}"
            )
        if checked.setdefault(known[name], number) != number:
            raise UsageError(
                f"dimension '{known[name]}' is given two values, {checked[known[name]]} and {number}"
            )
    return checked


def known_dims(model: ir.Model, dims: Mapping[str, int] | None) -> dict[str, int]:
    """Return those of ``dims`` that name a dynamic dimension of the model, see ``check_dims``."""
    known = _spellings(model)
    return check_dims(model, {k: v for k, v in (dims or {}).items() if k in known})


def _spellings(model: ir.Model) -> dict[str, str]:
    known: dict[str, str] = {}
    for name, value, axis in input_dims(model):
        known[name] = name
        known.setdefault(f"{value.name}:{axis}", name)
    return known


def _unknown_dim(model: ir.Model, name: str) -> UsageError:
    dynamic = dynamic_dims(model)
    for value in model_inputs(model):
        for axis, d in enumerate(dims_of(value.shape) or ()):
            if name == f"{value.name}:{axis}":
                return UsageError(f"dimension '{name}' is fixed at {d} in this model")
    if not dynamic:
        return UsageError(f"no dimension '{name}': all input shapes of this model are fixed")
    return UsageError(f"the model has no dimension '{name}'", hint=nearest(name, dynamic))


def guess_dims(
    model: ir.Model, dims: Mapping[str, int] | None = None, attempt: int = 0
) -> dict[str, int]:
    """Return a value for every dynamic dimension of the inputs.

    ``dims`` go first. Then what the graph forces (the channels of a Conv, the rows of a weight), then
    what the name says, then what the place says: the first axis is the batch, 1.

    Args:
        model: the model.
        dims: values the caller gave, by the names of ``dynamic_dims``.
        attempt: 0 for the best guess, up to ``ATTEMPTS - 1`` for others; nothing proves that the
            model runs with them, see ``effdl.data.random.resolve_dims``.

    Raises:
        UsageError: see ``check_dims``.
    """
    given = check_dims(model, dims)
    chosen: dict[str, int] = {}
    sums: list[str] = []
    for name, ladder in _ladders(model).items():
        if name in given:
            chosen[name] = given[name]
        elif "+" in name:
            sums.append(name)
            chosen[name] = 0  # keeps the order of the dimensions
        else:
            chosen[name] = ladder[min(attempt, len(ladder) - 1)]
    for name in sums:
        # exporters of decoders name the length of the mask "past_length + length"
        terms = [t.strip() for t in name.split("+")]
        values = [int(t) if t.isdigit() else chosen.get(t) or SEQUENCE[0] for t in terms]
        chosen[name] = sum(values)
    return chosen


def _ladders(model: ir.Model) -> dict[str, tuple[int, ...]]:
    """Values worth trying for each dimension, the best source of knowledge over all its places."""
    best: dict[str, tuple[int, tuple[int, ...]]] = {}
    for name, value, axis in input_dims(model):
        shape = dims_of(value.shape) or ()
        forced = _forced(value, axis, len(shape))
        if forced is not None:
            found: tuple[int, tuple[int, ...]] = (0, (forced,))
        elif (ladder := _by_name(name, value.name or "")) is not None:
            found = (1, ladder)
        else:
            found = (2, _by_place(value, shape, axis))
        if name not in best or found[0] < best[name][0]:
            best[name] = found
    return {name: ladder for name, (_, ladder) in best.items()}


def _by_name(name: str, input_name: str) -> tuple[int, ...] | None:
    word = name.lower()
    if word.startswith(f"{input_name.lower()}:"):  # no name of its own
        return PAST if "past" in word and not word.endswith(":0") else None
    if _GENERATED.fullmatch(word):
        return None
    return next((ladder for pattern, ladder in _NAMES if pattern.search(word)), None)


def _by_place(value: ir.Value, shape: Dims, axis: int) -> tuple[int, ...]:
    if axis == 0:
        return IMAGE if len(shape) == 3 and shape[-1] in (1, 3, 4) else BATCH
    floating = value.dtype is None or value.dtype.is_floating_point()
    fixed_first = shape[0] if isinstance(shape[0], int) else 0
    match len(shape):
        case 2:
            return SIGNAL if floating else SEQUENCE
        case 3 if fixed_first in (1, 3, 4) and axis > 0 and not isinstance(shape[1], int):
            return SEQUENCE if isinstance(shape[2], int) else IMAGE
        case 3 if axis == 1 and fixed_first > 1:
            return BATCH  # the state of a recurrent layer: layers, batch, features
        case 4:
            return _by_place_in_image(shape, axis)
        case 5 if axis >= 2:
            return (16, 32, 64)
    return SEQUENCE


def _by_place_in_image(shape: Dims, axis: int) -> tuple[int, ...]:
    channels_last = isinstance(shape[3], int) and shape[3] <= 4 and not isinstance(shape[1], int)
    if axis == (3 if channels_last else 1):
        return CHANNELS
    fixed = [d for d in shape[1:] if isinstance(d, int) and d > 4]
    # two wide fixed axes are heads and head size of an attention cache, not an image
    return SEQUENCE if len(fixed) == 2 else IMAGE


def _forced(value: ir.Value, axis: int, rank: int) -> int | None:
    """Return the size that the weight of a user of ``value`` demands, None when none does."""
    for node, index in value.uses():
        if is_op(node, *_SAME_SHAPE) and index == 0:
            size = _forced(node.outputs[0], axis, rank)
        else:
            size = _demand(node, index, axis, rank)
        if size is not None:
            return size
    return None


def _demand(node: ir.Node, index: int, axis: int, rank: int) -> int | None:
    weight = dims_of(node.inputs[1].shape) if len(node.inputs) > 1 and node.inputs[1] else None
    size: int | str | None = None
    if is_op(node, *_RECURRENT):
        batch_axis = 0 if int_attr(node, "layout", 0) else 1
        if index == 0 and axis == 2 and weight is not None and len(weight) == 3:
            size = weight[2]
        elif index in (5, 6) and axis == batch_axis:
            size = 1
    elif weight is None or index != 0:
        return None
    elif is_op(node, "Conv") and axis == 1 and len(weight) > 1 and isinstance(weight[1], int):
        size = weight[1] * int_attr(node, "group", 1)
    elif is_op(node, "ConvTranspose") and axis == 1:
        size = weight[0]
    elif is_op(node, "Gemm") and len(weight) == 2 and axis == 1 - int_attr(node, "transA", 0):
        size = weight[int_attr(node, "transB", 0)]
    elif is_op(node, "MatMul") and rank >= 1 and axis == rank - 1 and len(weight) >= 2:
        size = weight[-2]
    return size if isinstance(size, int) else None


def selector_values(model: ir.Model) -> dict[str, int]:
    """Return the integer inputs that the graph compares with a constant, with that constant.

    An input such as the sampling rate chooses a branch: any other number runs none of them as meant.
    """
    found = {}
    for value in model_inputs(model):
        if value.dtype is not None and value.dtype.is_integer():
            chosen = _compared_with(value)
            if chosen is not None:
                found[value.name or ""] = chosen
    return found


def _compared_with(value: ir.Value) -> int | None:
    for node, index in value.uses():
        if is_op(node, "Equal"):
            constant = scalar(node.inputs[1 - index])
            if constant is not None:
                return int(constant)
        elif is_op(node, "Identity", "Cast", "Squeeze", "Unsqueeze", "Reshape") and index == 0:
            constant = _compared_with(node.outputs[0])
            if constant is not None:
                return constant
    return None


def selector_arrays(model: ir.Model, dims: Mapping[str, int]) -> dict[str, npt.NDArray[np.generic]]:
    """Return ``selector_values`` as arrays in the inputs' shapes, where these are small and known."""
    arrays = {}
    chosen = selector_values(model)
    for value in model_inputs(model):
        if value.name in chosen and value.dtype is not None:
            shape = [
                d if isinstance(d, int) else dims.get(d or f"{value.name}:{axis}", 0)
                for axis, d in enumerate(dims_of(value.shape) or ())
            ]
            if 0 < np.prod(shape) <= 64:
                arrays[value.name] = np.full(shape, chosen[value.name], value.dtype.numpy())
    return arrays
