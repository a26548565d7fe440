"""All forms of a layer, and the matrix that one of them amounts to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from effdl.graph.walk import int_attr, is_op
from effdl.passes._low_rank_forms import (
    MOST_FEATURES,
    Form,
    KernelFirst,
    PointFirst,
    Seen,
    Tucker,
    most_rank,
)
from effdl.passes._low_rank_kernels import Separable, Spatial
from effdl.passes._low_rank_layer import Layer, weight_index
from effdl.solve.output_pca import Matrix
from effdl.solve.reduced_rank import composed_channels


def forms(
    layer: Layer, seen: Seen, share_of_macs: float, *, energy: float | None = None, seed: int = 0
) -> Iterator[Form]:
    """Yield the ways to write a layer, those of fewer nodes first.

    Args:
        layer: which.
        seen: what the data showed.
        share_of_macs: no rank is of interest that costs more than this share of the layer.
        energy: what a layer without data is factorized for, where few columns may do.
        seed: of a sketch of a large matrix.
    """
    budget = share_of_macs * layer.macs
    plain = KernelFirst(layer, seen, 0)
    yield KernelFirst(layer, seen, most_rank(plain, budget), energy, seed)
    if layer.places == 1:
        return
    point = PointFirst(layer, seen, most_rank(PointFirst(layer, seen, 0), budget))
    if is_op(layer.node, "ConvTranspose"):
        yield point
        return
    if point.most and point.most * layer.places <= MOST_FEATURES:
        yield point
        yield Tucker(layer, seen, point.most, point)
    if len(layer.kernel) == 2 and min(layer.kernel) > 1:
        most = most_rank(Spatial(layer, seen, 0), budget)
        if most and most * layer.kernel[1] <= MOST_FEATURES:
            yield Spatial(layer, seen, most)


def separable_forms(layer: Layer, seen: Seen, share_of_macs: float) -> Iterator[Form]:
    """Yield the layer as a depthwise convolution and a 1x1; nothing where not even one kernel each saves.

    Args:
        layer, seen, share_of_macs: as for ``forms``.
    """
    most = most_rank(Separable(layer, seen, 0), share_of_macs * layer.macs)
    most = min(most, MOST_FEATURES // layer.inputs)
    if most:
        yield Separable(layer, seen, most)


def composed(layer: Layer, form: Form, weights: Sequence[Matrix]) -> Matrix:
    """Return the matrix [N, K] that a chain of weights computes."""
    at = layer
    arrays = [np.asarray(w, np.float64) for w in weights]
    if is_op(at.node, "ConvTranspose"):
        if form.kind == "1x1 first":
            point, kernel = arrays
            cube = np.einsum(
                "rc,rnk->nkc",
                point.reshape(len(point), -1),
                kernel.reshape(len(point), at.outputs, -1),
            )
        else:
            kernel, point = arrays
            rank = kernel.shape[1]
            cube = np.einsum(
                "nr,crk->nkc", point.reshape(at.outputs, rank), kernel.reshape(at.inputs, rank, -1)
            )
        return np.asarray(cube.reshape(at.matrix.shape))
    if form.kind == "separable":
        deep, point = (a.reshape(len(a), -1) for a in arrays)
        count = len(deep) // at.inputs
        cube = np.einsum(
            "ncr,crk->nck",
            point.reshape(at.outputs, at.inputs, count),
            deep.reshape(at.inputs, count, -1),
        )
        return np.asarray(cube.reshape(at.matrix.shape))
    if not at.kernel:
        if weight_index(at.node) == 0:
            return np.asarray(arrays[1] @ arrays[0])
        right = arrays[1] if int_attr(at.node, "transB", 0) else arrays[1].T
        return np.asarray(right @ arrays[0].T)
    if form.kind == "kernel first":
        return np.asarray(arrays[1].reshape(at.outputs, -1) @ arrays[0].reshape(len(arrays[0]), -1))
    basis = arrays[0].reshape(len(arrays[0]), -1)
    places = at.places if form.kind != "spatial" else at.kernel[1]
    kernel = arrays[1].reshape(len(arrays[1]), -1)
    whole = composed_channels(kernel, basis, places)
    return whole if len(arrays) == 2 else np.asarray(arrays[2].reshape(at.outputs, -1) @ whole)
