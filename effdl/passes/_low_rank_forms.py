"""Layers as chains through fewer channels: what each form costs and loses at every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import numpy as np
import onnx_ir as ir

from effdl.graph.walk import int_attr, is_op
from effdl.passes._low_rank_layer import Array, Layer, Link, weight_index, with_axis
from effdl.solve.output_pca import Matrix, OutputPca, balanced, from_gram, output_pca
from effdl.solve.reduced_rank import (
    Regression,
    channel_basis,
    channel_features,
)

Ranks = tuple[int, ...]
_STEPS = 8
"""Ranks of each of two that are looked at together."""
_LOOKS = 2
"""How often the combinations of channels are chosen again for the outputs that are kept."""
MOST_FEATURES = 6000
"""Features of a regression: above, its time and memory are no longer small."""


@dataclass(frozen=True)
class Seen:
    """What the data showed.

    Args:
        covariance: [K, K] that errors are measured with; None for no data.
        mean: [K] that a shift of the outputs makes up for; None where none is possible.
    """

    covariance: Matrix | None = None
    mean: Matrix | None = None


class Form(Protocol):
    """A way to write a layer."""

    @property
    def kind(self) -> str:
        """Its name."""

    @property
    def how(self) -> str:
        """In a few words."""

    @property
    def limits(self) -> Ranks:
        """The full ranks."""

    def macs(self, ranks: Ranks) -> int:
        """Return the multiply-accumulates of the chain."""

    def error(self, ranks: Ranks) -> float:
        """Return the variance of the outputs that is lost, as a share of all of it."""

    def links(self, ranks: Ranks) -> list[Link]:
        """Return the nodes."""

    def weights(self, ranks: Ranks) -> list[Matrix]:
        """Return their weights."""

    def up_to(self, ranks: Ranks) -> Form:
        """Return the form for nothing but these ranks, which is less work."""


def share(loss: float, total: float) -> float:
    """Return a loss relative to the whole, 0 of nothing."""
    return min(1.0, loss / total) if total > 0 else 0.0


@dataclass(frozen=True)
class KernelFirst:
    """The layer with r outputs, then a 1x1 (or a product) that makes all outputs of them."""

    layer: Layer
    seen: Seen
    most: int
    energy: float | None = None
    seed: int = 0
    kind: str = "kernel first"

    @property
    def how(self) -> str:
        """In a few words."""
        op = self.layer.node.op_type
        if op == "MatMul":
            return "two MatMuls"
        if op == "Gemm":
            return "MatMul and Gemm"
        return "1x1 after the kernel" if self.layer.places > 1 else "two 1x1"

    @property
    def limits(self) -> Ranks:
        """The full rank."""
        return (min(self.layer.outputs, self.layer.inputs * self.layer.places),)

    def macs(self, ranks: Ranks) -> int:
        """Return the multiply-accumulates of the chain."""
        at = self.layer
        first = at.read if is_op(at.node, "ConvTranspose") else at.written
        return ranks[0] * (at.inputs * at.places * first + at.outputs * at.written)

    @cached_property
    def _pca(self) -> OutputPca:
        at = self.layer
        if not is_op(at.node, "ConvTranspose"):
            return output_pca(
                at.matrix, self.seen.covariance, self.most, energy=self.energy, seed=self.seed
            )
        cube = _transposed_cube(at)
        flat = cube.reshape(at.outputs, -1)
        inner = cube if self.seen.covariance is None else cube @ self.seen.covariance
        return from_gram(flat, flat @ inner.reshape(at.outputs, -1).T)

    def up_to(self, ranks: Ranks) -> Form:
        """Return the form for nothing but this rank."""
        return replace(self, most=ranks[0])

    def error(self, ranks: Ranks) -> float:
        """Return the share of the outputs' variance that is lost."""
        return share(self._pca.loss(ranks[0]), self._pca.total)

    def links(self, ranks: Ranks) -> list[Link]:
        """Return the two nodes."""
        at, r = self.layer, ranks[0]
        node = at.node
        if is_op(node, "Conv"):
            hidden = with_axis(at.y, 1, r)
            first = Link("Conv", dict(node.attributes), (r, at.inputs, *at.kernel), hidden)
            return [first, point_link(at, at.outputs, r)]
        if is_op(node, "ConvTranspose"):
            hidden = with_axis(at.y, 1, r)
            first = Link("ConvTranspose", dict(node.attributes), (at.inputs, r, *at.kernel), hidden)
            return [first, point_link(at, at.outputs, r)]
        if weight_index(node) == 0:
            axis = -1 if at.x is not None and len(at.x) == 1 else -2
            hidden = with_axis(at.x, axis, r)
            first = Link("MatMul", {}, (r, at.inputs), hidden, left=True)
            return [first, Link("MatMul", {}, (at.outputs, r), left=True)]
        first = Link("MatMul", {}, (at.inputs, r), with_axis(at.x, -1, r))
        shape = (at.outputs, r) if int_attr(node, "transB", 0) else (r, at.outputs)
        return [first, Link(node.op_type, dict(node.attributes), shape)]

    def weights(self, ranks: Ranks) -> list[Matrix]:
        """Return the two weights."""
        at, r = self.layer, ranks[0]
        left, right = balanced(*self._pca.factors(r))
        shapes = [link.shape for link in self.links(ranks)]
        if is_op(at.node, "Conv"):
            return [right.reshape(shapes[0]), left.reshape(shapes[1])]
        if is_op(at.node, "ConvTranspose"):
            cube = right.reshape(r, at.places, at.inputs)
            return [cube.transpose(2, 0, 1).reshape(shapes[0]), left.reshape(shapes[1])]
        if weight_index(at.node) == 0:
            return [right, left]
        return [right.T, left if int_attr(at.node, "transB", 0) else left.T]


