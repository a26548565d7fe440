"""What is doubtful about a measurement, and what to do about it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from effdl.measure.rounds import Timing
from effdl.report import BenchResult, Latency

_LOUD = 0.10
_DRIFT = 0.10
_MOVES = 0.03
_FIRST_RUN = 10.0
_FIRST_RUN_MS = 50.0
_LISTED = 4


def timing_warnings(
    latencies: Mapping[str, Latency], unsettled: Collection[int], min_runs: int
) -> list[str]:
    """Return what is doubtful about the times.

    Args:
        latencies: by the model's name.
        unsettled: models (by number) that were not warm when measuring began.
        min_runs: the least number of runs.
    """
    said = []
    for k, (name, latency) in enumerate(latencies.items()):
        if latency.spread > _LOUD:
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
                f"{name}: still getting faster when warm-up ended; measure longer (seconds)"
            )
    return said


def verdict_warnings(
    names: Sequence[str], results: Sequence[BenchResult], processes: int
) -> list[str]:
    """Return what is doubtful about the verdicts.

    Args:
        names: of the models.
        results: of the same.
        processes: generations of processes they come from.
    """
    said = []
    for name, result in zip(names, results, strict=True):
        if result.verdict == "noisy":
            said.append(
                f"{name}: the interval [{result.ci[0]:.2f}, {result.ci[1]:.2f}] is too wide for a verdict; "
                "close other programs, or measure longer (seconds)"
            )
        slow_start = result.first_ms > _FIRST_RUN * result.latency.median
        if slow_start and result.first_ms > _FIRST_RUN_MS:
            times = result.first_ms / result.latency.median
            said.append(
                f"{name}: the first run takes {result.first_ms:.0f} ms, {times:.0f} times the median; "
                "run it once before it has to answer"
            )
    if processes == 1 and len(results) > 1:
        said.append(
            "each model was loaded once only: how much its speed differs from process to process is "
            "assumed, not measured; measure longer (seconds)"
        )
    return said


def drift_warnings(names: Sequence[str], timing: Timing) -> list[str]:
    """Return how the machine, or a model against the first, changed speed meanwhile."""
    levels = [[np.log(g) for g in timing.levels[k]] for k in range(len(names))]
    everything = np.mean([np.concatenate(model) for model in levels], axis=0)
    quarter = len(everything) // 4
    said = []
    if quarter >= 2:
        change = float(np.median(everything[-quarter:]) - np.median(everything[:quarter]))
        if abs(change) > _DRIFT:
            word = "slower" if change > 0 else "faster"
            said.append(
                f"the machine became {abs(np.expm1(change)):.0%} {word} during the run (heat, or other "
                "programs); the models took turns, so the ratios stand, but measure again for the times"
            )
    for name, model in zip(names[1:], levels[1:], strict=True):
        moves = [_movement(a - b) for a, b in zip(levels[0], model, strict=True) if len(a) >= 4]
        same_way = len(moves) > 1 and len({m > 0 for m in moves}) == 1
        if same_way and abs(np.mean(moves)) > _MOVES:
            said.append(
                f"{name}: its ratio moves by {abs(np.mean(moves)):.0%} within each process; "
                "measure longer (seconds)"
            )
    return said


def _movement(values: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> float:
    half = len(values) // 2
    return float(np.median(values[half:]) - np.median(values[:half]))


def device_warnings(names: Sequence[str], loads: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what does not run on the device that was asked for, and what its numbers stand for.

    Args:
        names: of the models.
        loads: what their workers said on loading.
    """
    said = []
    for name, load in zip(names, loads, strict=True):
        if load.get("unbound"):
            said.append(f"{name}: times include copies to and from the device: {load['unbound']}")
        for provider, ops in sorted(load.get("fallback", {}).items()):
            most = sorted(ops.items(), key=lambda item: (-item[1], item[0]))
            listed = ", ".join(f"{op} {n}" for op, n in most[:_LISTED])
            more = ", ..." if len(most) > _LISTED else ""
            count = sum(ops.values())
            said.append(
                f"{name}: {count} node{'s' if count != 1 else ''} on {provider} ({listed}{more})"
            )
    if loads and loads[0]["providers"][0] == "CUDAExecutionProvider":
        said.append(
            "float32 products run in TF32 (10 bits of mantissa) where the GPU can, as by default"
        )
    return said


def machine_warnings(threads: int, cores: int, load: float | None) -> list[str]:
    """Return what is doubtful about the machine.

    Args:
        threads: intra-op threads asked for.
        cores: processors a process may use.
        load: programs that wanted to run in the last minute, None when unknown.
    """
    wanted = threads or cores
    if wanted > cores:
        return [f"{wanted} threads share {cores} cores: ask for at most {cores} threads"]
    if load is not None and load > cores - wanted + 0.5:
        busy = f"other programs kept about {load:.1f} of {cores} cores busy in the last minute"
        return [
            f"{busy}: close them, or ask for fewer than {wanted} threads"
            if wanted > 1
            else f"{busy}: close them"
        ]
    return []
