"""The gate: what helps stays, what does not goes, and the reader is told why."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import pytest

import effdl
from effdl import gate as gate_module
from effdl.errors import CheckFailed, DataError, ModelError, TargetError, UsageError
from effdl.gate.islands import Islands
from effdl.graph import io
from effdl.graph.weights import Names, replace_weight
from effdl.measure import outcome
from effdl.measure.verdict import Ratio, judge, sentence
from effdl.passes.base import Context, NodePass
from effdl.pipeline import optimize
from effdl.recipe import Recipe, Step
from effdl.recipe import load as load_recipe
from effdl.recipe.model import Budget, Evaluation
from effdl.report import (
    BenchReport,
    BenchResult,
    Latency,
    OpChange,
    RunReport,
)
from effdl.run_options import RunOptions
from tests.support import SAMPLES, op_counts

CNN = SAMPLES / "digits_cnn.onnx"


class Lossy(NodePass):
    """Multiplies the weights of the Convs it may touch and says how many."""

    lossy: ClassVar[bool] = True
    claims: ClassVar[frozenset[str]] = frozenset({"latency", "size"})
    factor: float = 1.01

    def run(self, model: ir.Model, ctx: Context) -> int:
        names = Names(model)
        nodes = [n for n in model.graph if n.op_type == "Conv" and self.selected(n)]
        for node in nodes:
            weight = node.inputs[1].const_value.numpy()
            replace_weight(node, 1, weight * np.float32(self.factor), names)
            ctx.touch(node, "scaled")
        marks = model.metadata_props
        marks["lossy"] = marks.get("lossy", "") + f"{self.factor:g};"
        return len(nodes)


class Tidy(NodePass):
    """Lossless, claims nothing."""

    def run(self, model: ir.Model, ctx: Context) -> int:
        model.metadata_props["tidy"] = "yes"
        return 1


def recipe_of(*steps: NodePass, budget: Budget | None = None, **more: Any) -> Recipe:
    base = load_recipe("lossless")
    named = tuple(Step(type(s).__name__.lower(), {}, s, "r.yaml:4:5") for s in steps)
    return base.model_copy(update={"passes": named, "budget": budget, **more})


def fake_bench(speed: Callable[[ir.Model], float], calls: list[int]) -> Callable[..., BenchReport]:
    """A bench whose times are told by ``speed`` (1 is the input's, 2 twice as fast)."""

    def bench(models: list[Path], feeds: Any, target: Any, **options: Any) -> BenchReport:
        calls.append(len(models))
        rates = [speed(io.load(Path(m))) for m in models]
        results = []
        for k, (model, rate) in enumerate(zip(models, rates, strict=True)):
            ratio = Ratio(rate / rates[0], rate / rates[0] * 0.99, rate / rates[0] * 1.01)
            ms = 1.0 / rate
            results.append(
                BenchResult(
                    path=str(model),
                    sha256="",
                    file_bytes=Path(model).stat().st_size,
                    zstd_bytes=None,
                    load_ms=1.0,
                    first_ms=1.0,
                    peak_bytes=1,
                    latency=Latency(ms, ms, ms, ms, ms, 0.0, 100),
                    ratio=ratio.value,
                    ci=(ratio.low, ratio.high),
                    verdict="reference" if k == 0 else judge(ratio, 0.02),
                    noise_floor=0.02,
                )
            )
        said = tuple(sentence(r.verdict, Ratio(r.ratio, *r.ci), 0.02) for r in results[1:])
        return BenchReport("CPUExecutionProvider", 1, "1", "cpu", {}, "", tuple(results), said)

    return bench


@pytest.fixture
def speeds(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Replace the stopwatch: ``speeds["of"]`` tells how fast a model is."""
    calls: list[int] = []
    state: dict[str, Any] = {"of": lambda model: 1.0, "calls": calls}
    bench = fake_bench(lambda model: float(state["of"](model)), calls)
    monkeypatch.setattr(gate_module, "bench", bench)
    monkeypatch.setattr(outcome, "bench", bench)
    monkeypatch.setattr(gate_module, "profile", lambda *a, **k: _Profiles())
    monkeypatch.setattr(gate_module, "changes", lambda a, b: (OpChange("Conv", 1, 2, 1.0, 1.5),))
    monkeypatch.setattr(gate_module, "explain", lambda moved: "2 Conv added 0.50 ms")
    monkeypatch.setattr(gate_module, "culprits", lambda a, b: [(("conv1",), 1.0, 1.5)])
    monkeypatch.setattr(gate_module, "Islands", partial(FakeIslands, state))
    return state


class FakeIslands:
    """What had better be left alone: ``speeds["left"]``, for speed; for accuracy as without profiles."""

    def __init__(
        self, state: dict[str, Any], model: ir.Model, touched: Sequence[str], *_: object
    ) -> None:
        self.state = state
        self.repair = Islands(model, touched).repair

    def slower(self) -> list[str]:
        return list(self.state.get("left", ()))


class _Profiles:
    profiles: ClassVar[tuple[None, None]] = (None, None)


def factors(model: ir.Model) -> list[float]:
    return [float(f) for f in model.metadata_props.get("lossy", "").split(";") if f]


def run(recipe: Recipe, tmp_path: Path, **options: Any) -> RunReport:
    return optimize(CNN, recipe, tmp_path / "o.onnx", options=RunOptions(**options))


def test_a_pass_that_pays_stays(speeds: dict[str, Any], tmp_path: Path) -> None:
    speeds["of"] = lambda model: 2.0 if factors(model) else 1.0
    report = run(recipe_of(Lossy()), tmp_path)
    assert report.won
    (step,) = report.passes
    assert step.status == "changed"
    assert step.gate is not None
    assert (step.gate.kept, step.gate.by, step.gate.verdict) == (True, "latency", "faster")
    assert step.gate.ratio == pytest.approx(2.0)
    assert report.bench is not None
    assert report.bench.models[-1].verdict == "faster"
    assert factors(io.load(tmp_path / "o.onnx")) == [1.01]


@pytest.mark.parametrize(("speed", "word"), [(1.0, "same"), (0.8, "slower")])
def test_a_pass_that_does_not_pay_goes_and_the_input_comes_back(
    speeds: dict[str, Any], tmp_path: Path, speed: float, word: str
) -> None:
    speeds["of"] = lambda model: speed if factors(model) else 1.0
    report = run(recipe_of(Tidy(), Lossy()), tmp_path)
    tidy, lossy = report.passes
    assert tidy.status == "changed"
    assert lossy.status == "dropped"
    assert lossy.gate is not None
    assert not lossy.gate.kept
    assert lossy.gate.verdict == word
    assert "2 Conv added 0.50 ms" in lossy.reason
    assert not report.won
    assert (tmp_path / "o.onnx").read_bytes() == CNN.read_bytes()
    assert any("nothing helped" in w for w in report.warnings)


def test_what_helps_is_kept_beside_what_does_not(speeds: dict[str, Any], tmp_path: Path) -> None:
    def speed(model: ir.Model) -> float:
        return (1.5 if 1.01 in factors(model) else 1.0) * (0.7 if 1.02 in factors(model) else 1.0)

    speeds["of"] = speed
    report = run(recipe_of(Lossy(), Lossy(factor=1.02)), tmp_path)
    assert [p.status for p in report.passes] == ["changed", "dropped"]
    assert report.won
    assert factors(io.load(tmp_path / "o.onnx")) == [1.01]


def test_passes_that_only_lose_together_are_taken_out(
    speeds: dict[str, Any], tmp_path: Path
) -> None:
    """Each is measured as a gain, yet the sum is not: the smaller gain goes first."""
    seen: list[list[float]] = []

    def speed(model: ir.Model) -> float:
        f = factors(model)
        seen.append(f)
        final = len(speeds["calls"]) > 2  # the result against the input
        if f == [1.01, 1.02]:
            return 0.9 if final else 1.8
        return 1.5 if f == [1.01] else 1.0

    speeds["of"] = speed
    report = run(recipe_of(Lossy(), Lossy(factor=1.02)), tmp_path)
    assert report.won
    assert [p.status for p in report.passes] == ["changed", "dropped"]
    gone = report.passes[1].gate
    assert gone is not None
    assert (gone.kept, gone.by) == (False, "total")
    assert "slower" in report.passes[1].reason
    assert factors(io.load(tmp_path / "o.onnx")) == [1.01]


def test_the_final_gate_judges_only_the_result(speeds: dict[str, Any], tmp_path: Path) -> None:
    speeds["of"] = lambda model: 0.5 if factors(model) else 1.0
    report = run(recipe_of(Lossy()), tmp_path, gate="final")
    assert report.passes[0].status == "dropped"
    assert report.passes[0].gate is not None
    assert report.passes[0].gate.by == "total"
    assert not report.won
    speeds["calls"].clear()
    kept = run(recipe_of(Lossy()), tmp_path, gate="off")
    assert kept.passes[0].status == "changed"
    assert kept.passes[0].gate is None
    assert speeds["calls"] == [2]
    assert kept.won
    with pytest.raises(UsageError, match="unknown gate"):
        run(recipe_of(Lossy()), tmp_path, gate="maybe")


def test_lossless_recipes_need_not_win_but_may_not_lose(
    speeds: dict[str, Any], tmp_path: Path
) -> None:
    report = run(recipe_of(Tidy()), tmp_path)
    assert report.won
    assert report.passes[0].status == "changed"
    assert report.passes[0].gate is None
    speeds["of"] = lambda model: 0.8 if "tidy" in model.metadata_props else 1.0
    report = run(recipe_of(Tidy()), tmp_path)
    assert report.passes[0].status == "dropped"
    assert not report.won


def test_a_lossy_pass_is_held_to_the_fidelity_budget(
    speeds: dict[str, Any], tmp_path: Path
) -> None:
    speeds["of"] = lambda model: 2.0 if factors(model) else 1.0
    tight = recipe_of(Lossy(factor=1.5), budget=Budget(fidelity=0.01))
    report = run(tight, tmp_path)
    (step,) = report.passes
    assert step.status == "dropped"
    assert step.gate is not None
    assert step.gate.by == "fidelity"
    assert step.gate.fidelity is not None
    assert step.gate.fidelity > 0.01
    assert "allowed 0.01" in step.reason
    assert "Conv" in step.reason  # the operator at fault
    assert step.gate.culprits
    wide = run(recipe_of(Lossy(), budget=Budget(fidelity=0.5)), tmp_path)
    assert wide.passes[0].status == "changed"
    assert wide.won


class Hurts(Lossy):
    """Ruins one Conv, and hardly touches the others."""

    def run(self, model: ir.Model, ctx: Context) -> int:
        names = Names(model)
        nodes = [n for n in model.graph if n.op_type == "Conv" and self.selected(n)]
        last = [n for n in model.graph if n.op_type == "Conv"][-1]
        for node in nodes:
            weight = node.inputs[1].const_value.numpy()
            factor = np.float32(-1.0 if node is last else 1.0001)
            replace_weight(node, 1, weight * factor, names)
            ctx.touch(node, "scaled")
        model.metadata_props["lossy"] = "1.0001;"
        return len(nodes)


def test_a_pass_that_hurts_in_one_place_is_repaired(speeds: dict[str, Any], tmp_path: Path) -> None:
    speeds["of"] = lambda model: 2.0 if factors(model) else 1.0
    report = run(recipe_of(Hurts(), budget=Budget(fidelity=0.01)), tmp_path)
    (step,) = report.passes
    last = [n.name for n in io.load(CNN).graph if n.op_type == "Conv"][-1]
    assert step.status == "changed"
    assert step.options["ignore"]
    assert last in step.reason
    assert "allowed 0.01" in step.reason
    assert report.won
    assert report.verified is not None
    assert max(o.rel_l2 for o in report.verified.outputs) < 0.01


def labelled(tmp_path: Path) -> Path:
    data = np.load(SAMPLES / "digits_cnn.calib.npz")
    (name,) = data.files
    images = data[name][:64]
    model = effdl.load(CNN)
    from effdl.runtime.session import open_session

    session = open_session(model)
    scores = [next(iter(session.run({name: images[k : k + 1]}).values())) for k in range(64)]
    file = tmp_path / "test.npz"
    np.savez(file, **{name: images, "label": np.concatenate(scores).argmax(-1)})
    return file


def test_labels_decide_where_there_are_some(speeds: dict[str, Any], tmp_path: Path) -> None:
    speeds["of"] = lambda model: 2.0 if factors(model) else 1.0
    base = load_recipe("lossless").data
    data = base.model_copy(update={"evaluation": Evaluation(path=labelled(tmp_path))})
    budget = Budget(accuracy_drop=0.01, fidelity=1e-9)
    report = run(recipe_of(Lossy(), budget=budget, data=data), tmp_path)
    assert report.passes[0].status == "changed"  # the outputs moved, the answers did not
    assert report.passes[0].gate is not None
    assert report.passes[0].gate.score == 1.0
    assert report.accuracy is not None
    assert report.accuracy["difference"] == 0.0
    assert report.accuracy["verdict"] == "same"
    worse = run(recipe_of(Lossy(factor=-1.0), budget=budget, data=data), tmp_path)
    assert worse.passes[0].status == "dropped"
    assert "top1 went from 1.0000 to" in worse.passes[0].reason


def test_the_objective_size_is_judged_by_size(speeds: dict[str, Any], tmp_path: Path) -> None:
    speeds["of"] = lambda model: 0.5 if factors(model) else 1.0
    report = run(recipe_of(Lossy(), objective="size"), tmp_path)
    assert report.passes[0].status == "dropped"  # the file is no smaller
    assert report.passes[0].gate is not None
    assert report.passes[0].gate.by == "size"
    assert not report.won
    small = load_recipe("smallest-file").model_copy(update={"budget": None})
    report = optimize(
        CNN, small, tmp_path / "s.onnx", data=SAMPLES / "digits_cnn.calib.npz", options=RunOptions()
    )
    assert report.won
    assert report.after.file_bytes < report.before.file_bytes


def test_what_cannot_be_measured_stays_and_says_so(tmp_path: Path) -> None:
    report = run(recipe_of(Lossy()), tmp_path, bench_seconds=0.0)
    assert report.passes[0].status == "changed"
    assert report.passes[0].gate is None
    assert report.bench is None
    assert report.unmeasured == "switched off"
    assert report.won


def test_a_missed_budget_carries_the_report(speeds: dict[str, Any], tmp_path: Path) -> None:
    speeds["of"] = lambda model: 1.5 if factors(model) else 1.0
    recipe = recipe_of(Lossy(), budget=Budget(speedup=2.0))
    with pytest.raises(CheckFailed, match=r"speed-up 1.50, wanted 2.00") as e:
        run(recipe, tmp_path)
    assert isinstance(e.value.report, RunReport)
    assert e.value.report.passes[0].gate is not None
    assert not (tmp_path / "o.onnx").exists()
    report = run(recipe, tmp_path, keep_going=True)
    assert any("budget missed" in w for w in report.warnings)
    assert (tmp_path / "o.onnx").exists()


def test_a_noisy_pass_is_measured_again(
    speeds: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speeds["of"] = lambda model: 2.0 if factors(model) else 1.0
    bench = gate_module.bench
    given: list[float] = []

    def first_noisy(*args: Any, **options: Any) -> BenchReport:
        given.append(options["seconds"])
        report = bench(*args, **options)
        if len(given) > 1:
            return report
        return replace(
            report, models=(report.models[0], replace(report.models[1], verdict="noisy"))
        )

    monkeypatch.setattr(gate_module, "bench", first_noisy)
    report = run(recipe_of(Lossy()), tmp_path)
    assert report.passes[0].status == "changed"
    assert given == [1.0, 2.5]


def test_weights_beside_the_model_come_back_too(speeds: dict[str, Any], tmp_path: Path) -> None:
    source = tmp_path / "big.onnx"
    io.save(io.load(CNN), source, external=True)
    speeds["of"] = lambda model: 0.5 if factors(model) else 1.0
    goal = tmp_path / "out.onnx"
    report = optimize(source, recipe_of(Lossy()), goal, options=RunOptions())
    assert not report.won
    assert effdl.compare(source, goal).equal
    assert op_counts(io.load(goal)) == op_counts(io.load(CNN))
    assert io.content_digest(io.load(goal)) == io.content_digest(io.load(CNN))


def test_passes_without_proof_are_taken_out_first(speeds: dict[str, Any], tmp_path: Path) -> None:
    """An unmeasured step that slows the model down does not cost the measured gain."""

    def speed(model: ir.Model) -> float:
        return (1.5 if factors(model) else 1.0) * (0.5 if "tidy" in model.metadata_props else 1.0)

    speeds["of"] = speed
    report = run(recipe_of(Tidy(), Lossy()), tmp_path)
    assert report.won
    assert [p.status for p in report.passes] == ["dropped", "changed"]
    assert report.passes[0].gate is not None
    assert report.passes[0].gate.by == "total"
    assert factors(io.load(tmp_path / "o.onnx")) == [1.01]
    used = json.loads(io.load(tmp_path / "o.onnx").metadata_props["effdl.recipe"])
    assert used["passes"] == ["lossy"]  # what made the file, not what was asked for


def test_a_candidate_that_cannot_be_measured_goes(
    speeds: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*args: Any, **options: Any) -> BenchReport:
        raise ModelError("the measuring process was ended by SIGKILL")

    monkeypatch.setattr(gate_module, "bench", dies)
    report = run(recipe_of(Lossy()), tmp_path)
    assert report.passes[0].status == "dropped"
    assert "SIGKILL" in report.passes[0].reason
    assert not report.won


def test_a_result_that_cannot_be_measured_is_not_written(
    speeds: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speeds["of"] = lambda model: 2.0 if factors(model) else 1.0

    def dies(*args: Any, **options: Any) -> BenchReport:
        raise TargetError("the connection was lost")

    monkeypatch.setattr(outcome, "bench", dies)
    with pytest.raises(TargetError):
        run(recipe_of(Lossy()), tmp_path)
    assert not (tmp_path / "o.onnx").exists()
    report = run(recipe_of(Lossy()), tmp_path, gate="off")
    assert report.unmeasured == "the connection was lost"


def test_retries_do_not_end_a_strict_run(speeds: dict[str, Any], tmp_path: Path) -> None:
    """The milder tries leave every Conv alone at last, which is no fault of the recipe."""
    speeds["of"] = lambda model: 2.0 if factors(model) else 1.0
    recipe = recipe_of(Lossy(factor=-1.0), budget=Budget(fidelity=1e-6))
    report = run(recipe, tmp_path, strict=True)
    assert report.passes[0].status == "dropped"
    assert "left alone" in report.passes[0].reason


def test_an_input_that_is_the_output_stays(speeds: dict[str, Any], tmp_path: Path) -> None:
    goal = tmp_path / "m.onnx"
    io.save(io.load(CNN), goal, external=True)
    names, content = sorted(p.name for p in tmp_path.iterdir()), goal.read_bytes()
    report = optimize(goal, recipe_of(Lossy()), goal, options=RunOptions())
    assert not report.won
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    assert goal.read_bytes() == content


def test_wrong_labels_are_told_before_the_work(speeds: dict[str, Any], tmp_path: Path) -> None:
    file = labelled(tmp_path)
    arrays = dict(np.load(file))
    np.savez(file, **{**arrays, "label": arrays["label"][:10]})
    data = load_recipe("lossless").data.model_copy(update={"evaluation": Evaluation(path=file)})
    said: list[str] = []
    with pytest.raises(DataError, match="10 labels"):
        optimize(
            CNN,
            recipe_of(Lossy(), data=data),
            tmp_path / "o.onnx",
            options=RunOptions(),
            progress=lambda name, what: said.append(name),
        )
    assert "lossy" not in said


def test_threads_come_from_the_target(
    speeds: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[int] = []
    bench = outcome.bench

    def spy(*args: Any, **options: Any) -> BenchReport:
        given.append(options["threads"])
        return bench(*args, **options)

    monkeypatch.setattr(outcome, "bench", spy)
    recipe = recipe_of(Tidy(), target={"device": "cpu", "threads": 2})
    run(recipe, tmp_path)
    run(recipe, tmp_path, threads=1)
    run(recipe_of(Tidy()), tmp_path)
    assert given == [2, 1, 1]


def test_a_smaller_file_that_is_slower_says_so(speeds: dict[str, Any], tmp_path: Path) -> None:
    speeds["of"] = lambda model: 0.5 if "effdl.recipe" in model.metadata_props else 1.0
    small = load_recipe("smallest-file").model_copy(update={"budget": None})
    report = optimize(
        CNN, small, tmp_path / "s.onnx", data=SAMPLES / "digits_cnn.calib.npz", options=RunOptions()
    )
    assert report.won
    assert any("smaller, but slower 0.50x" in w for w in report.warnings)


def test_an_accuracy_limit_without_labels_is_told(speeds: dict[str, Any], tmp_path: Path) -> None:
    report = run(recipe_of(Tidy(), budget=Budget(accuracy_drop=0.01)), tmp_path)
    assert any("accuracy_drop is not held" in w for w in report.warnings)


@pytest.mark.parametrize(
    ("lossy", "verdict", "ratio", "interval", "kept"),
    [
        (True, "faster", 1.05, (1.02, 1.08), True),
        (True, "noisy", 1.05, (0.99, 1.11), False),
        (False, "noisy", 1.05, (0.99, 1.11), True),
        (False, "noisy", 1.01, (0.96, 1.06), False),
        (False, "noisy", 0.95, (0.88, 1.02), False),
        (False, "same", 1.01, (1.0, 1.02), False),
        (False, "slower", 0.9, (0.88, 0.92), False),
    ],
)
def test_noise_keeps_what_costs_nothing_and_is_probably_faster(
    lossy: bool, verdict: str, ratio: float, interval: tuple[float, float], kept: bool
) -> None:
    latency = Latency(1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 100)
    model = BenchResult("m.onnx", "", 1, None, 1.0, 1.0, 1, latency, ratio, interval, verdict, 0.02)
    found = gate_module._judged(model, "why", 1.0, lossy)
    assert found.kept == kept
    assert found.reason == ("" if kept else "why")
