"""The rows that a layer multiplies its weights with, cut out of what it reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Window:
    """How a convolution moves over its input, per spatial axis.

    Args:
        sizes: of the kernel.
        strides, dilations: as in ONNX.
        pads: begins, then ends; None for ``auto_pad``.
        auto_pad: SAME_UPPER or SAME_LOWER where ``pads`` is None.
    """

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...] | None
    auto_pad: str = "NOTSET"


@dataclass(frozen=True)
class Rows:
    """Where the rows of a layer come from.

    Args:
        value: the name of what it reads.
        width: numbers in a row, K.
        groups: how many sets of rows there are, each for its own outputs.
        window: of a convolution over [N, C, ...]; None for products over the last axis.
    """

    value: str
    width: int
    groups: int = 1
    window: Window | None = None

    def take(self, array: npt.NDArray[np.generic], most: int) -> Floats:
        """Return at most about ``most`` rows as [groups, rows, width], evenly spread.

        Padding counts: it is what the layer reads there.
        """
        data = np.asarray(array, np.float32)
        if self.window is None:
            return self.every(data.reshape(-1, self.width), most)[None]
        patches = _patches(data, self.window, most)
        count, channels = patches.shape[:2]
        grouped = patches.reshape(count, self.groups, channels // self.groups, -1)
        return np.ascontiguousarray(
            grouped.reshape(count, self.groups, self.width).transpose(1, 0, 2)
        )

    def every(self, places: Floats, most: int) -> Floats:
        """Return those of [places, ...] that ``take`` returns the rows of."""
        return places[:: _step(len(places), most)]


def _step(count: int, most: int) -> int:
    """Return an odd step: it does not fall in step with lengths and heights, mostly even."""
    return 1 if count <= most else (count // most) | 1


def _patches(data: Floats, window: Window, most: int) -> Floats:
    """Return what lies under the window at some of its places, [places, channels, *sizes]."""
    reach = [d * (k - 1) + 1 for k, d in zip(window.sizes, window.dilations, strict=True)]
    pads = window.pads or _same(data.shape[2:], reach, window)
    axes = len(window.sizes)
    wide = [(0, 0), (0, 0), *zip(pads[:axes], pads[axes:], strict=True)]
    padded = np.pad(data, wide) if any(pads) else data
    places = [
        (size - r) // s + 1
        for size, r, s in zip(padded.shape[2:], reach, window.strides, strict=True)
    ]
    grid = (data.shape[0], *places)
    count = int(np.prod(grid))
    batch, *along = np.unravel_index(np.arange(0, count, _step(count, most)), grid)
    spatial = tuple(range(2, 2 + axes))
    inside = (slice(None), slice(None), *[slice(None)] * axes)
    inside += tuple(slice(None, None, d) for d in window.dilations)
    under = np.lib.stride_tricks.sliding_window_view(padded, reach, spatial)[inside]
    starts = (a * s for a, s in zip(along, window.strides, strict=True))
    index: tuple[Any, ...] = (batch, slice(None), *starts)
    taken: Floats = under[index]
    return taken


def _same(sizes: tuple[int, ...], reach: list[int], window: Window) -> tuple[int, ...]:
    begins, ends = [], []
    for size, r, stride in zip(sizes, reach, window.strides, strict=True):
        total = max(0, (-(-size // stride) - 1) * stride + r - size)
        less, more = total // 2, total - total // 2
        begins.append(less if window.auto_pad == "SAME_UPPER" else more)
        ends.append(more if window.auto_pad == "SAME_UPPER" else less)
    return (*begins, *ends)
