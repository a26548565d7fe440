"""Weights whose inputs were seen: what pruning them does to their outputs, and what makes up for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from effdl.graph.bias import Bias, bias_of
from effdl.graph.walk import is_op
from effdl.graph.weights import Names
from effdl.measure.taps import chunks
from effdl.observe.layers import rows_of
from effdl.observe.moments import Moments, moment_bytes, moments
from effdl.observe.rows import Rows
from effdl.passes.base import Context
from effdl.passes.prune._found import Weight
from effdl.passes.prune._shares import LEVELS
from effdl.solve import sparse_admm, sparse_obs
from effdl.solve.sparse_pattern import Blocks, Pattern

Array = npt.NDArray[Any]
Method = Literal["wanda", "obs", "admm"]
_HELD_OUT = 5
"""Every so many feeds, one is kept to judge by."""


@dataclass(frozen=True)
class Layer:
    """A weight, the rows it is multiplied with and the bias that can take up what it loses on average."""

    weight: Weight
    rows: Rows
    bias: Bias | None

    def matrix(self) -> Array:
        """Return the weight as [groups, outputs, K], K in the order of the layout's view."""
        return self.weight.view().reshape(self.rows.groups, -1, self.rows.width)

    def inputs(self, seen: Moments) -> tuple[Array, Array]:
        """Return second moments [groups, K, K] that count for errors, and means [groups, K]."""
        second = seen.covariance if self.bias is not None else seen.second
        mean, positions = seen.mean, self.weight.view().shape[1]
        channels = self.rows.width // positions
        if (
            positions > 1
            and channels * positions == self.rows.width
            and self.rows.window is not None
        ):
            if is_op(self.weight.users[0], "ConvTranspose"):
                return second, mean
            order = np.arange(self.rows.width).reshape(channels, positions).T.ravel()
            return second[:, order[:, None], order[None]], mean[:, order]
        return second, mean


def layer_of(weight: Weight, model: ir.Model) -> Layer | str:
    """Return the layer of a weight, or why what it reads cannot be told."""
    node = weight.users[0]
    if len(weight.users) > 1:
        return "has several users"
    if is_op(node, "Gather"):
        return "is a table"
    if is_op(node, "LSTM", "GRU", "RNN"):
        return "is recurrent"
    if node.graph is not model.graph:
        return "is in a subgraph"
    rows = rows_of(node) if weight.index == 1 else None
    size = weight.tensor.size
    if rows is None or size % (rows.groups * rows.width):
        return "has rows that cannot be told"
    return Layer(weight, rows, bias_of(node, weight.layout.outputs))


