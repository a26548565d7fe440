"""The forms in which a constant can be stored, and the nodes that make it what it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from effdl.graph.insert import Builder
from effdl.solve import compact

Array = npt.NDArray[Any]
_SPARSE = 0.1
"""Share of zeros, or of the most frequent value, from which a bitmap of them is tried."""
_LEAST_SHARED = 8
"""Numbers that an entry of a codebook stands for at least, on average."""
_CUMSUM = 11
"""The opset that brought CumSum."""


@dataclass(frozen=True)
class Form:
    """A way to store one constant.

    Args:
        name: in a word or two.
        arrays: what goes into the file for it alone.
        tables: what forms of other constants may need as well: a small array, by name.
        nodes: how many put it together.
        write: adds them and returns their result; takes the constant's name.
    """

    name: str
    arrays: tuple[Array, ...]
    tables: tuple[Array, ...]
    nodes: int
    write: Callable[[Builder, str], ir.Value]


def forms(array: Array, opset: int) -> Iterator[Form]:
    """Yield the exact forms of a float constant, but for the one that it has.

    Args:
        array: float32 or float16.
        opset: of the default domain.
    """
    if array.dtype == np.float32:
        yield from _as_half(array)
        yield from _as_grid(array)
    found = False
    for axis in _group_axes(array):
        for coded in _coded(array, axis):
            found = True
            yield _codes_form(array, coded, axis)
            if opset >= _CUMSUM and np.mean(coded.codes == 0) >= _SPARSE:
                yield _sparse_codes_form(array, coded, axis)
    if found:
        return
    if opset >= _CUMSUM and np.mean(_zeros(array)) >= _SPARSE:
        yield _sparse_values_form(array)
    if array.dtype == np.float32 and (parts := compact.planes(array.reshape(-1))) is not None:
        yield _planes_form(array, parts)


def _zeros(array: Array) -> npt.NDArray[np.bool_]:
    found: npt.NDArray[np.bool_] = (array == 0) & ~np.signbit(array)
    return found


def _as_half(array: Array) -> Iterator[Form]:
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    if not np.array_equal(half.astype(np.float32).view(np.uint32), array.view(np.uint32)):
        return

    def write(to: Builder, name: str) -> ir.Value:
        return _cast(to, to.constant(half, f"{name}_half"), ir.DataType.FLOAT)

    yield Form("float16", (half,), (), 1, write)


def _as_grid(array: Array) -> Iterator[Form]:
    """Integers with one scale, or one along the first or last axis."""
    for axis in (None, 0, array.ndim - 1):
        found = compact.grid(array, axis)
        if found is None:
            continue
        behind = 0 if axis is None else array.ndim - 1 - axis
        scale = found.scale.reshape([-1] + [1] * behind) if axis is not None else found.scale[0]

        def write(
            to: Builder, name: str, q: Array = found.integers, scale: Array = scale
        ) -> ir.Value:
            whole = _cast(to, to.constant(q, f"{name}_int8"), ir.DataType.FLOAT)
            return to.op("Mul", [whole, to.constant(np.asarray(scale), f"{name}_scale")], name)

        yield Form("int8 with scales", (found.integers, found.scale), (), 2, write)
        return


def _group_axes(array: Array) -> tuple[int, ...]:
    """Axes along which codebooks may differ: that of the outputs is the first or the last."""
    return (0, array.ndim - 1) if array.ndim > 1 else (0,)


def _coded(array: Array, axis: int) -> Iterator[compact.Symbols]:
    """Yield codebooks from few to many, as long as more of them let more symbols into a byte."""
    rows = np.moveaxis(array, axis, 0)
    length, best = rows.shape[0], 0
    counts = [1 << p for p in range(length.bit_length()) if length % (1 << p) == 0]
    for groups in dict.fromkeys((*counts, length)):
        if groups == 1 and axis != 0:
            continue  # the same as along the first axis
        found = compact.symbols(rows, groups)
        if found is None or found.books.size * _LEAST_SHARED > array.size:
            continue
        count = compact.per_byte(found.books.shape[1])
        if count > best:
            best = count
            yield found


@dataclass(frozen=True)
class _Stream:
    """Symbols below ``k`` as bytes."""

    data: Array
    k: int
    count: int

    def tables(self) -> tuple[Array, ...]:
        return (compact.digits(self.k),) if compact.per_byte(self.k) > 1 else ()

    def write(self, to: Builder, name: str) -> ir.Value:
        """Return the symbols as a vector of int32."""
        made = _cast(to, to.constant(self.data, f"{name}_codes"), ir.DataType.INT32)
        if compact.per_byte(self.k) == 1:
            return made
        table = to.constant(compact.digits(self.k), f"digits_{self.k}")
        return _cast(
            to, _first(to, _taken(to, table, made, name), self.count, name), ir.DataType.INT32
        )


def _stream(codes: Array, k: int) -> _Stream:
    flat, wide = codes.reshape(-1), compact.radix(k)
    return _Stream(compact.join(flat, wide), wide, len(flat))


def _in_place(coded: compact.Symbols, shape: tuple[int, ...], axis: int) -> Array:
    """Return codes in the shape and order of the constant."""
    moved = (shape[axis], *shape[:axis], *shape[axis + 1 :])
    return np.ascontiguousarray(np.moveaxis(coded.codes.reshape(moved), 0, axis))


def _decoded(
    to: Builder, codes: ir.Value, coded: compact.Symbols, array: Array, axis: int, name: str
) -> ir.Value:
    """Return the entries of a vector of codes, in the shape of the constant."""
    whole = to.op("Reshape", [codes, to.ints(*array.shape)], name)
    groups, k = coded.books.shape
    if groups > 1:
        starts = np.repeat(np.arange(groups, dtype=np.int32) * k, array.shape[axis] // groups)
        starts = starts.reshape([-1] + [1] * (array.ndim - 1 - axis))
        whole = to.op("Add", [whole, to.constant(starts, f"{name}_groups")], name)
    return _taken(to, to.constant(coded.books.reshape(-1), f"{name}_values"), whole, name)


def _codes_form(array: Array, coded: compact.Symbols, axis: int) -> Form:
    stream = _stream(_in_place(coded, array.shape, axis), coded.books.shape[1])

    def write(to: Builder, name: str) -> ir.Value:
        return _decoded(to, stream.write(to, name), coded, array, axis, name)

    groups, k = coded.books.shape
    many = f"{groups} x {k} values" if groups > 1 else f"{k} values"
    nodes = 3 + 4 * len(stream.tables()) + (groups > 1)
    return Form(many, (stream.data, coded.books), stream.tables(), nodes, write)


def _sparse_codes_form(array: Array, coded: compact.Symbols, axis: int) -> Form:
    """A bitmap of the most frequent value, mostly zero, and the codes of the others."""
    codes = _in_place(coded, array.shape, axis).reshape(-1)
    mask, k = codes != 0, coded.books.shape[1]
    stream = _stream(codes[mask] - np.uint8(1), k - 1)
    bits = compact.bitmap(mask)

    def write(to: Builder, name: str) -> ir.Value:
        others = to.op(
            "Add", [stream.write(to, name), to.constant(np.ones(1, np.int32), "one")], name
        )
        zero = to.constant(np.zeros(1, np.int32), "zero")
        return _decoded(
            to, _spread(to, bits, len(codes), zero, others, name), coded, array, axis, name
        )

    groups = coded.books.shape[0]
    many = f"bitmap and {groups} x {k - 1} values" if groups > 1 else f"bitmap and {k - 1} values"
    tables = (*stream.tables(), compact.digits(2))
    return Form(many, (bits, stream.data, coded.books), tables, 16 + (groups > 1), write)


def _sparse_values_form(array: Array) -> Form:
    """A bitmap of the zeros, and the other numbers: taken apart, where they can be."""
    mask = ~_zeros(array).reshape(-1)
    values, bits = array.reshape(-1)[mask], compact.bitmap(mask)
    parts = compact.planes(values) if array.dtype == np.float32 else None

    def others(to: Builder, name: str) -> ir.Value:
        whole = f"{name}_others"
        return to.constant(values, whole) if parts is None else _put_together(to, parts, name)

    def write(to: Builder, name: str) -> ir.Value:
        zero = to.constant(np.zeros(1, array.dtype), "zero")
        spread = _spread(to, bits, len(mask), zero, others(to, name), name)
        return to.op("Reshape", [spread, to.ints(*array.shape)], name)

    arrays = (values,) if parts is None else (parts.low, parts.high, parts.exponent)
    tables = (compact.digits(2), *(compact.plane_tables() if parts is not None else ()))
    return Form("bitmap and numbers", (bits, *arrays), tables, 20, write)


def _planes_form(array: Array, parts: compact.Planes) -> Form:
    def write(to: Builder, name: str) -> ir.Value:
        return to.op("Reshape", [_put_together(to, parts, name), to.ints(*array.shape)], name)

    arrays = (parts.low, parts.high, parts.exponent)
    return Form("parts of floats", arrays, compact.plane_tables(), 10, write)


def _put_together(to: Builder, parts: compact.Planes, name: str) -> ir.Value:
    upper, sign, power = (
        to.constant(t, n)
        for t, n in zip(compact.plane_tables(), ("upper", "sign", "power"), strict=True)
    )
    low = _cast(to, to.constant(parts.low, f"{name}_low"), ir.DataType.FLOAT)
    high = _cast(to, to.constant(parts.high, f"{name}_high"), ir.DataType.INT32)
    exponent = _cast(to, to.constant(parts.exponent, f"{name}_exponent"), ir.DataType.INT32)
    mantissa = to.op("Add", [_taken(to, upper, high, name), low], name)
    signed = to.op("Mul", [mantissa, _taken(to, sign, high, name)], name)
    return to.op("Mul", [signed, _taken(to, power, exponent, name)], name)


def _spread(
    to: Builder, bits: Array, count: int, zero: ir.Value, others: ir.Value, name: str
) -> ir.Value:
    """Return a vector with ``zero`` where a bit is not set and the next of ``others`` where it is."""
    bytes_ = _cast(to, to.constant(bits, f"{name}_bits"), ir.DataType.INT32)
    table = to.constant(compact.digits(2), "digits_2")
    mask = _cast(to, _first(to, _taken(to, table, bytes_, name), count, name), ir.DataType.INT32)
    number = to.op("CumSum", [mask, to.constant(np.array(0, np.int64), "axis")], name)
    place = to.op("Mul", [number, mask], name)
    return _taken(to, to.op("Concat", [zero, others], name, {"axis": 0}), place, name)


def _cast(to: Builder, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    return to.op("Cast", [value], None, {"to": int(dtype)})


def _taken(to: Builder, table: ir.Value, indices: ir.Value, name: str) -> ir.Value:
    return to.op("Gather", [table, indices], name, {"axis": 0})


def _first(to: Builder, table: ir.Value, count: int, name: str) -> ir.Value:
    """Return the first ``count`` numbers of a table, row by row."""
    flat = to.op("Reshape", [table, to.ints(-1)], name)
    if to.opset >= 10:
        return to.op("Slice", [flat, to.ints(0), to.ints(count)], name)
    return to.op("Slice", [flat], name, {"starts": (0,), "ends": (count,)})
