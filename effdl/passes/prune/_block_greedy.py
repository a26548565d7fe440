"""Which blocks go: the least harm for what it saves first, measured anew with what is gone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from effdl.graph.weights import Names
from effdl.passes.prune._block_edit import Cut, drop, joins
from effdl.passes.prune._channel_trial import Trials

_LEAST_HARM = 1e-9
"""Below this all harm is rounding: what saves most goes first."""


@dataclass(frozen=True)
class Gone:
    """A unit that was dropped.

    Args:
        cuts: its blocks.
        means: whether the mean of each branch is put in its place.
        harm: what it added to the error of the outputs when it went.
        error: of the outputs with all before it gone too, nothing fitted.
    """

    cuts: tuple[Cut, ...]
    means: bool
    harm: float
    error: float


@dataclass
class _Try:
    """A unit with what dropping it did when it was last tried."""

    cuts: tuple[Cut, ...]
    gain: float
    means: bool = False
    error: float = 0.0
    harm: float = 0.0
    tried_at: int = -1

    @property
    def rank(self) -> float:
        return max(self.harm, _LEAST_HARM) / self.gain


@dataclass
class Greedy:
    """Drops units from a copy of a model one after the other.

    Harm grows with what is gone, so what was measured earlier is a bound: only units that may be the next
    are tried again (Minoux 1978, "Accelerated greedy algorithms").

    Args:
        model: is not changed.
        trials: measures the outputs.
        gains: what goes with each node, by its first output.
    """

    model: ir.Model
    trials: Trials
    gains: Mapping[str, float]
    gone: list[Gone] = field(default_factory=list)
    error: float = 0.0

    def __post_init__(self) -> None:
        self.now = self.model.clone()

    def run(self, units: Sequence[tuple[Cut, ...]], enough: Callable[[Greedy], bool]) -> None:
        """Drop units until there is ``enough`` or none is left."""
        left = [_Try(u, max(self._gain(u), 1e-12)) for u in units]
        while left and not enough(self):
            here = joins(self.now)
            left = [t for t in left if all(c.out in here for c in t.cuts)]
            best = self._best(left)
            if best is None:
                return
            left.remove(best)
            self._take(best)

    def _gain(self, unit: tuple[Cut, ...]) -> float:
        return sum(self.gains.get(n, 0.0) for n in {n for c in unit for n in c.nodes})

    def _best(self, left: list[_Try]) -> _Try | None:
        step = len(self.gone)
        while left:
            left.sort(key=lambda t: t.rank)
            first = left[0]
            if first.tried_at == step:
                return first
            todo = [t for t in left if t.tried_at < 0] or [first]
            for one in todo:
                self._measure(one, step)
        return None

    def _measure(self, one: _Try, step: int) -> None:
        if one.tried_at < 0:
            plain, mean = (self._error(one.cuts, means) for means in (False, True))
            one.means, one.error = mean < plain, min(mean, plain)
        else:
            one.error = self._error(one.cuts, one.means)
        one.harm, one.tried_at = one.error - self.error, step

    def _error(self, cuts: tuple[Cut, ...], means: bool) -> float:
        copy = self.now.clone()
        names = Names(copy)
        for cut in cuts:
            drop(copy, cut, names, mean=means)
        return self.trials.error(copy)

    def _take(self, best: _Try) -> None:
        names = Names(self.now)
        for cut in best.cuts:
            drop(self.now, cut, names, mean=best.means)
        self.gone.append(Gone(best.cuts, best.means, best.harm, best.error))
        self.error = best.error
