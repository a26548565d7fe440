"""What becomes zero together: single weights or blocks of them by count, or m - n of every m inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from effdl.solve.sparsity import Mask, block_scores, find_cut, keep_above, n_m_mask, spread_blocks

Scores = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Blocks:
    """The blocks of lowest mean score become zero; single weights are blocks of 1 x 1.

    Args:
        outputs: of the layer: scores are cut as [outputs, the rest].
        height, width: outputs and inputs of a block; those at the edges may be smaller.
    """

    outputs: int
    height: int = 1
    width: int = 1

    @property
    def single(self) -> bool:
        """Whether blocks are single weights."""
        return self.height == self.width == 1

    def means(self, scores: Scores) -> npt.NDArray[np.float32]:
        """Return the mean score of every block."""
        rows = scores.reshape(self.outputs, -1)
        if self.single:
            return rows.astype(np.float32)
        return block_scores(rows, (self.height, self.width))

    def drop(self, scores: Scores, count: int) -> Mask:
        """Return True for the ``count`` blocks of lowest scores, in the shape of ``scores``."""
        means = self.means(scores)
        keep, _ = keep_above(means, find_cut(lambda: [means], count))
        return self.spread(~keep, scores)

    def spread(self, chosen: Mask, like: Scores) -> Mask:
        """Return the mask of the elements of the blocks chosen, in the shape of ``like``."""
        if self.single:
            return chosen.reshape(like.shape)
        flat = (self.outputs, like.size // self.outputs)
        return spread_blocks(chosen, (self.height, self.width), flat).reshape(like.shape)


@dataclass(frozen=True)
class Groups:
    """Of every m consecutive inputs, the n of largest scores stay.

    Args:
        n, m: see above; of a shorter group of r inputs at the end of a run ``ceil(r * n / m)`` stay.
        run: inputs after which groups start anew.
    """

    n: int
    m: int
    run: int

    def drop(self, scores: Scores, count: int = 0) -> Mask:
        """Return True for what becomes zero, in the shape of ``scores``; the count follows from n and m."""
        return ~n_m_mask(scores.reshape(-1, self.run), self.n, self.m).reshape(scores.shape)

    def bounds(self, inputs: int) -> list[tuple[int, int, int]]:
        """Return start, end and the number to drop of every group of ``inputs`` columns."""
        found = []
        for first in range(0, inputs, self.run):
            for start in range(first, first + self.run, self.m):
                size = min(self.m, first + self.run - start)
                found.append((start, start + size, size - -(-size * self.n // self.m)))
        return found


Pattern = Blocks | Groups
