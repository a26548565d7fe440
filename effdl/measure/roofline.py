"""The roof of a machine, measured through ONNX Runtime, and where below it a model runs.

Source: Williams, Waterman, Patterson, "Roofline: an insightful visual performance model", CACM 2009;
bandwidth counted as in McCalpin's STREAM.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from effdl.errors import ModelError, TargetError
from effdl.graph import io
from effdl.graph.scratch import scratch
from effdl.measure.work import Work
from effdl.report import BenchResult, Peaks
from effdl.runtime.cache import Cache
from effdl.runtime.client import WorkerProcess
from effdl.runtime.host import Host, open_host
from effdl.runtime.machine import this_machine
from effdl.runtime.target import Target

SCHEMA = 1
"""Of what is cached, raised when the probes change."""
MAX_AGE = 30 * 86400.0
BUSY_AGE = 600.0
"""Seconds that peaks are kept; those that were measured while other programs computed, not as long."""
FAR = 0.25
"""Below this share of either roof the time is neither for computing nor for moving data."""
EXCEEDED = 1.2
"""A model that reaches more than this of a peak shows that the peak was measured too low."""
_BLOCK_MS = 30.0
_BLOCKS = 5
_SLOW_NS = 1e8
"""A product that takes longer than this is not worth its time."""
_TYPES = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "int8": ir.DataType.INT8,
    "uint8": ir.DataType.UINT8,
}


@dataclass(frozen=True)
class Probe:
    """One small model whose best time gives one peak.

    Args:
        peak: the number of ``Peaks`` that it measures.
        op_type: ``MatMul``, ``MatMulInteger`` or ``Add``.
        dtypes: of the two operands.
        shape: of both operands.
        work: operations or bytes of one run.
    """

    peak: str
    op_type: str
    dtypes: tuple[str, str]
    shape: tuple[int, ...]
    work: float


def peaks(
    host: Host,
    target: Target,
    threads: int,
    *,
    refresh: bool = False,
    folder: Path | None = None,
) -> Peaks | None:
    """Return what the target's machine reaches at most, from the cache or measured in about 2 s.

    Args:
        host: the target's machine, open.
        target: the provider that computes.
        threads: intra-op threads.
        refresh: measure although the cache has it; the higher of both holds.
        folder: of the cache; the user's own when None.

    Returns:
        None on an emulated machine, whose times mean nothing.

    Raises:
        TargetError: the provider is absent.
    """
    if host.emulated:
        return None
    cache = Cache("peaks", SCHEMA, folder)
    with host.worker("peaks of this machine") as worker:
        hello = worker.ask("hello")
        key = _key(hello, target, threads)
        kept = cache.get(key, MAX_AGE)
        found = read(kept)
        lasting = (kept or {}).get("calm") or cache.get(key, BUSY_AGE) is not None
        if found is not None and lasting and not refresh:
            return found
        measured = _measure(host, worker, hello, target, threads)
    if found is not None:
        both = zip(asdict(measured).items(), asdict(found).values(), strict=True)
        measured = Peaks(**{name: max(new, old) for (name, new), old in both})
    cache.put(key, {"peaks": asdict(measured), "calm": _calm(hello, threads)})
    return measured


def _calm(hello: Mapping[str, Any], threads: int) -> bool:
    """Whether other programs left the processors to the probes."""
    cores, load = int(hello["machine"]["cores"]), hello.get("load")
    return load is None or load <= cores - (threads or cores) + 0.5


def known_here(target: Target, threads: int, folder: Path | None = None) -> Peaks | None:
    """Return what an earlier command measured on this machine, None when nothing is kept."""
    import onnxruntime as ort

    hello = {"machine": asdict(this_machine()), "onnxruntime": ort.__version__}
    kept = Cache("peaks", SCHEMA, folder).get(_key(hello, target, threads), MAX_AGE)
    return read(kept)


def of_machine(target: Target, *, measure: bool, folder: Path | None = None) -> tuple[Peaks, ...]:
    """Return a machine's peaks on one thread and on all of them.

    Args:
        target: whose machine.
        measure: measure now; else only what is kept, and only of this machine.
        folder: as in ``peaks``.

    Raises:
        TargetError: the machine cannot be reached or has not the provider.
    """
    counts = (1,) if target.on_gpu else (1, 0)
    if not measure:
        kept = [] if target.remote else [known_here(target, n, folder) for n in counts]
        return tuple(p for p in kept if p is not None)
    with open_host(target) as host:
        found = [peaks(host, target, n, refresh=True, folder=folder) for n in counts]
    return tuple(p for p in found if p is not None)


def read(facts: Mapping[str, Any] | None) -> Peaks | None:
    """Make Peaks of what a cache file holds, None when it is not that."""
    try:
        found = Peaks(**facts["peaks"]) if facts is not None else None
    except (KeyError, TypeError):
        return None
    numbers = [] if found is None else list(asdict(found).values())
    sound = all(isinstance(n, int | float) and 0 <= n < float("inf") for n in numbers)
    return found if found is not None and sound and found.fp32_gflops > 0 else None


class Roof:
    """The peaks that the models of one bench are held against.

    Args:
        host, target, threads, folder: as in ``peaks``, which is asked at once.

    ``known`` is what it said, None when nothing could be measured; ``note`` says what went wrong.
    """

    def __init__(
        self, host: Host, target: Target, threads: int, folder: Path | None = None
    ) -> None:
        self._measure = partial(peaks, host, target, threads, folder=folder)
        self.known: Peaks | None = None
        self.note = ""
        try:
            self.known = self._measure()
        except ModelError as e:
            self.note = f"the machine's peaks could not be measured: {e.message}"

    def over(
        self, results: Sequence[BenchResult], works: Sequence[Work]
    ) -> tuple[BenchResult, ...]:
        """Return the results with their place below the roof.

        A model well above a peak shows that the peak was measured on a busy machine: it is measured
        once more, and the higher of both holds. Where that fails the peaks stay, with a ``note``: the
        results are worth more than their roof.
        """
        found = placed(results, works, self.known)
        if self.known is None or not any(map(self._above, found, works)):
            return found
        try:
            self.known = self._measure(refresh=True)
        except (ModelError, TargetError) as e:
            self.note = (
                "the machine's peaks are too low and could not be measured once more: " + e.message
            )
        return placed(results, works, self.known)

    def _above(self, result: BenchResult, work: Work) -> bool:
        memory = memory_ms(work, self.known) if self.known is not None else 0.0
        return max(result.peak_share or 0.0, memory / result.latency.median) > EXCEEDED


def placed(
    results: Sequence[BenchResult], works: Sequence[Work], known: Peaks | None
) -> tuple[BenchResult, ...]:
    """Return the results with ``gflops``, ``peak_share`` and ``bound`` filled in, see ``place``."""
    found = []
    for result, work in zip(results, works, strict=True):
        gflops, share, bound = place(work, result.latency.median, known)
        found.append(replace(result, gflops=gflops, peak_share=share, bound=bound))
    return tuple(found)


def place(work: Work, ms: float, known: Peaks | None) -> tuple[float | None, float | None, str]:
    """Return achieved GFLOP/s, their share of the compute peak, and what the time is spent on.

    The compute roof is that of the model's mix of number formats: the time that each part of the MACs
    takes at its own peak. The memory roof is the bytes that have to move, over the bandwidth of main
    memory, or of the cache when all fits into it.

    Args:
        work: of one inference.
        ms: its time.
        known: the machine's peaks.

    Returns:
        None, None and an empty text for what cannot be told: a model whose MACs are unknown or 0 has
        no rate. ``compute`` or ``memory`` is the higher roof that the time comes near to;
        ``overhead`` when it is far from both: time goes into elementwise nodes, small kernels and
        what lies between them.
    """
    if not work.macs or ms <= 0:
        return None, None, ""
    gflops = 2 * work.macs / ms / 1e6
    if known is None or known.fp32_gflops <= 0:
        return gflops, None, ""
    compute = sum(
        2 * work.macs * share / _peak(kind, known) / 1e6 for kind, share in work.formats.items()
    )
    memory = memory_ms(work, known)
    nearer = "compute" if compute >= memory else "memory"
    return gflops, compute / ms, nearer if max(compute, memory) >= FAR * ms else "overhead"


def memory_ms(work: Work, known: Peaks) -> float:
    """Return the time that the model's bytes take at the least, in ms; 0 when unknown."""
    in_cache = work.resident <= known.cache_bytes and known.cache_bandwidth > 0
    bandwidth = known.cache_bandwidth if in_cache else known.bandwidth
    return work.moved / bandwidth / 1e6 if bandwidth > 0 else 0.0


