"""What a run gained: the file that came in against the file that goes out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from effdl.data.feeds import Feeds
from effdl.errors import EffdlError
from effdl.measure.bench import bench
from effdl.report import BenchReport, ModelStats
from effdl.runtime.host import Host
from effdl.runtime.target import Target

_GENERATIONS = 4
"""How often processes are started: half of what ``effdl bench`` may take, for half the wait."""


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
    host: Host | None = None,
    must: bool = False,
) -> tuple[BenchReport | None, str]:
    """Bench two files on the first feeds.

    Args:
        before: the file that came in.
        after: the file that goes out, still in its stage.
        stats: of both, so that nothing is hashed and compressed again; the second has the name that
            ``after`` will have.
        feeds: the inputs.
        target: where to run.
        must: an error is raised, not told.
        threads, seconds, seed, host: as in ``bench``.

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
            host=host,
            generations=_GENERATIONS,
        )
    except EffdlError as e:
        if must:
            raise
        return None, e.message
    if host is not None:
        host.discard(after)
    last = replace(result.models[-1], path=stats[1].path)
    return replace(result, models=(*result.models[:-1], last)), ""
