"""Samples for a model's inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.generic]
Feed = dict[str, Array]
"""One input for a run: an array per graph input."""
KEPT_BYTES = 256 << 20
"""Bytes of feeds that ``LazyFeeds`` keeps once they are made."""


@dataclass(frozen=True)
class Feeds:
    """A list of feeds, each ready for ``InferenceSession.run``.

    Args:
        batches: the feeds, in order; those of ``LazyFeeds`` are made when they are asked for.
        source: where they come from: a file name, or ``random``.
        real: False for random numbers, which are weak evidence about accuracy.
    """

    batches: Sequence[Feed]
    source: str
    real: bool

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Feed]:
        return iter(self.batches)

    def first(self, count: int) -> Feeds:
        """Return the first ``count`` feeds."""
        return Feeds(self.batches[:count], self.source, self.real)

    def some(self, count: int) -> Feeds:
        """Return at most ``count`` feeds, evenly spread."""
        if len(self) <= count:
            return self
        numbers = spread(len(self), count).tolist()
        return Feeds(_Chosen(self.batches, numbers), self.source, self.real)

    def split(self, every: int) -> tuple[Feeds, Feeds]:
        """Return the feeds without every ``every``-th one, and those; all and none where they are few."""
        numbers = range(len(self))
        if len(self) < 2 * every:
            return self, Feeds((), self.source, self.real)
        apart = [k for k in numbers if k % every == every - 1]
        rest = [k for k in numbers if k % every != every - 1]
        kept, held = (_Chosen(self.batches, n) for n in (rest, apart))
        return Feeds(kept, self.source, self.real), Feeds(held, self.source, self.real)


class _Chosen(Sequence[Feed]):
    """Some of a list of feeds, which are still made only when they are asked for."""

    def __init__(self, feeds: Sequence[Feed], numbers: Sequence[int]) -> None:
        self._feeds = feeds
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Feed: ...

    @overload
    def __getitem__(self, index: slice) -> _Chosen: ...

    def __getitem__(self, index: int | slice) -> Feed | _Chosen:
        if isinstance(index, slice):
            return _Chosen(self._feeds, self._numbers[index])
        return self._feeds[self._numbers[index]]


class LazyFeeds(Sequence[Feed]):
    """Feeds that are made when they are asked for, so that thousands of images need little memory.

    The first ones made are kept, up to ``KEPT_BYTES``: a second model need not read them again.

    Args:
        make: makes the feed of a number.
        numbers: which feeds, in order.
        kept: shared by the slices of one list.
    """

    def __init__(
        self, make: Callable[[int], Feed], numbers: Sequence[int], kept: _Kept | None = None
    ) -> None:
        self._make = make
        self._numbers = numbers
        self._kept = kept or _Kept()

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Feed: ...

    @overload
    def __getitem__(self, index: slice) -> LazyFeeds: ...

    def __getitem__(self, index: int | slice) -> Feed | LazyFeeds:
        if isinstance(index, slice):
            return LazyFeeds(self._make, self._numbers[index], self._kept)
        number = self._numbers[index]
        feed = self._kept.feeds.get(number)
        if feed is None:
            feed = self._make(number)
            self._kept.add(number, feed)
        return dict(feed)


class _Kept:
    """Feeds that were made already."""

    def __init__(self) -> None:
        self.feeds: dict[int, Feed] = {}
        self._bytes = 0

    def add(self, number: int, feed: Feed) -> None:
        size = nbytes(feed)
        if self._bytes + size <= KEPT_BYTES:
            self.feeds[number] = feed
            self._bytes += size


def nbytes(feed: Mapping[str, Array]) -> int:
    """Return the bytes of all arrays of a feed."""
    return sum(a.nbytes for a in feed.values())


def spread(count: int, limit: int | None) -> npt.NDArray[np.int64]:
    """Return the numbers of at most ``limit`` of ``count`` samples, spread evenly over all."""
    wanted = count if limit is None else min(limit, count)
    return np.arange(wanted, dtype=np.int64) * count // max(wanted, 1)
