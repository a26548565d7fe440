"""Runs a recipe over a model: snapshot, pass, check, measure, keep or go back; then save and verify."""

from __future__ import annotations

import shutil
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from effdl.data.dataset import load_dataset
from effdl.data.feeds import Feeds
from effdl.data.spec import Source
from effdl.errors import CheckFailed, DataError, EffdlError, ModelError
from effdl.forms import best_form, forms_of
from effdl.gate import Gate, loses, weakest
from effdl.graph import io
from effdl.graph.clean import clean
from effdl.graph.scratch import scratch
from effdl.graph.walk import all_nodes
from effdl.graph.weights import weight_tensors
from effdl.measure.locate import first_divergence
from effdl.measure.outcome import race
from effdl.measure.remote import verify_at
from effdl.measure.stats import model_stats
from effdl.measure.verify import Verdict
from effdl.passes.base import NodePass, PassLog
from effdl.recipe import Recipe, Step, to_dict
from effdl.recipe.budget import missed, price, unheld
from effdl.recipe.patterns import match_patterns
from effdl.recipe.provenance import stamp
from effdl.recipe.reproducer import write_reproducer
from effdl.recipe.sparing import REPAIRS, spare, spared
from effdl.report import CompareReport, GateReport, ModelStats, PassReport, RunReport
from effdl.run_options import PassBug, Progress, RunOptions
from effdl.runtime.host import Host, no_latency, open_host
from effdl.runtime.target import check_reachable, parse_target, where_to_check
from effdl.runtime.versions import versions
from effdl.workpiece import Applied, Workpiece


