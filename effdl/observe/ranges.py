"""What values the tensors of a model take on calibration data, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from effdl.data.feeds import Feeds
from effdl.observe import MAX_BYTES
from effdl.observe.tensors import tensors
from effdl.solve.ranges import Histogram

BINS = 4096
_SAMPLES = 1 << 23
"""Values per tensor that go into its histogram, over all feeds."""
_LEAST_SAMPLES = 4096


def collect(
    model: ir.Model,
    names: Sequence[str],
    feeds: Feeds,
    *,
    threads: int = 0,
    max_bytes: int = MAX_BYTES,
) -> dict[str, Histogram]:
    """Run the model over the feeds and return a histogram per float tensor of ``names``.

    The activations of one feed are in memory at a time, and of them at most ``max_bytes`` (but at
    least one tensor). Minimum and maximum are exact; the bins hold an evenly spaced subsample of
    large tensors. A tensor that was not finite somewhere, or held nothing, is left out.

    Args:
        model: a float model; it is not changed.
        names: values of its main graph: graph inputs or outputs of nodes.
        feeds: calibration samples.
        threads: intra-op threads, 0 for ONNX Runtime's choice.
        max_bytes: see above.

    Raises:
        ModelError: ONNX Runtime cannot load or run the model.
    """
    if not names or not len(feeds):
        return {}
    wanted = list(dict.fromkeys(names))
    running = {name: _Growing() for name in wanted}
    per_feed = max(_LEAST_SAMPLES, _SAMPLES // len(feeds))
    for name, array in tensors(model, wanted, feeds, threads=threads, max_bytes=max_bytes):
        running[name].add(array, per_feed)
    done = {name: r.histogram() for name, r in running.items()}
    return {name: h for name, h in done.items() if h is not None}


class _Growing:
    """A histogram whose range doubles when a value falls outside: one pass is enough."""

    def __init__(self, bins: int = BINS) -> None:
        self.counts = np.zeros(bins)
        self.low = self.high = 0.0
        self.minimum, self.maximum = math.inf, -math.inf
        self.finite = True

    def add(self, array: npt.NDArray[np.generic], samples: int) -> None:
        flat = array.reshape(-1)
        if not flat.size or not self.finite:
            return
        least, most = float(flat.min()), float(flat.max())
        if not (math.isfinite(least) and math.isfinite(most)):
            self.finite = False
            return
        self.minimum, self.maximum = min(self.minimum, least), max(self.maximum, most)
        self._cover(least, most)
        if flat.size > samples:
            # An odd step does not fall in step with widths and channel counts, mostly even.
            flat = flat[:: (flat.size // samples) | 1]
        bins = self.counts.size
        width = (self.high - self.low) / bins
        position = (
            (flat.astype(np.float64) - self.low) / width if width > 0 else np.zeros(flat.size)
        )
        index = np.clip(position.astype(np.int64), 0, bins - 1)
        self.counts += np.bincount(index, minlength=bins)

    def _cover(self, least: float, most: float) -> None:
        """Double the range, merging bins in pairs, until it holds [least, most] and 0."""
        least, most = min(least, 0.0), max(most, 0.0)
        if self.low == self.high:
            if least == most:
                return  # nothing but zeros so far: they stay in the first bin
            zeros = self.counts.sum()
            self.low, self.high = least, most
            self.counts[:] = 0
            place = int(-least / (most - least) * self.counts.size)
            self.counts[min(place, self.counts.size - 1)] = zeros
            return
        half = self.counts.size // 2
        while self.low > least or self.high < most:
            merged = self.counts.reshape(half, 2).sum(axis=1)
            self.counts = np.zeros(2 * half)
            if self.high < most:
                self.counts[:half] = merged
                self.high += self.high - self.low
            else:
                self.counts[half:] = merged
                self.low -= self.high - self.low

    def histogram(self) -> Histogram | None:
        if not self.finite or not self.counts.any():
            return None
        return Histogram(self.counts, self.low, self.high, self.minimum, self.maximum)
