"""Numbers for the positions along axes of tensors, and which of them go together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Units:
    """Sets of positions that can only be removed together.

    Args:
        of: [labels], the unit of each label, numbered from 0.
        frozen: [units], the number of the reason why a unit stays, -1 for one that can go.
        reasons: what the numbers mean.
    """

    of: Ints
    frozen: Ints
    reasons: tuple[str, ...]


class Labels:
    """Hands out labels, one for each position of an axis, and remembers what ties them."""

    def __init__(self) -> None:
        self._count = 0
        self._ties: list[tuple[Ints, Ints]] = []
        self._frozen: list[tuple[Ints, int]] = []
        self._reasons: dict[str, int] = {}

    def fresh(self, count: int) -> Ints:
        """Return ``count`` new labels."""
        self._count += count
        return np.arange(self._count - count, self._count, dtype=np.int64)

    def tie(self, left: Ints, right: Ints) -> None:
        """Let labels go together, one by one (shapes are broadcast)."""
        a, b = np.broadcast_arrays(left, right)
        self._ties.append((a.reshape(-1), b.reshape(-1)))

    def freeze(self, labels: Ints, reason: str) -> None:
        """Let labels stay whatever comes."""
        number = self._reasons.setdefault(reason, len(self._reasons))
        self._frozen.append((labels.reshape(-1), number))

    def units(self) -> Units:
        """Return the sets of labels that are tied, directly or through others.

        Source: connected components by hooking and pointer jumping (Shiloach and Vishkin 1982).
        """
        root = np.arange(self._count, dtype=np.int64)
        if self._ties:
            left, right = (np.concatenate(side) for side in zip(*self._ties, strict=True))
            while True:
                a, b = root[left], root[right]
                low, high = np.minimum(a, b), np.maximum(a, b)
                if np.array_equal(low, high):
                    break
                np.minimum.at(root, high, low)
                while not np.array_equal(root, up := root[root]):
                    root = up
        heads, of = np.unique(root, return_inverse=True)
        frozen = np.full(len(heads), -1, np.int64)
        for labels, number in reversed(self._frozen):  # the first reason is the one that is told
            frozen[of[labels]] = number
        return Units(of.reshape(-1).astype(np.int64), frozen, tuple(self._reasons))
