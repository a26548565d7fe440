"""Zeros in all weights of a model, chosen by what their inputs look like."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from effdl.passes.base import Context
from effdl.passes.prune import _shares
from effdl.passes.prune._found import Weight
from effdl.passes.prune._magnitude import Choice
from effdl.passes.prune._seen import (
    Layer,
    Method,
    Pruned,
    layer_of,
    observed,
    path,
    prune,
    saliency,
)
from effdl.solve.sparse_pattern import Blocks
from effdl.solve.sparsity import find_cut, keep_above

Array = npt.NDArray[Any]


@dataclass
class Outcome:
    """What becomes of the weights, by their numbers.

    Args:
        new: the new constants.
        layers: those of them whose inputs were seen, and what pruning does to them.
        blind: why the others went by magnitude.
    """

    new: dict[int, Array] = field(default_factory=dict)
    layers: dict[int, tuple[Layer, Pruned]] = field(default_factory=dict)
    blind: dict[int, str] = field(default_factory=dict)

    def tell(self, ctx: Context) -> None:
        """Note the errors, and what went by magnitude."""
        if self.layers:
            errors = [p.error for _, p in self.layers.values()]
            ctx.note("mean_layer_error", round(float(np.mean(errors)), 4))
            ctx.note("largest_layer_error", round(max(errors), 4))
        reasons = Counter(self.blind[k] for k in self.new if k in self.blind)
        if reasons:
            ctx.note("by_magnitude", ", ".join(f"{n} {why}" for why, n in sorted(reasons.items())))


@dataclass(frozen=True)
class ByData:
    """The options of the pass that count where there is data.

    Args:
        choice: what is zeroed together.
        method: how zeros are chosen.
        scope: how they are shared out among weights.
        share: of zeros.
    """

    choice: Choice
    method: Method
    scope: str
    share: float

    def run(self, found: Sequence[Weight], model: ir.Model, ctx: Context) -> Outcome:
        """Return the new weights; the model stays as it is."""
        outcome, layers = Outcome(), dict[int, Layer]()
        for k, weight in enumerate(found):
            layer = layer_of(weight, model)
            if isinstance(layer, str):
                outcome.blind[k] = layer
            else:
                layers[k] = layer
        counts = self._counts(found, layers, model, ctx)
        wanting = [k for k, w in enumerate(found) if not self._done(w, counts[k])]
        look = {k: layers[k] for k in wanting if k in layers}
        for k, seen, judge in observed(model, look, ctx):
            pattern = self.choice.pattern(found[k])
            result = prune(layers[k], seen, judge, self.method, pattern, counts[k])
            outcome.new[k] = found[k].shaped(result.matrix)
            outcome.layers[k] = layers[k], result
        for k in wanting:
            if k not in outcome.new:
                keep = self.choice.keep(found[k], counts[k])
                outcome.new[k] = zeroed(found[k], keep)
                outcome.blind.setdefault(k, "with inputs too wide or not finite")
        return outcome

    def _done(self, weight: Weight, count: int) -> bool:
        """Whether a weight has the zeros asked for."""
        if self.choice.kind == "n:m":
            return not weight.array()[~self.choice.keep(weight, 0)].any()
        return self.choice.zeros(weight) >= count

    def _counts(
        self, found: Sequence[Weight], layers: Mapping[int, Layer], model: ir.Model, ctx: Context
    ) -> list[int]:
        sizes = [self.choice.size(w) for w in found]
        if self.scope == "erk":
            return _shares.erk(found, sizes, self.share)
        counts = _shares.uniform(sizes, self.share)
        if self.scope == "layer" or self.choice.kind == "n:m":
            return counts
        total = round(self.share * sum(sizes))
        if sum(self.choice.zeros(w) for w in found) >= total:
            return [0] * len(found)
        known: dict[int, Any] = {}
        for k, seen, _ in observed(model, layers, ctx):
            pattern = self.choice.pattern(found[k])
            assert isinstance(pattern, Blocks)
            if self.scope == "plan":
                known[k] = path(layers[k], seen, pattern, sizes[k])
            else:
                known[k] = pattern.means(saliency(layers[k], seen))
        left = total - sum(n for k, n in enumerate(counts) if k not in known)
        if self.scope == "plan":
            share_out = _shares.planned(list(known.values()), [sizes[k] for k in known], left)
        else:
            share_out = _common(list(known.values()), left)
        for k, n in zip(known, share_out, strict=True):
            counts[k] = n
        return counts


def _common(scores: Sequence[npt.NDArray[np.float32]], count: int) -> list[int]:
    """Return how many of each are among the ``count`` lowest of all."""
    cut, found = find_cut(lambda: scores, count), []
    for part in scores:
        keep, cut = keep_above(part, cut)
        found.append(int((~keep).sum()))
    return found


def zeroed(weight: Weight, keep: npt.NDArray[np.bool_]) -> Array:
    """Return a weight without what does not stay."""
    array = weight.array()
    return np.where(keep, array, np.zeros((), array.dtype))
