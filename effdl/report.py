"""What every command found, as frozen data; ``to_json`` makes what ``--json`` writes."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

SCHEMA = 1


@dataclass(frozen=True)
class ModelStats:
    """The static facts of a model.

    Args:
        path: the file, ``-`` for a pipe, empty for a model in memory.
        sha256: of the file, empty for a model in memory.
        opset: the default domain's version; ``opsets`` has all domains.
        ir_version: of the file format.
        nodes: all nodes, subgraphs and functions included; ``ops`` counts them by type.
        params: numbers held by floating-point, integer and packed weights.
        macs: multiply-accumulates of one inference at ``dims``; None when no node could be counted.
        macs_unknown: op types with work that could not be counted.
        weight_bytes: bytes of weights by dtype.
        file_bytes: the file with its external data, 0 for a model in memory.
        zstd_bytes: the same, compressed with zstd; None when not measured.
        inputs: ``name: dtype[shape]`` of the graph inputs; ``outputs`` likewise.
        dims: values of dynamic dimensions that ``macs`` assumes.
        dynamic: names of the dynamic dimensions.
    """

    path: str
    sha256: str
    opset: int
    opsets: dict[str, int]
    ir_version: int
    nodes: int
    ops: dict[str, int]
    params: int
    macs: int | None
    macs_unknown: tuple[str, ...]
    weight_bytes: dict[str, int]
    file_bytes: int
    zstd_bytes: int | None
    inputs: dict[str, str]
    outputs: dict[str, str]
    dims: dict[str, int]
    dynamic: tuple[str, ...]


@dataclass(frozen=True)
class OutputError:
    """How far one graph output is from the reference, over all feeds.

    Args:
        max_abs: largest absolute difference; ``mean_abs`` the mean one.
        rel_l2: norm of the difference over the norm of the reference; 0 when nothing differs,
            infinite when the reference is all zeros or the outputs cannot be subtracted.
        cosine: cosine of the two outputs as one long vector; 1 when both are all zeros, 0 when one is.
        sqnr_db: signal to quantization-noise ratio in decibel, infinite when nothing differs.
        top1: share of samples with the same argmax over the last axis, None if that says nothing.
        equal: within the tolerance of the comparison.
        tolerance: the relative tolerance used.
        reason: why not equal, when it is no number (shape, dtype, NaN).
    """

    name: str
    max_abs: float
    mean_abs: float
    rel_l2: float
    cosine: float
    sqnr_db: float
    top1: float | None
    equal: bool
    tolerance: float
    reason: str = ""


@dataclass(frozen=True)
class CompareReport:
    """Two models on the same feeds.

    Args:
        feeds: how many; ``source`` says where they come from; ``real`` is False for random numbers.
        equal: all outputs are within tolerance.
    """

    reference: str
    candidate: str
    feeds: int
    source: str
    real: bool
    equal: bool
    outputs: tuple[OutputError, ...]
    notes: tuple[str, ...] = ()


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
            that of the same process before loading.
        ratio: time of the first model over the time of this one (1.4: this one is 1.4x as fast);
            ``ratio_low`` and ``ratio_high`` are its 95 % confidence interval.
        verdict: ``faster``, ``slower``, ``same`` or ``noisy`` against the first model; ``reference``
            for the first itself.
        noise_floor: the difference, as a fraction, below which nothing was called faster or slower;
            from the models against themselves in the same run.
        rounds: blocks of each model that the interval comes from.
    """

    path: str
    sha256: str
    file_bytes: int
    zstd_bytes: int | None
    load_ms: float
    first_ms: float
    peak_bytes: int
    latency: Latency
    ratio: float
    ratio_low: float
    ratio_high: float
    verdict: str = "reference"
    noise_floor: float = 0.0
    rounds: int = 0


