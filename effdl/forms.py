"""A pass that can be written in several forms: each is tried, the fastest on the target is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import onnx_ir as ir

from effdl.gate import Gate
from effdl.graph.walk import all_nodes
from effdl.recipe import Step
from effdl.report import GateReport, PassReport
from effdl.workpiece import Snapshot, Workpiece


@dataclass(frozen=True)
class Form:
    """One way to run a step.

    Args:
        label: the values of the options that tell it apart.
        step: the step with these options.
    """

    label: str
    step: Step


def forms_of(step: Step) -> list[Form]:
    """Return the forms that the pass of a step can take."""
    found = []
    given = step.pass_.model_dump()
    for variant in step.pass_.variants():
        changed = {k: v for k, v in variant.model_dump().items() if v != given[k]}
        options = {**step.options, **changed}
        label = " ".join(map(str, changed.values())) or step.name
        found.append(Form(label, replace(step, pass_=variant, options=options)))
    return found


def best_form(
    work: Workpiece,
    gate: Gate,
    forms: list[Form],
    attempt: Callable[[Step], tuple[Step, PassReport, str]],
) -> tuple[Step, PassReport] | None:
    """Try each form on the model as it is now, keep the fastest; the model before it if none is.

    Args:
        work: the model on its way.
        gate: measures.
        forms: what to choose from.
        attempt: runs and checks one step, in a milder form where it has to, and leaves the model changed
            where all went well; says what it ran, what came of it and why it breaks the budget.

    Returns:
        None, with the model as it was, where no form changed anything within the budget, or speed is
        not measured.
    """
    before = work.snapshot()
    ways: dict[tuple[str, ...], tuple[Form, PassReport, Snapshot]] = {}
    failed, refusals = [], []
    for form in forms:
        step, report, refused = attempt(form.step)
        if refused:
            refusals.append((step, report))
            failed.append(f"{form.label}: {refused}")
        elif report.status == "changed":
            way = replace(form, step=step), report, work.snapshot()
            ways.setdefault(_operators(work.model), way)
        elif report.status == "rolled_back":
            failed.append(f"{form.label} rolled back")
        work.restore(before)
    made = [(state.model, names_touched(report)) for _, report, state in ways.values()]
    found = gate.fastest(forms[0].step.pass_, before.model, made) if made else None
    if refusals and not made:
        step, report = refusals[0]
        reason = "; ".join(failed)
        held = None if report.gate is None else replace(report.gate, reason=reason)
        return step, replace(report, status="dropped", reason=reason, gate=held)
    if found is None:
        return None
    ranked = sorted(
        zip(found, ways.values(), strict=True), key=lambda r: (r[0].kept, r[0].ratio or 0.0)
    )
    verdict, (form, report, state) = ranked[-1]
    if len(ranked) > 1 or failed:
        told = [f"{f.label} {_speed(g)}" for g, (f, _, _) in reversed(ranked)] + failed
        report = replace(report, notes={**report.notes, "forms": ", ".join(told)})
    if verdict.kept:
        work.restore(state)
        return form.step, replace(report, gate=with_budget(verdict, report.gate))
    verdict = with_budget(verdict, report.gate)
    dropped = replace(report, status="dropped", reason=verdict.reason, gate=verdict)
    return form.step, dropped


def with_budget(verdict: GateReport, held: GateReport | None) -> GateReport:
    """Return a verdict on speed with the score and the error of the one on the budget."""
    if held is None:
        return verdict
    return replace(verdict, score=held.score, fidelity=held.fidelity)


def names_touched(report: PassReport) -> list[str]:
    """Return the names of the nodes that a pass changed."""
    return [name for name, _ in report.touched]


def _speed(gate: GateReport) -> str:
    return "not measured" if gate.ratio is None else f"{gate.ratio:.2f}x"


def _operators(model: ir.Model) -> tuple[str, ...]:
    """Tell apart what forms make: one that does not apply anywhere may fall back to another."""
    return tuple(sorted(f"{n.domain}:{n.op_type}" for n in all_nodes(model)))
