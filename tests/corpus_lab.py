"""Many models through the lossless passes, each in a child process that may crash or hang."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
import onnx_ir as ir

from effdl import passes
from effdl.errors import EffdlError
from effdl.graph import io
from effdl.graph.clean import clean
from effdl.graph.walk import interface, opset
from effdl.passes.base import Pass
from effdl.recipe import load as load_recipe
from tests.support import context

LIMIT_SECONDS = 60.0
NO_LIMIT = 1 << 40
PASSED, REFUSED, SKIPPED, FAILED = "passed", "refused", "skipped", "failed"
# They do nothing without being told what.
_NEED_OPTIONS = ("set_shapes", "convert_opset")


@dataclass(frozen=True)
class Outcome:
    """What came of one model; ``seconds`` of processor time."""

    name: str
    status: str
    detail: str = ""
    seconds: float = 0.0
    changes: int = 0


class Refusal(Exception):
    """The model was turned down with a reason, or cannot be judged here."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status


Work = Callable[[Any], int]
"""Takes one job, returns the number of changes; raises where an output is wrong."""


def run_all(
    jobs: Mapping[str, Any],
    work: Work,
    *,
    limit: float = LIMIT_SECONDS,
    workers: int | None = None,
) -> list[Outcome]:
    """Do every job in forked workers; a crash or a job above ``limit`` seconds is that job's failure."""
    todo = list(jobs)
    found: dict[str, Outcome] = {}
    count = min(workers or len(os.sched_getaffinity(0)), len(todo))
    crew = [_Worker(jobs, work) for _ in range(count)]
    try:
        for worker in crew:
            worker.give(todo)
        while busy := [w for w in crew if w.job is not None]:
            next_end = min(w.started for w in busy) + limit
            patience = max(0.0, next_end - time.monotonic())
            ready = wait([w.pipe for w in busy], timeout=patience)
            for worker in busy:
                outcome = worker.result(limit) if worker.pipe in ready else worker.overdue(limit)
                if outcome is not None:
                    found[outcome.name] = outcome
                    worker.give(todo)
    finally:
        for worker in crew:
            worker.end()
    return [found[name] for name in jobs]


class _Worker:
    """A forked process that does one job after another, and is replaced when it dies."""

    def __init__(self, jobs: Mapping[str, Any], work: Work) -> None:
        self.jobs, self.work = jobs, work
        self.job: str | None = None
        self.started = 0.0
        self.pipe: Connection
        self.process: BaseProcess
        self._start()

    def _start(self) -> None:
        fork = get_context("fork")
        self.pipe, other = fork.Pipe()
        self.process = fork.Process(target=_serve, args=(other, self.jobs, self.work), daemon=True)
        self.process.start()
        other.close()

    def give(self, todo: list[str]) -> None:
        self.job = todo.pop() if todo else None
        self.started = time.monotonic()
        if self.job is not None:
            self.pipe.send(self.job)

    def result(self, limit: float) -> Outcome:
        assert self.job is not None
        try:
            outcome = self.pipe.recv()
            assert isinstance(outcome, Outcome)
        except (EOFError, ConnectionError):
            self.process.join()
            return self._lost(f"crashed: exit code {self.process.exitcode}")
        return outcome

    def overdue(self, limit: float) -> Outcome | None:
        if time.monotonic() - self.started < limit:
            return None
        return self._lost(f"not done after {limit:.0f} s")

    def _lost(self, why: str) -> Outcome:
        assert self.job is not None
        outcome = Outcome(self.job, FAILED, why, time.monotonic() - self.started)
        self.end()
        self._start()
        return outcome

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _serve(pipe: Connection, jobs: Mapping[str, Any], work: Work) -> None:
    import faulthandler

    faulthandler.disable()
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 2)
    while True:
        name = pipe.recv()
        started = time.process_time()
        status, detail, changes = PASSED, "", 0
        try:
            changes = work(jobs[name])
        except Refusal as e:
            status, detail = e.status, str(e)
        except Exception as e:
            import traceback

            frame = traceback.extract_tb(e.__traceback__)[-1]
            where = f"{os.path.basename(frame.filename)}:{frame.lineno}"
            status, detail = FAILED, f"{type(e).__name__} at {where}: {str(e)[:400]}"
        pipe.send(Outcome(name, status, detail, time.process_time() - started, changes))


