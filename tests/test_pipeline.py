from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import pytest

import effdl
from effdl.errors import CheckFailed, ModelError
from effdl.graph import io
from effdl.graph.weights import Names, replace_weight
from effdl.measure.verify import Verdict, Verifier
from effdl.passes.base import Context, Pass
from effdl.pipeline import optimize
from effdl.recipe import Recipe, Step
from effdl.recipe import load as load_recipe
from effdl.run_options import PassBug, RunOptions
from tests.support import SAMPLES, from_text

CNN = SAMPLES / "digits_cnn.onnx"
QUICK = RunOptions(bench_seconds=0)


class Wrong(Pass):
    """Claims to be lossless and is not."""

    def run(self, model: ir.Model, ctx: Context) -> int:
        node = next(n for n in model.graph if n.op_type == "Conv")
        weight = node.inputs[1].const_value.numpy()
        replace_weight(node, 1, weight * np.float32(1.5), Names(model))
        return 1


class Noisy(Wrong):
    """The same, honest about it."""

    lossy: ClassVar[bool] = True


class Poison(Pass):
    """Lossy, and breaks the model."""

    lossy: ClassVar[bool] = True

    def run(self, model: ir.Model, ctx: Context) -> int:
        node = next(n for n in model.graph if n.op_type == "Conv")
        weight = node.inputs[1].const_value.numpy()
        replace_weight(node, 1, np.full_like(weight, np.nan), Names(model))
        return 1


class Freezes(Pass):
    """Bakes the batch of 1 into a Reshape."""

    def run(self, model: ir.Model, ctx: Context) -> int:
        flatten = next(n for n in model.graph if n.op_type == "Flatten")
        shape = ir.Value(name="frozen", const_value=ir.tensor(np.array([1, -1]), name="frozen"))
        model.graph.register_initializer(shape)
        node = ir.node("Reshape", [flatten.inputs[0], shape], num_outputs=1)
        model.graph.insert_before(flatten, node)
        flatten.outputs[0].replace_all_uses_with(node.outputs[0])
        return 1


class Renames(Pass):
    """Changes the interface without saying so."""

    def run(self, model: ir.Model, ctx: Context) -> int:
        model.graph.outputs[0].name = "renamed"
        return 1


class Crashes(Pass):
    """A bug."""

    def run(self, model: ir.Model, ctx: Context) -> int:
        raise KeyError("no such thing")


def recipe_of(*steps: Pass) -> Recipe:
    base = load_recipe("lossless")
    named = tuple(Step(type(s).__name__.lower(), {}, s, "r.yaml:4:5") for s in steps)
    return base.model_copy(update={"passes": named})


@pytest.mark.parametrize(
    "step", [Wrong(), Poison(), Freezes(), Renames()], ids=lambda s: type(s).__name__
)
def test_a_pass_that_breaks_the_model_is_caught(step: Pass, tmp_path: Path) -> None:
    goal = tmp_path / "o.onnx"
    goal.write_bytes(b"old")
    with pytest.raises(CheckFailed, match="rolled back") as e:
        optimize(CNN, recipe_of(step), goal, options=QUICK)
    assert ("Conv '/stem/Conv'" in e.value.message) == isinstance(step, Wrong)
    assert goal.read_bytes() == b"old"
    assert not [n for n in os.listdir(tmp_path) if n.startswith(".")]


@pytest.mark.parametrize(
    "step", [Wrong(), Poison(), Freezes(), Renames()], ids=lambda s: type(s).__name__
)
def test_keep_going_drops_it_and_goes_on(step: Pass, tmp_path: Path) -> None:
    goal = tmp_path / "o.onnx"
    good = load_recipe("lossless").passes
    recipe = recipe_of(step).model_copy(update={"passes": (*recipe_of(step).passes, *good)})
    report = optimize(CNN, recipe, goal, options=RunOptions(bench_seconds=0, keep_going=True))
    assert report.passes[0].status == "rolled_back"
    assert report.passes[0].reason
    assert any(p.status == "changed" for p in report.passes[1:])
    assert report.verified is not None
    assert report.verified.equal
    assert effdl.compare(CNN, goal).equal


def test_a_lossy_pass_has_its_error_recorded(tmp_path: Path) -> None:
    report = optimize(CNN, recipe_of(Noisy()), tmp_path / "o.onnx", options=QUICK)
    assert report.passes[0].status == "changed"
    assert report.passes[0].error is not None
    assert report.passes[0].error > 1e-3
    assert report.verified is not None
    assert not report.verified.equal


def test_a_crash_on_a_model_that_never_ran_is_a_fault_of_the_model(tmp_path: Path) -> None:
    source, goal = tmp_path / "m.onnx", tmp_path / "o.onnx"
    model = (
        from_text("""<ir_version: 8, opset_import: ["": 17]> g (float[1,2,3] x) => (float[a,b,c] y)
        { y = Transpose <perm = [0, 49, 2]> (x) }""")
    )  # ONNX's checker takes it, the runtime does not
    io.save(model, source)
    with pytest.raises(ModelError, match="does not run as it is either"):
        optimize(source, recipe_of(Crashes()), goal, options=QUICK)
    assert not goal.exists()


