"""Keeps a pass only where it does what it claims, measured on the target, and holds the budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import onnx_ir as ir

from effdl.data.feeds import Feeds
from effdl.errors import EffdlError, ModelError
from effdl.gate.islands import Islands
from effdl.gate.scores import Scores, drop
from effdl.gate.total import objective_of
from effdl.graph import io
from effdl.measure.bench import bench
from effdl.measure.blame import changes, explain
from effdl.measure.locate import at_fault, locate, worst
from effdl.measure.parts import culprits
from effdl.measure.profile import profile
from effdl.measure.size import zstd_size
from effdl.passes.base import Pass
from effdl.recipe import Recipe
from effdl.report import (
    BenchReport,
    BenchResult,
    GateReport,
    OpChange,
    Profile,
)
from effdl.runtime.host import Host
from effdl.runtime.target import Target

_PATIENCE = 2.5
"""A pass that is too noisy to judge is measured once more, this many times as long."""
_GENERATIONS = 3
"""How often processes are started for a pass; starting them takes longer than measuring a small model."""
_SIGMAS = 1.96
"""Half a 95 % interval, in standard deviations."""
_SUSPECTS = 32
"""Steps that a repair chooses from."""
_NAMED = 3
"""Operators that a reason names."""


def _judged(model: BenchResult, said: str, before_ms: float, lossy: bool) -> GateReport:
    """Return whether a model is kept after a race, and what was measured.

    One that computes the same is kept as well when it is probably faster, where the machine is too noisy
    to prove it: the result as a whole is measured again, and the input stays when it does not win.
    """
    kept = model.verdict == "faster"
    if model.verdict == "noisy" and not lossy:
        spread = math.log(model.ci[1] / model.ci[0]) / 2 / _SIGMAS
        kept = math.log(model.ratio) > spread
    return GateReport(
        kept=kept,
        by="latency",
        reason="" if kept else said,
        verdict=model.verdict,
        ratio=model.ratio,
        ci=model.ci,
        noise_floor=model.noise_floor,
        latency_ms=model.latency.median,
        before_ms=before_ms,
        file_bytes=model.file_bytes,
    )


@dataclass
class Gate:
    """Judges one pass after the other.

    Args:
        recipe: with the budget.
        source: the input model's file.
        host: where speed is measured, None when that cannot be.
        target: what ``host`` runs on.
        check_target: where outputs are computed.
        feeds: gives the inputs for measuring; they change with the model's interface.
        scores: of models by the recipe's metric.
        workdir: a temporary folder.
        seconds: measuring time per model and pass.
        threads, seed: as in ``bench``.
        tell: told what is being done.
    """

    recipe: Recipe
    source: Path
    host: Host | None
    target: Target
    check_target: Target
    feeds: Callable[[], Feeds]
    scores: Scores
    workdir: Path
    seconds: float
    threads: int
    seed: int
    tell: Callable[[str], None] = field(default=lambda what: None)
    objective: str = field(init=False)
    _before: Path | None = field(init=False)
    _count: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.objective = objective_of(self.recipe)
        self._before = self.source

    def judge(
        self,
        step: Pass,
        original: ir.Model,
        before: ir.Model,
        after: ir.Model,
        error: float | None,
        touched: Sequence[str],
    ) -> GateReport | None:
        """Say whether a pass stays; None when it claims nothing and costs nothing.

        Args:
            step: the pass.
            original: the input model.
            before: the model without the pass.
            after: the model with it.
            error: relative L2 error of the worst output of ``after`` against the input model.
            touched: names of the nodes that the pass changed.
        """
        held = self._hold(original, after, error) if step.lossy else None
        if held is not None and not held.kept:
            return self._name_layers(held, before, after, touched)
        by = self._claim(step)
        if not by:
            self.forget()
            return held
        old = self._before or self._write(before)
        new = self._write(after)
        smaller = by == "size"
        if smaller:
            found = self._smaller(old, new)
        else:
            found = self._timed(old, [new], step.lossy)[0]
            found = self._name_places(found, step, before, touched, old, new)
        self._before, gone = (new, old) if found.kept else (old, new)
        self._remove(gone)
        if held is not None:
            found = replace(found, score=held.score, fidelity=held.fidelity)
        return found

    def holds(
        self,
        step: Pass,
        original: ir.Model,
        before: ir.Model,
        after: ir.Model,
        error: float | None,
        touched: Sequence[str],
        *,
        explain: bool,
    ) -> GateReport | None:
        """Say whether a model keeps the budget, None where none is held; arguments as of ``judge``.

        Args:
            explain: name the layers at fault and what to leave alone, where it does not.
        """
        held = self._hold(original, after, error) if step.lossy else None
        if held is None or held.kept or not explain:
            return held
        return self._name_layers(held, before, after, touched)

    def forget(self) -> None:
        """The model changed without being measured: its file is of no use any more."""
        if self._before is not None:
            self._remove(self._before)
        self._before = None

    def claims(self, step: Pass) -> bool:
        """Whether a pass has to show something here."""
        return step.lossy or bool(self._claim(step))

    def _claim(self, step: Pass) -> str:
        """What the pass is judged by, empty for nothing."""
        if self.objective == "size":
            return "size" if "size" in step.claimed() else ""
        return "latency" if "latency" in step.claimed() and self.host is not None else ""

    def _write(self, model: ir.Model) -> Path:
        self._count += 1
        path = self.workdir / f"gate{self._count}.onnx"
        io.save(model, path)
        return path

    def _remove(self, path: Path) -> None:
        """Remove a file of ours, here and where it was measured: models may be large."""
        if path == self.source:
            return
        if self.host is not None:
            self.host.discard(path)
        for file in (*io.data_files(path), path):
            file.unlink()

    def _hold(self, original: ir.Model, after: ir.Model, error: float | None) -> GateReport | None:
        """Hold a lossy pass to the budget: by the metric, or by the output error without labels."""
        budget = self.recipe.budget
        spec = self.scores.spec
        if budget is None:
            return None
        if budget.accuracy_drop is not None and spec is not None:
            self.tell(f"scoring {spec.metric}")
            first, now = self.scores.of_input(original), self.scores.of(after)
            kept = drop(first, now.value) <= budget.accuracy_drop
            said = f"{spec.metric} went from {first.value:.4f} to {now.value:.4f}"
            reason = "" if kept else f"{said}, allowed is a loss of {budget.accuracy_drop:g}"
            return GateReport(kept, "accuracy", reason, score=now.value, fidelity=error)
        if budget.fidelity is not None and error is not None:
            kept = error <= budget.fidelity
            reason = "" if kept else f"output error {error:.2g}, allowed {budget.fidelity:g}"
            return GateReport(kept, "fidelity", reason, fidelity=error)
        return None

    def _name_layers(
        self,
        found: GateReport,
        before: ir.Model,
        after: ir.Model,
        touched: Sequence[str],
    ) -> GateReport:
        """Add the layers at which the error arises, and which of them it is cheapest to leave alone.

        Against the model before the pass: in the input model a tensor of the same name may be another
        one (a factor that a fold has moved).
        """
        self.tell("looking for the layers at fault")
        feeds = self.feeds().first(1)
        try:
            report = locate(before, after, feeds, self.check_target, top=_SUSPECTS)
        except EffdlError:  # a model that does not run with its inner tensors as outputs
            return found
        said = [f"{op} {name}" for name, op, _ in worst(report, _NAMED)]
        reason = f"{found.reason}; most comes from {', '.join(said)}" if said else found.reason
        budget = self.recipe.budget
        limit = budget.fidelity if budget is not None and found.by == "fidelity" else None
        islands = Islands(before, touched, *self._profiles(before, after))
        error = math.inf if found.fidelity is None else found.fidelity
        repair = islands.repair(report.jumps, error, limit)
        return replace(found, reason=reason, culprits=tuple(at_fault(report)), repair=repair)

    def _profiles(
        self, before: ir.Model, after: ir.Model
    ) -> tuple[Profile, Profile] | tuple[None, None]:
        """Return where the time of two models goes; nothing where speed is no aim."""
        if self.objective == "size" or self.host is None:
            return None, None
        old, new = self._before or self._write(before), self._write(after)
        found = self.profile(old, new)
        self._before = old
        self._remove(new)
        return found or (None, None)

    def _smaller(self, old: Path, new: Path) -> GateReport:
        before, after = io.files_size(old), io.files_size(new)
        kept = after < before or (after == before and zstd_size(new) < zstd_size(old))
        reason = "" if kept else f"the file is not smaller: {before:,} -> {after:,} bytes"
        return GateReport(kept, "size", reason, file_bytes=after)

    def fastest(
        self, step: Pass, before: ir.Model, forms: Sequence[tuple[ir.Model, Sequence[str]]]
    ) -> list[GateReport] | None:
        """Time several models against the one before them, in one race; None where speed is no aim.

        The fastest that is kept becomes the model that the next pass is measured against.

        Args:
            step: what made them.
            before: the model before it.
            forms: what it made, and the names of the nodes that it changed.
        """
        if self.objective == "size" or self.host is None:
            return None
        old = self._before or self._write(before)
        files = [self._write(m) for m, _ in forms]
        found = self._timed(old, files, step.lossy)
        best = max(range(len(found)), key=lambda k: (found[k].kept, found[k].ratio or 0.0))
        touched = forms[best][1]
        found[best] = self._name_places(found[best], step, before, touched, old, files[best])
        self._before = files[best] if found[best].kept else old
        for file in (old, *files):
            if file != self._before:
                self._remove(file)
        return found

    def _timed(self, old: Path, files: Sequence[Path], lossy: bool) -> list[GateReport]:
        """Time files against ``old``; the reason is the verdict where one is not kept."""
        self.tell("measuring")
        try:
            result = self._race([old, *files], self.seconds, _GENERATIONS)
            if all(m.verdict == "noisy" for m in result.models[1:]):
                result = self._race([old, *files], self.seconds * _PATIENCE, None)
        except ModelError as e:
            return [GateReport(False, "latency", f"cannot be measured: {e.message}")] * len(files)
        return [
            _judged(model, said, result.models[0].latency.median, lossy)
            for model, said in zip(result.models[1:], result.verdict, strict=True)
        ]

    def _race(self, files: Sequence[Path], seconds: float, generations: int | None) -> BenchReport:
        known = {p: (io.files_size(p), None, "") for p in files}
        return bench(
            list(files),
            self.feeds().first(2),
            self.target,
            threads=self.threads,
            seconds=seconds,
            seed=self.seed,
            known=known,
            host=self.host,
            generations=generations,
        )

    def _name_places(
        self,
        found: GateReport,
        step: Pass,
        before: ir.Model,
        touched: Sequence[str],
        old: Path,
        new: Path,
    ) -> GateReport:
        """Add where time was lost: by operator where the pass is not kept, and the places to leave alone."""
        refine = step.lossy and len(touched) > 1
        if found.ratio is None or (found.kept and not refine):
            return found
        self.tell("profiling")
        report = self.profile(old, new)
        if report is None:
            return found
        if refine:
            names = Islands(before, touched, *report).slower()
            if 0 < len(names) < len(set(touched)):
                found = replace(found, repair=tuple(names))
        return found if found.kept else self._name_operators(found, *report)

    def _name_operators(self, found: GateReport, first: Profile, second: Profile) -> GateReport:
        """Add where the time went."""
        moved = changes(first, second)
        least = (found.noise_floor or 0.0) * (found.before_ms or 0.0)
        told = any(abs(c.after_ms - c.before_ms) > least for c in moved)
        why = explain(moved) if told else ""
        places = culprits(first, second)
        names = list(dict.fromkeys(name for origin, _, _ in places for name in origin))
        said = found.reason
        return replace(
            found,
            reason=f"{said}: {why}" if why else said,
            changes=moved,
            culprits=tuple(names),
        )

    def profile(self, old: Path, new: Path) -> tuple[Profile, Profile] | None:
        """Return where the time of two files goes, None where it cannot be told."""
        try:
            report = profile(
                [old, new],
                self.feeds().first(1),
                self.target,
                threads=self.threads,
                seconds=min(self.seconds, 1.0),
                seed=self.seed,
                host=self.host,
            )
        except EffdlError:
            return None
        return report.profiles[0], report.profiles[1]

    def where_time_went(self, old: Path, new: Path) -> tuple[OpChange, ...]:
        """Return the time per kind of operator in two files, empty where it cannot be told."""
        found = self.profile(old, new)
        return () if found is None else changes(*found)
