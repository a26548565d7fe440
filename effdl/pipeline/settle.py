"""Writes the result, reads it back, verifies and measures it; while it loses, takes passes out."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from effdl.errors import CheckFailed
from effdl.gate import Gate
from effdl.gate.total import loses, weakest
from effdl.graph import io
from effdl.graph.clean import take_names
from effdl.measure.outcome import race
from effdl.measure.remote import verify_at
from effdl.pipeline.job import Job
from effdl.pipeline.steps import Steps
from effdl.recipe.provenance import stamp
from effdl.report import CompareReport, RunReport


def settle(job: Job, gate: Gate, steps: Steps, stage: io.Stage) -> RunReport:
    """Put the result on the stage.

    Returns:
        What was written, verified and measured. Where ``won`` is False it is the input.

    Raises:
        CheckFailed: the file, or the target, computes something else.
    """
    while True:
        report = _result(job, gate, steps, stage)
        if job.options.gate == "off":
            return report
        by, reason = loses(report, job.recipe)
        if not by:
            return _explained(job, gate, report, stage.path)
        index = weakest(report.passes, by)
        if index is None:
            return _give_back(job, stage, report, reason)
        steps.take_out(index, reason)


def _result(job: Job, gate: Gate, steps: Steps, stage: io.Stage) -> RunReport:
    """Write the model as it is now, read it back, compare and measure it."""
    job.tell("save", "writing")
    work = job.work
    kept = tuple(s for s, r in steps.done if r.status in ("changed", "unchanged"))
    stamp(work.model, job.recipe.model_copy(update={"passes": kept}), job.before.sha256)
    external = job.options.external
    if external is None and io.external_tensors(work.original):
        external = True
    written = work.model.clone()
    take_names(written, work.named)
    stage.write(written, external=external)
    verified = _verify_file(job, steps, stage.path)
    passes = [report for _, report in steps.done]
    report = job.report(passes, job.stats(stage.path), verified, job.unverified)
    if job.target.remote and work.verifier is not None:
        job.tell("verify", f"on {job.target.name}")
        report = replace(
            report, there=verify_at(job.target, job.host, stage.path, job.feeds().first(2))
        )
        wrong = next((t for t in report.there if not t.equal), None)
        if wrong is not None:
            _differs_there(job, wrong)
            report = replace(report, warnings=tuple(job.warnings))
    return _measure(job, gate, report, stage.path)


def _verify_file(job: Job, steps: Steps, path: Path) -> CompareReport | None:
    """Read the staged file back and compare it with the original model."""
    verifier = job.work.verifier
    if verifier is None:
        return None
    job.tell("verify", "reading the file back")
    verifier.reference = job.work.first
    lossy = any(s.pass_.lossy for s, r in steps.done if r.status == "changed")
    report = verifier.check_file(job.work.original, path, lossy=lossy)
    return replace(report, reference=str(job.source), candidate=job.label)


def _differs_there(job: Job, report: CompareReport) -> None:
    """Tell that the target computes something else; the end, unless the run is to go on."""
    worst = max((o.rel_l2 for o in report.outputs), default=0.0)
    name = report.place.target if report.place is not None else job.target.name
    said = f"on {name} the result computes something else than here: relative error {worst:.2g}"
    if not job.options.keep_going:
        hint = "nothing was written; --keep-going writes it anyway"
        raise CheckFailed(said, hint=hint)
    if said not in job.warnings:
        job.warnings.append(said)


def _measure(job: Job, gate: Gate, report: RunReport, path: Path) -> RunReport:
    """Score and time the input against the file just written."""
    if job.recipe.data.evaluation is not None:
        job.tell("evaluate", job.recipe.data.evaluation.metric)
        report = replace(report, accuracy=gate.scores.accuracy(job.source, path))
    if gate.host is None:
        return replace(report, unmeasured=job.unmeasured)
    job.tell("bench", "measuring input and output")
    result, why = race(
        job.source,
        path,
        (report.before, report.after),
        job.feeds(),
        job.target,
        threads=job.threads,
        seconds=job.options.bench_seconds,
        seed=job.options.seed,
        host=gate.host,
        must=job.options.gate != "off",
    )
    return replace(report, bench=result, unmeasured=why)


def _explained(job: Job, gate: Gate, report: RunReport, path: Path) -> RunReport:
    """Add where the time went, where it differs; a result that is given up is not profiled."""
    if report.bench is None or report.bench.models[-1].verdict == "same":
        return report
    job.tell("bench", "profiling input and output")
    return replace(report, changes=gate.where_time_went(job.source, path))


def _give_back(job: Job, stage: io.Stage, report: RunReport, reason: str) -> RunReport:
    """Put the input where the result would have been."""
    after = replace(job.before, path=job.label)
    if io.external_tensors(job.work.original):
        take_names(job.work.original, job.work.named)
        stage.write(job.work.original, external=True)
        after = job.stats(stage.path)
    else:
        shutil.copyfile(job.source, stage.path)
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
