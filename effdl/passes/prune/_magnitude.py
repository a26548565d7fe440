"""Which weights become zero by their magnitude alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from effdl.passes.prune._found import Weight
from effdl.solve import sparsity as solve
from effdl.solve.sparse_pattern import Blocks, Groups, Pattern


@dataclass(frozen=True)
class Choice:
    """What is zeroed together, and how its magnitude is told.

    Args:
        kind: single weights, n of m consecutive inputs, or blocks.
        n_m: n and m.
        block: outputs and inputs of a block.
        norm: mean magnitude or root mean square of a block.
    """

    kind: Literal["unstructured", "n:m", "block"]
    n_m: tuple[int, int]
    block: tuple[int, int]
    norm: Literal["l1", "l2"]

    def pattern(self, weight: Weight) -> Pattern:
        """Return the pattern in the view of a weight."""
        if self.kind == "n:m":
            return Groups(*self.n_m, weight.layout.summed)
        return Blocks(weight.layout.outputs, *(self.block if self.kind == "block" else (1, 1)))

    def scores(self, weight: Weight) -> solve.Scores:
        """Return the magnitudes of single weights, as they lie, or of blocks."""
        if self.kind == "block":
            viewed = weight.view()
            return solve.block_scores(viewed.reshape(len(viewed), -1), self.block, self.norm)
        return solve.magnitudes(weight.array())

    def size(self, weight: Weight) -> int:
        """Return how many blocks, or single weights, a weight has."""
        if self.kind != "block":
            return weight.tensor.size
        outputs, (height, width) = weight.layout.outputs, self.block
        return -(-outputs // height) * -(-(weight.tensor.size // outputs) // width)

    def zeros(self, weight: Weight) -> int:
        """Return how many of them are zero already."""
        return int((self.scores(weight) == 0).sum())

    def keep(self, weight: Weight, count: int) -> solve.Mask:
        """Return which elements stay when the ``count`` smallest go; n:m needs no count."""
        if self.kind == "n:m":
            return weight.shaped(solve.n_m_mask(weight.view(), *self.n_m))
        scores = self.scores(weight)
        keep, _ = solve.keep_above(scores, solve.find_cut(lambda: [scores], count))
        return self._elements(keep, weight)

    def keep_common(self, weights: Sequence[Weight], count: int) -> Iterator[solve.Mask]:
        """Yield per weight which elements stay when the ``count`` smallest of all go."""
        cut = solve.find_cut(lambda: map(self.scores, weights), count)
        for weight in weights:
            keep, cut = solve.keep_above(self.scores(weight), cut)
            yield self._elements(keep, weight)

    def _elements(self, keep: solve.Mask, weight: Weight) -> solve.Mask:
        if self.kind != "block":
            return keep
        flat = (weight.layout.outputs, weight.tensor.size // weight.layout.outputs)
        return weight.shaped(solve.spread_blocks(keep, self.block, flat))
