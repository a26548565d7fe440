"""Whether a result holds what its recipe promises."""

from __future__ import annotations

from effdl.data.metrics import LOWER_IS_BETTER
from effdl.recipe import Recipe
from effdl.report import RunReport


def missed(report: RunReport, recipe: Recipe) -> str:
    """Return which part of the recipe's budget the result misses, empty when it holds.

    What was not measured (no device, no evaluation data) is not held against the result.
    """
    budget = recipe.budget
    if budget is None:
        return ""
    bench, accuracy, verified = report.bench, report.accuracy, report.verified
    new = bench.models[-1] if bench is not None else None
    if budget.speedup is not None and new is not None and new.ratio < budget.speedup:
        return f"budget missed: speed-up {new.ratio:.2f}, wanted {budget.speedup:.2f}"
    if budget.latency is not None and new is not None and new.latency.median > budget.latency:
        return f"budget missed: latency {new.latency.median:.3g} ms, wanted {budget.latency:.3g} ms"
    if budget.accuracy_drop is not None and accuracy is not None:
        drop = accuracy["before"] - accuracy["after"]
        drop = -drop if accuracy["metric"] in LOWER_IS_BETTER else drop
        if drop > budget.accuracy_drop:
            return f"budget missed: accuracy dropped by {drop:.4f}, allowed {budget.accuracy_drop}"
    if budget.fidelity is not None and verified is not None:
        error = max((o.rel_l2 for o in verified.outputs), default=0.0)
        if error > budget.fidelity:
            return f"budget missed: relative output error {error:.3g}, allowed {budget.fidelity}"
    share = report.after.file_bytes / max(report.before.file_bytes, 1)
    if budget.size is not None and share > budget.size:
        return f"budget missed: {share:.2f} of the input's size, wanted {budget.size}"
    return ""
