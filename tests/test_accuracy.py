from __future__ import annotations

import numpy as np
import pytest

from effdl.data.feeds import Feeds
from effdl.errors import DataError, ModelError, UsageError
from effdl.graph import io
from effdl.measure.accuracy import evaluate
from tests.support import SAMPLES, from_text

MODEL = SAMPLES / "digits_mlp.onnx"


def digits(batch: int) -> tuple[Feeds, np.ndarray]:
    with np.load(SAMPLES / "digits_mlp.test.npz", allow_pickle=False) as data:
        images, labels = data["image"], data["label"]
    parts = [{"image": images[k : k + batch]} for k in range(0, len(images), batch)]
    return Feeds(tuple(parts), "digits_mlp.test.npz", True), labels


def test_accuracy_of_the_sample_model_is_the_one_its_readme_names() -> None:
    feeds, labels = digits(64)  # 504 samples: the last batch is smaller
    value = evaluate(MODEL, feeds, labels, "top1")
    assert value == pytest.approx(0.9980, abs=1e-4)
    assert evaluate(io.load(MODEL), *digits(1), "top1") == value
    assert evaluate(MODEL, feeds, labels, "top1", output="logits") == value


def test_unknown_metric_and_output_have_the_nearest_name() -> None:
    feeds, labels = digits(504)
    with pytest.raises(UsageError, match="unknown metric 'top_1'") as e:
        evaluate(MODEL, feeds, labels, "top_1")
    assert e.value.hint == "did you mean 'top1'?"
    with pytest.raises(UsageError, match="no output 'logit'") as e:
        evaluate(MODEL, feeds, labels, "top1", output="logit")
    assert e.value.hint == "did you mean 'logits'?"


def test_labels_have_to_fit() -> None:
    feeds, labels = digits(504)
    with pytest.raises(DataError, match="503 labels for 504 results") as e:
        evaluate(MODEL, feeds, labels[:-1], "top1")
    assert e.value.where == "digits_mlp.test.npz"
    with pytest.raises(DataError, match="no sample"):
        evaluate(MODEL, Feeds((), "x.npz", True), labels, "top1")


def test_outputs_that_cannot_be_scored() -> None:
    varying = from_text(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[N,L] x) => (float[N,L] y) { y = Neg(x) }"""
    )
    feeds = Feeds(
        ({"x": np.ones((1, 3), np.float32)}, {"x": np.ones((1, 4), np.float32)}), "x", True
    )
    with pytest.raises(DataError, match=r"depends on the sample \(\[3\], \[4\]\)"):
        evaluate(varying, feeds, np.zeros(2), "top1")
    sequence = from_text(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[2] x) => (seq(float[2]) y) { y = SequenceConstruct(x) }"""
    )
    with pytest.raises(ModelError, match="is no tensor"):
        evaluate(sequence, Feeds(({"x": np.ones(2, np.float32)},), "x", True), np.zeros(1), "top1")
