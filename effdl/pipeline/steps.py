"""Runs the passes of a recipe: snapshot, pass, check, measure, keep or go back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from effdl.errors import CheckFailed, EffdlError, ModelError
from effdl.forms import best_form, forms_of, names_touched, with_budget
from effdl.gate import Gate
from effdl.graph import io
from effdl.graph.walk import all_nodes
from effdl.graph.weights import weight_tensors
from effdl.measure.locate import first_divergence
from effdl.measure.verify import Verdict
from effdl.passes.base import NodePass, PassLog
from effdl.pipeline.job import Job
from effdl.recipe import Step
from effdl.recipe.patterns import match_patterns
from effdl.recipe.reproducer import write_reproducer
from effdl.recipe.sparing import spare, spared
from effdl.report import GateReport, PassReport
from effdl.run_options import PassBug
from effdl.workpiece import Applied, Snapshot

_ROUNDS = 2
"""How often nodes that a kept pass made slower are left alone."""

_REPAIRS = 4
"""How often nodes at fault are left alone, before a pass is dropped."""
_WORTH = 1.01
"""What leaving nodes alone has to gain."""


class Steps:
    """The passes of one run, and what became of each.

    Args:
        job: the run.
        gate: judges passes that claim something.
    """

    def __init__(self, job: Job, gate: Gate) -> None:
        self.job = job
        self.gate = gate
        self.done: list[tuple[Step, PassReport]] = []
        self._size: tuple[int, int] | None = None  # of the model as it is now, if known

    def run(self, steps: tuple[Step, ...]) -> None:
        """Run passes one after the other, lossless ones that claim nothing together.

        Raises:
            CheckFailed: a pass changed what it must not.
            PassBug: a pass crashed on a model that runs; a reproducer was written.
        """
        for group in self._groups(steps):
            if len(group) < 2 or not self._together(group):
                for step in group:
                    self.done.append(self._step(step))
                    self._save_step(step)

    def take_out(self, index: int, reason: str) -> None:
        """Run the kept passes again from the start, but one."""
        work = self.job.work
        self.job.tell(self.done[index][0].name, f"taken out: {reason}")
        work.restore(work.start)
        self._size = None
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

    def _save_step(self, step: Step) -> None:
        folder = self.job.options.save_after_each
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            io.save(self.job.work.model, folder / f"{len(self.done):02d}_{step.name}.onnx")

    def _groups(self, steps: tuple[Step, ...]) -> list[list[Step]]:
        """Return the steps, those together whose outputs can be compared at the end of them all."""
        groups: list[list[Step]] = [[]]
        options = self.job.options
        for step in steps:
            alone = (
                step.pass_.lossy
                or step.pass_.changes_interface()
                or options.save_after_each is not None
                or (options.gate == "each" and self.gate.claims(step.pass_))
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
        work = self.job.work
        before, done = work.snapshot(), list[tuple[Step, PassReport]]()
        for step in group:
            self.job.tell(step.name, "running")
            match_patterns(step, work.original, work.model)
            try:
                applied = work.apply(step, before.model, outputs=False)
            except Exception:  # it comes again when they run one by one, and is told then
                return self._undo(before)
            if applied.verdict is None and not self.job.options.strict:
                done.append((step, self._report(step, applied, "unchanged", applied.reason)))
            elif applied.verdict is not None and applied.verdict.ok:
                done.append((step, self._report(step, applied, "changed", "")))
            else:
                return self._undo(before)
        changed = [k for k, (_, report) in enumerate(done) if report.status == "changed"]
        if changed:
            self.job.tell(group[changed[-1]].name, "checking")
            verdict = work.check_outputs(before.model)
            if not verdict.ok:
                return self._undo(before)
            work.accept(verdict)
            self.gate.forget()
            step, last = done[changed[-1]]
            done[changed[-1]] = step, replace(last, error=verdict.error, reason=verdict.note)
        self.done += done
        return True

    def _undo(self, before: Snapshot) -> bool:
        self.job.work.restore(before)
        self._size = None
        return False

    def _step(self, step: Step) -> tuple[Step, PassReport]:
        """Run one pass in its best form; where the gate drops it, again without the nodes at fault."""
        work = self.job.work
        match_patterns(step, work.original, work.model)
        judged = self.job.options.gate == "each"
        before = work.snapshot()
        self.gate.tell = lambda what: self.job.tell(step.name, what)
        forms = forms_of(step) if judged else []
        best = None
        if len(forms) > 1:
            best = best_form(work, self.gate, forms, self._within_budget)
            self._size = None
        step, report = self._repaired(*(best or (step, self._attempt(step, judged=judged))))
        rounds = 0
        while report.gate is not None and report.gate.kept and rounds < _ROUNDS:
            better = self._refined(step, report, before)
            if better is None:
                break
            (step, report), rounds = better, rounds + 1
        return step, report

    def _repaired(self, step: Step, report: PassReport) -> tuple[Step, PassReport]:
        """Where the gate dropped a pass, run it again without the nodes at fault, and again."""
        if not isinstance(step.pass_, NodePass):
            return step, report
        milder, last, tried = step, report, ""
        for _ in range(_REPAIRS):
            if last.gate is None or last.gate.kept:
                break
            more = spare(milder, last.gate.repair, self.job.work.model)
            if more is None:
                break
            milder, left = more, spared(step, more)
            self.job.tell(step.name, f"again, {left} left alone")
            last = self._attempt(milder, judged=True, again=True)
            if last.gate is not None and last.gate.kept:
                return milder, replace(
                    last, reason=f"{left} left alone; with them: {report.reason}"
                )
            tried = f"; with {left} left alone: {last.reason}"
        if not tried or report.gate is None:
            return step, report
        reason = report.reason + tried
        return step, replace(report, reason=reason, gate=replace(report.gate, reason=reason))

    def _within_budget(self, step: Step) -> tuple[Step, PassReport, str]:
        """Run one pass; where it breaks the budget, again without the layers at fault, and again.

        Returns:
            What was run, what came of it, and why the budget is broken, empty where it is not.
        """
        work = self.job.work
        before = work.snapshot()
        milder, reason = step, ""
        first: GateReport | None = None
        for tries in range(_REPAIRS + 1):
            report = self._attempt(milder, judged=False, again=True)
            if report.status != "changed":
                break
            held = self._held(milder, before, report, explain=tries < _REPAIRS)
            if held is None or held.kept:
                reason = f"{reason}; with them: {first.reason}" if first else report.reason
                return milder, replace(report, reason=reason, gate=held), ""
            first = first or held
            more = spare(milder, held.repair, before.model)
            if more is None:
                break
            work.restore(before)
            milder, reason = more, f"{spared(step, more)} left alone"
            self.job.tell(step.name, f"again, {reason}")
        if first is None:
            return milder, report, ""
        return milder, replace(report, gate=first), first.reason

    def _held(
        self, step: Step, before: Snapshot, report: PassReport, *, explain: bool
    ) -> GateReport | None:
        """Return whether the model as it is now keeps the budget, None where none is held."""
        work, touched = self.job.work, names_touched(report)
        models = work.original, before.model, work.model
        return self.gate.holds(step.pass_, *models, work.error(), touched, explain=explain)

    def _refined(
        self, step: Step, report: PassReport, before: Snapshot
    ) -> tuple[Step, PassReport] | None:
        """Try again without the nodes that a kept pass made slower.

        Returns:
            None, with the model as it was, where there are none or nothing is gained.
        """
        assert report.gate is not None
        if not isinstance(step.pass_, NodePass):
            return None
        milder = spare(step, report.gate.repair, before.model)
        if milder is None:
            return None
        work = self.job.work
        now = work.snapshot()
        work.restore(before)
        left = spared(step, milder)
        self.job.tell(step.name, f"again, {left} left alone")
        self.gate.forget()  # it holds the file of the kept model
        again = self._attempt(milder, judged=False, again=True)
        changed = again.status == "changed"
        held = self._held(milder, before, again, explain=False) if changed else None
        if changed and (held is None or held.kept):
            made = [(now.model, names_touched(report)), (work.model, names_touched(again))]
            found = self.gate.fastest(step.pass_, before.model, made)
            gained = 0.0
            if found is not None and found[1].kept:
                gained = (found[1].ratio or 0.0) / (found[0].ratio or 1.0)
            if found is not None and gained > _WORTH:
                said = f"{left} left alone: {gained:.2f}x as fast as with them"
                reason = "; ".join(r for r in (report.reason, said) if r)
                kept = {k: v for k, v in report.notes.items() if k == "forms"}
                notes = {**again.notes, **kept}
                gate = with_budget(found[1], held)
                return milder, replace(again, reason=reason, notes=notes, gate=gate)
        work.restore(now)
        self.gate.forget()
        self._size = None
        return None

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
        options, work = self.job.options, self.job.work
        lenient = options.keep_going or again
        self.job.tell(step.name, "running")
        before = work.snapshot()
        try:
            applied = work.apply(step, before.model, outputs=outputs)
        except EffdlError as e:
            if not isinstance(e, CheckFailed):
                e.where = e.where or step.where
            raise
        except Exception as e:
            applied = self._crashed(step, before.model, e, lenient)
        verdict = applied.verdict
        if verdict is None:
            if options.strict and not again:
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
        touched = [name for name, _ in applied.log.touched]
        gate = self._judge(step, before.model, verdict, touched) if judged else None
        if gate is not None and not gate.kept:
            report = self._report(step, applied, "dropped", gate.reason)
            work.restore(before)
            self._size = None
        else:
            work.accept(verdict)
            report = self._report(step, applied, "changed", verdict.note)
        return replace(report, gate=gate)

    def _crashed(self, step: Step, before: ir.Model, error: Exception, lenient: bool) -> Applied:
        """Keep a reproducer; the end of the run, unless it is to go on without the pass."""
        job = self.job
        reproducer = write_reproducer(self._place(), before, step, job.recipe, error)
        if not lenient and job.unverified:
            raise ModelError(
                f"{step.name} fails on this model ({type(error).__name__}: {error}), which does not run "
                f"as it is either: {job.unverified}",
                hint=f"if the model is right, the fault is ours: see {reproducer}",
            ) from error
        if not lenient:
            raise PassBug(step.name, reproducer, error) from error
        job.warnings.append(f"{step.name} crashed ({error}); reproducer: {reproducer}")
        crash = Verdict(False, None, f"crashed: {type(error).__name__}: {error}")
        return Applied(PassLog(), 0, "", crash, 0.0, 0.0)

    def _judge(
        self, step: Step, before: ir.Model, verdict: Verdict, touched: list[str]
    ) -> GateReport | None:
        work = self.job.work
        error = work.total_error(verdict)
        return self.gate.judge(step.pass_, work.original, before, work.model, error, touched)

    def _why_failed(self, step: Step, before: ir.Model, verdict: Verdict) -> str:
        """Return the reason with the place in the graph, where a lossless pass changed the outputs."""
        if step.pass_.lossy or not verdict.errors:
            return verdict.reason
        job = self.job
        job.tell(step.name, "looking for the place")
        where = first_divergence(before, job.work.model, job.feeds(), job.check_target)
        return f"{verdict.reason}; {where}" if where else verdict.reason

    def _check_failed(self, step: Step, model: ir.Model, reason: str) -> CheckFailed:
        place = write_reproducer(self._place(), model, step, self.job.recipe, CheckFailed(reason))
        return CheckFailed(
            f"{step.name} was rolled back: {reason}",
            hint=f"nothing was written; --keep-going drops the pass. See {place}",
        )

    def _place(self) -> Path:
        return self.job.goal.parent if self.job.goal is not None else Path.cwd()

    def _report(self, step: Step, applied: Applied, status: str, reason: str) -> PassReport:
        if self._size is None or status != "unchanged":
            self._size = size_of(self.job.work.model)
        return pass_report(step, applied, status, reason, self._size)


def size_of(model: ir.Model) -> tuple[int, int]:
    """Return the number of nodes and the bytes of weights."""
    return sum(1 for _ in all_nodes(model)), sum(t.nbytes for t in weight_tensors(model))


def pass_report(
    step: Step, applied: Applied, status: str, reason: str, size: tuple[int, int]
) -> PassReport:
    """Return what became of a step; ``size`` is of the model that it left behind, see ``size_of``."""
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
        nodes=size[0],
        weight_bytes=size[1],
        seconds=applied.seconds,
        check_seconds=applied.check_seconds,
    )
