"""Whether a result holds what its recipe promises."""

from __future__ import annotations

from effdl.recipe import Recipe
from effdl.report import RunReport


def overstepped(report: RunReport, recipe: Recipe) -> str:
    """Return how the result is further from the input model than the recipe allows, empty when not.

    Labelled samples decide where the recipe has them and limits ``accuracy_drop``; the output error
    stands in where it has not.
    """
    budget = recipe.budget
    if budget is None:
        return ""
    accuracy, verified = report.accuracy, report.verified
    if budget.accuracy_drop is not None and accuracy is not None:
        drop = accuracy["drop"]
        if not drop <= budget.accuracy_drop:
            return f"{accuracy['metric']} lost {drop:.4f}, allowed {budget.accuracy_drop:g}"
    elif budget.fidelity is not None and verified is not None:
        error = max((o.rel_l2 for o in verified.outputs), default=0.0)
        if error > budget.fidelity:
            return f"relative output error {error:.3g}, allowed {budget.fidelity:g}"
    return ""


def missed(report: RunReport, recipe: Recipe) -> str:
    """Return which part of the recipe's budget the result misses, empty when it holds.

    What was not measured (no device, no evaluation data) is not held against the result.
    """
    budget = recipe.budget
    if budget is None:
        return ""
    new = report.bench.models[-1] if report.bench is not None else None
    share = report.after.file_bytes / max(report.before.file_bytes, 1)
    over = overstepped(report, recipe)
    if budget.speedup is not None and new is not None and new.ratio < budget.speedup:
        over = f"speed-up {new.ratio:.2f}, wanted {budget.speedup:.2f}"
    elif budget.latency is not None and new is not None and new.latency.median > budget.latency:
        over = f"latency {new.latency.median:.3g} ms, wanted {budget.latency:.3g} ms"
    elif budget.size is not None and share > budget.size:
        over = f"{share:.2f} of the input's size, wanted {budget.size}"
    return f"budget missed: {over}" if over else ""


def unheld(recipe: Recipe) -> list[str]:
    """Return what the recipe limits and nothing can tell."""
    budget = recipe.budget
    limits = budget is not None and budget.accuracy_drop is not None and budget.fidelity is None
    if limits and recipe.data.evaluation is None:
        return ["budget.accuracy_drop is not held: the recipe has no data.evaluation to score on"]
    return []


def price(report: RunReport) -> list[str]:
    """Return what a smaller result costs in speed, where that was measured."""
    if not report.won or report.bench is None or report.bench.models[-1].verdict != "slower":
        return []
    return [f"the result is smaller, but {report.bench.verdict[-1]}"]
