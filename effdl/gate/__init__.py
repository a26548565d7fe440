"""Keeps a pass only where it does what it claims, measured on the target, and holds the budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import onnx_ir as ir

from effdl.data.feeds import Feeds
from effdl.errors import EffdlError, ModelError
from effdl.gate.scores import Scores, drop
from effdl.gate.total import objective_of
from effdl.graph import io
from effdl.measure.bench import bench
from effdl.measure.blame import changes, culprits, explain
from effdl.measure.locate import at_fault, locate, worst
from effdl.measure.profile import profile
from effdl.measure.size import zstd_size
from effdl.passes.base import Pass
from effdl.recipe import Recipe
from effdl.report import (
    BenchReport,
    BenchResult,
    GateReport,
    LocateReport,
    OpChange,
    Profile,
)
from effdl.runtime.host import Host
from effdl.runtime.target import Target

_PATIENCE = 2.5
"""A pass that is too noisy to judge is measured once more, this many times as long."""
_GENERATIONS = 3
"""How often processes are started for a pass; starting them takes longer than measuring a small model."""
_MARGIN = 0.8
"""Share of the limit that a repair aims at, and of the time lost."""
_SIGMAS = 1.96
"""Half a 95 % interval, in standard deviations."""
_SUSPECTS = 32
"""Steps that a repair chooses from."""
_NAMED = 3
"""Operators that a reason names."""


def _some(names: Sequence[str]) -> int:
    """How many of the nodes at fault to leave alone when nothing more is known."""
    return math.ceil(len(names) / 10)


def _most(places: Sequence[tuple[tuple[str, ...], float, float]]) -> int:
    """How many of the nodes to leave alone, so that most of the time lost at these places comes back."""
    lost = sum(after - before for _, before, after in places)
    names: dict[str, None] = {}
    found = 0.0
    for origin, before, after in places:
        if found >= _MARGIN * lost:
            break
        names |= dict.fromkeys(origin)
        found += after - before
    return len(names)


def _enough(report: LocateReport, error: float | None, limit: float) -> int:
    """How many of the nodes at fault to leave alone, so that the others stay below the limit.

    The errors that single steps cause at the outputs are taken to be independent: they add up as
    squares. Their sum is scaled to the error that was measured.
    """
    effects = [j.effect or 0.0 for j in report.jumps]
    total = math.hypot(*effects)
    if not total or error is None:
        return _some(at_fault(report))
    rest = total
    for k in range(len(effects)):
        rest = math.hypot(*effects[k:])
        if rest * error <= _MARGIN * limit * total:
            return len(at_fault(replace(report, jumps=report.jumps[:k])))
    return len(at_fault(report))


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
        self, step: Pass, original: ir.Model, before: ir.Model, after: ir.Model, error: float | None
    ) -> GateReport | None:
        """Say whether a pass stays; None when it claims nothing and costs nothing.

        Args:
            step: the pass.
            original: the input model.
            before: the model without the pass.
            after: the model with it.
            error: relative L2 error of the worst output of ``after`` against the input model.
        """
        held = self._hold(original, after, error) if step.lossy else None
        if held is not None and not held.kept:
            return held
        by = self._claim(step)
        if not by:
            self.forget()
            return held
        old = self._before or self._write(before)
        new = self._write(after)
        smaller = by == "size"
        found = self._smaller(old, new) if smaller else self._faster(old, new, lossy=step.lossy)
        self._before, gone = (new, old) if found.kept else (old, new)
        self._remove(gone)
        if held is not None:
            found = replace(found, score=held.score, fidelity=held.fidelity)
        return found

    def refuses(self, step: Pass, original: ir.Model, after: ir.Model, error: float | None) -> str:
        """Return why a model breaks the budget, empty when it does not; ``judge`` explains the arguments."""
        held = self._hold(original, after, error, explain=False) if step.lossy else None
        return held.reason if held is not None and not held.kept else ""

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

    def _hold(
        self, original: ir.Model, after: ir.Model, error: float | None, *, explain: bool = True
    ) -> GateReport | None:
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
            found = GateReport(kept, "accuracy", reason, score=now.value, fidelity=error)
        elif budget.fidelity is not None and error is not None:
            kept = error <= budget.fidelity
            reason = "" if kept else f"output error {error:.2g}, allowed {budget.fidelity:g}"
            found = GateReport(kept, "fidelity", reason, fidelity=error)
        else:
            return None
        return self._name_layers(found, original, after) if explain and not found.kept else found

    def _name_layers(self, found: GateReport, original: ir.Model, after: ir.Model) -> GateReport:
        """Add the layers at which the error arises."""
        self.tell("looking for the layers at fault")
        feeds = self.feeds().first(1)
        try:
            report = locate(original, after, feeds, self.check_target, top=_SUSPECTS)
        except EffdlError:  # a model that does not run with its inner tensors as outputs
            return found
        said = [f"{op} {name}" for name, op, _ in worst(report, _NAMED)]
        reason = f"{found.reason}; most comes from {', '.join(said)}" if said else found.reason
        names = at_fault(report)
        budget = self.recipe.budget
        limit = budget.fidelity if budget is not None and found.by == "fidelity" else None
        few = _enough(report, found.fidelity, limit) if limit is not None else _some(names)
        return replace(found, reason=reason, culprits=tuple(names), spare=few)

    def _smaller(self, old: Path, new: Path) -> GateReport:
        before, after = io.files_size(old), io.files_size(new)
        kept = after < before or (after == before and zstd_size(new) < zstd_size(old))
        reason = "" if kept else f"the file is not smaller: {before:,} -> {after:,} bytes"
        return GateReport(kept, "size", reason, file_bytes=after)

    def fastest(
        self, before: ir.Model, forms: Sequence[ir.Model], *, lossy: bool
    ) -> list[GateReport] | None:
        """Time several models against the one before them, in one race; None where speed is no aim.

        The fastest that is kept becomes the model that the next pass is measured against.
        """
        if self.objective == "size" or self.host is None:
            return None
        old = self._before or self._write(before)
        files = [self._write(m) for m in forms]
        found = self._timed(old, files, lossy)
        kept = [k for k, f in enumerate(found) if f.kept]
        best = max(kept, key=lambda k: found[k].ratio or 0.0, default=None)
        if best is None:  # why the best of them loses
            k = max(range(len(found)), key=lambda k: found[k].ratio or 0.0)
            if found[k].ratio is not None:
                found[k] = self._name_operators(found[k], found[k].reason, old, files[k])
        self._before = old if best is None else files[best]
        for file in (old, *files):
            if file != self._before:
                self._remove(file)
        return found

    def _faster(self, old: Path, new: Path, *, lossy: bool) -> GateReport:
        found = self._timed(old, [new], lossy)[0]
        if found.kept or found.ratio is None:
            return found
        return self._name_operators(found, found.reason, old, new)

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

    def _name_operators(self, found: GateReport, said: str, old: Path, new: Path) -> GateReport:
        """Add where the time went."""
        self.tell("profiling")
        report = self.profile(old, new)
        if report is None:
            return replace(found, reason=said)
        first, second = report
        moved = changes(first, second)
        least = (found.noise_floor or 0.0) * (found.before_ms or 0.0)
        told = any(abs(c.after_ms - c.before_ms) > least for c in moved)
        why = explain(moved) if told else ""
        places = culprits(first, second)
        names = list(dict.fromkeys(name for origin, _, _ in places for name in origin))
        return replace(
            found,
            reason=f"{said}: {why}" if why else said,
            changes=moved,
            culprits=tuple(names),
            spare=_most(places),
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
