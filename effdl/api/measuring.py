"""The verbs that take time: bench and profile."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from effdl.api.inputs import ModelLike, TargetLike, as_files, feeds_of
from effdl.data.spec import Source
from effdl.errors import UsageError
from effdl.measure import bench as _bench
from effdl.measure.baseline import read_baseline, with_baseline
from effdl.measure.profile import profile as run_profile
from effdl.measure.results import file_facts
from effdl.measure.scan import scan as run_scan
from effdl.measure.verdict import MIN_EFFECT
from effdl.report import BenchReport, BenchScan, ProfileReport
from effdl.runtime.host import Host, no_latency, open_host
from effdl.runtime.target import parse_target


def bench(
    *models: ModelLike,
    data: str | Path | Source | None = None,
    target: TargetLike = "cpu",
    threads: int = 1,
    dims: Mapping[str, int] | None = None,
    seconds: float = 5.0,
    seed: int = 0,
    min_effect: float = MIN_EFFECT,
    control: bool = True,
    yardstick: bool = False,
    baseline: str | Path | None = None,
    peaks: bool = False,
    cuda_graph: bool = False,
    progress: Callable[[str, float], None] | None = None,
) -> BenchReport:
    """Measure models side by side on ONNX Runtime, the first being the base.

    Args:
        models: one or more models with the same inputs.
        data: real inputs, as in ``optimize``; random ones otherwise.
        target: where; ``arm-emulated`` is refused, its times mean nothing.
        threads: intra-op threads, 0 for ONNX Runtime's own choice.
        dims: values of dynamic dimensions, ``{"batch": 8}``.
        seconds: the most measuring time per model; it ends earlier when it is exact enough.
        seed: of random inputs and of the statistics.
        min_effect: the smallest difference to be told, as a fraction.
        control: also run the base in a second process, which shows what is noise.
        yardstick: also time a fixed small model; a report with it can be a ``baseline``.
        baseline: an earlier report as a JSON file, to compare with.
        peaks: also tell how near to the machine's measured peaks each model runs; measuring them takes
            about three seconds once, then they are kept in the user's cache folder.
        cuda_graph: record a GPU's work once and replay it; for one feed of fixed shapes.
        progress: called with a text and the share that is done.

    Raises:
        TargetError: the provider is not there, or fell back to the CPU.
        ModelError, DataError: a model or its data cannot be used, or the baseline measured something else.
    """
    report = bench_scan(
        *models,
        data=data,
        target=target,
        threads=[threads],
        dims=dims,
        seconds=seconds,
        seed=seed,
        min_effect=min_effect,
        control=control,
        yardstick=yardstick,
        baseline=baseline,
        peaks=peaks,
        cuda_graph=cuda_graph,
        progress=progress,
    )
    return report.cells[0]


def bench_scan(
    *models: ModelLike,
    threads: Sequence[int] = (1,),
    scan: Mapping[str, Sequence[int]] | None = None,
    data: str | Path | Source | None = None,
    target: TargetLike = "cpu",
    dims: Mapping[str, int] | None = None,
    seconds: float = 5.0,
    seed: int = 0,
    min_effect: float = MIN_EFFECT,
    control: bool = True,
    yardstick: bool = False,
    baseline: str | Path | None = None,
    peaks: bool = False,
    cuda_graph: bool = False,
    progress: Callable[[str, float], None] | None = None,
) -> BenchScan:
    """Bench the models at every combination of threads and values of dynamic dimensions.

    Args:
        models: as in ``bench``.
        threads: numbers of intra-op threads.
        scan: values by dimension, ``{"batch": [1, 8, 32]}``.
        data, target, dims, seconds, seed, min_effect, control, yardstick, baseline, peaks, cuda_graph,
            progress: as in ``bench``, for every combination.
    """
    if not models:
        raise UsageError("no model to measure")
    earlier = None if baseline is None else read_baseline(Path(baseline))
    count = len(threads) * math.prod(len(v) for v in (scan or {}).values())
    done = 0
    with as_files(models) as files, ExitStack() as stack:
        known = {path: file_facts(path) for path in dict.fromkeys(files)}
        host: Host | None = None

        def measure(number: int, values: dict[str, int]) -> BenchReport:
            nonlocal done, host
            place = parse_target(target, number)
            if place.device == "arm-emulated":
                raise no_latency(place.name)
            host = host or stack.enter_context(open_host(place))
            sizes = {**(dims or {}), **values}
            report = _bench.bench(
                files,
                feeds_of(files[0], data, sizes, seed, place, count=2),
                place,
                threads=number,
                seconds=seconds,
                seed=seed,
                known=known,
                host=host,
                min_effect=min_effect,
                control=control,
                yardstick=yardstick or earlier is not None,
                dims=sizes,
                peaks=peaks,
                cuda_graph=cuda_graph,
                progress=progress and (lambda text, share: progress(text, (done + share) / count)),
            )
            done += 1
            if earlier is None:
                return report
            return with_baseline(report, earlier, Path(str(baseline)))

        return run_scan(measure, threads, scan or {})


def profile(
    *models: ModelLike,
    data: str | Path | Source | None = None,
    target: TargetLike = "cpu",
    threads: int = 1,
    dims: Mapping[str, int] | None = None,
    seconds: float = 5.0,
    seed: int = 0,
    progress: Callable[[str, float], None] | None = None,
) -> ProfileReport:
    """Tell where the time of one model goes, or of two and where the difference comes from.

    Args:
        models: one or two models with the same inputs.
        data, target, threads, dims, seconds, seed, progress: as in ``bench``.

    Raises:
        TargetError: the provider is not there, or its times mean nothing.
        ModelError, DataError: a model or its data cannot be used.
        UsageError: more than two models.
    """
    place = parse_target(target, threads)
    if place.device == "arm-emulated":
        raise no_latency(place.name)
    if not models:
        raise UsageError("no model to measure")
    with as_files(models) as files:
        feeds = feeds_of(files[0], data, dims, seed, place, count=2)
        return run_profile(
            files, feeds, place, threads=threads, seconds=seconds, seed=seed, progress=progress
        )
