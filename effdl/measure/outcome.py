"""What a run gained: the file that came in against the file that goes out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from effdl.data.feeds import Array, Feeds
from effdl.errors import EffdlError
from effdl.measure.accuracy import evaluate
from effdl.measure.bench import bench
from effdl.report import BenchReport, ModelStats
from effdl.runtime.target import Target


def race(
    before: Path,
    after: Path,
    stats: tuple[ModelStats, ModelStats],
    feeds: Feeds,
    target: Target,
    *,
    threads: int,
    seconds: float,
    seed: int,
) -> tuple[BenchReport | None, str]:
    """Bench two files on the first feeds.

    Args:
        before: the file that came in.
        after: the file that goes out, still in its stage.
        stats: of both, so that nothing is hashed and compressed again; the second has the name that
            ``after`` will have.
        feeds: the inputs.
        target: where to run.
        threads, seconds, seed: as in ``bench``.

    Returns:
        The report and an empty text, or None and why nothing could be measured.
    """
    known = {
        path: (s.file_bytes, s.zstd_bytes, s.sha256)
        for path, s in zip((before, after), stats, strict=True)
    }
    try:
        result = bench(
            [before, after],
            feeds.first(2),
            target,
            threads=threads,
            seconds=seconds,
            seed=seed,
            known=known,
        )
    except EffdlError as e:
        return None, e.message
    last = replace(result.models[-1], path=stats[1].path)
    return replace(result, models=(*result.models[:-1], last)), ""


def score(
    before: Path, after: Path, feeds: Feeds, labels: Array, metric: str, target: Target
) -> dict[str, Any]:
    """Score two files on the same labelled samples.

    Args:
        before: the file that came in.
        after: the file that goes out.
        feeds: the samples.
        labels: one per sample, shape [samples, ...].
        metric: a name of ``effdl.data.metrics``.
        target: where both run.
    """
    old, new = (evaluate(m, feeds, labels, metric, target=target) for m in (before, after))
    return {"metric": metric, "before": old, "after": new, "samples": len(labels)}
