"""What layers read, guessed from the weights of the layers before them: for pruning without data.

Inputs of the layer that makes the channels are taken to be independent and of variance one. Then the weights
alone tell which channels are alike, and what a removed one can be replaced by: the data-free merging of
similar neurons (Srinivas and Babu 2015; "Model Folding", Wang et al. 2025), for any number of neighbours.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from effdl.graph.channels import Channels, Group, Role
from effdl.graph.walk import is_op
from effdl.graph.weights import constant
from effdl.observe.moments import Moments
from effdl.passes.prune._channel_order import matrix

Float = npt.NDArray[np.float64]
_THROUGH = ("MaxPool", "AveragePool", "GlobalAveragePool", "Identity", "Dropout", "Flatten")
_NEIGHBOURS = 0.5
"""Correlation of what neighbouring taps of a kernel read in one channel."""


def guessed(found: Channels, group: Group) -> dict[Role, Moments]:
    """Return moments of what the readers of a group read; none for those where channels are not in line."""
    spread = _spread(found, group)
    if spread is None:
        return {}
    moments = {}
    for role in group.of_kind("in"):
        units = found.of(role.value, role.axis)
        if units is None or not np.array_equal(np.sort(units), group.units):
            continue
        at = np.searchsorted(group.units, units)
        covariance = spread[np.ix_(at, at)]
        deviation = np.sqrt(np.diagonal(covariance))
        mean: Float = np.zeros(len(at))
        if _rectified(role.node.inputs[0]):
            mean = np.asarray(deviation / np.sqrt(2 * np.pi), np.float64)
            covariance = rectified(covariance)
        taps = matrix(role)[1]
        near = np.full((taps, taps), _NEIGHBOURS) + (1 - _NEIGHBOURS) * np.eye(taps)
        wide = np.asarray(np.kron(covariance, near), np.float64)
        means = np.repeat(mean, taps)
        moments[role] = Moments(wide[None], means[None], np.abs(means)[None], 0)
    return moments


def rectified(covariance: Float) -> Float:
    """Return the covariance of max(x, 0) for normal x of mean 0.

    Source: Cho and Saul 2009, "Kernel Methods for Deep Learning", equation 6 (arc-cosine kernel, n = 1).
    """
    deviation = np.sqrt(np.diagonal(covariance))
    scale = np.outer(deviation, deviation)
    cosine = np.clip(np.divide(covariance, scale, out=np.zeros_like(scale), where=scale > 0), -1, 1)
    angle = np.arccos(cosine)
    second = scale / (2 * np.pi) * (np.sin(angle) + (np.pi - angle) * cosine)
    result: Float = second - scale / (2 * np.pi)
    return result


def _spread(found: Channels, group: Group) -> Float | None:
    """Return the covariance of the channels of a group, in the order of its units."""
    total: Float | None = None
    for role in group.of_kind("out"):
        units = found.of(role.value, role.axis)
        array = constant(role.value)
        if array is None or units is None or not np.array_equal(np.sort(units), group.units):
            return None
        rows = np.moveaxis(array.astype(np.float64), role.axis, 0).reshape(len(units), -1)
        rows = rows[np.argsort(units)]
        product = rows @ rows.T
        total = product if total is None else total + product
    return total


def _rectified(value: ir.Value | None) -> bool:
    """Whether a value comes from a Relu, past what leaves channels as they are."""
    node = value.producer() if value is not None else None
    while node is not None and is_op(node, *_THROUGH):
        value = node.inputs[0]
        node = value.producer() if value is not None else None
    return is_op(node, "Relu", "Clip")
