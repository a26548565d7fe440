"""The shipped presets: what each promises by its name and its file."""

from pathlib import Path

import pytest
import yaml

from effdl import api, recipe
from effdl.data.npz import load_npz
from effdl.graph import io
from effdl.graph.walk import opset
from effdl.run_options import RunOptions
from effdl.runtime.target import parse_target
from tests.support import ROOT, SAMPLES, assert_same, context, from_text, op_counts

NAMES = recipe.preset_names()


def test_the_presets_are_there() -> None:
    wanted = (
        "arm-int8 cnn-int8 cnn-slim cnn-thin cnn-thin-int8 fp16-cuda int8 lossless smallest-file tiny-file "
        "transformer-fp32 transformer-int8 weights-int4"
    )
    assert wanted.split() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_preset_is_sound(name: str) -> None:
    report = recipe.check(name)
    assert not report.errors
    got = recipe.load(name)
    assert got.name == name
    assert len(got.description) > 15
    assert got.data.calibration is None
    assert got.data.evaluation is None
    assert parse_target(got.target).device in ("cpu", "cuda", "arm")
    summary = next(p for p in recipe.presets() if p.name == name)
    assert summary.passes == tuple(s.name for s in got.passes)
    assert summary.target == parse_target(got.target).device


@pytest.mark.parametrize("name", NAMES)
def test_preset_says_when_to_use_it(name: str) -> None:
    text = recipe.preset_text(name)
    comments = [line for line in text.splitlines() if line.startswith("#")]
    assert len(comments) >= 2
    assert text.endswith("\n")
    assert max(len(line) for line in text.splitlines()) <= 100


@pytest.mark.parametrize("name", NAMES)
def test_preset_survives_dump_and_load(name: str) -> None:
    first = recipe.load(name)
    again = recipe.load(yaml.safe_load(recipe.dump(first)))
    assert recipe.to_dict(again) == recipe.to_dict(first)
    assert again.passes == first.passes


def test_lossless_has_no_lossy_pass_and_needs_no_data() -> None:
    for step in recipe.load("lossless").passes:
        assert not step.pass_.lossy, step.name
        assert not step.pass_.needs_data, step.name


@pytest.mark.parametrize(
    ("name", "device"), [("fp16-cuda", "cuda"), ("arm-int8", "arm"), ("cnn-int8", "cpu")]
)
def test_targets(name: str, device: str) -> None:
    assert parse_target(recipe.load(name).target).device == device


def test_which_presets_need_data_is_known() -> None:
    with_data = {n for n in NAMES if any(s.pass_.needs_data for s in recipe.load(n).passes)}
    assert with_data == {"cnn-int8", "cnn-thin-int8", "arm-int8", "smallest-file"}
    for name in NAMES:
        assert any("calibration data" in n for n in recipe.check(name).notes) == (name in with_data)


@pytest.mark.parametrize("version", [7, 9, 11, 13, 16, 17, 18, 20, 21])
def test_lossless_runs_at_every_opset(version: int) -> None:
    """On a model of any age it changes the outputs of nothing, and leaves the opset alone."""
    model = from_text(
        f"""<ir_version: 8, opset_import: ["": {version}]>
        g (float[n,4] x) => (float[n,4] z)
        <float[4,4] w = {{1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7}}, float[4] b = {{1,2,3,4}}>
        {{ y = MatMul(x, w)  i = Identity(y)  a = Add(i, b)  z = Relu(a) }}"""
    )
    before = model.clone()
    for step in recipe.load("lossless").passes:
        if opset(model) >= step.pass_.min_opset:
            step.pass_.run(model, context())
    io.check(model)
    assert opset(model) == version
    assert "Identity" not in op_counts(model)
    assert_same(before, model)


@pytest.mark.parametrize("name", ["cnn-int8", "arm-int8"])
def test_int8_presets_quantize_the_sample_cnn(name: str) -> None:
    """Folding comes before quantizing: no batch norm is left, and convolutions are 8-bit."""
    model = io.load(SAMPLES / "digits_cnn.onnx")
    got = recipe.load(name)
    device = parse_target(got.target).device
    for step in got.passes:
        feeds = load_npz(SAMPLES / "digits_cnn.calib.npz", model).first(8)
        step.pass_.run(model, context(feeds, target=device))
    counts = op_counts(model)
    assert "BatchNormalization" not in counts
    assert counts["DequantizeLinear"] > counts["Conv"]
    zero_points = {
        str(v.const_value.dtype.numpy())
        for n in model.graph.all_nodes()
        if n.op_type == "QuantizeLinear"
        for v in n.inputs[2:]
        if v is not None and v.const_value is not None
    }
    assert zero_points == ({"int8"} if name == "arm-int8" else {"uint8"})


def test_presets_are_packaged() -> None:
    """The wheel carries them inside the package, where an installed effdl looks."""
    text = (ROOT / "pyproject.toml").read_text()
    assert '"configs" = "effdl/configs"' in text


@pytest.mark.parametrize("name", ["cnn-int8", "int8", "transformer-int8", "weights-int4"])
def test_where_nothing_is_timed_a_run_gives_the_same_bytes(name: str, tmp_path: Path) -> None:
    model = "digits_cnn" if name.startswith("cnn") else "digits_transformer"
    options = RunOptions(gate="off", bench_seconds=0)
    for goal in ("a.onnx", "b.onnx"):
        api.optimize(
            SAMPLES / f"{model}.onnx",
            name,
            tmp_path / goal,
            data=SAMPLES / f"{model}.calib.npz",
            options=options,
        )
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
