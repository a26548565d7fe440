"""A small vocabulary for finding a known computation in a graph and saying why it is not there.

A matcher is a function that walks from an anchor node and calls ``need``, ``some``, ``step`` and
``expand``; the first condition that fails raises ``Mismatch``, and ``attempt`` turns that into its
reason. Operand order and association need no cases of their own: ``expand`` reads a tree of
arithmetic as a polynomial, so that every way of writing the same formula compares equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar

import onnx_ir as ir

from effdl.graph.walk import is_op
from effdl.graph.weights import constant_tensor, scalar

T = TypeVar("T")
P = ParamSpec("P")
Poly = dict[tuple[int, ...], float]
"""Coefficient by exponents: with atoms (x, e), ``{(1, 1): 0.5}`` is 0.5·x·e."""

_ARITHMETIC = ("Add", "Sub", "Mul", "Div", "Neg", "Pow")
_MAX_NODES = 32
_RTOL = {ir.DataType.FLOAT16: 2e-3, ir.DataType.BFLOAT16: 1.6e-2}


class Mismatch(Exception):
    """A condition of a pattern that does not hold; the text is the reason for the user."""


def attempt(match: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | str:
    """Return what ``match`` returns for the arguments, or the reason of the first failed condition."""
    try:
        return match(*args, **kwargs)
    except Mismatch as e:
        return str(e)


def need(condition: bool, reason: str) -> None:
    """Raise Mismatch with ``reason`` unless ``condition`` holds."""
    if not condition:
        raise Mismatch(reason)


def some(value: T | None, reason: str) -> T:
    """Return ``value``; raise Mismatch with ``reason`` when it is None."""
    if value is None:
        raise Mismatch(reason)
    return value


def label(node: ir.Node) -> str:
    """Return ``Op 'name'`` for a message."""
    return f"{node.op_type} '{node.name}'" if node.name else node.op_type


def step(value: ir.Value, *op_types: str) -> ir.Node:
    """Return the one node that uses ``value``; it must be one of ``op_types``.

    A node that takes ``value`` twice, such as Mul(d, d), counts as one user.

    Raises:
        Mismatch: other users, a graph output, no user, or another operator.
    """
    need(not value.is_graph_output(), f"'{value.name}' is a graph output")
    users = list(dict.fromkeys(u.node for u in value.uses()))
    need(len(users) == 1, f"'{value.name}' has {len(users)} users, the pattern has one")
    wanted = " or ".join(op_types)
    need(is_op(users[0], *op_types), f"'{value.name}' goes to {label(users[0])}, not to {wanted}")
    return users[0]


def other(node: ir.Node, value: ir.Value) -> ir.Value:
    """Return the operand of a two-input node that is not ``value`` (``value`` itself if both are)."""
    a, b = node.inputs[0], node.inputs[1]
    return some(b if a is value else a, f"{label(node)} lacks an operand")


def split_scalar(node: ir.Node) -> tuple[ir.Value, ir.Value] | None:
    """Return (operand, constant) of a two-input node with one single-number constant, in any order."""
    if len(node.inputs) != 2:
        return None
    a, b = node.inputs
    if a is None or b is None:
        return None
    if scalar(b) is not None:
        return (a, b) if scalar(a) is None else None
    return (b, a) if scalar(a) is not None else None


def keeps_rank(value: ir.Value, rank: int | None) -> bool:
    """Whether the constant ``value`` adds no dimension to an operand of ``rank`` (None: unknown)."""
    tensor = constant_tensor(value)
    dims = 0 if tensor is None else len(tensor.shape)
    return dims == 0 or (rank is not None and dims <= rank)


@dataclass
class Expansion:
    """A tree of arithmetic, multiplied out.

    Args:
        terms: the polynomial in the atoms, without zero terms.
        nodes: the nodes of the tree, operands before users.
        rtol: relative error that its constants may have, by the coarsest of their dtypes.
    """

    terms: Poly
    nodes: list[ir.Node] = field(default_factory=list)
    rtol: float = 1e-6

    def equals(self, terms: Poly) -> bool:
        """Whether the polynomial is ``terms``, up to the rounding of the constants."""
        return self.terms.keys() == terms.keys() and all(
            abs(self.terms[k] - v) <= self.rtol * abs(v) for k, v in terms.items()
        )


def expand(root: ir.Value, atoms: Sequence[ir.Value], rank: int | None) -> Expansion:
    """Read ``root`` as a polynomial in ``atoms`` with constant coefficients.

    Args:
        root: the value to explain.
        atoms: the values where reading stops.
        rank: dimensions of the atoms, None when unknown; constants must not add one.

    Raises:
        Mismatch: something other than arithmetic of atoms and single numbers is in it.
    """
    result = Expansion({})
    known: dict[ir.Value, Poly] = {}
    zero = (0,) * len(atoms)
    for k, atom in enumerate(atoms):
        known[atom] = {tuple(int(i == k) for i in range(len(atoms))): 1.0}

    def read(value: ir.Value | None) -> Poly:
        if value is None:
            raise Mismatch("an operand is missing")
        if value in known:
            return known[value]
        number = scalar(value)
        if number is not None:
            need(keeps_rank(value, rank), f"the constant '{value.name}' may add a dimension")
            dtype = value.dtype
            tensor = constant_tensor(value)
            dtype = tensor.dtype if tensor is not None else dtype
            result.rtol = max(result.rtol, _RTOL.get(dtype, 0.0) if dtype else 0.0)
            return {zero: number}
        node = value.producer()
        if node is None or not is_op(node, *_ARITHMETIC):
            by = "an input" if node is None else label(node)
            raise Mismatch(f"'{value.name}' ({by}) is no part of the formula")
        need(len(result.nodes) < _MAX_NODES, "the formula is longer than any known form")
        known[value] = poly = _combine(node, [read(v) for v in node.inputs])
        result.nodes.append(node)
        return poly

    terms = read(root)
    result.terms = {k: v for k, v in terms.items() if v != 0}
    return result


def _combine(node: ir.Node, args: list[Poly]) -> Poly:
    a = args[0]
    match node.op_type:
        case "Add":
            return _sum(a, args[1], 1.0)
        case "Sub":
            return _sum(a, args[1], -1.0)
        case "Mul":
            return _product(a, args[1])
        case "Neg":
            return {k: -v for k, v in a.items()}
    number = _only_number(args[1])
    if node.op_type == "Div":
        divisor = some(number, f"{label(node)} divides by a computed value")
        need(divisor != 0, f"{label(node)} divides by zero")
        return {k: v / divisor for k, v in a.items()}
    power = some(number, f"the exponent of {label(node)} is computed")
    need(power in (1, 2, 3, 4), f"the exponent of {label(node)} is {power:g}")
    result = a
    for _ in range(int(power) - 1):
        result = _product(result, a)
    return result


def _sum(a: Poly, b: Poly, sign: float) -> Poly:
    result = dict(a)
    for k, v in b.items():
        result[k] = result.get(k, 0.0) + sign * v
    return result


def _product(a: Poly, b: Poly) -> Poly:
    result: Poly = {}
    for k, v in a.items():
        for m, w in b.items():
            key = tuple(i + j for i, j in zip(k, m, strict=True))
            result[key] = result.get(key, 0.0) + v * w
    need(
        all(max(k, default=0) <= 8 for k in result), "the formula has a higher power than any form"
    )
    return result


def _only_number(poly: Poly) -> float | None:
    if not poly:
        return 0.0
    return next(iter(poly.values())) if all(not any(k) for k in poly) else None


def arithmetic_values(root: ir.Value, depth: int = 7) -> list[ir.Value]:
    """Return the computed values that ``root`` is arithmetic of, itself first, nearest first."""
    found: dict[ir.Value, None] = {root: None}
    level = [root]
    for _ in range(depth):
        below: dict[ir.Value, None] = {}
        for value in level:
            node = value.producer()
            if node is None or not is_op(node, *_ARITHMETIC):
                continue
            for v in node.inputs:
                if v is not None and v not in found and scalar(v) is None:
                    below[v] = None
        found.update(below)
        level = list(below)
    return list(found)


def closed(nodes: Iterable[ir.Node], root: ir.Value) -> None:
    """Check that nothing outside ``nodes`` sees their values, apart from ``root``.

    Raises:
        Mismatch: names the value with another user.
    """
    inside = set(nodes)
    for node in dict.fromkeys(nodes):
        for value in node.outputs:
            if value is root:
                continue
            need(not value.is_graph_output(), f"'{value.name}' is also a graph output")
            for use in value.uses():
                need(
                    use.node in inside,
                    f"'{value.name}' is also used by {label(use.node)}",
                )