def _transposed_cube(at: Layer) -> Array:
    """Return the weight of a ConvTranspose as [N, places, C]."""
    return np.asarray(at.matrix, np.float64).reshape(at.outputs, at.places, at.inputs)


@dataclass(frozen=True)
class PointFirst:
    """A 1x1 that makes r channels of all, then the layer with r inputs."""

    layer: Layer
    seen: Seen
    most: int
    kind: str = "1x1 first"
    how: str = "1x1 before the kernel"

    @property
    def limits(self) -> Ranks:
        """The full rank."""
        return (min(self.layer.inputs, self.layer.outputs * self.layer.places),)

    def macs(self, ranks: Ranks) -> int:
        """Return the multiply-accumulates of the chain."""
        at = self.layer
        second = at.read if is_op(at.node, "ConvTranspose") else at.written
        return ranks[0] * (at.inputs * at.read + at.outputs * at.places * second)

    @cached_property
    def _pca(self) -> OutputPca:  # of a ConvTranspose, where nothing ties the places together
        return output_pca(self.layer.matrix, self.seen.covariance)

    @cached_property
    def basis(self) -> Matrix:
        """Combinations of channels."""
        at = self.layer
        return channel_basis(at.matrix, self.seen.covariance, at.inputs, min(self.most, at.inputs))

    @cached_property
    def fits(self) -> Regression:
        """Fits to them."""
        return channel_features(
            self.layer.matrix, self.seen.covariance, self.basis, self.layer.places
        )

    def up_to(self, ranks: Ranks) -> Form:
        """Return the form for nothing but this rank."""
        return replace(self, most=ranks[0])

    def error(self, ranks: Ranks) -> float:
        """Return the share of the outputs' variance that is lost."""
        if is_op(self.layer.node, "ConvTranspose"):
            return share(self._pca.loss(ranks[0]), self._pca.total)
        return share(self.fits.loss(ranks[0] * self.layer.places), self.fits.total)

    def links(self, ranks: Ranks) -> list[Link]:
        """Return the two nodes."""
        at, r = self.layer, ranks[0]
        point = point_link(at, r, at.inputs, with_axis(at.x, 1, r))
        transposed = is_op(at.node, "ConvTranspose")
        shape = (r, at.outputs, *at.kernel) if transposed else (at.outputs, r, *at.kernel)
        return [point, Link(at.node.op_type, dict(at.node.attributes), shape)]

    def weights(self, ranks: Ranks) -> list[Matrix]:
        """Return the two weights."""
        at, r = self.layer, ranks[0]
        shapes = [link.shape for link in self.links(ranks)]
        if is_op(at.node, "ConvTranspose"):
            left, right = balanced(*self._pca.factors(r))
            cube = left.reshape(at.outputs, at.places, r).transpose(2, 0, 1)
            return [right.reshape(shapes[0]), cube.reshape(shapes[1])]
        fit = self.fits.fit(r * at.places)
        kernel, point = even(fit, self.basis[:r], at.places)
        return [point.reshape(shapes[0]), kernel.reshape(shapes[1])]


