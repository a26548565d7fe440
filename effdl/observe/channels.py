"""What the channels of tensors hold on calibration data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from effdl.data.feeds import Feeds
from effdl.observe import MAX_BYTES
from effdl.observe.tensors import tensors

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Channels:
    """Statistics per channel, each [C].

    Args:
        low, high: the least and the largest value.
        mean: of the values.
        square: the mean of their squares.
    """

    low: Array
    high: Array
    mean: Array
    square: Array

    def moved(self, factors: Array, shift: Array) -> Channels:
        """Return what (x - shift) / factors holds."""
        square = np.maximum(self.square - 2 * shift * self.mean + shift**2, 0.0)
        return Channels(
            (self.low - shift) / factors,
            (self.high - shift) / factors,
            (self.mean - shift) / factors,
            square / factors**2,
        )


def channels(
    model: ir.Model,
    axes: Mapping[str, int],
    feeds: Feeds,
    *,
    threads: int = 0,
    max_bytes: int = MAX_BYTES,
) -> dict[str, Channels]:
    """Return the statistics of each tensor; one that was not finite somewhere is left out.

    Args:
        model: is not changed.
        axes: the axis of the channels, by the name of a value of the main graph.
        feeds: calibration samples.
        threads: intra-op threads, 0 for ONNX Runtime's choice.
        max_bytes: of activations that are held at a time.

    Raises:
        ModelError: ONNX Runtime cannot load or run the model.
    """
    sums = {name: _Sums() for name in axes}
    if axes and len(feeds):
        for name, array in tensors(model, list(axes), feeds, threads=threads, max_bytes=max_bytes):
            sums[name].add(np.asarray(array), axes[name])
    done = {name: s.channels() for name, s in sums.items()}
    return {name: found for name, found in done.items() if found is not None}


class _Sums:
    def __init__(self) -> None:
        self.count = 0
        self.finite = True
        self.low = self.high = self.first = self.second = np.zeros(0)

    def add(self, array: npt.NDArray[np.generic], axis: int) -> None:
        if not array.size or not self.finite:
            return
        rows = np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1).astype(np.float64)
        low, high = rows.min(1), rows.max(1)
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            self.finite = False
            return
        first, second = rows.sum(1), np.square(rows).sum(1)
        if self.count:
            low, high = np.minimum(low, self.low), np.maximum(high, self.high)
            first, second = first + self.first, second + self.second
        self.low, self.high, self.first, self.second = low, high, first, second
        self.count += rows.shape[1]

    def channels(self) -> Channels | None:
        if not self.count or not self.finite:
            return None
        return Channels(self.low, self.high, self.first / self.count, self.second / self.count)
