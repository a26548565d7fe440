"""Which weights become zero: magnitude over one or many tensors, N:M groups, blocks.

Every choice is exact and deterministic: equal magnitudes go in order of their position. Zeros have
the smallest score, so that choosing again on a pruned tensor chooses the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Scores = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
_CHUNK = 1 << 22  # elements looked at together: bounds the memory for tensors of gigabytes


@dataclass(frozen=True)
class Cut:
    """Where the smallest scores end.

    Args:
        bits: bit pattern of the float32 score at which to cut: smaller ones are dropped.
        ties: how many of the scores equal to it are dropped, the first ones in order.
    """

    bits: int
    ties: int


def magnitudes(weights: npt.NDArray[Any]) -> Scores:
    """Return the absolute values of ``weights`` as float32, keeping every non-zero above zero."""
    with np.errstate(over="ignore", under="ignore"):
        scores: Scores = np.abs(weights).astype(np.float32)
    if weights.dtype.itemsize > 4:
        tiny = np.finfo(np.float32).smallest_subnormal
        scores = np.where((scores == 0) & (weights != 0), tiny, scores)
    return scores


def find_cut(source: Callable[[], Iterable[Scores]], count: int) -> Cut:
    """Return the cut below which exactly ``count`` of all scores lie, in two passes over them.

    Non-negative floats order like their bit patterns, so a histogram of the upper 16 bits finds the
    bin of the ``count``-th smallest score, and one of the lower 16 bits within it the score itself.

    Args:
        source: called twice, yields the arrays of scores in the same order (any shapes, NaN last).
        count: number of scores to drop, at most as many as there are.
    """
    if count == 0:
        return Cut(0, 0)
    upper = np.zeros(1 << 16, np.int64)
    for part in _bit_chunks(source()):
        upper += np.bincount(part >> 16, minlength=1 << 16)
    total = np.cumsum(upper)
    if count > total[-1]:
        raise ValueError(f"{count} of {total[-1]} scores")
    high = int(np.searchsorted(total, count))
    rest = count - int(total[high] - upper[high])
    lower = np.zeros(1 << 16, np.int64)
    for part in _bit_chunks(source()):
        lower += np.bincount(part[part >> 16 == high] & 0xFFFF, minlength=1 << 16)
    total = np.cumsum(lower)
    low = int(np.searchsorted(total, rest))
    return Cut(high << 16 | low, rest - int(total[low] - lower[low]))


def keep_above(scores: Scores, cut: Cut) -> tuple[Mask, Cut]:
    """Return the mask of what ``cut`` keeps of ``scores``, and the cut for the arrays that follow."""
    bits = _bits(scores)
    keep: Mask = bits > cut.bits
    equal = np.flatnonzero(bits == cut.bits)
    keep.flat[equal[cut.ties :]] = True
    return keep, Cut(cut.bits, cut.ties - min(cut.ties, len(equal)))


def unstructured_mask(weights: npt.NDArray[Any], sparsity: float) -> Mask:
    """Return True for the weights to keep: all but the ``round(sparsity * n)`` smallest magnitudes.

    Source: Han et al. 2015, "Learning both Weights and Connections", section 3.
    """
    scores = magnitudes(weights)
    return keep_above(scores, find_cut(lambda: [scores], round(sparsity * scores.size)))[0]


def n_m_mask(weights: npt.NDArray[Any], n: int, m: int) -> Mask:
    """Return True for the ``n`` largest magnitudes of every ``m`` consecutive ones of the last axis.

    A shorter group of r weights at the end of the axis keeps the ``ceil(r * n / m)`` largest.

    Source: Mishra et al. 2021, "Accelerating Sparse Deep Neural Networks", section 3.
    """
    length = weights.shape[-1]
    whole = length - length % m
    keep = np.ones(weights.shape, bool)
    rows, out = weights.reshape(-1, length), keep.reshape(-1, length)
    step = max(1, _CHUNK // max(length, 1))
    for i in range(0, len(rows), step):
        part = rows[i : i + step]
        groups = part[:, :whole].reshape(-1, m)
        out[i : i + step, :whole] = _largest(groups, n).reshape(len(part), whole)
        out[i : i + step, whole:] = _largest(part[:, whole:], -((whole - length) * n // m))
    return keep


def block_scores(
    matrix: npt.NDArray[Any], block: tuple[int, int], norm: Literal["l1", "l2"] = "l1"
) -> Scores:
    """Return the mean magnitude (l1) or the root mean square (l2) of every block of ``matrix``.

    Args:
        matrix: [rows, columns].
        block: rows and columns of a block; those at the lower and right edge may be smaller.
        norm: what is averaged.

    Returns:
        [ceil(rows / block[0]), ceil(columns / block[1])].
    """
    (height, width), (bh, bw) = matrix.shape, block
    values = magnitudes(matrix).astype(np.float64)
    if norm == "l2":
        values **= 2
    starts = np.arange(0, height, bh), np.arange(0, width, bw)
    sums = np.add.reduceat(np.add.reduceat(values, starts[0], axis=0), starts[1], axis=1)
    sizes = np.outer(
        np.diff(np.append(starts[0], height)), np.diff(np.append(starts[1], width))
    ).astype(np.float64)
    means = sums / sizes
    return magnitudes(np.sqrt(means) if norm == "l2" else means)


def spread_blocks(blocks: Mask, block: tuple[int, int], shape: tuple[int, ...]) -> Mask:
    """Return the mask of elements, of ``shape``, that belong to a mask of blocks."""
    spread: Mask = np.repeat(np.repeat(blocks, block[0], axis=0), block[1], axis=1)
    return spread[: shape[0], : shape[1]]


def block_mask(
    matrix: npt.NDArray[Any],
    block: tuple[int, int],
    sparsity: float,
    norm: Literal["l1", "l2"] = "l1",
) -> Mask:
    """Return True for all but the ``round(sparsity * blocks)`` blocks of smallest norm."""
    scores = block_scores(matrix, block, norm)
    keep, _ = keep_above(scores, find_cut(lambda: [scores], round(sparsity * scores.size)))
    return spread_blocks(keep, block, matrix.shape)


def _largest(groups: npt.NDArray[Any], count: int) -> Mask:
    """Mask the ``count`` largest magnitudes of each row, the first ones among equals."""
    keep = np.zeros(groups.shape, bool)
    descending = np.argsort(~_bits(magnitudes(groups)), axis=-1, kind="stable")
    np.put_along_axis(keep, descending[:, :count], True, axis=-1)
    return keep


def _bits(scores: Scores) -> npt.NDArray[np.uint32]:
    return np.ascontiguousarray(scores).view(np.uint32)


def _bit_chunks(arrays: Iterable[Scores]) -> Iterator[npt.NDArray[np.uint32]]:
    for array in arrays:
        flat = _bits(array).reshape(-1)
        for i in range(0, len(flat), _CHUNK):
            yield flat[i : i + _CHUNK]
