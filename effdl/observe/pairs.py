"""What layers of a changed model read, beside what they put out in the model it was made from."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from effdl.data.feeds import Feeds
from effdl.measure.taps import tapped
from effdl.observe.rows import Rows
from effdl.runtime.session import Session
from effdl.runtime.target import parse_target
from effdl.solve.refit import Moments

K = TypeVar("K", bound=Hashable)
Array = npt.NDArray[np.generic]
Floats = npt.NDArray[np.float32]
_ROWS_PER_INPUT = 10
_LEAST_ROWS = 10_000
_HELD = 5
"""Every so many feeds are held out."""


@dataclass(frozen=True)
class Pair:
    """Where to look for one layer.

    Args:
        rows: what it reads, in the changed model.
        target: a value of the old model, what the layer should put out.
        axis: of the outputs in it, 1 or -1.
        keep: which of them there still are; None for all.
        minus: a value of the changed model that is added to the output later: not the layer's to make.
    """

    rows: Rows
    target: str
    axis: int
    keep: npt.NDArray[np.bool_] | None = None
    minus: str = ""


def pairs(
    old: ir.Model,
    new: ir.Model,
    layers: Mapping[K, Pair],
    feeds: Feeds,
    *,
    threads: int = 0,
) -> Iterator[tuple[K, Moments, Moments]]:
    """Yield the moments of each layer over most of the feeds, and over those that are held out.

    Both models run on every feed once. A layer is left out where something was not finite.

    Raises:
        ModelError: ONNX Runtime cannot load or run a model.
    """
    if not layers or not len(feeds):
        return
    before = _Tap(old, [p.target for p in layers.values()], threads)
    wanted = [*(p.rows.value for p in layers.values()), *(p.minus for p in layers.values())]
    after = _Tap(new, [n for n in wanted if n], threads)
    parts = [(k, {key: _Sums(p, len(feeds)) for key, p in layers.items()}) for k in range(2)]
    few = len(feeds) < 2 * _HELD
    for number, feed in enumerate(feeds):
        x, t = after.run(feed), before.run(feed)
        held = number % 2 if few else number % _HELD == _HELD - 1
        sums = parts[int(held)][1]
        for pair, one in zip(layers.values(), sums.values(), strict=True):
            one.add(x[pair.rows.value], t[pair.target], x[pair.minus] if pair.minus else None)
    for key in layers:
        seen, held_out = (sums.pop(key).moments() for _, sums in parts)
        if seen is not None and held_out is not None:
            yield key, seen, held_out


class _Tap:
    """A session that gives values of a model's main graph, inputs too."""

    def __init__(self, model: ir.Model, names: Sequence[str], threads: int) -> None:
        inputs = {v.name for v in model.graph.inputs}
        computed = [n for n in dict.fromkeys(names) if n not in inputs]
        place = parse_target("cpu", threads)
        self._session: Session | None = (
            tapped(model, computed, place, optimize=True) if computed else None
        )

    def run(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        found: dict[str, Array] = {} if self._session is None else dict(self._session.run(feed))
        return {**feed, **found}


class _Sums:
    def __init__(self, pair: Pair, feeds: int) -> None:
        self.pair = pair
        self.rows = 0
        self.finite = True
        rows = pair.rows
        self._most = -(-max(_LEAST_ROWS, _ROWS_PER_INPUT * rows.width) // feeds)
        self._waiting: list[tuple[Floats, Floats]] = []
        self._started = False

    def add(self, x: Array, target: Array, minus: Array | None) -> None:
        if not self.finite or not x.size:
            return
        pair = self.pair
        rows = pair.rows.take(x, self._most)
        wanted = np.asarray(target, np.float32)
        if pair.keep is not None:
            wanted = np.compress(pair.keep, wanted, axis=pair.axis)
        if minus is not None:
            wanted = wanted - np.asarray(minus, np.float32)
        outputs = _outputs(wanted, pair.axis, pair.rows, self._most)
        if not (np.isfinite(rows).all() and np.isfinite(outputs).all()):
            self.finite = False
            return
        if not self._started:
            self._start(rows, outputs)
        self._waiting.append((rows - self._pivots[0], outputs - self._pivots[1]))
        self.rows += rows.shape[1]
        if sum(r.shape[1] for r, _ in self._waiting) >= pair.rows.width:
            self._multiply()

    def _start(self, rows: Floats, outputs: Floats) -> None:
        groups, _, width = rows.shape
        made = outputs.shape[2]
        self._pivots = rows.mean(1, keepdims=True), outputs.mean(1, keepdims=True)
        self._first = np.zeros((groups, width)), np.zeros((groups, made))
        self._inner = np.zeros((groups, width, width))
        self._cross = np.zeros((groups, made, width))
        self._spread = np.zeros((groups, made))
        self._started = True

    def _multiply(self) -> None:
        x, t = (np.concatenate(side, axis=1) for side in zip(*self._waiting, strict=True))
        self._waiting.clear()
        self._first[0][:] += x.sum(1, dtype=np.float64)
        self._first[1][:] += t.sum(1, dtype=np.float64)
        self._inner += x.transpose(0, 2, 1) @ x
        self._cross += t.transpose(0, 2, 1) @ x
        self._spread += np.square(t).sum(1, dtype=np.float64)

    def moments(self) -> Moments | None:
        if not self.finite or not self.rows:
            return None
        if self._waiting:
            self._multiply()
        n = self.rows
        off_in, off_out = (first / n for first in self._first)
        return Moments(
            n,
            self._pivots[0][:, 0] + off_in,
            self._pivots[1][:, 0] + off_out,
            self._inner / n - off_in[:, :, None] * off_in[:, None, :],
            self._cross / n - off_out[:, :, None] * off_in[:, None, :],
            np.maximum(self._spread / n - off_out**2, 0.0),
        )


def _outputs(array: Floats, axis: int, rows: Rows, most: int) -> Floats:
    """Return outputs as [groups, rows, outputs], of the places that ``Rows.take`` chooses."""
    last = np.moveaxis(array, axis, -1)
    flat = rows.every(last.reshape(-1, last.shape[-1]), most)
    grouped = flat.reshape(len(flat), rows.groups, -1)
    return np.ascontiguousarray(grouped.transpose(1, 0, 2))