@dataclass(frozen=True)
class Tucker:
    """A 1x1 to r channels, the kernel from r to s, and a 1x1 from s to all outputs."""

    layer: Layer
    seen: Seen
    most: int
    first: PointFirst
    kind: str = "Tucker"
    how: str = "1x1 before and after the kernel"

    @property
    def limits(self) -> Ranks:
        """The full ranks, of inputs and of outputs."""
        return (self.first.limits[0], self.layer.outputs)

    def macs(self, ranks: Ranks) -> int:
        """Return the multiply-accumulates of the chain."""
        at, (r, s) = self.layer, ranks
        return at.inputs * r * at.read + (r * s * at.places + s * at.outputs) * at.written

    @cached_property
    def _lost(self) -> dict[int, Matrix]:
        return {}

    def up_to(self, ranks: Ranks) -> Form:
        """Return the form for nothing but these ranks."""
        return replace(self, most=ranks[0], first=replace(self.first, most=ranks[0]))

    def error(self, ranks: Ranks) -> float:
        """Return the share of the outputs' variance that is lost, before the second look."""
        return _cut_error(self.first.fits, ranks[0] * self.layer.places, ranks[1], self._lost)

    def links(self, ranks: Ranks) -> list[Link]:
        """Return the three nodes."""
        at, (r, s) = self.layer, ranks
        return [
            point_link(at, r, at.inputs, with_axis(at.x, 1, r)),
            Link("Conv", dict(at.node.attributes), (s, r, *at.kernel), with_axis(at.y, 1, s)),
            point_link(at, at.outputs, s),
        ]

    def weights(self, ranks: Ranks) -> list[Matrix]:
        """Return the three weights; channels are chosen for the outputs that are kept, and again."""
        at, (r, s) = self.layer, ranks
        h = self.seen.covariance
        basis, fits = self.first.basis[:r], self.first.fits
        directions, values = fits.outputs(r * at.places)
        best = fits.loss(r * at.places) + float(values[s:].sum())
        for _ in range(_LOOKS):
            again = channel_basis(at.matrix, h, at.inputs, r, directions[:, :s])
            other = channel_features(at.matrix, h, again, at.places)
            turned, found = other.outputs(r * at.places)
            loss = other.loss(r * at.places) + float(found[s:].sum())
            if loss >= best:
                break
            best, basis, fits, directions = loss, again, other, turned
        left = directions[:, :s]
        left, core = balanced(left, left.T @ fits.fit(r * at.places))
        kernel, point = even(core, basis, at.places)
        shapes = [link.shape for link in self.links(ranks)]
        return [a.reshape(n) for a, n in zip((point, kernel, left), shapes, strict=True)]


def _cut_error(fits: Regression, features: int, outputs: int, known: dict[int, Matrix]) -> float:
    if features not in known:
        known[features] = fits.outputs(features)[1]
    loss = fits.loss(features) + float(known[features][outputs:].sum())
    return share(loss, fits.total)


def even(fit: Matrix, basis: Matrix, places: int) -> tuple[Matrix, Matrix]:
    """Give each combination and what reads it the same largest value; returns fit and basis."""
    rank = len(basis)
    rows = fit.reshape(-1, rank, places).transpose(0, 2, 1).reshape(-1, rank)
    left, right = balanced(rows, basis)
    return left.reshape(-1, places, rank).transpose(0, 2, 1), right


def point_link(
    at: Layer, outputs: int, inputs: int, hidden: tuple[int | str | None, ...] | None = None
) -> Link:
    ones = (1,) * len(at.kernel)
    attributes = {"kernel_shape": ir.AttrInt64s("kernel_shape", ones)}
    return Link("Conv", attributes, (outputs, inputs, *ones), hidden)


def most_rank(form: Form, budget: float) -> int:
    """Return the largest rank of a form with one rank whose MACs are within the budget."""
    per_rank = form.macs((1,))
    return min(form.limits[0], int(budget / per_rank + 1e-9)) if per_rank else 0


def thinned(values: Sequence[int], count: int) -> list[int]:
    """Return at most ``count`` of ascending values, evenly spread, the largest among them."""
    if len(values) <= count:
        return list(values)
    places = np.linspace(0, len(values) - 1, count).round().astype(int)
    return [values[k] for k in dict.fromkeys(places.tolist())]


def all_ranks(form: Form, budget: float, multiple: int, least: int) -> list[Ranks]:
    """Return the ranks of a form that are multiples within a budget of MACs."""
    grids = [
        [r for r in range(multiple, limit + 1, multiple) if r >= least] for limit in form.limits
    ]
    if len(grids) == 2:
        pairs = [(r, s) for r in thinned(grids[0], _STEPS) for s in thinned(grids[1], _STEPS)]
        most = getattr(form, "most", form.limits[0])
        return [p for p in pairs if p[0] <= most and form.macs(p) <= budget]
    return [(r,) for r in grids[0] if form.macs((r,)) <= budget]
