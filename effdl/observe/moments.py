"""Second moments of what layers read, on calibration data."""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from effdl.data.feeds import Feeds
from effdl.measure.taps import chunks
from effdl.observe.kept import Kept
from effdl.observe.rows import Rows
from effdl.observe.tensors import tensors

K = TypeVar("K", bound=Hashable)
_LONG = 2.0
"""Seconds of a run over the data from which its statistics are kept for the next command."""
_ROWS_PER_INPUT = 8
"""Rows, per number in a row, that are looked at over all feeds; more add nothing."""
_LEAST_ROWS = 8192
"""Rows that are looked at over all feeds however short they are."""
MAX_BYTES = 512 << 20
"""Bytes that the moments of one group of layers may take."""


def rows_wanted(width: int) -> int:
    """Return how many rows of ``width`` numbers to look at over all feeds."""
    return max(_LEAST_ROWS, _ROWS_PER_INPUT * width)


@dataclass(frozen=True)
class Moments:
    """What is known of the rows x that a layer reads.

    Args:
        covariance: [groups, K, K], the mean of (x - mean) (x - mean)^T; empty where it was not asked for.
        mean: [groups, K], the mean of x.
        magnitude: [groups, K], the mean of |x|.
        rows: how many were looked at.
    """

    covariance: npt.NDArray[np.float64]
    mean: npt.NDArray[np.float64]
    magnitude: npt.NDArray[np.float64]
    rows: int

    @property
    def second(self) -> npt.NDArray[np.float64]:
        """[groups, K, K], the mean of x x^T."""
        if not self.covariance.size:
            return self.covariance
        return self.covariance + self.mean[:, :, None] * self.mean[:, None, :]


def moments(
    model: ir.Model,
    layers: Mapping[K, Rows],
    feeds: Feeds,
    *,
    second: bool = True,
    threads: int = 0,
    max_bytes: int = MAX_BYTES,
) -> Iterator[tuple[K, Moments]]:
    """Yield the moments of each layer, group after group, so that few are in memory at a time.

    Args:
        model: a float model; it is not changed.
        layers: what each reads, by any key.
        feeds: calibration samples.
        second: whether second moments are wanted, which cost K times as much as the others.
        threads: intra-op threads, 0 for ONNX Runtime's choice.
        max_bytes: of the moments of a group; the model runs over the data once for each group.

    A layer is left out whose input was not finite somewhere or held nothing, or whose second moments alone
    are more than ``MAX_BYTES``. What took long is kept in the user's cache, by the content of the data and
    of what computes the layer's input.

    Raises:
        ModelError: ONNX Runtime cannot load or run the model.
    """
    if not len(feeds):
        return
    kept = Kept(model, feeds) if second else None
    for group in _groups(layers, max_bytes) if second else [list(layers)]:
        known = {k: m for k in group if kept and (m := _recalled(kept, layers[k])) is not None}
        sums = {k: _Sums(layers[k], len(feeds), second) for k in group if k not in known}
        readers: dict[str, list[_Sums]] = {}
        for key, one in sums.items():
            readers.setdefault(layers[key].value, []).append(one)
        start = time.perf_counter()
        for name, array in tensors(model, list(readers), feeds, threads=threads):
            for reader in readers[name]:
                reader.add(array)
        seconds = time.perf_counter() - start
        for key in group:
            found = known.pop(key, None)
            if found is None:
                found = sums.pop(key).moments()
                if found is not None and kept is not None and seconds > _LONG:
                    _keep(kept, layers[key], found)
            if found is not None:
                yield key, found


def _recalled(kept: Kept, rows: Rows) -> Moments | None:
    found = kept.get(rows)
    if found is None:
        return None
    covariance, mean, magnitude = (
        np.asarray(found[name], np.float64) for name in ("covariance", "mean", "magnitude")
    )
    return Moments(covariance, mean, magnitude, int(found["rows"]))


def _keep(kept: Kept, rows: Rows, seen: Moments) -> None:
    found = {"mean": seen.mean, "magnitude": seen.magnitude, "rows": np.array(seen.rows)}
    kept.put(rows, {"covariance": seen.covariance.astype(np.float32), **found})


def moment_bytes(rows: Rows) -> int:
    """Return the bytes of the second moments of a layer."""
    return 8 * rows.groups * rows.width**2


def _groups(layers: Mapping[K, Rows], max_bytes: int) -> Iterator[list[K]]:
    sizes = {k: n for k, rows in layers.items() if (n := moment_bytes(rows)) <= MAX_BYTES}
    return chunks(sizes, sizes, max_bytes)


class _Sums:
    def __init__(self, source: Rows, feeds: int, second: bool) -> None:
        groups, width = source.groups, source.width
        self.source = source
        self.second = np.zeros((groups, width, width) if second else (0, 0, 0))
        self.first = np.zeros((groups, width))
        self.absolute = np.zeros((groups, width))
        self.rows = 0
        self.finite = True
        self._pivot = np.zeros((groups, 1, width), np.float32)
        self._waiting: list[npt.NDArray[np.float32]] = []
        self._most = -(-rows_wanted(width) // feeds)

    def add(self, array: npt.NDArray[np.generic]) -> None:
        if not self.finite or not array.size:
            return
        rows = self.source.take(array, self._most)
        if not np.isfinite(rows).all():
            self.finite = False
            return
        if not self.rows:
            self._pivot = rows.mean(1, keepdims=True)
        if self.second.size:
            # About their mean: the spread of large numbers is lost in squares of single precision.
            self._waiting.append(rows - self._pivot)
            if sum(r.shape[1] for r in self._waiting) >= self.source.width:
                self._multiply()
        self.first += rows.sum(1, dtype=np.float64)
        self.absolute += np.abs(rows).sum(1, dtype=np.float64)
        self.rows += rows.shape[1]

    def _multiply(self) -> None:
        """Add what waits: as many rows at a time as they are long, since a sum of K x K is not free."""
        rows = np.concatenate(self._waiting, axis=1)
        self._waiting.clear()
        self.second += rows.transpose(0, 2, 1) @ rows

    def moments(self) -> Moments | None:
        if not self.finite or not self.rows:
            return None
        if self._waiting:
            self._multiply()
        n, mean = self.rows, self.first / self.rows
        covariance = self.second / n
        if covariance.size:
            off = mean - self._pivot[:, 0]
            covariance -= off[:, :, None] * off[:, None, :]
            # As it is kept, so that what comes from the cache is the same; the products are single, too.
            with np.errstate(over="ignore"):
                covariance = covariance.astype(np.float32).astype(np.float64)
            if not np.isfinite(covariance).all():
                return None
        return Moments(covariance, mean, self.absolute / n, n)