def test_a_crash_of_ours_leaves_a_reproducer(tmp_path: Path) -> None:
    with pytest.raises(PassBug, match="KeyError") as e:
        optimize(CNN, recipe_of(Crashes()), tmp_path / "o.onnx", options=QUICK)
    folder = e.value.reproducer
    assert sorted(os.listdir(folder)) == ["error.txt", "model.onnx", "recipe.yaml"]
    assert "no such thing" in (folder / "error.txt").read_text()
    assert io.content_digest(io.load(folder / "model.onnx")) == io.content_digest(io.load(CNN))
    assert not (tmp_path / "o.onnx").exists()
    report = optimize(
        CNN,
        recipe_of(Crashes()),
        tmp_path / "o.onnx",
        options=RunOptions(bench_seconds=0, keep_going=True),
    )
    assert report.passes[0].status == "rolled_back"
    assert "KeyError" in report.passes[0].reason


def test_nothing_to_do_keeps_the_content(tmp_path: Path) -> None:
    first, second = tmp_path / "a.onnx", tmp_path / "b.onnx"
    effdl.optimize(CNN, "lossless", first, options=QUICK)
    report = effdl.optimize(first, "lossless", second, options=QUICK)
    assert {p.status for p in report.passes} == {"unchanged"}
    assert all(p.reason for p in report.passes)
    props = [json.loads(json.dumps(dict(io.load(f).metadata_props))) for f in (first, second)]
    assert props[0]["effdl.content_sha256"] == props[1]["effdl.content_sha256"]


def test_output_may_be_the_input(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    io.save(io.load(CNN), path, external=True)
    report = effdl.optimize(path, "lossless", path, options=RunOptions(bench_seconds=0.2))
    assert report.bench is not None
    assert effdl.compare(CNN, path).equal
    assert len(os.listdir(tmp_path)) == 2


def test_events_are_told(tmp_path: Path) -> None:
    told: list[tuple[str, str]] = []
    optimize(
        CNN,
        recipe_of(Noisy()),
        tmp_path / "o.onnx",
        options=QUICK,
        progress=lambda name, what: told.append((name, what)),
    )
    assert [n for n, _ in told][-1] in ("verify", "bench", "save")
    assert ("noisy", "running") in told


def recipe_file(tmp_path: Path, passes: str) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(f"name: r\ndescription: d\npasses: {passes}\n")
    return path


def test_passes_that_change_the_interface_are_checked_too(tmp_path: Path) -> None:
    recipe = recipe_file(
        tmp_path,
        "[simplify, set_shapes: {dims: {batch: 3}}, convert_float16: {keep_io_types: false}]",
    )
    report = effdl.optimize(CNN, recipe, tmp_path / "o.onnx", options=QUICK)
    assert [p.status for p in report.passes] == ["changed"] * 3
    assert report.passes[1].error == 0
    assert report.verified is not None
    assert report.verified.outputs[0].rel_l2 < 0.02
    assert report.after.inputs == {"image": "float16[3,1,8,8]"}


class Invalid(Pass):
    """Makes a graph that ONNX refuses."""

    def run(self, model: ir.Model, ctx: Context) -> int:
        node = next(n for n in model.graph if n.op_type == "Conv")
        node.attributes["kernel_shape"] = ir.AttrString("kernel_shape", "three")
        return 1


def test_an_invalid_graph_is_rolled_back(tmp_path: Path) -> None:
    options = RunOptions(bench_seconds=0, keep_going=True)
    report = optimize(CNN, recipe_of(Invalid()), tmp_path / "o.onnx", options=options)
    assert report.passes[0].status == "rolled_back"
    assert "invalid ONNX graph" in report.passes[0].reason


def test_lossless_passes_are_compared_once_and_the_wrong_one_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    checks: list[bool] = []
    honest = Verifier.check

    def counted(self: Verifier, *args: Any, lossy: bool) -> Verdict:
        checks.append(lossy)
        return honest(self, *args, lossy=lossy)

    monkeypatch.setattr(Verifier, "check", counted)
    report = effdl.optimize(CNN, "lossless", tmp_path / "o.onnx", options=QUICK)
    changed = [p for p in report.passes if p.status == "changed"]
    assert len(changed) >= 2
    assert len(checks) == 2, "the passes together, then the file"
    assert [p.error is not None for p in changed] == [False] * (len(changed) - 1) + [True]
    steps = load_recipe("lossless").passes
    steps = (*steps[:3], Step("wrong", {}, Wrong()), *steps[3:])
    recipe = Recipe(name="mixed", description="one is wrong", passes=steps)
    options = RunOptions(bench_seconds=0, keep_going=True)
    report = optimize(CNN, recipe, tmp_path / "p.onnx", options=options)
    assert [p.name for p in report.passes if p.status == "rolled_back"] == ["wrong"]
    assert report.verified is not None
    assert report.verified.equal
