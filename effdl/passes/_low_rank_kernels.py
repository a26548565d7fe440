"""Convolutions as chains of smaller kernels: a column and a row, or kernels for each channel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import onnx_ir as ir

from effdl.graph.walk import ints_attr
from effdl.passes._low_rank_forms import Form, Ranks, Seen, even, point_link, share
from effdl.passes._low_rank_layer import Layer, Link, attributes_of, with_axis
from effdl.solve.output_pca import Matrix, balanced
from effdl.solve.reduced_rank import (
    Regression,
    channel_basis,
    channel_features,
    kernel_basis,
    kernel_features,
)


@dataclass(frozen=True)
class Spatial:
    """A kernel one column wide, then one that is one row high, of an image's kernel."""

    layer: Layer
    seen: Seen
    most: int
    kind: str = "spatial"

    @property
    def how(self) -> str:
        """In a few words."""
        high, wide = self.layer.kernel
        return f"{high}x1 and 1x{wide}"

    @property
    def limits(self) -> Ranks:
        """The full rank."""
        high, wide = self.layer.kernel
        return (min(self.layer.inputs * high, self.layer.outputs * wide),)

    def macs(self, ranks: Ranks) -> int:
        """Return the multiply-accumulates of the chain."""
        at, (high, wide) = self.layer, self.layer.kernel
        return ranks[0] * (at.inputs * high * at.halfway + at.outputs * wide * at.written)

    @cached_property
    def basis(self) -> Matrix:
        """Combinations of channels and rows."""
        at = self.layer
        columns = at.inputs * at.kernel[0]
        return channel_basis(at.matrix, self.seen.covariance, columns, min(self.most, columns))

    @cached_property
    def fits(self) -> Regression:
        """Fits to them."""
        return channel_features(
            self.layer.matrix, self.seen.covariance, self.basis, self.layer.kernel[1]
        )

    def up_to(self, ranks: Ranks) -> Form:
        """Return the form for nothing but this rank."""
        return replace(self, most=ranks[0])

    def error(self, ranks: Ranks) -> float:
        """Return the share of the outputs' variance that is lost."""
        return share(self.fits.loss(ranks[0] * self.layer.kernel[1]), self.fits.total)

    def links(self, ranks: Ranks) -> list[Link]:
        """Return the two nodes."""
        at, r = self.layer, ranks[0]
        down, across = (_along(at.node, axis) for axis in (0, 1))
        high, wide = at.kernel
        hidden = (*at.x[:1], r, at.y[2], at.x[3]) if at.x and at.y else None
        return [
            Link("Conv", down, (r, at.inputs, high, 1), hidden),
            Link("Conv", across, (at.outputs, r, 1, wide)),
        ]

    def weights(self, ranks: Ranks) -> list[Matrix]:
        """Return the two weights."""
        wide = self.layer.kernel[1]
        kernel, first = even(self.fits.fit(ranks[0] * wide), self.basis[: ranks[0]], wide)
        shapes = [link.shape for link in self.links(ranks)]
        return [first.reshape(shapes[0]), kernel.reshape(shapes[1])]


@dataclass(frozen=True)
class Separable:
    """R kernels for each channel, then a 1x1 over all that they give."""

    layer: Layer
    seen: Seen
    most: int
    kind: str = "separable"

    @property
    def how(self) -> str:
        """In a few words."""
        return "depthwise and 1x1"

    @property
    def limits(self) -> Ranks:
        """As many kernels as one has places."""
        return (self.layer.places,)

    def macs(self, ranks: Ranks) -> int:
        """Return the multiply-accumulates of the chain."""
        at = self.layer
        return ranks[0] * at.inputs * (at.places + at.outputs) * at.written

    @cached_property
    def kernels(self) -> Matrix:
        """Kernels of each channel."""
        at = self.layer
        count = min(self.most, at.places)
        return kernel_basis(
            np.asarray(at.matrix, np.float64), self.seen.covariance, at.inputs, count
        )

    @cached_property
    def fits(self) -> Regression:
        """Fits to what they give."""
        at = self.layer
        return kernel_features(
            np.asarray(at.matrix, np.float64), self.seen.covariance, self.kernels
        )

    def up_to(self, ranks: Ranks) -> Form:
        """Return the form for nothing but this rank."""
        return replace(self, most=ranks[0])

    def error(self, ranks: Ranks) -> float:
        """Return the share of the outputs' variance that is lost."""
        return share(self.fits.loss(ranks[0] * self.layer.inputs), self.fits.total)

    def links(self, ranks: Ranks) -> list[Link]:
        """Return the two nodes."""
        at, wide = self.layer, ranks[0] * self.layer.inputs
        depthwise = attributes_of(at.node, group=at.inputs)
        hidden = with_axis(at.y, 1, wide)
        return [
            Link("Conv", depthwise, (wide, 1, *at.kernel), hidden),
            point_link(at, at.outputs, wide),
        ]

    def weights(self, ranks: Ranks) -> list[Matrix]:
        """Return the two weights."""
        at, count = self.layer, ranks[0]
        fit = self.fits.fit(count * at.inputs).reshape(at.outputs, count, at.inputs)
        wide = np.ascontiguousarray(fit.transpose(0, 2, 1)).reshape(at.outputs, -1)
        point, deep = balanced(wide, self.kernels[:, :count].reshape(-1, at.places))
        shapes = [link.shape for link in self.links(ranks)]
        return [deep.reshape(shapes[0]), point.reshape(shapes[1])]


def _along(node: ir.Node, axis: int) -> dict[str, ir.Attr]:
    """Return the attributes of a convolution along one of two axes only."""

    def kept(values: Sequence[int], other: int) -> tuple[int, ...] | None:
        if not values:
            return None
        return tuple(v if k % 2 == axis else other for k, v in enumerate(values))

    return attributes_of(
        node,
        kernel_shape=None,
        strides=kept(ints_attr(node, "strides"), 1),
        dilations=kept(ints_attr(node, "dilations"), 1),
        pads=kept(ints_attr(node, "pads"), 0),
    )