def _peak(kind: str, known: Peaks) -> float:
    """The peak of a number format; what has no kernel of its own is computed in float32."""
    own = {"int8": known.int8_gops, "fp16": known.fp16_gflops}.get(kind, 0.0)
    return own if own > 0 else known.fp32_gflops


def _key(hello: Mapping[str, Any], target: Target, threads: int) -> dict[str, object]:
    machine = hello["machine"]
    return {
        "cpu": machine["cpu"],
        "arch": machine["arch"],
        "isa": sorted(machine["isa"]),
        "cores": machine["cores"],
        "memory": machine["memory"],
        "onnxruntime": hello["onnxruntime"],
        "provider": target.providers[0],
        "threads": threads,
    }


def _measure(
    host: Host, worker: WorkerProcess, hello: Mapping[str, Any], target: Target, threads: int
) -> Peaks:
    cache = 0 if target.on_gpu else int(hello.get("cache_bytes", 0))
    best = {"fp32_gflops": 0.0, "int8_gops": 0.0, "bandwidth": 0.0}
    with scratch() as folder:
        for k, probe in enumerate(probes(hello["machine"], cache, target.on_gpu, threads)):
            before = best.get(probe.peak, 0.0)
            if before and probe.work / before > _SLOW_NS:
                continue  # the smaller one of the kind must do on a slow machine
            path = folder / f"probe{k}.onnx"
            io.save(probe_model(probe), path)
            try:
                ns = _best_ns(worker, host.send(path), probe, target, threads)
            except ModelError:
                # Not enough memory for the larger one, or no kernel for the number format.
                if before or probe.peak != "fp32_gflops":
                    continue
                raise
            best[probe.peak] = max(before, probe.work / ns)
    return Peaks(threads=threads, cache_bytes=cache, **best)


