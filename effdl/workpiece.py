"""The model on its way through a recipe: run a pass on it, check what came out, go back."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from effdl.data.feeds import Feeds
from effdl.errors import ModelError
from effdl.graph import io
from effdl.graph.clean import clean, name_nodes
from effdl.graph.dims import known_dims
from effdl.graph.walk import interface
from effdl.measure.fidelity import compare_outputs
from effdl.measure.verify import Outputs, Verdict, Verifier, run_all, verification_feeds
from effdl.observe import MAX_BYTES
from effdl.passes.base import Context, PassLog
from effdl.recipe import Step
from effdl.runtime.target import Target


@dataclass(frozen=True)
class Applied:
    """What a pass did.

    Args:
        log: nodes touched, left alone, figures.
        changes: what ``run`` returned.
        reason: why nothing, when there are no changes.
        verdict: of the check; None when nothing changed.
        seconds: time of the pass itself; ``check_seconds`` of cleaning and checking.
    """

    log: PassLog
    changes: int
    reason: str
    verdict: Verdict | None
    seconds: float
    check_seconds: float


@dataclass(frozen=True)
class Snapshot:
    """A state to go back to; its weights are shared with the model."""

    model: ir.Model
    calibration: Feeds | None
    verifier: Verifier | None
    reference: Outputs
    first: Outputs
    memo: dict[Any, Any]


class Workpiece:
    """A model and what its checks need.

    Args:
        original: the input model; stays as it is, but that nodes without a name get one.
        target: what passes are told about the place the model is made for.
        check_target: where outputs are computed.
        samples: gives the user's samples, cut for a model's inputs; None without.
        dims: values of dynamic dimensions for random inputs.
        seed: of every random choice.
        max_memory: bytes that calibration holds at a time.
        workdir: a temporary folder.
    """

    def __init__(
        self,
        original: ir.Model,
        target: Target,
        check_target: Target,
        samples: Callable[[ir.Model], Feeds] | None,
        dims: Mapping[str, int],
        seed: int,
        workdir: Path,
        max_memory: int = MAX_BYTES,
    ) -> None:
        self.named = name_nodes(original)  # what is left alone or at fault is told by its name
        self.original = original
        self.model = original.clone()
        self.target = target
        self.check_target = check_target
        self.samples = samples
        self.calibration = None if samples is None else samples(original)
        self.dims = dims
        self.seed = seed
        self.workdir = workdir
        self.max_memory = max_memory
        self.verifier: Verifier | None = None
        self.first: Outputs = []  # of the original model on the verifier's feeds
        self.memo: dict[Any, Any] = {}  # what passes observed of the model as it is now
        self.start: Snapshot = self.snapshot()

    def start_checks(self) -> None:
        """Run the original model, whose outputs every check goes back to.

        Raises:
            ModelError: it does not run here.
        """
        self.verifier = Verifier(self.model, self._feeds(self.dims), self.check_target)
        self.first = self.verifier.reference
        self.start = self.snapshot()

    def _feeds(self, dims: Mapping[str, int]) -> Feeds:
        return verification_feeds(
            self.model, self.calibration, dims=dims, seed=self.seed, target=self.check_target
        )

    def snapshot(self) -> Snapshot:
        """Return the present state."""
        reference = [] if self.verifier is None else self.verifier.reference
        return Snapshot(
            self.model.clone(), self.calibration, self.verifier, reference, self.first, self.memo
        )

    def restore(self, state: Snapshot) -> None:
        """Go back to a state; it can be used again."""
        self.model = state.model.clone()
        self.calibration = state.calibration
        self.verifier, self.first, self.memo = state.verifier, state.first, state.memo
        if self.verifier is not None:
            self.verifier.reference = state.reference

    def apply(self, step: Step, before: ir.Model, *, outputs: bool = True) -> Applied:
        """Run a pass and check the result; the model stays changed, whatever the check says.

        Args:
            step: the pass.
            before: a copy of the present model.
            outputs: also compare outputs; False leaves that to ``check_outputs``.
        """
        started = time.perf_counter()
        log, changes, reason = self.run_pass(step)
        ran = time.perf_counter()
        verdict = None
        if changes:
            clean(self.model)
            verdict = self._check(step, before, outputs)
        return Applied(log, changes, reason, verdict, ran - started, time.perf_counter() - ran)

    def run_pass(self, step: Step) -> tuple[PassLog, int, str]:
        """Run a pass, nothing else; returns its log, the number of changes, and why there are none."""
        why = step.pass_.too_old(self.model)
        if why:
            return PassLog(), 0, why
        ctx = self.context()
        changes = step.pass_.run(self.model, ctx)
        if changes:
            self.memo = {}  # a snapshot before it has the old one
        return ctx.log, changes, "" if changes else ctx.log.why_nothing()

    def context(self) -> Context:
        """Return what a pass may know, with a folder of its own."""
        folder = Path(tempfile.mkdtemp(dir=self.workdir))
        return Context(
            self.target,
            self.calibration,
            self.seed,
            folder,
            max_bytes=self.max_memory,
            memo=self.memo,
        )

    def accept(self, verdict: Verdict) -> None:
        """Make the checked model the one that the next is compared with."""
        if self.verifier is not None:
            self.verifier.accept(verdict)

    def total_error(self, verdict: Verdict) -> float | None:
        """Return the relative L2 error of the worst output against the original model."""
        return None if verdict.outputs is None else self._error(verdict.outputs)

    def error(self) -> float | None:
        """Return the error of the model as it was accepted last, as ``total_error`` does."""
        return None if self.verifier is None else self._error(self.verifier.reference)

    def _error(self, outputs: Outputs) -> float | None:
        if self.verifier is None:
            return None
        errors = compare_outputs(self.first, outputs, casts=True)
        return max((e.rel_l2 for e in errors), default=0.0)

    def check_outputs(self, before: ir.Model) -> Verdict:
        """Compare outputs with those of ``before``, after lossless passes that were not checked."""
        if self.verifier is None:
            return Verdict(True, None, "", "not checked")
        return self.verifier.check(before, self.model, lossy=False)

    def _check(self, step: Step, before: ir.Model, outputs: bool) -> Verdict:
        try:
            io.check(self.model)
        except ModelError as e:
            return Verdict(False, None, e.message)
        if not step.pass_.changes_interface():
            changed = interface(before) ^ interface(self.model)
            if changed:
                names = ", ".join(sorted(changed))
                return Verdict(False, None, f"inputs or outputs changed: {names}")
        if self.verifier is None or not outputs:
            return Verdict(True, None, "", "not checked" if self.verifier is None else "")
        if (
            step.pass_.changes_interface()
        ):  # input shapes may be others: feeds that fit the new model
            if self.samples is not None:
                self.calibration = self.samples(self.model)
            feeds = self._feeds(known_dims(self.model, self.dims))
            self.verifier = Verifier(before, feeds, self.check_target)
            self.first = run_all(self.original, feeds, self.check_target)
        return self.verifier.check(before, self.model, lossy=step.pass_.lossy)
