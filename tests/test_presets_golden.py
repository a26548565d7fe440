"""Every preset over every sample model: what comes out is right, and smaller where it should be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import effdl
from effdl.data.npz import load_labels, load_npz
from effdl.graph import io
from effdl.measure.accuracy import evaluate
from tests.support import SAMPLES

PRESETS = sorted(p.stem for p in (Path(__file__).parent.parent / "configs").glob("*.yaml"))
MODELS = ("digits_cnn", "digits_mlp", "digits_transformer")
SMALLER = {  # preset -> largest allowed share of the file, zstd
    "cnn-int8": 0.45,
    "transformer-int8": 0.6,
    "smallest-file": 0.4,
    "fp16-cuda": 0.6,
    "arm-int8": 0.45,
    "lossless": 1.02,
    "transformer-fp32": 1.02,
    "cnn-slim": 1.01,
    "int8": 0.6,
    "weights-int4": 0.45,
    "cnn-thin": 0.8,
    "cnn-thin-int8": 0.45,
    "tiny-file": 0.3,
}
FOR_CNNS = ("cnn-slim", "cnn-thin", "cnn-thin-int8")
"""Presets that search long; what their passes do to a transformer is in the tests of the passes."""
NOTHING_TO_DO = {("transformer-int8", "digits_cnn")}  # hardly a matrix product in it


def test_no_preset_is_forgotten() -> None:
    assert set(PRESETS) == set(SMALLER)


@pytest.mark.parametrize(
    ("preset", "model_name"),
    [(p, m) for p in PRESETS for m in MODELS if p not in FOR_CNNS or m != "digits_transformer"],
)
def test_preset(preset: str, model_name: str, tmp_path: Path) -> None:
    source = SAMPLES / f"{model_name}.onnx"
    goal = tmp_path / "o.onnx"
    report = effdl.optimize(
        source,
        preset,
        goal,
        data=_some(model_name, tmp_path),
        options=effdl.RunOptions(bench_seconds=0, gate_seconds=0.3),
    )
    assert report.verified is not None
    assert report.after.zstd_bytes is not None
    assert report.before.zstd_bytes is not None
    share = 1.01 if (preset, model_name) in NOTHING_TO_DO else SMALLER[preset]
    assert report.after.zstd_bytes <= share * report.before.zstd_bytes
    test = SAMPLES / f"{model_name}.test.npz"
    original = io.load(source)
    labels = load_labels(test, "label")
    feeds = load_npz(test, original)
    before = evaluate(source, feeds, labels, "top1")
    after = evaluate(goal, feeds, labels, "top1")
    assert before > 0.97
    equal = preset in ("lossless", "transformer-fp32")
    allowed = 0.0 if equal else 0.02
    assert after >= before - allowed - 1e-9
    if equal:
        assert report.verified.equal
        assert np.isclose(after, before)


def _some(model_name: str, folder: Path) -> Path:
    """Write every third calibration sample: what takes long grows with them, what is tested does not."""
    with np.load(SAMPLES / f"{model_name}.calib.npz") as whole:
        few = {name: array[::3] for name, array in whole.items()}
    np.savez(folder / "calib.npz", **few)
    return folder / "calib.npz"
