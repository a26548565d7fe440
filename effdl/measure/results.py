"""What was measured of each model, as the report has it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from effdl.graph import io
from effdl.measure import verdict
from effdl.measure.rounds import Timing
from effdl.measure.size import zstd_size
from effdl.measure.work import Work
from effdl.report import BenchResult

FileFacts = tuple[int, int | None, str]
"""Bytes on disk, the same compressed with zstd, SHA-256."""


@dataclass
class Told:
    """What the workers of one model said, one entry per generation.

    Args:
        loads: answers to ``load``; ``stats`` answers to ``stats`` after the last round.
    """

    loads: list[dict[str, Any]] = field(default_factory=list)
    stats: list[dict[str, Any]] = field(default_factory=list)

    def median(self, key: str) -> float:
        """Return the median over generations of a figure of ``load``."""
        return float(np.median([float(a[key]) for a in self.loads]))

    def most(self, key: str) -> int | None:
        """Return the largest of a figure of ``stats`` that may be missing."""
        return max((int(a[key]) for a in self.stats if a.get(key) is not None), default=None)

    def mean(self, key: str) -> float | None:
        """Return the mean of a figure of ``stats`` that may be missing."""
        values = [float(a[key]) for a in self.stats if a.get(key) is not None]
        return float(np.mean(values)) if values else None

    def peak_bytes(self) -> int | None:
        """Return the largest growth of resident memory by the model."""
        grown = [a["peak_bytes"] - a["baseline_bytes"] for a in self.stats if a["peak_bytes"]]
        return max(grown, default=None)


def file_facts(path: Path) -> FileFacts:
    """Return bytes on disk, the same compressed with zstd, and SHA-256 of a model file.

    Raises:
        ModelError: see ``graph.io.load``.
    """
    io.load(path)  # names whatever is wrong with the file; weights outside stay unread
    return io.files_size(path), zstd_size(path), io.file_digest(path)


def model_results(
    paths: Sequence[Path],
    facts: dict[Path, FileFacts],
    works: Sequence[Work],
    told: Sequence[Told],
    timing: Timing,
    comparisons: Sequence[verdict.Comparison],
    min_effect: float,
) -> tuple[BenchResult, ...]:
    """Return a result per model.

    Args:
        paths: the models; ``facts``, ``works`` and ``told`` what is known of them.
        timing: their times, the models first.
        comparisons: each model after the first against it.
        min_effect: the smallest difference of interest.
    """
    results = []
    for k, path in enumerate(paths):
        size, packed, digest = facts[path]
        latency = verdict.latency(timing.runs(k))
        against = comparisons[k - 1] if k else None
        ratio = against.ratio if against else verdict.Ratio(1.0, 1.0, 1.0)
        floor = max(min_effect, against.noise if against else largest(comparisons))
        batch = works[k].batch
        results.append(
            BenchResult(
                path=str(path),
                sha256=digest,
                file_bytes=size,
                zstd_bytes=packed,
                load_ms=told[k].median("load_ms"),
                first_ms=told[k].median("first_ms"),
                peak_bytes=told[k].peak_bytes(),
                latency=latency,
                ratio=ratio.value,
                ci=(ratio.low, ratio.high),
                verdict=verdict.judge(ratio, floor, min_effect) if against else "reference",
                noise_floor=floor,
                rounds=timing.rounds,
                params=works[k].params,
                macs=works[k].macs,
                batch=batch,
                throughput=1e3 * batch / latency.median if batch else None,
                device_bytes=told[k].most("device_bytes"),
                energy_mj=told[k].mean("energy_mj"),
            )
        )
    return tuple(results)


def largest(comparisons: Iterable[verdict.Comparison]) -> float:
    """Return the largest noise of the comparisons, 0 without any."""
    return max((c.noise for c in comparisons), default=0.0)


def sentence(result: BenchResult) -> str:
    """Return the verdict on a model in words."""
    ratio = verdict.Ratio(result.ratio, *result.ci)
    return verdict.sentence(result.verdict, ratio, result.noise_floor)