def optimize(
    source: Path,
    recipe: Recipe,
    output: Path | None,
    *,
    data: Path | Source | None = None,
    options: RunOptions | None = None,
    progress: Progress | None = None,
) -> RunReport:
    """Run ``recipe`` over the model file ``source`` and write the result to ``output``.

    Args:
        source: the model.
        recipe: what to do.
        output: where the result goes; None in a dry run.
        data: calibration samples; goes before the recipe's ``data.calibration``.
        options: see ``RunOptions``.
        progress: told what is going on.

    Returns:
        What happened. Where ``won`` is False nothing helped and the output is the input, unchanged.

    Raises:
        EffdlError: a fault of model, recipe, data, output; CheckFailed: a pass changed the outputs
            or a budget was missed, and nothing was written.
        PassBug: a pass crashed on a model that runs; a reproducer was written.
    """
    options = options or RunOptions()
    with scratch() as workdir, ExitStack() as stack:
        tell = progress or _silent
        run = _Run(source, recipe, output, data, options, tell, workdir, stack)
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
        data: Path | Source | None,
        options: RunOptions,
        progress: Progress,
        workdir: Path,
        stack: ExitStack,
    ) -> None:
        self.started = time.perf_counter()
        self.source = source
        self.recipe = recipe
        self.options = options
        self.progress = progress
        self.workdir = workdir
        self.warnings: list[str] = []
        self.stack = stack
        self.target = parse_target(recipe.target)
        self.check_target, self.unmeasured = where_to_check(self.target)
        if self.target.remote:
            check_reachable(self.target)
        self.host: Host | None = None
        if self.target.device == "ssh":  # what its processor can do decides number formats
            progress("target", f"reaching {self.target.name}")
            self.host = stack.enter_context(open_host(self.target))
            self.target = self.host.target
        own = self.target.threads or 1
        self.threads = own if options.threads is None else options.threads
        self.steps = recipe.passes[: options.stop_after]
        self.goal = None if output is None else io.check_goal(output)
        self.label = str(output or "")
        if self.goal is not None:
            io.clean_leftovers(self.goal)
        progress("load", "reading")
        original = io.load(source)
        calibration = data or recipe.data.calibration
        self.work = Workpiece(
            original,
            self.target,
            self.check_target,
            (lambda model: load_dataset(calibration, model).feeds) if calibration else None,
            options.dims,
            options.seed,
            workdir,
        )
        self.done: list[tuple[Step, PassReport]] = []
        self.unverified = ""
        if not options.dry_run:
            self._need_data()

    def _need_data(self) -> None:
        for step in self.steps:
            if step.pass_.needs_data and self.work.calibration is None:
                raise DataError(
                    f"{step.name} needs calibration data",
                    hint="--data FILE.npz with one array per graph input, or data.calibration",
                    where=step.where,
                )

    def dry(self) -> RunReport:
        """Run the passes on a copy in memory and report what they touch."""
        work = self.work
        self.before = model_stats(work.original, self.source, self.options.dims, zstd=False)
        for step in self.steps:
            self.progress(step.name, "planning")
            match_patterns(step, work.original, work.model)
            if step.pass_.needs_data and work.calibration is None:
                self.done.append((step, self._planned(step)))
                continue
            started = time.perf_counter()
            log, changes, reason = work.run_pass(step)
            if changes:
                clean(work.model)
            status = "changed" if changes else "unchanged"
            applied = Applied(log, changes, reason, None, time.perf_counter() - started, 0.0)
            self.done.append((step, self._report(step, applied, status, reason)))
        after = replace(model_stats(work.model, None, self.options.dims, zstd=False), path="")
        return self._run_report(after, None, "a dry run checks nothing")

    def _planned(self, step: Step) -> PassReport:
        ctx = self.work.context()
        names = step.pass_.candidates(self.work.model, ctx)
        log = ctx.log
        log.touched.extend((n, "candidate") for n in names or [] if n not in dict(log.touched))
        reason = "needs calibration data (--data): these are its candidates"
        return self._report(step, Applied(log, 0, reason, None, 0.0, 0.0), "not_run", reason)

    def full(self) -> RunReport:
        """Run, check, measure, save and verify."""
        assert self.goal is not None
        self.before = model_stats(self.work.original, self.source, self.options.dims)
        self._start_checks()
        self.gate = self._open_gate()
        self.warnings += unheld(self.recipe)
        for group in self._groups():
            if len(group) < 2 or not self._together(group):
                for step in group:
                    self.done.append(self._step(step))
                    self._save_step(step)
        with io.Stage(self.goal) as stage:
            report = self._settle(stage)
            report = replace(report, warnings=(*report.warnings, *price(report)))
            miss = missed(report, self.recipe) if report.won else ""
            if miss and not self.options.keep_going:
                hint = "nothing was written; --keep-going writes it anyway"
                raise CheckFailed(miss, hint=hint, report=report)
            if miss:
                report = replace(report, warnings=(*report.warnings, miss))
            if report.won or self.goal != self.source.absolute():
                stage.commit()
        return replace(report, seconds=time.perf_counter() - self.started)

    def _save_step(self, step: Step) -> None:
        folder = self.options.save_after_each
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            io.save(self.work.model, folder / f"{len(self.done):02d}_{step.name}.onnx")

    def _groups(self) -> list[list[Step]]:
        """Return the steps, those together whose outputs can be compared at the end of them all."""
        groups: list[list[Step]] = [[]]
        judged = self.options.gate == "each"
        for step in self.steps:
            alone = (
                step.pass_.lossy
                or step.pass_.changes_interface()
                or self.options.save_after_each is not None
                or (judged and self.gate.claims(step.pass_))
            )
            if alone:
                groups += [[step], []]
            else:
                groups[-1].append(step)
        return [g for g in groups if g]

    def _together(self, group: list[Step]) -> bool:
        """Run lossless passes and compare outputs once; False, with nothing done, where they differ.

        Opening a session costs more than most of these passes. One after the other, each checked,
        then tells which pass it was.
        """
        before, done = self.work.snapshot(), list[tuple[Step, PassReport]]()
        for step in group:
            match_patterns(step, self.work.original, self.work.model)
            done.append((step, self._attempt(step, judged=False, outputs=False)))
        changed = [k for k, (_, report) in enumerate(done) if report.status == "changed"]
        if changed:
            self.progress(group[changed[-1]].name, "checking")
            verdict = self.work.check_outputs(before.model)
            if not verdict.ok:
                self.work.restore(before)
                return False
            self.work.accept(verdict)
            self.gate.forget()
            step, last = done[changed[-1]]
            reason = verdict.note or last.reason
            done[changed[-1]] = step, replace(last, error=verdict.error, reason=reason)
        self.done += done
        return True

    def _start_checks(self) -> None:
        self.progress("check", "running the input model")
        try:
            self.work.start_checks()
        except ModelError as e:
            if any(s.pass_.needs_data for s in self.steps):
                raise
            self.unverified = e.message
            self.warnings.append(f"outputs are not checked: {e.message}")

    def _open_gate(self) -> Gate:
        """Reach the target, if its speed can be measured."""
        if self.host is not None and self.host.emulated:
            self.unmeasured = no_latency(self.target.name, self.host.machine.emulator).message
        if self.work.verifier is None:
            self.unmeasured = self.unmeasured or "the model does not run here"
        elif self.options.bench_seconds <= 0:
            self.unmeasured = self.unmeasured or "switched off"
        if self.host is None and not self.unmeasured:
            self.host = self.stack.enter_context(open_host(self.target))
        spec = self.recipe.data.evaluation
        gate = Gate(
            recipe=self.recipe,
            source=self.source,
            host=None if self.unmeasured else self.host,
            target=self.target,
            check_target=self.check_target,
            feeds=self._feeds,
            dataset=None if spec is None else lambda model: load_dataset(spec, model),
            workdir=self.workdir,
            seconds=self.options.gate_seconds,
            threads=self.threads,
            seed=self.options.seed,
        )
        if gate.dataset is not None:
            self.progress("evaluate", "scoring the input model")
            gate.score_input(self.work.original)  # wrong data is told now, not after the work
        return gate

    def _feeds(self) -> Feeds:
        assert self.work.verifier is not None
        return self.work.verifier.feeds

    def _step(self, step: Step) -> tuple[Step, PassReport]:
        """Run one pass; where the gate drops it, try again without the nodes at fault."""
        match_patterns(step, self.work.original, self.work.model)
        judged = self.options.gate == "each"
        forms = forms_of(step) if judged else []
        if len(forms) > 1:
            self.gate.tell = lambda what: self.progress(step.name, what)
            best = best_form(
                self.work, self.gate, forms, lambda s: self._attempt(s, judged=False, again=True)
            )
            if best is not None:
                return best
        report = self._attempt(step, judged=judged)
        gate = report.gate
        if gate is None or gate.kept or not isinstance(step.pass_, NodePass):
            return step, report
        tried = ""
        for factor in REPAIRS if gate.by != "latency" else REPAIRS[:1]:
            milder = spare(step, gate.culprits, factor * gate.spare, self.work.model)
            if milder is None:
                break
            left = spared(step, milder)
            self.progress(step.name, f"again, {left} left alone")
            again = self._attempt(milder, judged=True, again=True)
            if again.gate is not None and again.gate.kept:
                return milder, replace(again, reason=f"{left} left alone; with them: {gate.reason}")
            tried = f"; with {left} left alone: {again.reason}"
            if again.gate is None or factor * gate.spare >= len(gate.culprits):
                break
        reason = report.reason + tried
        return step, replace(report, reason=reason, gate=replace(gate, reason=reason))

    def _attempt(
        self, step: Step, *, judged: bool, again: bool = False, outputs: bool = True
    ) -> PassReport:
        """Run one pass; on failure the model is the one before it again.

        Args:
            step: the pass.
            judged: whether the gate looks at it.
            again: it ran before; what goes wrong now is reported, it does not end the run.
            outputs: compare outputs; else somebody does so later.
        """
        lenient = self.options.keep_going or again
        self.progress(step.name, "running")
        work, before = self.work, self.work.snapshot()
        try:
            applied = work.apply(step, before.model, outputs=outputs)
        except EffdlError as e:
            if not isinstance(e, CheckFailed):
                e.where = e.where or step.where
            raise
        except Exception as e:
            reproducer = write_reproducer(self._place(), before.model, step, self.recipe, e)
            if not lenient and self.unverified:
                raise ModelError(
                    f"{step.name} fails on this model ({type(e).__name__}: {e}), which does not run "
                    f"as it is either: {self.unverified}",
                    hint=f"if the model is right, the fault is ours: see {reproducer}",
                ) from e
            if not lenient:
                raise PassBug(step.name, reproducer, e) from e
            self.warnings.append(f"{step.name} crashed ({e}); reproducer: {reproducer}")
            crash = Verdict(False, None, f"crashed: {type(e).__name__}: {e}")
            applied = Applied(PassLog(), 0, "", crash, 0.0, 0.0)
        verdict = applied.verdict
        if verdict is None:
            work.restore(before)
            if self.options.strict and not again:
                raise CheckFailed(
                    f"{step.name} found nothing to do: {applied.reason}", where=step.where
                )
            return self._report(step, applied, "unchanged", applied.reason)
        if not verdict.ok:
            reason = self._why_failed(step, before.model, verdict)
            work.restore(before)
            if not lenient:
                raise self._check_failed(step, before.model, reason)
            return self._report(step, applied, "rolled_back", reason)
        gate = self._judge(step, before.model, verdict) if judged else None
        if gate is not None and not gate.kept:
            report = self._report(step, applied, "dropped", gate.reason)
            work.restore(before)
        else:
            work.accept(verdict)
            report = self._report(step, applied, "changed", verdict.note)
        return replace(report, gate=gate)

    def _judge(self, step: Step, before: ir.Model, verdict: Verdict) -> GateReport | None:
        work = self.work
        self.gate.tell = lambda what: self.progress(step.name, what)
        error = work.total_error(verdict)
        return self.gate.judge(step.pass_, work.original, before, work.model, error)

    def _why_failed(self, step: Step, before: ir.Model, verdict: Verdict) -> str:
        """Return the reason with the place in the graph, where a lossless pass changed the outputs."""
        if step.pass_.lossy or not verdict.errors:
            return verdict.reason
        self.progress(step.name, "looking for the place")
        where = first_divergence(before, self.work.model, self._feeds(), self.check_target)
        return f"{verdict.reason}; {where}" if where else verdict.reason

    def _check_failed(self, step: Step, model: ir.Model, reason: str) -> CheckFailed:
        place = write_reproducer(self._place(), model, step, self.recipe, CheckFailed(reason))
        return CheckFailed(
            f"{step.name} was rolled back: {reason}",
            hint=f"nothing was written; --keep-going drops the pass. See {place}",
        )

    def _place(self) -> Path:
        return self.goal.parent if self.goal is not None else Path.cwd()

    def _settle(self, stage: io.Stage) -> RunReport:
        """Write and measure the result; while it loses, take passes out."""
        while True:
            report = self._result(stage)
            if self.options.gate == "off":
                return report
            by, reason = loses(report, self.recipe)
            if not by:
                return self._explained(report, stage.path)
            index = weakest(report.passes, by)
            if index is None:
                return self._give_back(stage, report, reason)
            self._take_out(index, reason)

    def _take_out(self, index: int, reason: str) -> None:
        """Run the kept passes again from the start, but one."""
        self.progress(self.done[index][0].name, f"taken out: {reason}")
        self.work.restore(self.work.start)
        old, self.done = self.done, []
        for k, (step, was) in enumerate(old):
            if k == index:
                gate = GateReport(False, "total", f"with it the result is {reason}")
                report = replace(was, status="dropped", reason=gate.reason, gate=gate)
            elif was.status == "changed":
                report = replace(self._attempt(step, judged=False, again=True), gate=was.gate)
            else:
                report = was
            self.done.append((step, report))

    def _give_back(self, stage: io.Stage, report: RunReport, reason: str) -> RunReport:
        """Put the input where the result would have been."""
        after = replace(self.before, path=self.label)
        if io.external_tensors(self.work.original):
            stage.write(self.work.original, external=True)
            stats = model_stats(io.load(stage.path), stage.path, self.options.dims)
            after = replace(stats, path=self.label)
        else:
            shutil.copyfile(self.source, stage.path)
        return replace(
            report,
            after=after,
            verified=None,
            unverified="the output is the input",
            bench=None,
            unmeasured="the output is the input",
            accuracy=None,
            there=(),
            won=False,
            warnings=(*report.warnings, f"nothing helped: the best that was found is {reason}"),
        )

    def _result(self, stage: io.Stage) -> RunReport:
        """Write the model as it is now, read it back, compare and measure it."""
        self.progress("save", "writing")
        kept = tuple(s for s, r in self.done if r.status in ("changed", "unchanged"))
        used = self.recipe.model_copy(update={"passes": kept})
        stamp(self.work.model, used, self.before.sha256)
        external = self.options.external
        if external is None and io.external_tensors(self.work.original):
            external = True
        stage.write(self.work.model, external=external)
        verified = self._verify_file(stage.path)
        stats = model_stats(io.load(stage.path), stage.path, self.options.dims)
        report = self._run_report(replace(stats, path=self.label), verified, self.unverified)
        if self.target.remote and self.work.verifier is not None:
            self.progress("verify", f"on {self.target.name}")
            feeds = self._feeds().first(2)
            there = verify_at(self.target, self.host, stage.path, feeds)
            report = replace(report, there=there)
            wrong = next((t for t in there if not t.equal), None)
            if wrong is not None:
                self._differs_there(wrong)
                report = replace(report, warnings=tuple(self.warnings))
        return self._measure(report, stage.path)

    def _differs_there(self, report: CompareReport) -> None:
        """Tell that the target computes something else; the end, unless the run is to go on."""
        worst = max((o.rel_l2 for o in report.outputs), default=0.0)
        name = report.place.target if report.place is not None else self.target.name
        said = f"on {name} the result computes something else than here: relative error {worst:.2g}"
        if not self.options.keep_going:
            hint = "nothing was written; --keep-going writes it anyway"
            raise CheckFailed(said, hint=hint)
        if said not in self.warnings:
            self.warnings.append(said)

    def _verify_file(self, path: Path) -> CompareReport | None:
        """Read the staged file back and compare it with the original model."""
        verifier = self.work.verifier
        if verifier is None:
            return None
        self.progress("verify", "reading the file back")
        verifier.reference = self.work.first
        lossy = any(s.pass_.lossy for s, r in self.done if r.status == "changed")
        report = verifier.check_file(self.work.original, path, lossy=lossy)
        return replace(report, reference=str(self.source), candidate=self.label)

    def _measure(self, report: RunReport, path: Path) -> RunReport:
        """Score and time the input against the file just written."""
        if self.recipe.data.evaluation is not None:
            self.progress("evaluate", self.recipe.data.evaluation.metric)
            report = replace(report, accuracy=self.gate.accuracy(self.source, path))
        if self.gate.host is None:
            return replace(report, unmeasured=self.unmeasured)
        self.progress("bench", "measuring input and output")
        result, why = race(
            self.source,
            path,
            (report.before, report.after),
            self._feeds(),
            self.target,
            threads=self.threads,
            seconds=self.options.bench_seconds,
            seed=self.options.seed,
            host=self.gate.host,
            must=self.options.gate != "off",
        )
        return replace(report, bench=result, unmeasured=why)

    def _explained(self, report: RunReport, path: Path) -> RunReport:
        """Add where the time went, where it differs; a result that is given up is not profiled."""
        if report.bench is None or report.bench.models[-1].verdict == "same":
            return report
        self.progress("bench", "profiling input and output")
        return replace(report, changes=self.gate.where_time_went(self.source, path))

    def _report(self, step: Step, applied: Applied, status: str, reason: str) -> PassReport:
        log, verdict = applied.log, applied.verdict
        return PassReport(
            name=step.name,
            options=dict(step.options),
            lossy=step.pass_.lossy,
            status=status,
            changes=applied.changes,
            reason=reason,
            touched=tuple(log.touched),
            skipped=tuple(log.skipped),
            notes=dict(log.notes),
            error=verdict.error if verdict is not None else None,
            nodes=sum(1 for _ in all_nodes(self.work.model)),
            weight_bytes=sum(t.nbytes for t in weight_tensors(self.work.model)),
            seconds=applied.seconds,
            check_seconds=applied.check_seconds,
        )

    def _run_report(
        self, after: ModelStats, verified: CompareReport | None, unverified: str
    ) -> RunReport:
        return RunReport(
            recipe=to_dict(self.recipe),
            target=self.target.name,
            versions=versions(),
            before=self.before,
            after=after,
            passes=tuple(report for _, report in self.done),
            verified=verified,
            unverified=unverified,
            bench=None,
            unmeasured="",
            accuracy=None,
            output=self.label,
            dry_run=self.options.dry_run,
            seconds=time.perf_counter() - self.started,
            warnings=tuple(self.warnings),
            gate=self.options.gate,
            seed=self.options.seed,
        )
