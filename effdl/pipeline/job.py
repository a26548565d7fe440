"""What all parts of one ``optimize`` know."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from effdl.data.feeds import Feeds
from effdl.graph.io import load
from effdl.measure.stats import model_stats
from effdl.recipe import Recipe, to_dict
from effdl.report import CompareReport, ModelStats, PassReport, RunReport
from effdl.run_options import Progress, RunOptions
from effdl.runtime.host import Host
from effdl.runtime.target import Target
from effdl.runtime.versions import versions
from effdl.workpiece import Workpiece


@dataclass
class Job:
    """One run: what was asked for, the model on its way, and what has been found out.

    Args:
        source: the input model's file.
        recipe: what to do.
        goal: where the result goes, None in a dry run; ``label`` as the user wrote it.
        options: see ``RunOptions``.
        tell: told what is going on.
        target: where the result will run; ``check_target`` where outputs are computed.
        threads: intra-op threads of measurements.
        work: the model.
        workdir: a temporary folder.
        host: what ``target`` was reached through, None while it was not.
        before: facts of the input model.
        unverified: why outputs are not checked, empty when they are.
        unmeasured: why speed is not measured, empty when it is.
        warnings: what the user should know.
        started: by the clock ``time.perf_counter``.
    """

    source: Path
    recipe: Recipe
    goal: Path | None
    label: str
    options: RunOptions
    tell: Progress
    target: Target
    check_target: Target
    threads: int
    work: Workpiece
    workdir: Path
    before: ModelStats
    host: Host | None = None
    unverified: str = ""
    unmeasured: str = ""
    warnings: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)

    def feeds(self) -> Feeds:
        """Return the inputs of the checks; they change with the model's interface."""
        assert self.work.verifier is not None
        return self.work.verifier.feeds

    def stats(self, path: Path | None = None) -> ModelStats:
        """Return the facts of a result: of a file that was written, or of the model in memory."""
        dims = self.options.dims
        if path is None:
            found = model_stats(self.work.model, None, dims, zstd=False)
            return replace(found, path="")
        return replace(model_stats(load(path), path, dims), path=self.label)

    def report(
        self,
        passes: list[PassReport],
        after: ModelStats,
        verified: CompareReport | None,
        unverified: str,
    ) -> RunReport:
        """Return the report of a result that is not measured yet."""
        return RunReport(
            recipe=to_dict(self.recipe),
            target=self.target.name,
            versions=versions(),
            before=self.before,
            after=after,
            passes=tuple(passes),
            verified=verified,
            unverified=unverified,
            bench=None,
            unmeasured="",
            accuracy=None,
            output=self.label,
            dry_run=self.options.dry_run,
            seconds=time.perf_counter() - self.started,
            warnings=tuple(self.warnings),
            gate=self.options.gate,
            seed=self.options.seed,
        )
