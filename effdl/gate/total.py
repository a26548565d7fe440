"""Judges the result of a recipe as a whole against the input."""

from __future__ import annotations

from collections.abc import Sequence

from effdl.recipe import Recipe
from effdl.recipe.budget import overstepped
from effdl.report import PassReport, RunReport


def objective_of(recipe: Recipe) -> str:
    """Return what the recipe is after: ``latency``, ``size``, or empty for tidiness only.

    A recipe that does not say is after latency when one of its passes trades accuracy for it.
    """
    if recipe.objective is not None:
        return recipe.objective
    trades = any(s.pass_.lossy and "latency" in s.pass_.claimed() for s in recipe.passes)
    return "latency" if trades else ""


def loses(report: RunReport, recipe: Recipe) -> tuple[str, str]:
    """Return by what the result is worse than the input and the sentence for it; empty when it is not.

    Args:
        report: of the result that was just written, verified and measured.
        recipe: whose objective and budget count.
    """
    changed = [p for p in report.passes if p.status == "changed"]
    tried = [p for p in report.passes if p.gate is not None]
    if not changed:
        return ("latency", "no pass helped") if tried else ("", "")
    over = overstepped(report, recipe)
    if over:
        return "error", over
    objective = objective_of(recipe)
    before, after = report.before, report.after
    if objective == "size":
        old, new = ((s.file_bytes, s.zstd_bytes or 0) for s in (before, after))
        return ("", "") if new < old else ("size", "no smaller than the input")
    if report.bench is None:
        return "", ""
    word, said = report.bench.models[-1].verdict, report.bench.verdict[-1]
    proved = any(p.gate.kept and p.gate.by == "latency" for p in changed if p.gate is not None)
    if word == "faster" or (word == "noisy" and proved):
        return "", ""
    if word == "slower":
        return "slower", said
    claimed = any(p.lossy for p in (*changed, *tried))
    return ("latency", said) if objective == "latency" and claimed else ("", "")


def weakest(passes: Sequence[PassReport], by: str) -> int | None:
    """Return which pass to take out of a result that loses, None when none is left to blame.

    Args:
        passes: all steps.
        by: ``slower`` (than the input), ``latency`` (not faster), ``size`` or ``error``.
    """
    kept = [k for k, p in enumerate(passes) if p.status == "changed"]
    lossy = [k for k in kept if passes[k].lossy]
    if by == "error":
        return max(lossy, key=lambda k: passes[k].error or 0.0, default=None)
    proved = {k: r for k in kept if (r := _proved(passes[k]))}
    doubtful = [k for k in lossy if k not in proved]
    if by == "slower":  # a pass that claims nothing was never measured
        doubtful = [k for k in kept if k not in lossy and k not in proved] + doubtful
    else:
        proved = {k: r for k, r in proved.items() if k in lossy}
    if doubtful:
        return doubtful[-1]
    return min(proved, key=lambda k: proved[k], default=None)


def _proved(report: PassReport) -> float:
    """By how much a pass was measured to be faster, 0 when it was not measured."""
    gate = report.gate
    return gate.ratio or 0.0 if gate is not None and gate.kept and gate.by == "latency" else 0.0
