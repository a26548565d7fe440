"""Where the time of a model goes: kernel times of ONNX Runtime, told by the model's own nodes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from effdl.data.feeds import Feed, Feeds, nbytes
from effdl.errors import DataError, UsageError
from effdl.graph import io
from effdl.graph.scratch import scratch
from effdl.measure.blame import changes, explain
from effdl.measure.kernels import Kernels, make_profile
from effdl.measure.owngraph import Graph, named_copy, read_graph
from effdl.measure.parts import culprits
from effdl.measure.placement import placement
from effdl.measure.sending import describe, write_feeds
from effdl.report import Profile, ProfileReport
from effdl.runtime.client import WorkerProcess
from effdl.runtime.host import Host, need_clock, open_host
from effdl.runtime.target import Target

Progress = Callable[[str, float], None]
_MAX_EVENTS = 60_000
"""Of one profile: about 50 MB of JSON, and far below what the profiler can hold."""
_BLOCK_MS = 50.0
_WARM_UP = 3
_PROBE_NODES = 64
_MIN_RUNS = 4
_MAX_FEEDS = 16
_MAX_FEED_BYTES = 256 << 20


def profile(
    models: Sequence[Path | str],
    feeds: Feeds,
    target: Target,
    *,
    threads: int = 1,
    seconds: float = 3.0,
    seed: int = 0,
    host: Host | None = None,
    progress: Progress | None = None,
) -> ProfileReport:
    """Measure where the time of one model goes, or of two and where the difference comes from.

    Each model has two processes: one is timed, the other writes down the time of every kernel. Both do
    so in short blocks, all processes in turns, so that a disturbance hits everything alike. Times are
    means over the middle half of the runs. What the kernels do not account for is the overhead of
    ONNX Runtime between them.

    Args:
        models: one or two model files with the same inputs.
        feeds: inputs; those with the shapes of the first are used, at most 16.
        target: where to run.
        threads: intra-op threads, 0 for ONNX Runtime's own choice.
        seconds: measuring time per model.
        seed: of the order in which the models take turns.
        host: where to run, when it is open already; the target's own machine otherwise.
        progress: called with a stage and its done fraction.

    Raises:
        ModelError: a file is no model, does not load or run.
        TargetError: the provider is absent, or the processor is emulated and has no times.
        UsageError: no model, more than two, or a number that makes no sense.
    """
    paths = [Path(m) for m in models]
    _check_options(paths, feeds, threads, seconds)
    say = progress or (lambda stage, fraction: None)
    used = _pick(feeds)
    with ExitStack() as stack:
        folder = stack.enter_context(scratch())
        host = host or stack.enter_context(open_host(target))
        need_clock(host)
        files = write_feeds(used, folder, host)
        probe = folder / "probe.onnx"
        probe.write_bytes(_probe().SerializeToString())
        for file in (probe, *folder.glob("feed*.npz")):
            stack.callback(host.discard, file)
        subjects = []
        for k, path in enumerate(paths):
            say("load", k / len(paths))
            place = folder / f"model{k}"
            place.mkdir()
            subjects.append(_open(stack, host, target, path, place, files, threads, probe))
        _take_turns(subjects, seconds, seed, threads == 1 and not target.on_gpu, say)
        hello = subjects[0].timed.ask("hello")
        say("read", 0.0)
        profiles = tuple(_result(s) for s in subjects)
    wanted = target.providers[0]
    found = changes(*profiles) if len(profiles) == 2 else ()
    return ProfileReport(
        target=target.name,
        threads=threads,
        onnxruntime=str(hello["onnxruntime"]),
        cpu=str(hello["machine"]["cpu"]),
        feeds=describe(used[0]),
        profiles=profiles,
        changes=found,
        placements=tuple(placement(p, wanted) for p in profiles),
        provider=wanted,
        source=feeds.source,
        reason=explain(found),
        slower=tuple(culprits(*profiles)) if len(profiles) == 2 else (),
        warnings=tuple(w for s in subjects for w in s.warnings),
    )


@dataclass
class _Subject:
    """One model with its two processes."""

    path: Path
    own: Graph
    executed: Graph
    timed: WorkerProcess
    traced: WorkerProcess
    answer: dict[str, Any]
    warnings: list[str]
    warm: int = 0
    ns: tuple[int, ...] = ()


def _open(
    stack: ExitStack,
    host: Host,
    target: Target,
    path: Path,
    folder: Path,
    files: list[dict[str, Any]],
    threads: int,
    probe: Path,
) -> _Subject:
    io.load(path)  # names whatever is wrong with the file; weights outside stay unread
    named, own = named_copy(path, folder)
    if named != path:
        stack.callback(host.discard, named)
    common = {
        "model": host.send(named),
        "providers": list(target.providers),
        "threads": threads,
        "feeds": files,
    }
    timed = stack.enter_context(host.worker(str(path)))
    loaded = timed.ask("load", **common)
    traced = stack.enter_context(host.worker(str(path)))
    answer = traced.ask(
        "trace",
        **common,
        graph=host.output(f"{folder.name}.onnx"),
        prefix=host.output(f"{folder.name}-profile"),
        probe=host.send(probe),
    )
    warnings = [f"{path.name}: {cast}" for cast in loaded["casts"]]
    if answer["why"]:
        warnings.append(f"{path.name}: ONNX Runtime does not tell its graph; names may be missing")
    executed = Graph()
    if answer["graph"]:
        written = host.fetch(answer["graph"])
        executed = read_graph(onnx.load(written, load_external_data=False))
        traced.ask("remove", path=answer["graph"])
        written.unlink(missing_ok=True)
    return _Subject(path, own, executed, timed, traced, answer, warnings)


def _probe() -> onnx.ModelProto:
    """A chain of kernels that do next to nothing, see ``tracing.event_cost``."""
    names = ["x", *(f"x{k}" for k in range(_PROBE_NODES))]
    one = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Add", [n, "x"], [o]) for n, o in itertools.pairwise(names)],
        "probe",
        [onnx.helper.make_tensor_value_info("x", one, [1])],
        [onnx.helper.make_tensor_value_info(names[-1], one, [1])],
    )
    return onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8
    )


def _take_turns(
    subjects: list[_Subject], seconds: float, seed: int, same_cpu: bool, say: Progress
) -> None:
    """Run every process in blocks, in an order that is turned round from round to round."""
    sizes = []
    for k, subject in enumerate(subjects):
        say("warm-up", k / len(subjects))
        subject.timed.block(runs=_WARM_UP)
        ms = max(min(subject.timed.block(min_ms=_BLOCK_MS)[0]) / 1e6, 1e-3)
        nodes = max(len(subject.executed.nodes) or len(subject.own.nodes), 1)
        most = max(_MIN_RUNS, _MAX_EVENTS // nodes)
        total = min(max(_MIN_RUNS, round(seconds * 500 / ms)), most)
        sizes.append((max(1, min(round(_BLOCK_MS / ms), total)), total))
        subject.warm = max(_WARM_UP, sizes[-1][0])
        subject.traced.block(runs=subject.warm)
    rounds = max(-(-total // size) for size, total in sizes)
    rounds += rounds % 2
    order = [int(k) for k in np.random.default_rng(seed).permutation(len(subjects))]
    for turn in range(rounds):
        cpu: int | None = None
        for k in order:
            size, total = sizes[k]
            subject, runs = subjects[k], max(1, min(size, -(-total // rounds)))
            start = turn * runs
            pair = [subject.timed, subject.traced]
            for worker in pair[:: 1 if turn % 4 < 2 else -1]:
                times, at = worker.block(runs=runs, start=start, cpu=cpu)
                cpu = at if same_cpu else None
                if worker is subject.timed:
                    subject.ns += tuple(times)
        order.reverse()
        say("measure", (turn + 1) / rounds)


def _result(subject: _Subject) -> Profile:
    told = subject.traced.ask("traced", skip=subject.warm, trim=True)
    kernels = Kernels(
        told["nodes"], told["runs"], subject.answer["event_us"], subject.answer["assigned"]
    )
    wall_ms = middle_mean(subject.ns) / 1e6
    return make_profile(str(subject.path), subject.own, subject.executed, kernels, wall_ms)


def middle_mean(values: Sequence[float]) -> float:
    """Return the mean of the values without the smallest and the largest quarter."""
    ordered = np.sort(np.asarray(values, np.float64))
    quarter = len(ordered) // 4
    return float(ordered[quarter : len(ordered) - quarter].mean())


def _pick(feeds: Feeds) -> list[Feed]:
    """The first feeds of the shapes that the first one has: 16 or 256 MB, at least one."""
    picked: list[Feed] = []
    size = 0
    for feed in feeds:
        if picked and any(a.shape != picked[0][n].shape for n, a in feed.items()):
            continue
        size += nbytes(feed)
        if picked and (len(picked) == _MAX_FEEDS or size > _MAX_FEED_BYTES):
            break
        picked.append(feed)
    return picked


def _check_options(paths: Sequence[Path], feeds: Feeds, threads: int, seconds: float) -> None:
    if not 1 <= len(paths) <= 2:
        raise UsageError(
            f"a profile takes one model or two, not {len(paths)}",
            hint="effdl bench ranks any number of models",
        )
    if threads < 0:
        raise UsageError(f"threads must be 0 or more, not {threads}")
    if not 0 < seconds < float("inf"):
        raise UsageError(f"seconds must be a number above 0, not {seconds}")
    if len(feeds) == 0:
        raise DataError("there is no sample to measure with", where=feeds.source)
