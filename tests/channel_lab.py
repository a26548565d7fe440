"""Removing channels against masking them: what the tests of channel groups share."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from effdl.data.feeds import Feed
from effdl.graph import io
from effdl.graph.channels import Channels, Group, channels, mask, remove
from effdl.runtime.session import open_session


def some(group: Group, rng: np.random.Generator, share: float = 0.4) -> list[int]:
    """Random units of a group, at least one and never all."""
    count = min(len(group) - 1, max(1, round(share * len(group))))
    return [int(u) for u in rng.choice(group.units, count, replace=False)]


def both(model: ir.Model, units: Iterable[int]) -> tuple[ir.Model, ir.Model]:
    """Return the model with the units masked, and with them removed."""
    masked, smaller = model.clone(), model.clone()
    chosen = list(units)
    mask(masked, channels(masked), chosen)
    remove(smaller, channels(smaller), chosen)
    io.check(smaller)
    return masked, smaller


def differs(masked: ir.Model, smaller: ir.Model, feed: Feed) -> float:
    """Return the largest difference of the outputs, relative to their size."""
    want, got = open_session(masked).run(feed), open_session(smaller).run(feed)
    worst = 0.0
    for name, array in want.items():
        a, b = np.asarray(array, np.float64), np.asarray(got[name], np.float64)
        assert a.shape == b.shape, f"{name}: {a.shape} became {b.shape}"
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        size = float(np.abs(a[np.isfinite(a)]).max(initial=0.0)) or 1.0
        worst = max(worst, float(np.abs(np.where(same, 0.0, a - b)).max(initial=0.0)) / size)
    return worst


def check(model: ir.Model, feed: Feed, *, atol: float = 1e-5, most: int = 1000) -> Channels:
    """Every group alone, then all together: removed is masked."""
    found = channels(model)
    rng = np.random.default_rng(0)
    groups = [g for g in found.free if len(g) > 1]
    step = max(1, len(groups) // most)
    for group in groups[::step]:
        error = differs(*both(model, some(group, rng)), feed)
        assert error < atol, f"{group.name}: {error}"
    every = [u for g in groups for u in some(g, rng)]
    if every:
        assert differs(*both(model, every), feed) < atol
    return found
