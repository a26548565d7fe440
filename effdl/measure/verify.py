"""Checking a model against the one before it, on the same feeds, one session at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from effdl.data.feeds import Feed, Feeds
from effdl.data.random import larger_feeds
from effdl.errors import CheckFailed, ModelError
from effdl.graph.io import load
from effdl.measure.fidelity import fit, same
from effdl.measure.fidelity_outputs import compare_outputs
from effdl.report import CompareReport, OutputError
from effdl.runtime.apart import can_run_apart, run_apart
from effdl.runtime.session import Session, open_session
from effdl.runtime.target import Target

Outputs = list[dict[str, Any]]
REAL_SAMPLES = 8
"""Samples of the user's data that each check runs; random feeds are two, and one per dimension."""
_FREE_DIMS = 4


@dataclass(frozen=True)
class Verdict:
    """What a check found.

    Args:
        ok: equal within tolerance (lossless), or at least finite and of the same shapes (lossy).
        error: relative L2 error of the worst output, None when outputs could not be compared.
        reason: why not ok.
        note: a remark on a check that passed.
        errors: per output.
        outputs: what the checked model gave; the reference of the next check once it is accepted.
    """

    ok: bool
    error: float | None
    reason: str
    note: str = ""
    errors: tuple[OutputError, ...] = ()
    outputs: Outputs | None = None


class Verifier:
    """Holds feeds and the outputs of the last accepted model.

    Args:
        feeds: the inputs of every check.
        target: where the models are run.
    """

    def __init__(self, model: ir.Model | Path, feeds: Feeds, target: Target) -> None:
        self.feeds = feeds
        self.target = target
        self.reference = run_all(model, feeds, target)

    def check(self, before: ir.Model, after: ir.Model | Path, *, lossy: bool) -> Verdict:
        """Compare ``after`` with the last accepted outputs; ``before`` is opened only on doubt.

        Args:
            before: the model that gave those outputs.
            after: the model to check.
            lossy: whether a difference is allowed.
        """
        try:
            outputs = run_all(after, self.feeds, self.target)
        except ModelError as e:
            return Verdict(False, None, f"the model no longer runs: {e.message}")
        errors = compare_outputs(self.reference, outputs, casts=True)
        error = max((e.rel_l2 for e in errors), default=0.0)
        broken = next((e for e in errors if e.reason), None)
        if broken is not None:
            return Verdict(False, error, f"output '{broken.name}': {broken.reason}", "", errors)
        if lossy or all(e.equal for e in errors):
            return Verdict(True, error, "", "", errors, outputs)
        worst = max(errors, key=lambda e: e.rel_l2)
        reason = (
            f"output '{worst.name}' changed: relative error {worst.rel_l2:.2g}, "
            f"largest difference {worst.max_abs:.2g}"
        )
        if isinstance(after, ir.Model):
            equal, report = same(before, after, self.feeds, target=self.target)
            if equal:
                return Verdict(True, error, "", "; ".join(report.notes), errors, outputs)
        return Verdict(False, error, reason, "", errors)

    def check_file(self, original: ir.Model, path: Path, *, lossy: bool) -> CompareReport:
        """Compare the model file ``path`` with the original, whose outputs are the reference.

        Raises:
            CheckFailed: they differ (lossless), or the file does not run or gives other shapes.
        """
        verdict = self.check(original, path, lossy=lossy)
        if not verdict.ok and not lossy and verdict.errors:
            verdict = self.check(original, load(path), lossy=False)  # in memory: also as written
        if not verdict.ok:
            raise CheckFailed(
                f"the written model is not the original's equal: {verdict.reason}",
                hint="nothing was written; --save-after-each DIR shows which pass did it",
            )
        return CompareReport(
            reference="",
            candidate=str(path),
            feeds=len(self.feeds),
            source=self.feeds.source,
            real=self.feeds.real,
            equal=all(e.equal for e in verdict.errors),
            outputs=verdict.errors,
            notes=(verdict.note,) if verdict.note else (),
        )

    def accept(self, verdict: Verdict) -> None:
        """Make the outputs of a passed check the reference of the next one."""
        if verdict.outputs is not None:
            self.reference = verdict.outputs


def run_all(model: ir.Model | Path, feeds: Feeds, target: Target) -> Outputs:
    """Run every feed and return the outputs.

    Where the platform allows it, in a child process: a graph that makes ONNX Runtime crash is then an
    error like another, see ``runtime.apart``.

    Raises:
        ModelError: the model does not load or run, or ONNX Runtime crashed on it.
    """

    def work() -> Outputs:
        session = open_session(model, target)
        return [session.run(fit(feed, session)) for feed in feeds]

    return run_apart(work) if can_run_apart(target) else work()


def verification_feeds(
    model: ir.Model,
    real: Feeds | None,
    *,
    dims: Mapping[str, int],
    seed: int,
    target: Target,
) -> Feeds:
    """Return the feeds that checks run: the user's samples if there are some, else random ones.

    Random feeds include, for each dynamic dimension, one where it is larger by one (if the model
    runs so), so that a pass that freezes a dimension is found out.

    Raises:
        ModelError: the model does not run at all.
    """
    if real is not None:
        return real.first(REAL_SAMPLES)
    feeds, others = larger_feeds(
        model, dims=dims, seed=seed, count=2, larger=_FREE_DIMS, target=target
    )
    fit_for = runs_with(model, others, target) if others.batches else []
    more = [feed for feed, runs in zip(others.batches, fit_for, strict=True) if runs]
    return Feeds((*feeds.batches, *more), feeds.source, feeds.real)


def runs_with(model: ir.Model, feeds: Feeds, target: Target) -> list[bool]:
    """Return for each feed whether the model runs with it; in a child process as ``run_all``."""

    def work() -> Outputs:
        session = open_session(model, target)
        return [{"runs": np.array(_runs(session, feed))} for feed in feeds]

    try:
        found = run_apart(work) if can_run_apart(target) else work()
    except ModelError:  # it crashed on one of them: nothing to learn from any
        return [False] * len(feeds)
    return [bool(f["runs"]) for f in found]


def _runs(session: Session, feed: Feed) -> bool:
    try:
        session.run(fit(feed, session))
    except ModelError:
        return False
    return True
