"""Real models of others: lossless keeps their outputs; presets make them smaller and keep the score."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

import effdl
from effdl.graph import io
from effdl.graph.clean import clean
from tests.support import SHARED, context, needs_shared

MODELS = sorted((SHARED / "models").glob("*.onnx")) if SHARED else []
UNRUNNABLE = {"superres_prepost_op18"}
QUICK = effdl.RunOptions(bench_seconds=0)

pytestmark = needs_shared


@pytest.mark.parametrize("path", MODELS, ids=lambda p: p.stem)
def test_lossless_keeps_the_outputs(path: Path, tmp_path: Path) -> None:
    goal = tmp_path / "o.onnx"
    report = effdl.optimize(path, "lossless", goal, options=QUICK)
    assert os.listdir(tmp_path) == ["o.onnx"]
    assert report.after.nodes <= report.before.nodes
    metadata = sum(len(k) + len(v) for k, v in io.load(goal).metadata_props.items())
    assert report.after.file_bytes <= report.before.file_bytes + metadata + 2048
    if path.stem in UNRUNNABLE:
        assert report.verified is None
        assert "com.microsoft.extensions" in report.unverified
        return
    assert report.verified is not None
    assert report.verified.equal or report.verified.notes
    again = effdl.optimize(goal, "lossless", tmp_path / "p.onnx", options=QUICK)
    assert {p.status for p in again.passes} == {"unchanged"}


@pytest.mark.parametrize("path", MODELS, ids=lambda p: p.stem)
@pytest.mark.parametrize("preset", ["transformer-int8", "fp16-cuda", "cnn-slim"])
def test_presets_without_data_run(path: Path, preset: str, tmp_path: Path) -> None:
    goal = tmp_path / "o.onnx"
    options = replace(QUICK, gate="off", keep_going=True)  # the gate and its repairs take minutes
    report = effdl.optimize(path, preset, goal, options=options)
    assert (report.verified is None) == (path.stem in UNRUNNABLE)


@pytest.mark.parametrize("name", ["cifar_resnet20", "cifar_vgg"])
def test_cnn_int8_keeps_the_classes(name: str, tmp_path: Path) -> None:
    assert SHARED is not None
    path = SHARED / "models" / f"{name}.onnx"
    mean = np.array([0.4914, 0.4822, 0.4465], np.float32)
    std = np.array([0.2470, 0.2435, 0.2616], np.float32)
    with np.load(SHARED / "data" / "cifar10_calib_u8.npz") as data:
        images = ((data[data.files[0]].astype(np.float32) / 255 - mean) / std).transpose(0, 3, 1, 2)
    images = np.ascontiguousarray(images)
    key = ort.InferenceSession(path).get_inputs()[0].name
    np.savez(tmp_path / "calib.npz", **{key: images[:100]})
    goal = tmp_path / "o.onnx"
    effdl.optimize(path, "cnn-int8", goal, data=tmp_path / "calib.npz", options=QUICK)
    assert goal.stat().st_size < path.stat().st_size / 3
    want, got = (
        ort.InferenceSession(p).run(None, {key: images[100:600]})[0].argmax(-1)
        for p in (path, goal)
    )
    assert (want == got).mean() > 0.95


def test_an_already_quantized_model_is_recognised(tmp_path: Path) -> None:
    from effdl import passes

    assert SHARED is not None
    model = io.load(SHARED / "models" / "mobilenetv2_qdq_int8.onnx")
    for name in ("quantize_static", "quantize_dynamic"):
        ctx = context(None)
        twin = model.clone()
        clean(twin)
        if not passes.get(name).needs_data:
            assert passes.get(name)().run(twin, ctx) == 0
            assert ctx.log.skipped
        else:
            assert passes.get(name)().candidates(twin, ctx) == []
