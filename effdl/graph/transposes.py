"""Orders of axes, and what a node has to become to work on tensors in another order.

``perm`` is that of the operator Transpose: axis ``i`` of the result is axis ``perm[i]`` of the tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from effdl.graph.dims import Dims
from effdl.graph.walk import int_attr, ints_attr, is_op
from effdl.graph.weights import Array, Names, constant

Perm = tuple[int, ...]


class Declined(Exception):
    """Why a node cannot work in another order of axes, in words for the user."""


def identity(rank: int) -> Perm:
    """Return the order that changes nothing."""
    return tuple(range(rank))


def is_identity(perm: Perm | None) -> bool:
    """Whether ``perm`` changes nothing; None stands for no tensor, or one that is left alone."""
    return perm is None or perm == tuple(range(len(perm)))


def compose(first: Perm, second: Perm) -> Perm:
    """Return the one order that does what ``first`` and then ``second`` do."""
    return tuple(first[i] for i in second)


def inverse(perm: Perm) -> Perm:
    """Return the order that undoes ``perm``."""
    return tuple(sorted(range(len(perm)), key=perm.__getitem__))


def moved(axes: Sequence[int], perm: Perm) -> tuple[int, ...]:
    """Return where each of ``axes`` is after ``perm``."""
    at = inverse(perm)
    return tuple(at[a] for a in axes)


def without(perm: Perm, axes: Sequence[int]) -> Perm:
    """Return the order of the other axes after ``axes`` are gone.

    Args:
        perm: the order of a tensor before they go.
        axes: as they are numbered without ``perm``.
    """
    rest = [a for a in range(len(perm)) if a not in axes]
    return tuple(rest.index(a) for a in perm if a in rest)


def extended(perm: Perm, axes: Sequence[int]) -> Perm:
    """Return ``perm`` with ``axes`` put in, each of which stays at its place."""
    rank = len(perm) + len(axes)
    rest = [a for a in range(rank) if a not in axes]
    order = list(range(rank))
    for i, a in enumerate(rest):
        order[a] = rest[perm[i]]
    return tuple(order)


def permuted(dims: Dims | None, perm: Perm) -> Dims | None:
    """Return the shape of a tensor of shape ``dims`` after ``perm``."""
    return None if dims is None else tuple(dims[i] for i in perm)


@dataclass(frozen=True)
class Plan:
    """How a node works in another order of axes.

    Args:
        inputs: the order in which it wants each input; None: as it is, or replaced by ``edit``.
        outputs: the order in which it gives each output; None: as ever.
        edit: what has to be changed on the node, after its inputs are rewired.
        nodes: nodes that this adds.
        hidden: Transposes of its output that the runtime adds inside; negative: that it saves.
    """

    inputs: tuple[Perm | None, ...]
    outputs: tuple[Perm | None, ...]
    edit: Callable[[ir.Node, Names], None] | None = None
    nodes: int = 0
    hidden: int = 0


@dataclass(frozen=True)
class Ask:
    """A node, and the order of axes that one of its inputs or outputs shall have.

    Args:
        node: the operator.
        perm: the order asked for.
        output: whether it is asked of an output.
        index: the number of the input or output.
        opset: of the default domain.
        dims_of: shape of a value, None when the rank is not known.
        dtype_of: element type of a value.
        small: bytes up to which a constant may be kept twice.
        copies: constants that were made for an operand: by constant, order and number of axes.
    """

    node: ir.Node
    perm: Perm
    output: bool
    index: int
    opset: int
    dims_of: Callable[[ir.Value | None], Dims | None]
    dtype_of: Callable[[ir.Value | None], ir.DataType | None]
    small: int
    copies: dict[tuple[ir.Value, Perm, int], ir.Value]

    @property
    def value(self) -> ir.Value:
        """The input or output that is asked about."""
        value = (self.node.outputs if self.output else self.node.inputs)[self.index]
        assert value is not None
        return value

    def dims(self, index: int) -> Dims:
        """Return the shape of input ``index``; its rank must be known."""
        dims = self.dims_of(self.node.inputs[index])
        if dims is None:
            raise Declined(f"the rank of input {index} is not known")
        return dims

    def given(self, index: int) -> bool:
        """Whether input ``index`` is there."""
        return index < len(self.node.inputs) and self.node.inputs[index] is not None

    def axis(self, name: str, default: int, rank: int) -> int:
        """Return the attribute ``name`` as an axis that is not negative."""
        return axis_of(int_attr(self.node, name, default), rank)

    def on_data(self) -> None:
        """Decline an order asked of any input but the first."""
        if not self.output and self.index != 0:
            raise Declined(f"its input {self.index} is no tensor that can be transposed")

    def array(self, index: int, what: str) -> Array:
        """Return the constant that input ``index`` is; decline when it is computed."""
        array = constant(self.node.inputs[index])
        if array is None:
            raise Declined(f"its {what} are not constant")
        return array


def axis_of(axis: int, rank: int) -> int:
    """Return ``axis`` counted from the front."""
    if not -rank <= axis < rank:
        raise Declined(f"axis {axis} is none of a tensor with {rank} axes")
    return axis % rank


def perm_of(node: ir.Node, rank: int | None) -> Perm | None:
    """Return the order a Transpose makes; None when it says none and the rank is not known."""
    given = node.attributes.get("perm")
    if given is not None and given.is_ref():
        return None
    perm = ints_attr(node, "perm")
    if perm:
        return perm
    return None if rank is None else tuple(reversed(range(rank)))


def is_transpose(node: ir.Node | None) -> bool:
    """Whether ``node`` is a Transpose."""
    return is_op(node, "Transpose") and node is not None and node.inputs[0] is not None
