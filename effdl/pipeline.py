"""Runs a recipe over a model: snapshot, pass, clean, check, keep or roll back; then save and verify."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import onnx_ir as ir

from effdl.data.npz import load_labels, load_npz
from effdl.errors import CheckFailed, DataError, EffdlError, ModelError
from effdl.graph import io
from effdl.graph.clean import clean
from effdl.graph.dims import known_dims
from effdl.graph.scratch import scratch
from effdl.graph.walk import all_nodes, interface, opset
from effdl.graph.weights import weight_tensors
from effdl.measure.outcome import race, score
from effdl.measure.stats import model_stats
from effdl.measure.verify import Outputs, Verdict, Verifier, run_all, verification_feeds
from effdl.passes.base import Context, PassLog
from effdl.recipe import Recipe, Step, to_dict
from effdl.recipe.budget import missed
from effdl.recipe.patterns import match_patterns
from effdl.recipe.provenance import stamp
from effdl.recipe.reproducer import write_reproducer
from effdl.report import CompareReport, ModelStats, PassReport, RunReport
from effdl.runtime.target import parse_target, where_to_check
from effdl.runtime.versions import versions

Progress = Callable[[str, str], None]
"""Called with a pass (or stage) name and what is being done with it."""


@dataclass(frozen=True)
class RunOptions:
    """How a recipe is run, apart from what is in it.

    Args:
        dry_run: tell what each pass would do; nothing is checked, measured or written.
        keep_going: roll a failed pass back and go on, instead of stopping with nothing written.
        strict: a pass that finds nothing to do is an error.
        stop_after: run only the first passes.
        save_after_each: a folder that gets the model after every pass.
        bench_seconds: time for measuring input against output at the end, 0 for none.
        threads: intra-op threads of the measurement.
        dims: values of dynamic dimensions for random inputs.
        seed: of every random choice.
        external: weights beside the output; None: as the input has them, or where they must.
    """

    dry_run: bool = False
    keep_going: bool = False
    strict: bool = False
    stop_after: int | None = None
    save_after_each: Path | None = None
    bench_seconds: float = 3.0
    threads: int = 1
    dims: Mapping[str, int] = field(default_factory=dict)
    seed: int = 0
    external: bool | None = None


class PassBug(Exception):
    """A pass of ours failed on a model; ``reproducer`` is the folder that shows it."""

    def __init__(self, name: str, reproducer: Path, cause: BaseException) -> None:
        super().__init__(f"pass '{name}' failed: {type(cause).__name__}: {cause}")
        self.reproducer = reproducer


def optimize(
    source: Path,
    recipe: Recipe,
    output: Path | None,
    *,
    data: Path | None = None,
    options: RunOptions | None = None,
    progress: Progress | None = None,
) -> RunReport:
    """Run ``recipe`` over the model file ``source`` and write the result to ``output``.

    Args:
        source: the model.
        recipe: what to do.
        output: where the result goes; None in a dry run.
        data: calibration samples, an ``.npz``; goes before the recipe's ``data.calibration``.
        options: see ``RunOptions``.
        progress: told what is going on.

    Raises:
        EffdlError: a fault of model, recipe, data, output; CheckFailed: a pass changed the outputs
            or a budget was missed, and nothing was written.
        PassBug: a pass crashed; a reproducer was written.
    """
    options = options or RunOptions()
    with scratch() as workdir:
        run = _Run(source, recipe, output, data, options, progress or _silent, workdir)
        return run.dry() if options.dry_run else run.full()


def _silent(name: str, what: str) -> None:
    """Tell nobody."""


class _Run:
    """The state of one ``optimize``."""

    def __init__(
        self,
        source: Path,
        recipe: Recipe,
        output: Path | None,
        data: Path | None,
        options: RunOptions,
        progress: Progress,
        workdir: Path,
    ) -> None:
        self.started = time.perf_counter()
        self.source = source
        self.recipe = recipe
        self.options = options
        self.progress = progress
        self.workdir = workdir
        self.warnings: list[str] = []
        self.target = parse_target(recipe.target)
        self.check_target, self.unmeasured = where_to_check(self.target)
        self.steps = recipe.passes[: options.stop_after]
        self.goal = None if output is None else io.check_goal(output)
        self.label = str(output or "")
        if self.goal is not None:
            io.clean_leftovers(self.goal)
        progress("load", "reading")
        self.original = io.load(source)
        self.model = self.original.clone()
        calibration = data or recipe.data.calibration
        self.feeds = load_npz(calibration, self.original) if calibration else None
        self.verifier: Verifier | None = None
        self.first: Outputs = []  # of the original model on the verifier's feeds
        self.unverified = ""
        if not options.dry_run:
            self._need_data()

    def _need_data(self) -> None:
        for step in self.steps:
            if step.pass_.needs_data and self.feeds is None:
                raise DataError(
                    f"{step.name} needs calibration data",
                    hint="--data FILE.npz with one array per graph input, or data.calibration",
                    where=step.where,
                )

    def dry(self) -> RunReport:
        """Run the passes on a copy in memory and report what they touch."""
        before = model_stats(self.original, self.source, self.options.dims, zstd=False)
        reports = []
        for step in self.steps:
            self.progress(step.name, "planning")
            match_patterns(step, self.original, self.model)
            if step.pass_.needs_data and self.feeds is None:
                reports.append(self._planned(step))
                continue
            started = time.perf_counter()
            log, changes, reason = self._run_pass(step)
            if changes:
                clean(self.model)
            status = "changed" if changes else "unchanged"
            reports.append(self._report(step, log, status, changes, reason, None, started))
        after = replace(model_stats(self.model, None, self.options.dims, zstd=False), path="")
        return self._run_report(before, after, reports, None, "a dry run checks nothing")

    def _planned(self, step: Step) -> PassReport:
        ctx = self._context()
        names = step.pass_.candidates(self.model, ctx)
        log = ctx.log
        log.touched.extend((n, "candidate") for n in names or [] if n not in dict(log.touched))
        reason = "needs calibration data (--data): these are its candidates"
        return self._report(step, log, "not_run", 0, reason, None, time.perf_counter())

    def full(self) -> RunReport:
        """Run, check, save, verify and measure."""
        assert self.goal is not None
        before = model_stats(self.original, self.source, self.options.dims)
        self._start_verifier()
        reports = [self._step(step, n) for n, step in enumerate(self.steps, 1)]
        stamp(self.model, self.recipe, before.sha256)
        with io.Stage(self.goal) as stage:
            self.progress("save", "writing")
            external = self.options.external
            if external is None and io.external_tensors(self.original):
                external = True
            stage.write(self.model, external=external)
            verified = self._verify_file(stage.path)
            after = replace(
                model_stats(io.load(stage.path), stage.path, self.options.dims), path=self.label
            )
            report = self._run_report(before, after, reports, verified, self.unverified)
            report = self._measure(report, stage.path)
            miss = missed(report, self.recipe)
            if miss and not self.options.keep_going:
                raise CheckFailed(miss, hint="nothing was written; --keep-going writes it anyway")
            if miss:
                report = replace(report, warnings=(*report.warnings, miss))
            stage.commit()
        return replace(report, seconds=time.perf_counter() - self.started)

    def _start_verifier(self) -> None:
        self.progress("check", "running the input model")
        try:
            feeds = verification_feeds(
                self.model,
                self.feeds,
                dims=self.options.dims,
                seed=self.options.seed,
                target=self.check_target,
            )
            self.verifier = Verifier(self.model, feeds, self.check_target)
            self.first = self.verifier.reference
        except ModelError as e:
            if any(s.pass_.needs_data for s in self.steps):
                raise
            self.unverified = e.message
            self.warnings.append(f"outputs are not checked: {e.message}")

    def _step(self, step: Step, number: int) -> PassReport:
        """Run one pass; on failure the model is the one before it again."""
        self.progress(step.name, "running")
        match_patterns(step, self.original, self.model)
        started = time.perf_counter()
        snapshot = self.model.clone()
        try:
            log, changes, reason = self._run_pass(step)
            seconds = time.perf_counter() - started
            verdict = None
            if changes:
                self.progress(step.name, "checking")
                clean(self.model)
                verdict = self._check(step, snapshot)
        except EffdlError as e:
            if not isinstance(e, CheckFailed):
                e.where = e.where or step.where
            raise
        except Exception as e:
            reproducer = self._reproduce(step, snapshot, e)
            if not self.options.keep_going:
                raise PassBug(step.name, reproducer, e) from e
            self.warnings.append(f"{step.name} crashed ({e}); reproducer: {reproducer}")
            log, changes, seconds = PassLog(), 0, time.perf_counter() - started
            verdict = Verdict(False, None, f"crashed: {type(e).__name__}: {e}")
        status = "changed"
        if verdict is not None and not verdict.ok:
            status, reason = "rolled_back", verdict.reason
            self.model = snapshot
            if not self.options.keep_going:
                reproducer = self._reproduce(step, snapshot, CheckFailed(reason))
                raise CheckFailed(
                    f"{step.name} was rolled back: {reason}",
                    hint=f"nothing was written; --keep-going drops the pass. See {reproducer}",
                )
        elif verdict is None:
            status, self.model = "unchanged", snapshot
            if self.options.strict:
                raise CheckFailed(f"{step.name} found nothing to do: {reason}", where=step.where)
        elif self.verifier is not None:
            self.verifier.accept(verdict)
            reason = verdict.note
        if self.options.save_after_each is not None:
            folder = self.options.save_after_each
            folder.mkdir(parents=True, exist_ok=True)
            io.save(self.model, folder / f"{number:02d}_{step.name}.onnx")
        report = self._report(step, log, status, changes, reason, verdict, started)
        return replace(
            report, seconds=seconds, check_seconds=time.perf_counter() - started - seconds
        )

    def _run_pass(self, step: Step) -> tuple[PassLog, int, str]:
        have = opset(self.model)
        if have and have < step.pass_.min_opset:
            need = step.pass_.min_opset
            return (
                PassLog(),
                0,
                f"needs opset {need}, the model has {have}: convert_opset before it",
            )
        ctx = self._context()
        changes = step.pass_.run(self.model, ctx)
        reason = "" if changes else ctx.log.why_nothing()
        return ctx.log, changes, reason

    def _check(self, step: Step, snapshot: ir.Model) -> Verdict:
        try:
            io.check(self.model)
        except ModelError as e:
            return Verdict(False, None, e.message)
        if not step.pass_.changes_interface():
            changed = interface(snapshot) ^ interface(self.model)
            if changed:
                return Verdict(
                    False, None, f"inputs or outputs changed: {', '.join(sorted(changed))}"
                )
        if self.verifier is None:
            return Verdict(True, None, "", "not checked")
        if step.pass_.changes_interface():
            return self._new_interface(step, snapshot)
        return self.verifier.check(snapshot, self.model, lossy=step.pass_.lossy)

    def _new_interface(self, step: Step, snapshot: ir.Model) -> Verdict:
        """Check a pass that may change input shapes: on feeds that fit the new model."""
        assert self.verifier is not None
        feeds = verification_feeds(
            self.model,
            self.feeds,
            dims=known_dims(self.model, self.options.dims),
            seed=self.options.seed,
            target=self.check_target,
        )
        self.verifier = Verifier(snapshot, feeds, self.check_target)
        self.first = run_all(self.original, feeds, self.check_target)
        return self.verifier.check(snapshot, self.model, lossy=step.pass_.lossy)

    def _context(self) -> Context:
        folder = Path(tempfile.mkdtemp(dir=self.workdir))
        return Context(self.target, self.feeds, self.options.seed, folder, PassLog())

    def _report(
        self,
        step: Step,
        log: PassLog,
        status: str,
        changes: int,
        reason: str,
        verdict: Verdict | None,
        started: float,
    ) -> PassReport:
        return PassReport(
            name=step.name,
            options=dict(step.options),
            lossy=step.pass_.lossy,
            status=status,
            changes=changes,
            reason=reason,
            touched=tuple(log.touched),
            skipped=tuple(log.skipped),
            notes=dict(log.notes),
            error=verdict.error if verdict is not None else None,
            nodes=sum(1 for _ in all_nodes(self.model)),
            weight_bytes=sum(t.nbytes for t in weight_tensors(self.model)),
            seconds=time.perf_counter() - started,
            check_seconds=0.0,
        )

    def _verify_file(self, path: Path) -> CompareReport | None:
        """Read the staged file back and compare it with the original model."""
        if self.verifier is None:
            return None
        self.progress("verify", "reading the file back")
        self.verifier.reference = self.first
        lossy = any(s.pass_.lossy for s in self.steps)
        report = self.verifier.check_file(self.original, path, lossy=lossy)
        return replace(report, reference=str(self.source), candidate=self.label)

    def _measure(self, report: RunReport, path: Path) -> RunReport:
        """Score and time the input against the file just written."""
        spec = self.recipe.data.evaluation
        if spec is not None:
            self.progress("evaluate", spec.metric)
            samples = load_npz(spec.path, self.original)
            labels = load_labels(spec.path, spec.labels)
            scores = score(self.source, path, samples, labels, spec.metric, self.check_target)
            report = replace(report, accuracy=scores)
        if self.verifier is None:
            return replace(report, unmeasured="the model does not run here")
        if self.unmeasured or self.options.bench_seconds <= 0:
            return replace(report, unmeasured=self.unmeasured or "switched off")
        self.progress("bench", "measuring input and output")
        result, why = race(
            self.source,
            path,
            (report.before, report.after),
            self.verifier.feeds,
            self.target,
            threads=self.options.threads,
            seconds=self.options.bench_seconds,
            seed=self.options.seed,
        )
        return replace(report, bench=result, unmeasured=why)

    def _reproduce(self, step: Step, model: ir.Model, error: BaseException) -> Path:
        place = self.goal.parent if self.goal is not None else Path.cwd()
        return write_reproducer(place, model, step, self.recipe, error)

    def _run_report(
        self,
        before: ModelStats,
        after: ModelStats,
        passes: list[PassReport],
        verified: CompareReport | None,
        unverified: str,
    ) -> RunReport:
        return RunReport(
            recipe=to_dict(self.recipe),
            target=self.target.device,
            versions=versions(),
            before=before,
            after=after,
            passes=tuple(passes),
            verified=verified,
            unverified=unverified,
            bench=None,
            unmeasured="",
            accuracy=None,
            output=self.label,
            dry_run=self.options.dry_run,
            seconds=time.perf_counter() - self.started,
            warnings=tuple(self.warnings),
        )
