"""Samples for a model's inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.generic]
Feed = dict[str, Array]
"""One input for a run: an array per graph input."""


@dataclass(frozen=True)
class Feeds:
    """A list of feeds, each ready for ``InferenceSession.run``.

    Args:
        batches: the feeds, in order.
        source: where they come from: a file name, or ``random``.
        real: False for random numbers, which are weak evidence about accuracy.
    """

    batches: tuple[Feed, ...]
    source: str
    real: bool

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Feed]:
        return iter(self.batches)

    def first(self, count: int) -> Feeds:
        """Return the first ``count`` feeds."""
        return Feeds(self.batches[:count], self.source, self.real)


def nbytes(feed: Mapping[str, Array]) -> int:
    """Return the bytes of all arrays of a feed."""
    return sum(a.nbytes for a in feed.values())
