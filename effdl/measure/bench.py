"""Models measured side by side: one process each, blocks of runs taken in turns, a verdict."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from effdl.data.feeds import Feed, Feeds, nbytes
from effdl.errors import DataError, UsageError
from effdl.graph import io
from effdl.graph.scratch import scratch
from effdl.measure import verdict
from effdl.measure.sending import describe, write_feeds
from effdl.measure.size import zstd_size
from effdl.report import BenchReport, BenchResult, Latency
from effdl.runtime.client import WorkerProcess
from effdl.runtime.host import Host, open_host
from effdl.runtime.machine import this_machine
from effdl.runtime.target import Target

Progress = Callable[[str, float], None]
_MAX_FEEDS = 16
_MAX_FEED_BYTES = 256 << 20
_MIN_ROUNDS = 4
FileFacts = tuple[int, int | None, str]
"""Bytes on disk, the same compressed with zstd, SHA-256."""
_SETTLED = 0.05


def bench(
    models: Sequence[Path | str],
    feeds: Feeds,
    target: Target,
    *,
    threads: int = 1,
    seconds: float = 3.0,
    min_runs: int = 5,
    seed: int = 0,
    known: Mapping[Path, FileFacts] | None = None,
    host: Host | None = None,
    progress: Progress | None = None,
) -> BenchReport:
    """Measure models in ONNX Runtime at ORT_ENABLE_ALL and compare each with the first.

    Every model is loaded in a process of its own. These compute one at a time, in short blocks whose
    order alternates, so that a disturbance hits all of them alike. On CUDA a time includes copying
    inputs and outputs.

    Args:
        models: model files; the first is the reference of every ratio.
        feeds: inputs for the first model, at most 16 of them are used, in turns. A model with other
            floating-point types gets them cast.
        target: where to run.
        threads: intra-op threads; 0 for ONNX Runtime's choice.
        seconds: measuring time per model, warm-up and loading not counted. Slow models take longer:
            each gets at least ``min_runs`` runs.
        min_runs: the least number of timed runs.
        seed: of the order and of the bootstrap.
        known: sizes and hashes of files that the caller has read already, see ``file_facts``.
        host: where to run, when it is open already; the target's own machine otherwise.
        progress: called with a stage (``load``, ``warm-up``, ``measure``) and its done fraction.

    Raises:
        ModelError: a file is no model, does not load or run, or takes other inputs than the first.
        TargetError: the provider is absent, or the session fell back to the CPU.
        UsageError: a number that makes no sense.
    """
    paths = [Path(m) for m in models]
    _check_options(paths, feeds, threads, seconds, min_runs)
    say = progress or (lambda stage, fraction: None)
    known = {p: (known or {}).get(p) or file_facts(p) for p in dict.fromkeys(paths)}
    used = _pick(feeds)
    load_before = _load_average()
    with ExitStack() as stack:
        folder = stack.enter_context(scratch())
        host = host or stack.enter_context(open_host(target))
        files = write_feeds(used, folder, host)
        workers: list[WorkerProcess] = []
        loads: list[dict[str, Any]] = []
        for k, path in enumerate(paths):
            say("load", k / len(paths))
            worker = stack.enter_context(host.worker(str(path)))
            workers.append(worker)
            loads.append(
                worker.ask(
                    "load",
                    model=host.send(path),
                    providers=list(target.providers),
                    threads=threads,
                    feeds=files,
                )
            )
        version = str(workers[0].ask("hello")["onnxruntime"])
        timing = interleave(
            workers,
            seconds=seconds,
            min_runs=min_runs,
            seed=seed,
            same_work=_same_shapes(used),
            same_cpu=threads == 1 and target.device != "cuda",
            progress=say,
        )
        memory = [worker.ask("stats") for worker in workers]
    results = _results(paths, known, loads, memory, timing, seed)
    labels = _labels(paths)
    names = dict(zip(labels, (r.latency for r in results), strict=True))
    warnings = [f"{n}: {c}" for n, load in zip(labels, loads, strict=True) for c in load["casts"]]
    warnings += machine_warnings(threads, this_machine().cores, load_before)
    warnings += timing_warnings(names, timing.unsettled, min_runs)
    return BenchReport(
        provider=str(loads[0]["providers"][0]),
        threads=threads,
        onnxruntime=version,
        cpu=this_machine().cpu,
        feeds=describe(used[0]),
        source=feeds.source,
        models=results,
        verdict=tuple(_sentence(r) for r in results[1:]),
        warnings=tuple(warnings),
    )


class Worker(Protocol):
    """What ``interleave`` needs of a worker."""

    def block(
        self, *, runs: int = 0, min_ms: float = 0.0, start: int = 0, cpu: int | None = None
    ) -> tuple[list[int], int | None]:
        """Return times of single inferences in ns, and the processor they ran on."""


@dataclass
class Timing:
    """Times as they came.

    Args:
        blocks: per model, per round, the times of single inferences in ns.
        unsettled: models (by number) whose times still moved when warm-up had to end.
    """

    blocks: list[list[list[int]]]
    unsettled: list[int] = field(default_factory=list)


def interleave(
    workers: Sequence[Worker],
    *,
    seconds: float,
    min_runs: int,
    seed: int,
    same_work: bool = True,
    same_cpu: bool = False,
    progress: Progress | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Timing:
    """Warm every worker up, then take blocks in turns until the time is spent.

    Args:
        workers: one per model; only one computes at a time.
        seconds: measuring time per worker.
        min_runs: the least number of runs per worker, whatever the time.
        seed: of the order.
        same_work: all feeds have the same shapes. If not, every worker runs the same feeds in a
            round, so that block times can be compared.
        same_cpu: within a round all workers run on the processor that the first one was given. Of
            two processors one may be slower for seconds, by what a neighbour of the machine does.
        progress: as in ``bench``.
        clock: seconds.
    """
    say = progress or (lambda stage, fraction: None)
    block_ms = min(max(seconds * 1000 / 40, 20.0), 100.0)
    timing = Timing([[] for _ in workers])
    run_ms = []
    for k, worker in enumerate(workers):
        say("warm-up", k / len(workers))
        ms, settled = _warm_up(worker, block_ms, seconds / 3, clock)
        run_ms.append(ms)
        if not settled:
            timing.unsettled.append(k)
    if not same_work:
        run_ms = [max(run_ms)] * len(workers)
    runs = [max(1, round(block_ms / ms)) for ms in run_ms]
    rounds = max(_MIN_ROUNDS, -(-min_runs // min(runs)))
    orders = _orders(len(workers), np.random.default_rng(seed))
    begin, budget, done = clock(), seconds * len(workers), 0
    while done < rounds or done % 2 or clock() - begin < budget:
        cpu: int | None = None
        for k in next(orders):
            times, at = workers[k].block(runs=runs[k], start=done * runs[k], cpu=cpu)
            timing.blocks[k].append(times)
            cpu = at if same_cpu else None
        done += 1
        say("measure", min(1.0, (clock() - begin) / budget, done / rounds))
    return timing


def _warm_up(
    worker: Worker, block_ms: float, limit: float, clock: Callable[[], float]
) -> tuple[float, bool]:
    """Run until three blocks agree or ``limit`` seconds are over; returns ms per run, and which."""
    begin = clock()
    seen: list[float] = []
    while True:
        seen.append(verdict.block_time(worker.block(min_ms=block_ms)[0]) / 1e6)
        last = seen[-3:]
        if len(last) == 3 and max(last) <= min(last) * (1 + _SETTLED):
            return max(last[-1], 1e-6), True
        if clock() - begin >= limit:
            moved = len(last) > 1 and max(last[-2:]) > min(last[-2:]) * (1 + 2 * _SETTLED)
            return max(last[-1], 1e-6), not moved


def _orders(count: int, rng: np.random.Generator) -> Iterator[list[int]]:
    """Yield orders of ``count`` models; every second one is the reverse of the one before (ABBA)."""
    order = [int(k) for k in rng.permutation(count)]
    while True:
        yield order
        yield order[::-1]
        if count > 2:
            order = [int(k) for k in rng.permutation(count)]


def _results(
    paths: Sequence[Path],
    facts: dict[Path, FileFacts],
    loads: Sequence[dict[str, Any]],
    memory: Sequence[dict[str, Any]],
    timing: Timing,
    seed: int,
) -> tuple[BenchResult, ...]:
    times = [[verdict.block_time(b) for b in blocks] for blocks in timing.blocks]
    noise = [verdict.own_noise(t, seed) for t in times]
    results = []
    for k, path in enumerate(paths):
        size, packed, digest = facts[path]
        ratio = (
            verdict.Ratio(1.0, 1.0, 1.0)
            if k == 0
            else verdict.paired_ratio(times[0], times[k], seed)
        )
        floor = max(verdict.MIN_EFFECT, noise[0], noise[k])
        results.append(
            BenchResult(
                path=str(path),
                sha256=digest,
                file_bytes=size,
                zstd_bytes=packed,
                load_ms=loads[k]["load_ms"],
                first_ms=loads[k]["first_ms"],
                peak_bytes=memory[k]["peak_bytes"] - memory[k]["baseline_bytes"],
                latency=verdict.latency([t for block in timing.blocks[k] for t in block]),
                ratio=ratio.value,
                ci=(ratio.low, ratio.high),
                verdict="reference" if k == 0 else verdict.judge(ratio, floor),
                noise_floor=floor,
                rounds=len(times[k]),
            )
        )
    return tuple(results)


def _sentence(result: BenchResult) -> str:
    ratio = verdict.Ratio(result.ratio, *result.ci)
    return verdict.sentence(result.verdict, ratio)


def timing_warnings(
    latencies: dict[str, Latency], unsettled: Sequence[int], min_runs: int
) -> list[str]:
    """Return what is doubtful about the times, and what to do about it."""
    said = []
    for k, (name, latency) in enumerate(latencies.items()):
        if latency.spread > 0.10:
            said.append(
                f"{name}: times vary by ±{latency.spread:.0%} around the median; "
                "close other programs, or measure longer (seconds)"
            )
        if latency.runs <= 2 * min_runs:
            said.append(
                f"{name}: only {latency.runs} runs fitted into the time; "
                "measure longer (seconds) for a narrower interval"
            )
        if k in unsettled:
            said.append(
                f"{name}: still getting faster or slower when warm-up ended; measure longer (seconds)"
            )
    return said


def machine_warnings(threads: int, cores: int, load: float | None) -> list[str]:
    """Return what is doubtful about the machine.

    Args:
        threads: intra-op threads asked for.
        cores: processors this process may use.
        load: programs that wanted to run in the last minute, None when unknown.
    """
    wanted = threads or cores
    if wanted > cores:
        return [f"{wanted} threads share {cores} cores: ask for at most {cores} threads"]
    if load is not None and load > cores - wanted + 0.5:
        return [
            f"other programs kept about {load:.1f} of {cores} cores busy in the last minute: "
            f"close them, or ask for fewer than {wanted} threads"
            if wanted > 1
            else f"other programs kept about {load:.1f} of {cores} cores busy in the last minute: "
            "close them"
        ]
    return []


def _load_average() -> float | None:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def file_facts(path: Path) -> FileFacts:
    """Return bytes on disk, the same compressed with zstd, and SHA-256 of a model file.

    Raises:
        ModelError: see ``graph.io.load``.
    """
    io.load(path)  # names whatever is wrong with the file; weights outside stay unread
    return io.files_size(path), zstd_size(path), io.file_digest(path)


def _check_options(
    paths: Sequence[Path], feeds: Feeds, threads: int, seconds: float, min_runs: int
) -> None:
    if not paths:
        raise UsageError("no model to measure")
    if threads < 0:
        raise UsageError(f"threads must be 0 or more, not {threads}")
    if not 0 < seconds < float("inf"):
        raise UsageError(f"seconds must be a number above 0, not {seconds}")
    if min_runs < 1:
        raise UsageError(f"min_runs must be 1 or more, not {min_runs}")
    if len(feeds) == 0:
        raise DataError("there is no sample to measure with", where=feeds.source)


def _pick(feeds: Feeds) -> list[Feed]:
    """The first feeds, as many as are worth sending: 16 or 256 MB, at least one."""
    picked: list[Feed] = []
    size = 0
    for feed in feeds:
        size += nbytes(feed)
        if picked and (len(picked) == _MAX_FEEDS or size > _MAX_FEED_BYTES):
            break
        picked.append(feed)
    return picked


def _same_shapes(feeds: Sequence[Feed]) -> bool:
    return len({tuple(a.shape for a in feed.values()) for feed in feeds}) == 1


def _labels(paths: Sequence[Path]) -> list[str]:
    """File names; where two are the same, with their number."""
    names = [p.name for p in paths]
    return [n if names.count(n) == 1 else f"{n} (model {k + 1})" for k, n in enumerate(names)]