def probes(machine: Mapping[str, Any], cache: int, gpu: bool, threads: int) -> Iterator[Probe]:
    """Yield what to measure on a machine, the smaller of a kind first.

    Args:
        machine: its facts, see ``runtime.machine``.
        cache: bytes of its last-level cache, 0 when unknown.
        gpu: whether a GPU computes.
        threads: intra-op threads, 0 for all.
    """
    for size in _sizes(gpu, threads or int(machine["cores"])):
        yield _product("fp32_gflops", "MatMul", "float32", "float32", size)
        if gpu or (machine["arch"] == "arm64" and "fp16" in machine["isa"]):
            yield _product("fp16_gflops", "MatMul", "float16", "float16", size)
        if not gpu:  # x86 has fast kernels for unsigned by signed bytes, Arm for signed ones
            left = "int8" if machine["arch"] == "arm64" else "uint8"
            yield _product("int8_gops", "MatMulInteger", left, "int8", size)
    memory = int(machine["memory"]) or 1 << 30
    yield _stream("bandwidth", min(max(64 << 20, 4 * cache), 256 << 20, memory // 16))
    if cache >= 1 << 18:
        yield _stream("cache_bandwidth", min(cache // 8, 16 << 20))


def _sizes(gpu: bool, threads: int) -> tuple[int, ...]:
    if gpu:
        return (2048, 4096, 8192)
    return (384, 1024, 2048) if threads >= 8 else (384, 1024)


def _product(peak: str, op_type: str, left: str, right: str, size: int) -> Probe:
    return Probe(peak, op_type, (left, right), (size, size), 2.0 * size**3)


def _stream(peak: str, array_bytes: int) -> Probe:
    """c = a + b: three arrays move; that a processor first reads what it overwrites is not counted."""
    numbers = array_bytes // 4
    return Probe(peak, "Add", ("float32", "float32"), (numbers,), 3.0 * 4 * numbers)


def probe_model(probe: Probe) -> ir.Model:
    """Return the model of a probe, its inputs ``a`` and ``b``.

    The result is cut to one number, so that no large output is copied to the caller.
    """
    a, b = (
        ir.Value(name=n, type=ir.TensorType(_TYPES[d]), shape=ir.Shape(probe.shape))
        for n, d in zip("ab", probe.dtypes, strict=True)
    )
    first = ir.Value(name="first", const_value=ir.tensor(np.zeros(1, np.int64), name="first"))
    node = ir.node(probe.op_type, [a, b])
    cut = ir.node("Gather", [node.outputs[0], first])
    out = cut.outputs[0]
    node.outputs[0].name, out.name = "c", "y"
    out.type = ir.TensorType(
        ir.DataType.INT32 if "Integer" in probe.op_type else _TYPES[probe.dtypes[0]]
    )
    out.shape = ir.Shape((1, *probe.shape[1:]))
    graph = ir.Graph(
        [a, b], [out], nodes=[node, cut], initializers=[first], opset_imports={"": 13}, name="probe"
    )
    return ir.Model(graph, ir_version=8)


def _best_ns(worker: WorkerProcess, model: str, probe: Probe, target: Target, threads: int) -> int:
    """The fastest of all runs: a roof is a maximum, and a disturbance only adds time."""
    made = [{"shape": list(probe.shape), "dtype": dtype} for dtype in probe.dtypes]
    worker.ask(
        "load",
        model=model,
        providers=list(target.providers),
        threads=threads,
        feeds=[{"names": ["a", "b"], "make": made}],
    )
    worker.block(min_ms=_BLOCK_MS)  # warm-up
    return min(min(worker.block(min_ms=_BLOCK_MS)[0]) for _ in range(_BLOCKS))
