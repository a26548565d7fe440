"""What a run gained: the file that came in against the file that goes out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from effdl.data.feeds import Feeds
from effdl.data.npz import load_labels, load_npz
from effdl.errors import EffdlError
from effdl.graph import io
from effdl.measure.accuracy import evaluate
from effdl.measure.bench import bench
from effdl.report import BenchReport
from effdl.runtime.target import Target


def race(
    before: Path,
    after: Path,
    label: str,
    feeds: Feeds,
    target: Target,
    *,
    threads: int,
    seconds: float,
    seed: int,
) -> tuple[BenchReport | None, str]:
    """Bench two files on the first feeds; the second is reported under the name ``label``.

    Returns:
        The report and an empty text, or None and why nothing could be measured.
    """
    try:
        result = bench(
            [before, after], feeds.first(2), target, threads=threads, seconds=seconds, seed=seed
        )
    except EffdlError as e:
        return None, e.message
    last = replace(result.models[-1], path=label)
    return replace(result, models=(*result.models[:-1], last)), ""


def score(
    before: Path, after: Path, data: Path, labels: str, metric: str, target: Target
) -> dict[str, Any]:
    """Score two files on the same labelled samples.

    Args:
        before: the file that came in.
        after: the file that goes out.
        data: an ``.npz`` with the inputs and the labels.
        labels: the name of the labels in it.
        metric: a name of ``effdl.data.metrics``.
        target: where both run.
    """
    feeds = load_npz(data, io.load(before))
    truth = load_labels(data, labels)
    old, new = (evaluate(m, feeds, truth, metric, target=target) for m in (before, after))
    return {"metric": metric, "before": old, "after": new, "samples": len(truth)}
