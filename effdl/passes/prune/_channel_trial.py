"""What removing a part of one group alone does to the outputs of the model."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from effdl.data.feeds import Feeds
from effdl.graph.channels import Channels, Role
from effdl.graph.walk import is_op
from effdl.graph.weights import Names, constant, replace_weight
from effdl.observe.moments import Moments
from effdl.passes._layer_form import layer_form
from effdl.passes.prune._channel_order import Order, readers
from effdl.runtime.session import open_session
from effdl.runtime.target import Target
from effdl.solve.obs import weight_after

Float = npt.NDArray[np.float64]
LEVELS = (0.4, 0.7)
"""Shares of a group that trials remove."""


class Trials:
    """Outputs of a model on a few feeds, and of copies of it with something removed.

    Args:
        model: is not changed.
        feeds: to run it on.
        target: where to run.
    """

    def __init__(self, model: ir.Model, feeds: Feeds, target: Target) -> None:
        self.model = model
        self.feeds = feeds
        self.target = target
        self.wanted = self._run(model)

    def _run(self, model: ir.Model) -> list[dict[str, Float]]:
        session = open_session(model, self.target)
        return [
            {
                name: np.asarray(array, np.float64)
                for name, array in session.run(feed).items()
                if np.issubdtype(np.asarray(array).dtype, np.floating)
            }
            for feed in self.feeds
        ]

    def error(self, model: ir.Model) -> float:
        """Return the squared error of the outputs, relative to how much they vary; the worst output's."""
        got = self._run(model)
        worst = 0.0
        for name in self.wanted[0]:
            wrong = sum(
                float(np.sum((a[name] - b[name]) ** 2))
                for a, b in zip(self.wanted, got, strict=True)
            )
            right = np.concatenate([a[name].reshape(-1) for a in self.wanted])
            spread = float(np.sum((right - right.mean()) ** 2)) or 1.0
            worst = max(worst, wrong / spread)
        return worst if np.isfinite(worst) else 1e9

    def curve(
        self, order: Order, found: Channels, seen: Mapping[Role, Moments]
    ) -> tuple[list[float], list[float]]:
        """Return errors of a group's readers, and what each does to the model's outputs."""
        inner, outer = [0.0], [0.0]
        for level in LEVELS:
            gone = int(level * len(order.units))
            if gone and order.errors[gone] > inner[-1]:
                copy = self.model.clone()
                do_without(copy, self.model, order, gone, found, seen)
                inner.append(float(order.errors[gone]))
                outer.append(max(outer[-1], self.error(copy)))
        return inner, outer


def do_without(
    copy: ir.Model,
    model: ir.Model,
    order: Order,
    gone: int,
    found: Channels,
    seen: Mapping[Role, Moments],
) -> None:
    """Let the readers in a copy do without the first units of an order, as well as they can."""
    group = order.group
    kept = ~np.isin(group.units, order.units[:gone])
    nodes = dict(zip(model.graph, copy.graph, strict=True))
    names = Names(copy)
    for role, reader in zip(group.of_kind("in"), readers(found, group, seen), strict=True):
        every = np.ones(reader.weight.shape[1], bool)
        every[reader.columns[~kept].reshape(-1)] = False
        stay = np.flatnonzero(every)
        made = np.zeros_like(reader.weight)
        known = role in seen
        made[:, stay] = weight_after(reader, stay) if known else reader.weight[:, stay]
        node = nodes[role.node]
        write(node, role, made, names)
        form = layer_form(node)
        if known and form is not None and form.bias is not None:
            change = (reader.weight - made) @ seen[role].mean[0]
            form.bias.shift(change, names)


def write(node: ir.Node, role: Role, weight: Float, names: Names) -> None:
    """Write the matrix of an IN role back, the inverse of ``matrix``."""
    array = constant(node.inputs[role.index])
    assert array is not None
    if is_op(node, "Conv"):
        made = weight.reshape(array.shape)
    else:
        wide = list(array.shape)
        first = wide.pop(role.axis)
        made = np.moveaxis(weight.T.reshape(first, *wide), 0, role.axis)
    replace_weight(node, role.index, np.ascontiguousarray(made, array.dtype), names)
