"""Which parts of a graph take the second of two forms: cost of the parts, of the borders, and what is lost.

Choices of two with costs for neighbours that differ are minimum cuts (Kolmogorov and Zabih 2004, see
``mincut``), so islands come out whole: a part that gains less than its borders cost goes back. A limit on
what is lost is met by a price on it (Everett, "Generalized Lagrange multiplier method", 1963), which keeps
the problem a cut; what the price leaves of the limit is filled part by part.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from effdl.solve.mincut import SINK, SOURCE, Network

_STEPS = 24
_UNITS = 1 << 40
"""The sum of all costs in whole numbers, which the cut works with."""


@dataclass(frozen=True)
class Flow:
    """A value that parts hand on.

    Args:
        maker: the part that makes it, None for an input, which is in the first form.
        readers: the parts that read it.
        into: paid once where it is made in the first form and read in the second; ``back`` where it is
            made in the second and read in the first.
    """

    maker: int | None
    readers: tuple[int, ...]
    into: float
    back: float


@dataclass(frozen=True)
class Loss:
    """Something that is lost as soon as one of ``parts`` takes the second form; losses add up."""

    parts: tuple[int, ...]
    amount: float


@dataclass(frozen=True)
class Problem:
    """Parts with two forms.

    Args:
        first, second: what each part costs; None where it has no second form.
        flows: what they hand on.
        losses: what the second form loses.
    """

    first: Sequence[float]
    second: Sequence[float | None]
    flows: Sequence[Flow]
    losses: Sequence[Loss] = ()

    def cost(self, choice: Sequence[bool]) -> float:
        """Return what a choice costs; True is the second form."""
        total = 0.0
        for a, b, other in zip(self.first, self.second, choice, strict=True):
            total += (math.inf if b is None else b) if other else a
        return total + self.cost_of_flows(choice)

    def cost_of_flows(self, choice: Sequence[bool]) -> float:
        """Return what the borders of a choice cost."""
        total = 0.0
        for flow in self.flows:
            made = flow.maker is not None and choice[flow.maker]
            if any(choice[r] != made for r in flow.readers):
                total += flow.back if made else flow.into
        return total

    def lost(self, choice: Sequence[bool]) -> float:
        """Return what a choice loses."""
        return sum(loss.amount for loss in self.losses if any(choice[p] for p in loss.parts))


def cheapest(problem: Problem, price: float = 0.0) -> list[bool]:
    """Return the choice of least cost plus ``price`` times what is lost."""
    parts = list(zip(problem.first, problem.second, strict=True))
    whole = sum(abs(a) + abs(b or 0.0) for a, b in parts)
    whole += sum(f.into + f.back for f in problem.flows)
    whole += sum(loss.amount * price for loss in problem.losses)
    never = 2 * _UNITS

    def units(cost: float) -> int:
        return round(cost / whole * _UNITS) if whole else 0

    net = Network()
    points = [net.point() for _ in parts]  # on the source's side: the first form
    for point, (a, b) in zip(points, parts, strict=True):
        least = a if b is None else min(a, b)
        net.edge(point, SINK, units(a - least))
        net.edge(SOURCE, point, never if b is None else units(b - least))
    for flow in problem.flows:
        maker = SOURCE if flow.maker is None else points[flow.maker]
        some_second, some_first = net.point(), net.point()
        net.edge(maker, some_second, units(flow.into))
        net.edge(some_first, maker, units(flow.back))
        for reader in flow.readers:
            net.edge(some_second, points[reader], never)
            net.edge(points[reader], some_first, never)
    for loss in problem.losses:
        point = net.point()
        net.edge(SOURCE, point, units(loss.amount * price))
        for part in loss.parts:
            net.edge(point, points[part], never)
    first = net.source_side()
    return [p not in first for p in points]


def within(problem: Problem, limit: float) -> list[bool]:
    """Return a cheap choice that loses no more than ``limit`` (at least 0).

    It is the best one for some price; whatever else fits and gains is added, the largest gain first.
    """
    best = cheapest(problem)
    if problem.lost(best) <= limit:
        return best
    scale = problem.cost([False] * len(best)) or 1.0
    low, high = math.log(scale * 1e-9 / (limit or 1.0)), math.log(scale * 1e9 / (limit or 1.0))
    best = [False] * len(best)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        found = cheapest(problem, math.exp(middle))
        if problem.lost(found) <= limit:
            high = middle
            if problem.cost(found) < problem.cost(best):
                best = found
        else:
            low = middle
    return _filled(problem, limit, best)


def _filled(problem: Problem, limit: float, choice: list[bool]) -> list[bool]:
    """Return the choice with single parts more in the second form, where that fits and gains."""
    flows: dict[int, list[Flow]] = defaultdict(list)
    losses: dict[int, list[Loss]] = defaultdict(list)
    for flow in problem.flows:
        for part in {*flow.readers, *([] if flow.maker is None else [flow.maker])}:
            flows[part].append(flow)
    for loss in problem.losses:
        for part in set(loss.parts):
            losses[part].append(loss)
    choice = list(choice)
    left = limit - problem.lost(choice)

    def gain(k: int) -> float:
        """What part k in the second form saves."""
        second = problem.second[k]
        assert second is not None
        around = Problem((), (), flows[k])
        before = around.cost_of_flows(choice)
        choice[k] = True
        after = around.cost_of_flows(choice)
        choice[k] = False
        return problem.first[k] - second + before - after

    def more(k: int) -> float:
        """What it loses that is not lost yet."""
        return sum(x.amount for x in losses[k] if not any(choice[p] for p in x.parts))

    open_ = [k for k, s in enumerate(problem.second) if s is not None and not choice[k]]
    for k in sorted(open_, key=gain, reverse=True):
        if gain(k) > 0 and more(k) <= left:
            left -= more(k)
            choice[k] = True
    return choice
