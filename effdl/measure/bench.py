"""Models measured side by side: processes of their own, blocks of runs taken in turns, a verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from effdl.data.feeds import Feed, Feeds, nbytes
from effdl.errors import DataError, UsageError
from effdl.graph.scratch import scratch
from effdl.measure import verdict
from effdl.measure.crew import Crew, Member
from effdl.measure.doubts import (
    device_warnings,
    drift_warnings,
    machine_warnings,
    timing_warnings,
    verdict_warnings,
)
from effdl.measure.results import FileFacts, file_facts, model_results, sentence
from effdl.measure.roofline import Roof, placed
from effdl.measure.rounds import Plan, Progress, Timing, take_turns
from effdl.measure.sending import describe, write_feeds
from effdl.measure.work import work_of
from effdl.measure.yardstick import NAME, write_yardstick
from effdl.report import BenchReport, Yardstick
from effdl.runtime.host import Host, need_clock, open_host
from effdl.runtime.target import Target

_MAX_FEEDS = 16
_MAX_FEED_BYTES = 256 << 20


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
    min_effect: float = verdict.MIN_EFFECT,
    control: bool = True,
    generations: int | None = None,
    yardstick: bool = False,
    dims: Mapping[str, int] | None = None,
    peaks: bool = False,
    cuda_graph: bool = False,
    progress: Progress | None = None,
) -> BenchReport:
    """Measure models in ONNX Runtime at ORT_ENABLE_ALL and compare each with the first.

    Every model is loaded in a process of its own. These compute one at a time, in short blocks whose
    order alternates, so that a disturbance hits all of them alike; after a while fresh processes take
    their place, see ``measure.verdict``. It ends when every interval is narrow enough or the time is
    spent.

    Args:
        models: model files; the first is the reference of every ratio.
        feeds: inputs for the first model, at most 16 of them are used, in turns. A model with other
            floating-point types gets them cast.
        target: where to run.
        threads: intra-op threads; 0 for ONNX Runtime's choice.
        seconds: the most measuring time per model, warm-up and loading not counted. Slow models take
            longer: each gets at least ``min_runs`` runs.
        min_runs: the least number of timed runs.
        seed: of the order and of the bootstrap.
        known: sizes and hashes of files that the caller has read already, see ``file_facts``.
        host: where to run, when it is open already; the target's own machine otherwise.
        min_effect: the smallest difference to be told, as a fraction. Measuring ends early when every
            interval is narrower than that.
        control: also run the first model a second time, which tells what noise looks like.
        generations: how often to start fresh processes, None for as often as pays.
        yardstick: also time a fixed small model, for comparison with a run of another day.
        dims: values of dynamic dimensions that were asked for, for the report.
        peaks: also tell how near to the machine's peaks each model runs. They are measured first
            where no earlier command has, see ``measure.roofline``.
        cuda_graph: record a GPU's work once and replay it; for one feed of fixed shapes.
        progress: called with a stage (``peaks``, ``load``, ``warm-up``, ``measure``) and its done fraction.

    Raises:
        ModelError: a file is no model, does not load or run, or takes other inputs than the first.
        TargetError: the provider is absent, the session fell back to the CPU, or the machine is not
            reached or emulated.
        UsageError: a number that makes no sense.
    """
    paths = [Path(m) for m in models]
    _check_options(paths, feeds, threads, seconds, min_runs, min_effect, generations)
    if cuda_graph and not target.on_gpu:
        raise UsageError(f"target {target.name} has no CUDA graph", hint="--target cuda")
    say = progress or (lambda stage, fraction: None)
    facts = {p: (known or {}).get(p) or file_facts(p) for p in dict.fromkeys(paths)}
    used = _pick(feeds)[: 1 if cuda_graph else None]
    work = {p: work_of(p, used) for p in facts}
    works = [work[p] for p in paths]
    with ExitStack() as stack:
        folder = stack.enter_context(scratch())
        host = host or stack.enter_context(open_host(target))
        need_clock(host)
        if peaks:
            say("peaks", 0.0)
        roof = Roof(host, target, threads) if peaks else None
        crew = _crew(host, target, threads, paths, used, folder, control, yardstick)
        crew.options["cuda_graph"] = cuda_graph
        crew.say = say
        plan = Plan(
            seconds=seconds * len(paths),
            min_runs=min_runs,
            seed=seed,
            generations=generations,
            same_work=_same_shapes(used),
            same_cpu=threads == 1 and not target.on_gpu,
            enough=lambda timing: _exact(timing, crew, min_effect, seed),
        )
        timing = take_turns(crew.start, plan, say)
        for file in folder.glob("feed*.npz"):  # the host may stay open for more
            host.discard(file)
        comparisons = _comparisons(timing, crew, seed)[: len(paths) - 1]
        told = [m.told for m in crew.models]
        results = model_results(paths, facts, works, told, timing, comparisons, min_effect)
        results = roof.over(results, works) if roof else placed(results, works, None)
    labels = _labels(paths)
    machine = crew.hello["machine"]
    casts = zip(labels, (m.told.loads[0]["casts"] for m in crew.models), strict=True)
    latencies = {n: r.latency for n, r in zip(labels, results, strict=True)}
    return BenchReport(
        provider=str(crew.models[0].told.loads[0]["providers"][0]),
        threads=threads,
        onnxruntime=str(crew.hello["onnxruntime"]),
        cpu=str(machine["cpu"]),
        feeds=describe(used[0]),
        source=feeds.source,
        models=results,
        verdict=tuple(sentence(r) for r in results[1:]),
        warnings=(
            *(f"{name}: {cast}" for name, said in casts for cast in said),
            *crew.notes,
            *([roof.note] if roof and roof.note else []),
            *device_warnings(labels, [t.loads[0] for t in told]),
            *machine_warnings(threads, int(machine["cores"]), crew.hello.get("load")),
            *timing_warnings(latencies, timing.unsettled, min_runs),
            *verdict_warnings(labels, results, timing.generations),
            *drift_warnings(labels, timing),
        ),
        target=target.name,
        dims=dict(dims or {}),
        min_effect=min_effect,
        control=_control(timing, crew, seed),
        generations=timing.generations,
        yardstick=_yardstick(timing, crew, seed) if yardstick else None,
        peaks=roof.known if roof else None,
        energy=str(told[0].stats[0].get("energy", "")),
    )


def _crew(
    host: Host,
    target: Target,
    threads: int,
    paths: Sequence[Path],
    used: Sequence[Feed],
    folder: Path,
    control: bool,
    yardstick: bool,
) -> Crew:
    """Send the files and say which processes there will be."""
    files = write_feeds(used, folder, host)
    members = [Member(str(p), host.send(p), files) for p in paths]
    crew = Crew(host, {"providers": list(target.providers), "threads": threads}, members)
    if control and len(paths) > 1:
        crew.control = Member(str(paths[0]), members[0].model, files)
    if yardstick:
        place = folder / NAME
        place.mkdir()
        path, feed = write_yardstick(place)
        crew.extra.append(Member(NAME, host.send(path), write_feeds([feed], place, host)))
    return crew


def _comparisons(timing: Timing, crew: Crew, seed: int) -> list[verdict.Comparison]:
    """Every model after the first against it, then the yardstick, if there is one."""
    control = _control_levels(timing, crew)
    others = [*range(1, len(crew.models)), *([len(timing.levels) - 1] if crew.extra else [])]
    first = timing.levels[0]
    return [verdict.compare(first, timing.levels[k], control, seed) for k in others]


def _control_levels(timing: Timing, crew: Crew) -> list[list[float]] | None:
    return timing.levels[len(crew.models)] if crew.control else None


def _exact(timing: Timing, crew: Crew, min_effect: float, seed: int) -> bool:
    """Whether every interval is so narrow that the smallest effect would show."""
    found = _comparisons(timing, crew, seed)
    if len(crew.models) > 1:  # a single model is told by the yardstick, several by each other
        found = found[: len(crew.models) - 1]
    narrow = float(np.log1p(min_effect)) / 2
    return bool(found) and all(c.ratio.half_width <= narrow for c in found)


def _control(timing: Timing, crew: Crew, seed: int) -> tuple[float, float, float] | None:
    levels = _control_levels(timing, crew)
    if levels is None:
        return None
    ratio = verdict.control_ratio(timing.levels[0], levels, seed)
    return ratio.value, ratio.low, ratio.high


def _yardstick(timing: Timing, crew: Crew, seed: int) -> Yardstick:
    last = len(timing.levels) - 1
    ratio = _comparisons(timing, crew, seed)[-1].ratio
    median = float(np.median(timing.runs(last))) / 1e6
    return Yardstick(median, ratio.value, (ratio.low, ratio.high))


def _check_options(
    paths: Sequence[Path],
    feeds: Feeds,
    threads: int,
    seconds: float,
    min_runs: int,
    min_effect: float,
    generations: int | None,
) -> None:
    if not paths:
        raise UsageError("no model to measure")
    if threads < 0:
        raise UsageError(f"threads must be 0 or more, not {threads}")
    if not 0 < seconds < float("inf"):
        raise UsageError(f"seconds must be a number above 0, not {seconds}")
    if min_runs < 1:
        raise UsageError(f"min_runs must be 1 or more, not {min_runs}")
    if not 0 < min_effect < 1:
        raise UsageError(f"min_effect must lie between 0 and 1, not {min_effect}")
    if generations is not None and generations < 1:
        raise UsageError(f"generations must be 1 or more, not {generations}")
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
