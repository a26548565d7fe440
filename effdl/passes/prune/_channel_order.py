"""In which order the channels of a group go, and what that costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from effdl.graph.channels import Channels, Group, Role
from effdl.graph.walk import int_attr, is_op
from effdl.graph.weights import constant
from effdl.observe.layers import rows_of
from effdl.observe.moments import Moments
from effdl.observe.rows import Rows
from effdl.passes._layer_form import layer_form
from effdl.solve.obs import Reader, Removal, removal

Float = npt.NDArray[np.float64]
Saliency = Literal["obs", "l1", "l2", "batchnorm", "activation", "random"]


@dataclass(frozen=True)
class Order:
    """Units of a group in the order in which they go.

    Args:
        group: the group.
        units: [n], the first one goes first.
        errors: [n + 1], the error after so many have gone; not falling.
    """

    group: Group
    units: npt.NDArray[np.int64]
    errors: Float


def rows_for(role: Role) -> Rows | None:
    """Return what the layer of a role reads along the role's axis, None where that cannot be told."""
    node = role.node
    x = node.inputs[0]
    shape = role.value.shape
    if x is None or not x.name or shape is None:
        return None
    if is_op(node, "Conv", "ConvTranspose"):
        return rows_of(node) if int_attr(node, "group", 1) == 1 else None
    if is_op(node, "Gemm", "MatMul"):
        return rows_of(node) if role.index == 1 else None
    if is_op(node, "LSTM", "GRU", "RNN") and role.index == 1:
        return Rows(x.name, int(shape.numpy()[2]))
    if is_op(node, "Attention", domain="com.microsoft"):
        return Rows(x.name, int(shape.numpy()[0]))
    return None


def matrix(role: Role) -> tuple[Float, int]:
    """Return the weight of an IN role as [outputs, inputs x taps], with the number of taps."""
    array = constant(role.value)
    assert array is not None
    wide = np.moveaxis(array.astype(np.float64), role.axis, 0)
    if is_op(role.node, "Conv"):
        taps = int(np.prod(array.shape[2:]))
        return np.moveaxis(wide, 1, 0).reshape(array.shape[0], -1), taps
    return wide.reshape(len(wide), -1).T, 1


def columns(found: Channels, group: Group, role: Role, taps: int) -> npt.NDArray[np.int64]:
    """Return [units, columns] of an IN role's matrix, in the order of the group's units."""
    units = found.of(role.value, role.axis)
    assert units is not None
    places = np.flatnonzero(np.isin(units, group.units))
    order = np.argsort(units[places], kind="stable")
    per_unit = places[order].reshape(len(group), -1)
    return (per_unit[:, :, None] * taps + np.arange(taps)).reshape(len(group), -1)


def readers(found: Channels, group: Group, seen: Mapping[Role, Moments]) -> list[Reader]:
    """Return the layers that read a group; what they read counts alike where it was not seen."""
    made = []
    for role in group.of_kind("in"):
        weight, taps = matrix(role)
        moments = seen.get(role)
        inner = np.eye(weight.shape[1])
        if moments is not None and moments.covariance.shape[1] == weight.shape[1]:
            bias = _has_bias(role.node)
            inner = (moments.covariance if bias else moments.second)[0]
        made.append(Reader(weight, inner, columns(found, group, role, taps)))
    return made


def _has_bias(node: ir.Node) -> bool:
    form = layer_form(node)
    return form is not None and form.takes_bias


def order(
    found: Channels,
    group: Group,
    seen: Mapping[Role, Moments],
    saliency: Saliency,
    rng: np.random.Generator,
) -> Order:
    """Return the order in which a group's channels go."""
    if saliency == "obs" and group.of_kind("in"):
        done: Removal = removal(readers(found, group, seen))
        return Order(group, group.units[done.order], done.errors)
    scores = _SCORES[saliency](found, group, seen, rng)
    ranked = np.argsort(scores, kind="stable")
    total = float(scores.sum()) or 1.0
    errors = np.concatenate([[0.0], np.cumsum(scores[ranked])]) / total
    return Order(group, group.units[ranked], errors)


def _norms(power: int) -> Callable[..., Float]:
    def scores(found: Channels, group: Group, *_: object) -> Float:
        total = np.zeros(len(group))
        for role in group.of_kind("out"):
            array = constant(role.value)
            assert array is not None
            rows = np.moveaxis(np.abs(array.astype(np.float64)), role.axis, 0)
            norms = (rows.reshape(len(rows), -1) ** power).sum(1)
            mine = _per_unit(found, group, role, norms)
            total += mine / (mine.mean() or 1.0)
        return total

    return scores


def _per_unit(found: Channels, group: Group, role: Role, numbers: Float) -> Float:
    """Sum numbers per position of a role's axis over the positions of each unit."""
    units = found.of(role.value, role.axis)
    assert units is not None
    at = np.full(int(max(units.max(), group.units.max())) + 1, -1)
    at[group.units] = np.arange(len(group))
    mine = at[units]
    inside = mine >= 0
    summed: Float = np.bincount(mine[inside], numbers[inside], len(group)).astype(np.float64)
    return summed


def _batchnorm(found: Channels, group: Group, *rest: object) -> Float:
    """Return the magnitudes of the scales of batch norms that the group goes through."""
    total = np.zeros(len(group))
    for value in found.axes:
        for use in value.uses():
            if is_op(use.node, "BatchNormalization") and use.idx == 1:
                array = constant(value)
                units = found.of(value, 0)
                if array is not None and units is not None and np.isin(units, group.units).any():
                    at = {int(u): k for k, u in enumerate(group.units)}
                    for unit, scale in zip(units, np.abs(array), strict=True):
                        if int(unit) in at:
                            total[at[int(unit)]] += float(scale)
    return total if total.any() else _norms(2)(found, group)


def _activation(found: Channels, group: Group, seen: Mapping[Role, Moments], *_: object) -> Float:
    """Return |W_j|^2 E |x_j|^2 of what the readers do with each channel (Sun et al. 2023, "Wanda")."""
    total = np.zeros(len(group))
    for reader in readers(found, group, seen):
        each = np.square(reader.weight).sum(0) * np.diagonal(reader.moments)
        mine = each[reader.columns].sum(1)
        total += mine / (mine.mean() or 1.0)
    return total


def _random(found: Channels, group: Group, seen: object, rng: np.random.Generator) -> Float:
    return rng.random(len(group))


_SCORES: dict[str, Callable[..., Float]] = {
    "obs": _norms(2),
    "l1": _norms(1),
    "l2": _norms(2),
    "batchnorm": _batchnorm,
    "activation": _activation,
    "random": _random,
}


def needed(groups: Sequence[Group]) -> dict[Role, Rows]:
    """Return what has to be observed of the readers of groups, group after group."""
    found: dict[Role, Rows] = {}
    for group in groups:
        for role in group.of_kind("in"):
            rows = rows_for(role)
            if rows is not None:
                found[role] = rows
    return found
