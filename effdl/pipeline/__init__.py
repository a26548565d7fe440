"""Runs a recipe over a model: snapshot, pass, check, measure, keep or go back; then save and verify."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from effdl.data.dataset import load_dataset
from effdl.data.spec import Source
from effdl.errors import CheckFailed, DataError, ModelError
from effdl.gate import Gate
from effdl.gate.scores import Scores
from effdl.graph import io
from effdl.graph.clean import clean
from effdl.graph.scratch import scratch
from effdl.measure.stats import model_stats
from effdl.pipeline.job import Job
from effdl.pipeline.settle import settle
from effdl.pipeline.steps import Steps, pass_report, size_of
from effdl.recipe import Recipe, Step
from effdl.recipe.budget import missed, price, unheld
from effdl.recipe.patterns import match_patterns
from effdl.report import PassReport, RunReport
from effdl.run_options import Progress, RunOptions
from effdl.runtime.host import Host, no_latency, open_host
from effdl.runtime.target import check_reachable, parse_target, where_to_check
from effdl.runtime.worker.process import peak_bytes
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
        job = _open(source, recipe, output, data, options, progress or _silent, workdir, stack)
        steps = recipe.passes[: options.stop_after]
        return _dry(job, steps) if options.dry_run else _full(job, steps, stack)


def _silent(name: str, what: str) -> None:
    """Tell nobody."""


def _open(
    source: Path,
    recipe: Recipe,
    output: Path | None,
    data: Path | Source | None,
    options: RunOptions,
    tell: Progress,
    workdir: Path,
    stack: ExitStack,
) -> Job:
    """Reach the target, read the model and its data."""
    started = time.perf_counter()
    target = parse_target(recipe.target)
    check_target, unmeasured = where_to_check(target)
    if target.remote:
        check_reachable(target)
    host: Host | None = None
    if target.device == "ssh":  # what its processor can do decides number formats
        tell("target", f"reaching {target.name}")
        host = stack.enter_context(open_host(target))
        target = host.target
    goal = None if output is None else io.check_goal(output)
    if goal is not None:
        io.clean_leftovers(goal)
    tell("load", "reading")
    original = io.load(source)
    calibration = data or recipe.data.calibration
    work = Workpiece(
        original,
        target,
        check_target,
        (lambda model: load_dataset(calibration, model).feeds) if calibration else None,
        options.dims,
        options.seed,
        workdir,
        options.max_memory,
    )
    if not options.dry_run:
        _need_data(recipe.passes[: options.stop_after], work)
    return Job(
        source=source,
        recipe=recipe,
        goal=goal,
        label=str(output or ""),
        options=options,
        tell=tell,
        target=target,
        check_target=check_target,
        threads=(target.threads or 1) if options.threads is None else options.threads,
        work=work,
        workdir=workdir,
        before=model_stats(original, source, options.dims, zstd=not options.dry_run),
        host=host,
        unmeasured=unmeasured,
        started=started,
    )


def _need_data(steps: tuple[Step, ...], work: Workpiece) -> None:
    for step in steps:
        if step.pass_.needs_data and work.calibration is None:
            raise DataError(
                f"{step.name} needs calibration data",
                hint="--data FILE.npz with one array per graph input, or data.calibration",
                where=step.where,
            )


def _dry(job: Job, steps: tuple[Step, ...]) -> RunReport:
    """Run the passes on a copy in memory and report what they touch."""
    work, done = job.work, list[PassReport]()
    for step in steps:
        job.tell(step.name, "planning")
        match_patterns(step, work.original, work.model)
        if step.pass_.needs_data and work.calibration is None:
            done.append(_candidates(job, step))
            continue
        started = time.perf_counter()
        log, changes, reason = work.run_pass(step)
        if changes:
            clean(work.model)
        status = "changed" if changes else "unchanged"
        applied = Applied(log, changes, reason, None, time.perf_counter() - started, 0.0)
        done.append(pass_report(step, applied, status, reason, size_of(work.model)))
    return job.report(done, job.stats(), None, "a dry run checks nothing")


def _candidates(job: Job, step: Step) -> PassReport:
    """Report the nodes that a pass would look at, had it data."""
    ctx = job.work.context()
    names = step.pass_.candidates(job.work.model, ctx)
    log = ctx.log
    log.touched.extend((n, "candidate") for n in names or [] if n not in dict(log.touched))
    reason = "needs calibration data (--data): these are its candidates"
    applied = Applied(log, 0, reason, None, 0.0, 0.0)
    return pass_report(step, applied, "not_run", reason, size_of(job.work.model))


def _full(job: Job, steps: tuple[Step, ...], stack: ExitStack) -> RunReport:
    """Run, check, measure, save and verify."""
    assert job.goal is not None
    _start_checks(job, steps)
    gate = _open_gate(job, stack)
    job.warnings += unheld(job.recipe)
    running = Steps(job, gate)
    running.run(steps)
    with io.Stage(job.goal) as stage:
        report = settle(job, gate, running, stage)
        report = replace(report, warnings=(*report.warnings, *price(report)))
        miss = missed(report, job.recipe) if report.won else ""
        if miss and not job.options.keep_going:
            hint = "nothing was written; --keep-going writes it anyway"
            raise CheckFailed(miss, hint=hint, report=report)
        if miss:
            report = replace(report, warnings=(*report.warnings, miss))
        if report.won or job.goal != job.source.absolute():
            stage.commit()
    return replace(report, seconds=time.perf_counter() - job.started, peak_bytes=peak_bytes())


def _start_checks(job: Job, steps: tuple[Step, ...]) -> None:
    job.tell("check", "running the input model")
    try:
        job.work.start_checks()
    except ModelError as e:
        if any(s.pass_.needs_data for s in steps):
            raise
        job.unverified = e.message
        job.warnings.append(f"outputs are not checked: {e.message}")


def _open_gate(job: Job, stack: ExitStack) -> Gate:
    """Reach the target, if its speed can be measured; score the input, if there is a metric."""
    if job.host is not None and job.host.emulated:
        job.unmeasured = no_latency(job.target.name, job.host.machine.emulator).message
    if job.work.verifier is None:
        job.unmeasured = job.unmeasured or "the model does not run here"
    elif job.options.bench_seconds <= 0:
        job.unmeasured = job.unmeasured or "switched off"
    if job.host is None and not job.unmeasured:
        job.host = stack.enter_context(open_host(job.target))
    scores = Scores(job.source, job.recipe.data.evaluation, job.check_target, job.options.seed)
    if scores.spec is not None:
        job.tell("evaluate", "scoring the input model")
        scores.of_input(job.work.original)  # wrong data is told now, not after the work
    return Gate(
        recipe=job.recipe,
        source=job.source,
        host=None if job.unmeasured else job.host,
        target=job.target,
        check_target=job.check_target,
        feeds=job.feeds,
        scores=scores,
        workdir=job.workdir,
        seconds=job.options.gate_seconds,
        threads=job.threads,
        seed=job.options.seed,
    )
