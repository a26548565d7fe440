"""What a layer reads in two versions of a model, compared on calibration data."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from effdl.data.feeds import Feeds
from effdl.observe.moments import rows_wanted
from effdl.observe.rows import Floats, Rows
from effdl.observe.tensors import tensors

Doubles = npt.NDArray[np.float64]


_LEAST_FEEDS = 128
"""Feeds that are looked at where fewer would give rows enough."""


@dataclass(frozen=True)
class Drift:
    """Joint moments of the rows x that a layer read and the rows z that it reads now.

    Args:
        covariance: [groups, K, K], of z.
        cross: [groups, K, K], the mean of (x - mean) (z - moved)^T.
        mean: [groups, K], of x.
        moved: [groups, K], of z.
    """

    covariance: Doubles
    cross: Doubles
    mean: Doubles
    moved: Doubles


def drift(
    before: ir.Model, after: ir.Model, rows: Rows, feeds: Feeds, *, threads: int = 0
) -> Drift | None:
    """Return what is known of a layer's inputs in both models; None where they are not finite.

    Args:
        before, after: models with the value that ``rows`` names, in the same shape.
        rows: of the layer.
        feeds: calibration samples.
        threads: intra-op threads, 0 for ONNX Runtime's choice.

    Raises:
        ModelError: ONNX Runtime cannot load or run a model.
    """
    wanted = rows_wanted(rows.width)
    (_, first), *_ = tensors(before, [rows.value], feeds.first(1), threads=threads)
    each = max(1, rows.take(first, wanted).shape[1])
    feeds = feeds.some(max(_LEAST_FEEDS, -(-wanted // each)))
    most = -(-wanted // len(feeds))
    pairs = zip(
        tensors(before, [rows.value], feeds, threads=threads),
        tensors(after, [rows.value], feeds, threads=threads),
        strict=True,
    )
    sums = _Sums(rows)
    for (_, old), (_, new) in pairs:
        x, z = rows.take(old, most), rows.take(new, most)
        if not (np.isfinite(x).all() and np.isfinite(z).all()):
            return None
        sums.add(x, z)
    return sums.drift()


class _Sums:
    def __init__(self, rows: Rows) -> None:
        size = (rows.groups, rows.width)
        self.square, self.cross = np.zeros((*size, rows.width)), np.zeros((*size, rows.width))
        self.mean, self.moved = np.zeros(size), np.zeros(size)
        self.count = 0
        self._pivot = np.zeros((rows.groups, 1, rows.width), np.float32)
        self._waiting: list[tuple[Floats, Floats]] = []

    def add(self, x: Floats, z: Floats) -> None:
        if not x.shape[1]:
            return
        if not self.count:  # the spread of large numbers is lost in squares of single precision
            self._pivot = x.mean(1, keepdims=True)
        x, z = x - self._pivot, z - self._pivot
        self.mean += x.sum(1, dtype=np.float64)
        self.moved += z.sum(1, dtype=np.float64)
        self.count += x.shape[1]
        self._waiting.append((x, z))
        if sum(x.shape[1] for x, _ in self._waiting) >= x.shape[2]:
            self._multiply()

    def _multiply(self) -> None:
        """Add what waits: as many rows at a time as they are long, since a sum of K x K is not free."""
        x, z = (np.concatenate(part, axis=1) for part in zip(*self._waiting, strict=True))
        self._waiting.clear()
        self.square += z.transpose(0, 2, 1) @ z
        self.cross += x.transpose(0, 2, 1) @ z

    def drift(self) -> Drift | None:
        if not self.count:
            return None
        if self._waiting:
            self._multiply()
        mean, moved = self.mean / self.count, self.moved / self.count
        square = self.square / self.count - moved[:, :, None] * moved[:, None, :]
        cross = self.cross / self.count - mean[:, :, None] * moved[:, None, :]
        pivot = self._pivot[:, 0]
        return Drift(square, cross, mean + pivot, moved + pivot)
