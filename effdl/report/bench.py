"""Models measured side by side."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Latency:
    """Times of one inference in milliseconds.

    Args:
        median, p90, p99, minimum, mean: over all timed runs.
        spread: half the interquartile range over the median.
        runs: number of timed runs.
    """

    median: float
    p90: float
    p99: float
    minimum: float
    mean: float
    spread: float
    runs: int


@dataclass(frozen=True)
class BenchResult:
    """One model of a bench.

    Args:
        load_ms: opening the session; ``first_ms`` the first inference after it.
        peak_bytes: largest resident memory of a fresh process that loads and runs the model, less
            that of the same process before loading; None where the system does not tell.
        device_bytes: memory taken on the accelerator, None on a CPU.
        energy_mj: energy of one inference in millijoule, None where no counter can be read.
        params: numbers held by weights; ``macs`` multiply-accumulates of one run on the feeds.
        batch: samples in one run; ``throughput`` samples per second.
        gflops: achieved 10^9 operations per second (2 per multiply-accumulate); ``peak_share`` that
            over the measured peak of the machine for the model's number format; ``bound`` is
            ``compute``, ``memory`` or ``overhead``, what the time is spent on by the roofline.
        ratio: time of the first model over the time of this one (1.4: this one is 1.4x as fast);
            ``ci`` is its 95 % confidence interval.
        verdict: ``faster``, ``slower``, ``same`` or ``noisy`` against the first model; ``reference``
            for the first itself.
        noise_floor: the difference, as a fraction, below which nothing was called faster or slower.
        rounds: blocks of each model that the interval comes from.
    """

    path: str
    sha256: str
    file_bytes: int
    zstd_bytes: int | None
    load_ms: float
    first_ms: float
    peak_bytes: int | None
    latency: Latency
    ratio: float
    ci: tuple[float, float]
    verdict: str = "reference"
    noise_floor: float = 0.0
    rounds: int = 0
    params: int = 0
    macs: int | None = None
    batch: int | None = None
    throughput: float | None = None
    gflops: float | None = None
    peak_share: float | None = None
    bound: str = ""
    device_bytes: int | None = None
    energy_mj: float | None = None


@dataclass(frozen=True)
class Peaks:
    """What a machine reached when it was measured, the roof of the roofline.

    Args:
        threads: intra-op threads.
        fp32_gflops, int8_gops: matrix products through ONNX Runtime, 2 operations per
            multiply-accumulate.
        int8_gops: 0 where no 8-bit product was measured.
        bandwidth: bytes per second between main memory and processor, in GB/s.
        fp16_gflops: the same product in float16, 0 where it is not computed in float16.
        cache_bytes: size of the last-level cache, 0 when unknown; ``cache_bandwidth`` in GB/s for
            data that fits into it.
    """

    threads: int
    fp32_gflops: float
    int8_gops: float
    bandwidth: float
    fp16_gflops: float = 0.0
    cache_bytes: int = 0
    cache_bandwidth: float = 0.0


@dataclass(frozen=True)
class Yardstick:
    """A fixed small model (matrix products) that was timed beside the others.

    Args:
        ms: median time of it.
        ratio: time of the first model over its time; ``ci`` the 95 % confidence interval.
    """

    ms: float
    ratio: float
    ci: tuple[float, float]


@dataclass(frozen=True)
class BaselineChange:
    """A model against what it was in an earlier report.

    Args:
        path: the model now; ``then`` the model of the earlier report.
        ratio: 1.1 means 1.1 times as fast as then; ``ci`` the 95 % confidence interval.
        verdict: ``faster``, ``slower``, ``same`` or ``noisy``; ``sentence`` the same in words.
        noise_floor: as in ``BenchResult``.
    """

    path: str
    then: str
    ratio: float
    ci: tuple[float, float]
    verdict: str
    sentence: str
    noise_floor: float


@dataclass(frozen=True)
class BaselineReport:
    """A bench compared with an earlier one.

    Args:
        path: the earlier report's file.
        by: what was compared: ``ratio`` to the first model of either report, or ``latency``, corrected
            for the machine's speed by the yardstick.
        changes: per model; empty when nothing could be compared, ``notes`` say why.
        notes: what else differs between the runs.
    """

    path: str
    by: str
    changes: tuple[BaselineChange, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class BenchReport:
    """Several models measured side by side.

    Args:
        target: as it was asked for: ``cpu``, ``cuda``, ``ssh:pi4``.
        provider, threads, onnxruntime, cpu: where and how.
        feeds: the inputs, ``name: dtype[shape]``; ``source`` their origin; ``dims`` values of dynamic
            dimensions that were asked for.
        verdict: one sentence per model after the first.
        min_effect: the smallest difference that was to be called one, as a fraction.
        control: ratio and interval of the first model against a second process of itself (A/A);
            None when it was not run.
        peaks: the machine's measured peaks, None when not known.
        generations: how often the processes were started afresh.
        yardstick: a fixed small model that ran beside, None when none did.
        baseline: the comparison with an earlier report, None when none was asked for.
        energy: what ``energy_mj`` comes from, or why there is none.
    """

    provider: str
    threads: int
    onnxruntime: str
    cpu: str
    feeds: dict[str, str]
    source: str
    models: tuple[BenchResult, ...]
    verdict: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    target: str = "cpu"
    dims: dict[str, int] = field(default_factory=dict)
    min_effect: float = 0.0
    control: tuple[float, float, float] | None = None
    peaks: Peaks | None = None
    generations: int = 1
    yardstick: Yardstick | None = None
    baseline: BaselineReport | None = None
    energy: str = ""


@dataclass(frozen=True)
class BenchScan:
    """The same models measured at several numbers of threads, or sizes of a dynamic dimension.

    Args:
        axes: what was varied, ``threads`` or a dimension, and its values.
        cells: a report for each combination, the last axis varying fastest.
    """

    axes: dict[str, tuple[int, ...]]
    cells: tuple[BenchReport, ...]


@dataclass(frozen=True)
class NodeTime:
    """The time of one node of the graph that ONNX Runtime really runs.

    Args:
        name, op_type, provider: as ONNX Runtime says.
        ms: mean time of its kernel per inference.
        origin: names of the model's own nodes that it computes, empty for one that ONNX Runtime
            inserted (reorders, casts, copies).
        shape: of its first output, such as ``float[1,16,32,32]``, empty when unknown.
        near: the model's own nodes that it works for: the writer of what a QuantizeLinear takes, or
            the first reader of what another node gives.
    """

    name: str
    op_type: str
    provider: str
    ms: float
    origin: tuple[str, ...]
    shape: str = ""
    near: tuple[str, ...] = ()


@dataclass(frozen=True)
class OpTime:
    """All nodes of one op type: how many, and their time per inference in milliseconds."""

    op_type: str
    count: int
    ms: float


@dataclass(frozen=True)
class Profile:
    """Where the time of one model goes.

    Args:
        wall_ms: mean time of an inference without profiling, over the middle half of the runs;
            ``kernel_ms`` the sum over the nodes.
        ops: by op type, longest first; ``nodes`` every node that ran, longest first.
        runs: inferences that the means come from.
        event_us: what was taken off the profiler's time of every kernel, since writing the times
            down costs as much; ``scale`` what the rest was multiplied with, below 1 where the sum was
            still more than ``wall_ms``.
        folded: the model's own nodes that nothing computes any more: constant, or without effect.
        idle: those that did not run: in a branch that was not taken.
    """

    path: str
    wall_ms: float
    kernel_ms: float
    runs: int
    ops: tuple[OpTime, ...]
    nodes: tuple[NodeTime, ...]
    event_us: float = 0.0
    scale: float = 1.0
    folded: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()


@dataclass(frozen=True)
class OpChange:
    """One kind of work in two models.

    Args:
        kind: an op type, with its fused and quantized relatives under one name (``Conv`` has
            FusedConv and QLinearConv).
        before, after: nodes; ``before_ms`` and ``after_ms`` their time per inference.
        became: op types that do the same work after, where these are other ones.
    """

    kind: str
    before: int
    after: int
    before_ms: float
    after_ms: float
    became: tuple[str, ...] = ()


@dataclass(frozen=True)
class Placement:
    """Which nodes run on which execution provider.

    Args:
        providers: nodes per provider; ``ms`` their time per inference.
        inserted: nodes that ONNX Runtime added (Memcpy, Cast, reorder), by op type; ``inserted_ms``
            their time.
        fallback: nodes that the wanted provider did not take, ``(name, op_type, provider)``;
            ``fallback_share`` their share of the time.
    """

    path: str
    wanted: str
    providers: dict[str, int]
    ms: dict[str, float]
    inserted: dict[str, int]
    inserted_ms: float
    fallback: tuple[tuple[str, str, str], ...]
    fallback_share: float


@dataclass(frozen=True)
class ProfileReport:
    """Profiles of one model or of two; with two, where the difference comes from.

    Args:
        target, provider, threads, onnxruntime, cpu, feeds, source: as in ``BenchReport``.
        changes: by kind of operator, the largest first; ``reason`` says it in a sentence.
        placements: one per model.
        slower: places of the graph that got slower, the largest loss first: names of nodes of the
            first model, its time, and that of what the second does there.
    """

    target: str
    threads: int
    onnxruntime: str
    cpu: str
    feeds: dict[str, str]
    profiles: tuple[Profile, ...]
    changes: tuple[OpChange, ...] = ()
    placements: tuple[Placement, ...] = ()
    provider: str = ""
    source: str = ""
    warnings: tuple[str, ...] = ()
    reason: str = ""
    slower: tuple[tuple[tuple[str, ...], float, float], ...] = ()
