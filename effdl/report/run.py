"""One run of a recipe."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from effdl.report.bench import BenchReport, OpChange
from effdl.report.compare import CompareReport
from effdl.report.model import ModelStats


@dataclass(frozen=True)
class GateReport:
    """What the gate found about one pass, measured against the model before it.

    Args:
        kept: whether the pass stays.
        by: what decided: ``latency``, ``size``, ``accuracy``, ``fidelity``, or ``total`` when the sum
            of the passes lost and this one was taken out.
        reason: in a sentence, with the operators at fault.
        verdict: ``faster``, ``slower``, ``same``, ``noisy``; empty when speed was not measured.
        ratio, ci, noise_floor: as in ``BenchResult``, against the model before the pass.
        latency_ms: median of the model after the pass; ``before_ms`` of the one before it.
        file_bytes: of the model after the pass.
        score: the recipe's metric after the pass, None without evaluation data.
        fidelity: relative L2 error of the worst output against the input model.
        changes: time per kind of operator before and after the pass, the largest change first.
        culprits: nodes at fault, the worst first.
        repair: the nodes that a milder try had better leave alone; of a pass that is kept, those that it
            made slower.
    """

    kept: bool
    by: str
    reason: str
    verdict: str = ""
    ratio: float | None = None
    ci: tuple[float, float] | None = None
    noise_floor: float | None = None
    latency_ms: float | None = None
    before_ms: float | None = None
    file_bytes: int | None = None
    score: float | None = None
    fidelity: float | None = None
    changes: tuple[OpChange, ...] = ()
    culprits: tuple[str, ...] = ()
    repair: tuple[str, ...] = ()


@dataclass(frozen=True)
class PassReport:
    """One step of a run.

    Args:
        status: ``changed``, ``unchanged``, ``rolled_back`` (a check failed), ``dropped`` (the gate)
            or ``not_run``.
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
    gate: GateReport | None = None


@dataclass(frozen=True)
class RunReport:
    """One ``effdl optimize``.

    Args:
        recipe: the recipe as it was used, overrides included.
        verified: the output file, read back, against the original; None when the model cannot run.
        unverified: why ``verified`` is None.
        bench: input against output, None when not measured; ``unmeasured`` says why.
        accuracy: metric before and after on the recipe's evaluation data, if it names some.
        gate: ``off``, ``final`` or ``each``.
        there: the output file on a target that is another machine, against itself here.
        won: False when nothing that was tried helped, and the output is the input.
        changes: time per kind of operator in input and output, the largest change first.
        seed: of every random choice, None in reports of versions that did not write it.
        peak_bytes: of resident memory of this process at the end, 0 where the system does not tell. Other
            processes measure; theirs is in ``bench``.
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
    gate: str = "off"
    won: bool = True
    changes: tuple[OpChange, ...] = ()
    seed: int | None = None
    there: tuple[CompareReport, ...] = ()
    peak_bytes: int = 0
