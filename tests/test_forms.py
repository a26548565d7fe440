"""A pass with several forms: every one is tried, the fastest stays, or the model as it was."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import onnx_ir as ir

from effdl.forms import best_form, forms_of
from effdl.graph import io
from effdl.passes.base import Context, NodePass, Pass
from effdl.recipe import Step
from effdl.report import GateReport, PassReport
from tests.support import from_text


class Neg(NodePass):
    """Puts as many Neg in front of the output as its form says; "none" and "same" are forms as well."""

    form: str = "auto"

    def run(self, model: ir.Model, ctx: Context) -> int:
        count = {"none": 0, "bad": 1, "auto": 2, "two": 2, "same": 2, "four": 4}[self.form]
        relu = next(n for n in model.graph if n.op_type == "Relu")
        for k in range(count):
            source = relu.inputs[0]
            node = ir.node("Neg", [source], name=f"n{k}")
            node.outputs[0].name = f"n{k}_out"
            model.graph.insert_before(relu, node)
            relu.replace_input_with(0, node.outputs[0])
        return count

    def variants(self) -> Sequence[Neg]:
        if self.form != "auto":
            return (self,)
        return tuple(type(self)(form=f) for f in ("none", "two", "same", "four", "bad"))


class Work:
    """A model with snapshots."""

    def __init__(self) -> None:
        self.model = from_text(
            '<ir_version: 8, opset_import: ["": 17]> g (float[2] x) => (float[2] y) { y = Relu(x) }'
        )

    def snapshot(self) -> Any:
        return SimpleNamespace(model=self.model.clone())

    def restore(self, state: Any) -> None:
        self.model = state.model.clone()


class Gate:
    """Tells how fast each model is by its number of nodes."""

    def __init__(self, ratios: dict[int, float | None] | None) -> None:
        self.ratios, self.asked = ratios, list[int]()

    def fastest(
        self, step: Pass, before: ir.Model, forms: Sequence[tuple[ir.Model, Sequence[str]]]
    ) -> list[GateReport] | None:
        self.asked = [len(m.graph) for m, _ in forms]
        if self.ratios is None:
            return None
        found = [self.ratios[n] for n in self.asked]
        return [
            GateReport(r is not None and r > 1.02, "latency", "not faster", ratio=r) for r in found
        ]


def run(work: Work, gate: Gate, step: Step) -> tuple[Step, PassReport] | None:
    def attempt(one: Step) -> tuple[Step, PassReport, str]:
        changes = one.pass_.run(work.model, SimpleNamespace())  # type: ignore[arg-type]
        status = "changed" if changes else "unchanged"
        if changes == 1:
            status = "rolled_back"
        report = PassReport(
            one.name, one.options, False, status, changes, "", (), (), {}, None, 0, 0, 0.0, 0.0
        )
        five = len(work.model.graph) == 5 and one.pass_.lossy
        return one, report, "output error 0.5, allowed 0.2" if five else ""

    return best_form(work, gate, forms_of(step), attempt)  # type: ignore[arg-type]


STEP = Step("neg", {}, Neg(), "r.yaml:1:1")


def test_the_forms_of_a_step() -> None:
    assert [f.label for f in forms_of(STEP)] == ["none", "two", "same", "four", "bad"]
    assert [f.step.options for f in forms_of(STEP)][1] == {"form": "two"}
    given = Step("neg", {"form": "two"}, Neg(form="two"), "r.yaml:1:1")
    assert [(f.label, f.step.options) for f in forms_of(given)] == [("neg", {"form": "two"})]


def test_the_fastest_is_kept() -> None:
    for ratios, best, count in (({3: 1.1, 5: 1.3}, "four", 5), ({3: 1.4, 5: 1.3}, "two", 3)):
        work, gate = Work(), Gate(dict(ratios))
        found = run(work, gate, STEP)
        assert found is not None
        step, report = found
        assert gate.asked == [3, 5]  # a form that makes what another made is not measured again
        assert step.options == {"form": best}
        assert report.status == "changed"
        assert report.gate is not None
        assert report.gate.kept
        assert len(work.model.graph) == count
        other = {"two": "four 1.30x", "four": "two 1.10x"}[best]
        assert report.notes["forms"] == f"{best} {ratios[count]:.2f}x, {other}, bad rolled back"


def test_none_is_faster() -> None:
    for ratios in ({3: 0.9, 5: 1.0}, {3: None, 5: None}):
        work = Work()
        before = io.to_bytes(work.model)
        found = run(work, Gate(dict(ratios)), STEP)
        assert found is not None
        assert found[1].status == "dropped"
        assert found[1].reason == "not faster"
        assert io.to_bytes(work.model) == before


def test_speed_is_no_aim() -> None:
    work = Work()
    before = io.to_bytes(work.model)
    assert run(work, Gate(None), STEP) is None
    assert io.to_bytes(work.model) == before


def test_no_form_fits() -> None:
    work, gate = Work(), Gate({})
    assert run(work, gate, Step("neg", {}, Neg(form="none"), "r.yaml:1:1")) is None
    assert gate.asked == []


class Rounded(Neg):
    """The same, but lossy."""

    lossy: ClassVar[bool] = True


def test_a_form_that_breaks_the_budget_is_not_raced() -> None:
    work, gate = Work(), Gate({3: 1.1, 5: 1.3})
    found = run(work, gate, Step("rounded", {}, Rounded(), "r.yaml:1:1"))
    assert found is not None
    step, report = found
    assert step.options == {"form": "two"}
    assert gate.asked == [3]
    assert "allowed 0.2" in str(report.notes["forms"])