@dataclass(frozen=True)
class BenchReport:
    """Several models measured side by side.

    Args:
        provider, threads, onnxruntime, cpu: where and how.
        feeds: the inputs, ``name: dtype[shape]``; ``source`` their origin.
        verdict: one sentence per model after the first.
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


@dataclass(frozen=True)
class DoctorReport:
    """What effdl finds on this machine.

    Args:
        versions: of effdl, Python and the libraries it stands on; empty for one that is missing.
        system: the operating system and its release.
        arch, cpu, cores, memory, isa: as in ``runtime.machine.Machine``.
        providers: execution providers of this onnxruntime build, most wanted first.
        extras: optional parts (``tune``, ``train``, ``gpu``) and the version that is installed, empty
            when it is not.
        int8: the number format of int8 models for this processor: ``activation_type``,
            ``weight_type``, ``reduce_range`` and ``reason``.
        cuda: ``works``, ``not installed``, or why a CUDA session does not run here.
        problems: what is wrong, each with what to do.
    """

    versions: dict[str, str]
    system: str
    arch: str
    cpu: str
    cores: int
    memory: int
    isa: tuple[str, ...]
    providers: tuple[str, ...]
    extras: dict[str, str]
    int8: dict[str, str | bool]
    cuda: str
    problems: tuple[str, ...]


@dataclass(frozen=True)
class PassReport:
    """One step of a run.

    Args:
        status: ``changed``, ``unchanged``, ``rolled_back`` or ``not_run``.
        changes: what ``run`` returned.
        reason: why unchanged, rolled back or not run.
        touched: (node, what) pairs; ``skipped``: (node, reason) pairs; ``notes``: figures.
        error: relative L2 error of the worst output against the model before the pass; None
            when not compared.
        seconds: time of the pass itself; ``check_seconds`` of checking it.
    """

    name: str
    options: dict[str, Any]
    lossy: bool
    status: str
    changes: int
    reason: str
    touched: tuple[tuple[str, str], ...]
    skipped: tuple[tuple[str, str], ...]
    notes: dict[str, float | str]
    error: float | None
    nodes: int
    weight_bytes: int
    seconds: float
    check_seconds: float


@dataclass(frozen=True)
class RunReport:
    """One ``effdl optimize``.

    Args:
        recipe: the recipe as it was used, overrides included.
        verified: the output file, read back, against the original; None when the model cannot run.
        unverified: why ``verified`` is None.
        bench: input against output, None when not measured; ``unmeasured`` says why.
        accuracy: metric before and after on the recipe's evaluation data, if it names some.
    """

    recipe: dict[str, Any]
    target: str
    versions: dict[str, str]
    before: ModelStats
    after: ModelStats
    passes: tuple[PassReport, ...]
    verified: CompareReport | None
    unverified: str
    bench: BenchReport | None
    unmeasured: str
    accuracy: dict[str, Any] | None
    output: str
    dry_run: bool
    seconds: float
    warnings: tuple[str, ...] = field(default=())


def to_json(report: Any) -> dict[str, Any]:
    """Return a report as plain data with ``"schema"``; infinities and NaN become None."""
    return {"schema": SCHEMA, **_plain(dataclasses.asdict(report))}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


@dataclass(frozen=True)
class Opportunity:
    """What one pass would find in a model.

    Args:
        name: the pass; ``lossy`` whether it may change outputs; ``needs_data`` whether it needs
            calibration data.
        count: changes it would make, or nodes it would work on.
        reason: why nothing, when ``count`` is 0.
    """

    name: str
    lossy: bool
    needs_data: bool
    count: int
    reason: str


@dataclass(frozen=True)
class NodeStats:
    """The cost of one node: multiply-accumulates, numbers and bytes of its own weights."""

    name: str
    op_type: str
    macs: int | None
    params: int
    weight_bytes: int


@dataclass(frozen=True)
class InspectReport:
    """What is in a model and what could be done with it."""

    stats: ModelStats
    could: tuple[Opportunity, ...]
    nodes: tuple[NodeStats, ...] = ()