def observed(
    model: ir.Model, layers: Mapping[int, Layer], ctx: Context
) -> Iterator[tuple[int, Moments, Moments | None]]:
    """Yield the moments of every layer's inputs, and those of feeds held out where there are enough."""
    assert ctx.feeds is not None
    fitted, held = ctx.feeds.split(_HELD_OUT)
    sizes = {key: moment_bytes(layer.rows) for key, layer in layers.items()}
    for stage in chunks(layers, sizes, ctx.max_bytes // 2):
        rows = {key: layers[key].rows for key in stage}
        look = partial(moments, model, rows, threads=ctx.target.threads, max_bytes=ctx.max_bytes)
        judges = dict(look(held)) if len(held) else {}
        for key, seen in look(fitted):
            yield key, seen, judges.pop(key, None)


@dataclass(frozen=True)
class Pruned:
    """What became of a layer.

    Args:
        matrix: the new weight, [groups, outputs, K].
        error: squared change of the outputs relative to them, on samples held out where there are any.
        mean_change: [outputs], by which the outputs fall on average.
    """

    matrix: Array
    error: float
    mean_change: Array


def prune(
    layer: Layer,
    seen: Moments,
    judge: Moments | None,
    method: Method,
    pattern: Pattern,
    count: int,
) -> Pruned:
    """Return the layer with ``count`` blocks of zeros: the best of several ways, as held-out samples say."""
    weight = layer.matrix().astype(np.float64)
    second, mean = layer.inputs(seen)
    measure = layer.inputs(judge)[0] if judge is not None else second
    plain = np.where(pattern.drop(np.abs(weight), count), 0.0, weight)
    ways = [_solved(weight, second, method, pattern, count)]
    ways.append(sparse_admm.refit(weight, ways[0], second))
    errors = [sparse_admm.change(weight, w, measure) for w in (*ways, plain)]
    best = int(np.argmin(errors)) if judge is not None else 1
    new = (*ways, plain)[best].astype(layer.weight.array().dtype)
    lost = np.einsum("gnk,gk->gn", weight - new, mean).ravel()
    return Pruned(new, errors[best], lost)


def _solved(weight: Array, second: Array, method: Method, pattern: Pattern, count: int) -> Array:
    drop: Callable[[Array], Array] = partial(pattern.drop, count=count)
    if method == "admm":
        return sparse_admm.admm(weight, second, drop)
    if method == "wanda":
        scores = np.stack(
            [sparse_obs.wanda_scores(w, h) for w, h in zip(weight, second, strict=True)]
        )
        return np.where(_by_row(scores, pattern, count), 0.0, weight)
    known = [sparse_obs.curvature(h) for h in second]
    scores = np.stack([sparse_obs.saliency(w, k) for w, k in zip(weight, known, strict=True)])
    if not isinstance(pattern, Blocks):
        return np.stack(
            [
                sparse_obs.sweep(w, k, pattern, [0] * len(sparse_obs.panels(pattern, w.shape[1])))
                for w, k in zip(weight, known, strict=True)
            ]
        )
    if not pattern.single and weight.shape[:2] != (1, pattern.outputs):
        return np.where(drop(scores), 0.0, weight)  # blocks lie across the rows of groups
    counts = sparse_obs.quotas(list(scores), pattern, count)
    swept = [
        sparse_obs.sweep(w, k, pattern, c) for w, k, c in zip(weight, known, counts, strict=True)
    ]
    return np.stack(swept)


def _by_row(scores: Array, pattern: Pattern, count: int) -> Array:
    """Return what becomes zero, single weights the same share of every row."""
    if not isinstance(pattern, Blocks) or not pattern.single:
        return pattern.drop(scores, count)
    rows = scores.reshape(-1, scores.shape[2])
    least = count // len(rows)
    order = np.argsort(rows, axis=1, kind="stable")
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.arange(rows.shape[1])[None], axis=1)
    # Of what is left over, the lowest: as many rows lose one more as make up the count.
    urgency = np.where(ranks < least, 0.0, np.where(ranks == least, rows, np.inf))
    return Blocks(len(rows)).drop(urgency, count).reshape(scores.shape)


def path(layer: Layer, seen: Moments, pattern: Blocks, size: int) -> list[float]:
    """Return the errors at every one of ``LEVELS`` shares of zeros."""
    drops = [partial(pattern.drop, count=round(level * size)) for level in LEVELS[1:]]
    second, _ = layer.inputs(seen)
    return [0.0, *sparse_admm.path(layer.matrix().astype(np.float64), second, drops)]


def saliency(layer: Layer, seen: Moments) -> Array:
    """Return the scores of single weights relative to the energy of the layer's outputs."""
    weight, (second, _) = layer.matrix().astype(np.float64), layer.inputs(seen)
    scores = np.stack(
        [
            sparse_obs.saliency(w, sparse_obs.curvature(h))
            for w, h in zip(weight, second, strict=True)
        ]
    )
    energy = float(np.einsum("gnk,gnk->", weight @ second, weight))
    found: Array = scores / energy if energy > 0 else scores
    return found


def correct(layer: Layer, new: Pruned, names: Names) -> None:
    """Let the bias take up what the outputs lose on average."""
    if layer.bias is not None:
        layer.bias.shift(new.mean_change, names)
