"""Whole numbers that are not all known: sizes of dynamic dimensions and what is worked out of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from effdl.graph.weights import Array

_DEEPEST = 4
"""Steps that are followed: what is further away is a number of its own, equal to nothing."""


@dataclass(frozen=True)
class Unknown:
    """An element whose value is not known; equal ones are the same number in every run.

    Args:
        value: the tensor it comes from, the name of a dynamic dimension of the model, or just something
            that is equal to nothing else.
        index: the axis of ``value`` whose size it is when ``size`` is set, else its position.
        size: whether it is the size of an axis, so never negative.
    """

    value: object
    index: int
    size: bool


@dataclass(frozen=True)
class Derived:
    """A number worked out of others, of which one at least is not known; equal ones are equal.

    Args:
        op: ``Add``, ``Sub``, ``Mul``, ``Div`` or ``Min``.
        x, y: the operands, in an order of their own where it does not matter.
        dtype: in which it is computed.
    """

    op: str
    x: Element
    y: Element
    dtype: ir.DataType

    @property
    def depth(self) -> int:
        """How many steps lead to it at most."""
        return 1 + max(i.depth if isinstance(i, Derived) else 0 for i in (self.x, self.y))


Element = int | Unknown | Derived


@dataclass(frozen=True)
class Elements:
    """A scalar or vector of integers, as far as it is known."""

    items: tuple[Element, ...]
    scalar: bool
    dtype: ir.DataType

    def known(self) -> Array | None:
        """Return the array when every element is a number, else None."""
        if not all(isinstance(i, int) for i in self.items):
            return None
        flat = np.array(self.items, dtype=self.dtype.numpy())
        return flat.reshape(()) if self.scalar else flat


def combine(op: str, x: Element, y: Element, dtype: ir.DataType) -> Element:
    """Work out one element; what cannot be is an element that says how it comes about."""
    if isinstance(x, int) and isinstance(y, int):
        result = number_of(op, x, y)
        return Derived(op, x, y, dtype) if result is None else result
    neutral = 0 if op in ("Add", "Sub") else 1
    if y == neutral:
        return x
    if x == neutral and op in ("Add", "Mul"):
        return y
    if any(isinstance(i, Derived) and i.depth >= _DEEPEST for i in (x, y)):
        return Unknown(object(), 0, False)
    if op in ("Add", "Mul") and hash(x) > hash(y):
        x, y = y, x
    if op == "Div" and isinstance(x, Derived) and x.op == "Mul" and isinstance(y, int) and y > 0:
        # The product of sizes is far from where numbers wrap.
        if x.x == y and never_negative(x.y):
            return x.y
        if x.y == y and never_negative(x.x):
            return x.x
    return Derived(op, x, y, dtype)


def number_of(op: str, x: int, y: int) -> int | None:
    """Compute with 64-bit integers as ONNX does; None for what is left to the runtime."""
    if op == "Div":
        # Integer division in ONNX truncates.
        return None if y == 0 else abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)
    result = {"Add": x + y, "Sub": x - y, "Mul": x * y}[op]
    return result if -(1 << 31) <= result < 1 << 31 else None


def never_negative(element: Element) -> bool:
    """Whether ``element`` is at least zero in every run."""
    if isinstance(element, int):
        return element >= 0
    if isinstance(element, Unknown):
        return element.size
    if element.dtype != ir.DataType.INT64 or element.op == "Sub":
        return False
    return never_negative(element.x) and never_negative(element.y)
