"""Shapes of a dynamic model at several sizes of its dimensions: what is equal at all of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from effdl.errors import UsageError
from effdl.graph.dims import dynamic_dims, input_dims
from effdl.graph.shapes import Shapes, infer

Sizes = tuple[tuple[int, ...], ...]
"""A shape at every probe."""

_FIRST = ((2, 3), (7, 37), (17, 61), (29, 47), (41, 79), (53, 67))
"""Sizes of the first dynamic dimension at each probe, then of the second, ...: all different primes.

Far enough from each other that a network which halves a length five times still has two lengths.
"""


@dataclass(frozen=True)
class Probes:
    """A model's shapes at a few sizes; two dimensions that agree at all of them are the same.

    Exporters compute shapes by long chains of Shape, Gather and Concat, which symbols get lost in.
    With numbers every chain can be followed, and two expressions in the sizes that agree at several
    sets of different primes are the same for every practical purpose (the idea of the
    Schwartz-Zippel lemma). Nobody should build a silent rewrite on this alone: a rewrite that uses
    it must fail loudly at run time where the shapes do not fit.
    """

    shapes: tuple[Shapes, ...]
    _older: dict[ir.Value, ir.Value] = field(default_factory=dict)

    def of(self, value: ir.Value | None) -> Sizes | None:
        """Return the shape of ``value`` at each probe, None where one of them is not known."""
        if value in self._older:
            value = self._older[value]
        found = [s.static(value) for s in self.shapes]
        return None if any(f is None for f in found) else tuple(f for f in found if f is not None)

    def axis(self, value: ir.Value | None, axis: int) -> tuple[int, ...] | None:
        """Return the size of one axis at each probe, None when it is not known or not there."""
        sizes = self.of(value)
        if sizes is None or not all(-len(s) <= axis < len(s) for s in sizes):
            return None
        return tuple(s[axis] for s in sizes)

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        """Remember that ``new``, made by a rewrite, has the shape of ``old``."""
        self._older[new] = self._older.get(old, old)


def probe(model: ir.Model, *, alike: bool = False) -> Probes:
    """Infer the shapes of ``model`` with its dynamic dimensions set to different primes.

    Args:
        model: the model.
        alike: whether the first axes of all inputs are taken as one batch and the second axes of all
            inputs with two as one length: exporters that name no dimension, or each in its own way,
            leave it to the reader that ids and their mask are of one shape.
    """
    names = list(dynamic_dims(model))
    same = _places(model) if alike else {}
    if not names:
        return Probes((infer(model),))
    found = []
    for k in range(len(_FIRST[0])):
        sizes: dict[str, int] = {}
        plain = [n for n in names if "+" not in n and same.get(n, n) == n]
        for i, name in enumerate(plain):
            sizes[name] = _FIRST[i % len(_FIRST)][k] + (i // len(_FIRST)) * 60
        sizes.update({n: sizes[one] for n, one in same.items()})
        for name in names:  # exporters name a mask's length "past_length + length"
            if "+" in name:
                terms = [t.strip() for t in name.split("+")]
                sizes[name] = sum(int(t) if t.isdigit() else sizes.get(t, 67) for t in terms)
        try:
            found.append(infer(model, sizes))
        except UsageError:  # two spellings of one dimension
            continue
    return Probes(tuple(found) or (infer(model),))


def _places(model: ir.Model) -> dict[str, str]:
    """Return for the dimensions that by their place are batches or lengths the first of their kind."""
    first: dict[int, str] = {}
    found: dict[str, str] = {}
    for name, value, axis in input_dims(model):
        rank = len(value.shape or ())
        if "+" not in name and (axis == 0 or (axis == 1 and rank == 2)):
            found.setdefault(name, first.setdefault(axis, found.get(name, name)))
    return found
