from __future__ import annotations

from pathlib import Path

import pytest

import effdl
from effdl.report import to_json
from tests.support import SAMPLES, assert_same

MLP = SAMPLES / "digits_mlp.onnx"


def test_the_documented_call(tmp_path: Path) -> None:
    goal = str(tmp_path / "o.onnx")
    report = effdl.optimize(str(MLP), recipe="lossless", output=goal)
    assert report.bench is not None
    assert to_json(report)["schema"] == 2
    assert_same(effdl.load(MLP), effdl.load(goal))


def test_a_model_in_memory_is_taken_by_every_verb(tmp_path: Path) -> None:
    model = effdl.load(MLP)
    effdl.optimize(
        model, "lossless", tmp_path / "o.onnx", options=effdl.RunOptions(bench_seconds=0)
    )
    assert effdl.compare(model, tmp_path / "o.onnx").equal
    assert effdl.inspect(model).stats.params > 400_000
    assert len(effdl.bench(model, tmp_path / "o.onnx", seconds=0.2).models) == 2
    effdl.save(model, tmp_path / "copy.onnx")
    assert_same(model, effdl.load(tmp_path / "copy.onnx"))


def test_every_fault_of_the_user_is_an_effdl_error(tmp_path: Path) -> None:
    calls = [
        lambda: effdl.load("nowhere.onnx"),
        lambda: effdl.optimize("nowhere.onnx", "lossless", tmp_path / "o.onnx"),
        lambda: effdl.optimize(MLP, "no-such-preset", tmp_path / "o.onnx"),
        lambda: effdl.optimize(MLP, "lossless"),
        lambda: effdl.optimize(MLP, "lossless", tmp_path),
        lambda: effdl.optimize(MLP, "cnn-int8", tmp_path / "o.onnx"),
        lambda: effdl.optimize(MLP, "cnn-int8", tmp_path / "o.onnx", data=tmp_path / "no.npz"),
        lambda: effdl.bench(MLP, target="tpu"),
        lambda: effdl.bench(MLP, dims={"nothing": 3}),
        lambda: effdl.compare(MLP, SAMPLES / "digits_cnn.onnx"),
        lambda: effdl.inspect(tmp_path),
        lambda: effdl.save(effdl.load(MLP), tmp_path / "no" / "o.onnx"),
    ]
    for call in calls:
        with pytest.raises(effdl.EffdlError) as e:
            call()
        assert e.value.exit_code in (2, 3)
        assert str(e.value)


def test_names_are_all_there() -> None:
    for name in effdl.__all__:
        assert getattr(effdl, name) is not None
    with pytest.raises(AttributeError):
        effdl.nonsense  # noqa: B018