def count(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """Number of outcomes of each kind."""
    kinds = (PASSED, REFUSED, SKIPPED, FAILED)
    return {kind: sum(o.status == kind for o in outcomes) for kind in kinds}


def failures(outcomes: Sequence[Outcome]) -> str:
    """One line per failure."""
    return "\n".join(f"{o.name}: {o.detail}" for o in outcomes if o.status == FAILED)


@cache
def preset(max_growth: int | None = None) -> tuple[tuple[str, Pass], ...]:
    """The steps of the preset ``lossless``, with names."""
    steps: list[tuple[str, Pass]] = []
    for step in load_recipe("lossless").passes:
        made = step.pass_
        if step.name == "simplify" and max_growth is not None:
            made = made.model_copy(update={"max_growth": max_growth})
        steps.append((step.name, made))
    return tuple(steps)


@cache
def lossless() -> tuple[tuple[str, Pass], ...]:
    """Every pass that must not change an output, with its defaults, but the first of the preset."""
    names = [n for n in passes.names() if n not in (*_NEED_OPTIONS, preset()[0][0])]
    return tuple((n, passes.get(n)()) for n in names if not passes.get(n).lossy)


def apply(model: ir.Model, steps: Sequence[tuple[str, Pass]]) -> int:
    """Run steps as the pipeline does, without measuring; returns the number of changes."""
    total = 0
    for name, step in steps:
        if 0 < opset(model) < step.min_opset:
            continue
        before = interface(model)
        changes = step.run(model, context())
        if changes:
            clean(model)
            try:
                io.check(model)
            except EffdlError as e:
                raise AssertionError(f"{name}: {e.message}") from None
            if step.keeps_interface:
                assert interface(model) == before, f"{name}: inputs or outputs changed"
        total += changes
    return total


Run = Callable[[bytes, bool], list[Any]]
"""Runs a serialized model, with ONNX Runtime's optimizations or without."""


def run_on(feeds: Sequence[Mapping[str, Any]]) -> Run:
    """All outputs of all feeds, one after another."""

    def run(payload: bytes, optimize: bool) -> list[Any]:
        raw = session(payload, optimize=optimize)
        wanted = {p.name for p in raw.get_inputs()}
        return [
            o for f in feeds for o in raw.run(None, {k: v for k, v in f.items() if k in wanted})
        ]

    return run


def session(payload: bytes, *, optimize: bool = True) -> Any:
    """A session of one thread that says nothing."""
    import onnxruntime as ort

    levels = ort.GraphOptimizationLevel
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
    return ort.InferenceSession(payload, options, providers=["CPUExecutionProvider"])


def compare(before: bytes, want: list[Any], after: bytes, run: Run) -> None:
    """Fail unless outputs are equal as they are run, or as the graphs are written.

    What ONNX Runtime's own optimizations change in ``before`` is no fault of a pass either.
    """
    got = run(after, True)
    if close(got, want):
        return
    plain_want, plain_got = run(before, False), run(after, False)
    if close(plain_got, plain_want):
        return
    noise = max(_gap(w, p) for w, p in zip(want, plain_want, strict=True))
    gap = max(_gap(g, p) for g, p in zip(plain_got, plain_want, strict=True))
    assert gap <= 4 * noise < np.inf, difference(plain_got, plain_want)


def _gap(a: Any, b: Any) -> float:
    """The largest difference of two outputs of floats, relative to their size; infinite for others."""
    if not (isinstance(a, np.ndarray) and isinstance(b, np.ndarray)) or a.shape != b.shape:
        return np.inf
    if a.dtype.kind != "f" or a.dtype != b.dtype or not (np.isfinite(a) & np.isfinite(b)).all():
        return 0.0 if close(a, b) else np.inf
    size = float(np.abs(b).max(initial=0.0))
    gap = float(np.abs(a.astype(np.float64) - b).max(initial=0.0)) / (size or 1.0)
    return gap if gap < 1e-3 else np.inf


def close(got: Any, want: Any) -> bool:
    """Equal up to rounding, which is relative to the size of all numbers of a tensor."""
    if isinstance(want, list | tuple):
        same = isinstance(got, list | tuple) and len(got) == len(want)
        return same and all(close(g, w) for g, w in zip(got, want, strict=True))
    if isinstance(want, dict):
        return (
            isinstance(got, dict)
            and set(got) == set(want)
            and all(close(got[k], want[k]) for k in want)
        )
    if want is None or got is None:
        return want is got
    g, w = np.asarray(got), np.asarray(want)
    if g.shape != w.shape or (g.dtype != w.dtype and "OSU" not in g.dtype.kind + w.dtype.kind):
        return False
    if w.dtype.kind in "OSU":
        return bool((g.astype(str) == w.astype(str)).all())
    if w.dtype.kind in "biu":
        return bool((g == w).all())
    rtol = {"float64": 1e-9, "float32": 2e-5, "float16": 4e-3}.get(w.dtype.name, 0.05)
    g, w = g.astype(np.float64), w.astype(np.float64)
    finite = np.isfinite(w)
    scale = float(np.sqrt((w[finite] ** 2).mean())) if finite.any() else 0.0
    return bool(np.allclose(g, w, rtol=rtol, atol=rtol * scale, equal_nan=True))


def difference(got: list[Any], want: list[Any]) -> str:
    """Where and by how much outputs differ, in a few words."""
    if len(got) != len(want):
        return f"{len(got)} outputs, were {len(want)}"
    for k, (g, w) in enumerate(zip(got, want, strict=True)):
        if close(g, w):
            continue
        if not (isinstance(g, np.ndarray) and isinstance(w, np.ndarray)):
            return f"output {k} differs"
        if g.shape != w.shape or g.dtype != w.dtype:
            return f"output {k} is {g.dtype}{list(g.shape)}, was {w.dtype}{list(w.shape)}"
        if w.dtype.kind in "fiub":
            gap = np.abs(g.astype(np.float64) - w.astype(np.float64))
            return f"output {k} differs by {np.nanmax(gap):.3g} of {np.nanmax(np.abs(w)):.3g}"
        return f"output {k} differs"
    return "equal"


def check_model(
    model: ir.Model,
    feeds: Sequence[Mapping[str, Any]],
    *,
    steps: Sequence[tuple[str, Pass]] | None = None,
    alone: bool = True,
) -> int:
    """Hold the preset, then each lossless pass alone, to the outputs of ``model``.

    Args:
        model: stays as it is.
        feeds: what it is run with; without any, only crashes and invalid graphs are found.
        steps: instead of the preset.
        alone: also every pass of the registry by itself.

    Returns:
        The number of changes of the preset.
    """
    steps = preset() if steps is None else steps
    before = io.to_bytes(model)
    run = run_on(feeds)
    want = run(before, True) if feeds else []

    def hold(chosen: Sequence[tuple[str, Pass]]) -> int:
        twin = model.clone()
        changes = apply(twin, chosen)
        if not changes:
            assert io.to_bytes(twin) == before, "0 changes, but the model was touched"
            return 0
        after = io.to_bytes(twin)
        if feeds:
            compare(before, want, after, run)
        again = apply(twin, chosen)
        assert again == 0, f"a second run changes {again} more"
        return changes

    changes = _named("the preset", lambda: hold(steps))
    if alone:
        idle = model.clone()
        for name, step in lossless():
            # Most passes find nothing: they share a copy, which is compared once.
            if _named(name, lambda step=step, name=name, twin=idle: apply(twin, [(name, step)])):
                _named(name, lambda step=step, name=name: hold([(name, step)]))
                idle = model.clone()
        if io.to_bytes(idle) != before:
            for name, step in lossless():
                _named(name, lambda step=step, name=name: hold([(name, step)]))
    return changes


def _named(name: str, work: Callable[[], int]) -> int:
    try:
        return work()
    except Exception as e:
        e.args = (f"{name}: {str(e)[:350]}",)
        raise
