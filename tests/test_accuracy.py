from __future__ import annotations

import numpy as np
import pytest

from effdl.data.dataset import Dataset
from effdl.data.feeds import Feeds
from effdl.errors import DataError, ModelError, UsageError
from effdl.graph import io
from effdl.measure.accuracy import (
    difference,
    evaluate,
    reference_labels,
    score_interval,
    score_model,
)
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
        evaluate(varying, feeds, np.zeros(2), "numpy:array_equal")
    sequence = from_text(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[2] x) => (seq(float[2]) y) { y = SequenceConstruct(x) }"""
    )
    with pytest.raises(ModelError, match="is no tensor"):
        evaluate(sequence, Feeds(({"x": np.ones(2, np.float32)},), "x", True), np.zeros(1), "top1")


HEADLESS = """<ir_version: 8, opset_import: ["": 17]>
    g (float[N,L] x) => (float[N,L] y) { y = Neg(x) }"""


def shuffled(seed: int, share: float) -> Dataset:
    """Samples of which a share has wrong labels: what a worse model would look like."""
    feeds, labels = digits(64)
    rng = np.random.default_rng(seed)
    wrong = rng.random(len(labels)) < share
    return Dataset(feeds, np.where(wrong, (labels + 1) % 10, labels), "shuffled")


def test_scores_come_sample_by_sample() -> None:
    feeds, labels = digits(64)
    scored = score_model(MODEL, Dataset(feeds, labels, "x"), "top1")
    assert scored.samples is not None
    assert scored.samples.shape == (504,)
    assert scored.value == scored.samples.mean() == evaluate(MODEL, feeds, labels, "top1")
    assert (scored.metric, scored.count, scored.output) == ("top1", 504, "logits")
    bounds = score_interval(scored)
    assert bounds.low < scored.value < bounds.high


@pytest.mark.parametrize("metric", ["top1", "f1"])
def test_a_loss_is_told_from_chance(metric: str) -> None:
    right = score_model(MODEL, shuffled(0, 0.0), metric)
    worse = score_model(MODEL, shuffled(0, 0.1), metric)
    found = difference(right, worse)
    assert found.verdict == "worse"
    assert found.low < found.value < found.high < 0
    assert difference(worse, right).verdict == "better"
    nothing = difference(right, right)
    assert (nothing.value, nothing.verdict) == (0.0, "same")
    one = score_model(MODEL, shuffled(1, 0.004), metric)
    assert difference(right, one).verdict == "same"


def test_lower_is_better_turns_the_verdict() -> None:
    model = from_text(HEADLESS)
    feeds = Feeds(
        tuple({"x": np.full((1, 2), k, np.float32)} for k in np.linspace(0, 1, 40)), "x", True
    )
    labels = np.concatenate([-f["x"] for f in feeds])
    near = score_model(model, Dataset(feeds, labels + 0.1, "x"), "mse")
    far = score_model(model, Dataset(feeds, labels + 0.5, "x"), "mse")
    assert near.value == pytest.approx(0.01)
    assert difference(near, far).verdict == "worse"
    assert difference(near, far).value == pytest.approx(0.24)
    psnr = [score_model(model, Dataset(feeds, labels + d, "x"), "psnr") for d in (0.1, 0.5)]
    assert difference(*psnr).verdict == "worse"
    assert difference(*psnr).value < 0
    with pytest.raises(ValueError, match="different metrics"):
        difference(near, psnr[0])


def test_a_reference_model_stands_in_for_labels() -> None:
    feeds, _ = digits(64)
    bare = Dataset(feeds, None, "digits")
    with pytest.raises(DataError, match="has no labels"):
        score_model(MODEL, bare, "top1")
    judged = reference_labels(MODEL, bare, "agreement")
    assert judged.labels is not None
    assert judged.labels.shape == (504,)
    assert score_model(MODEL, judged, "agreement").value == 1.0
    outputs = reference_labels(MODEL, bare, "mse")
    assert outputs.labels is not None
    assert outputs.labels.shape == (504, 10)
    assert score_model(MODEL, outputs, "mse").value == 0.0


def test_sentence_pairs_are_scored_by_their_cosine() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(12, 4)).astype(np.float32)
    a, b = rows[0::2].astype(float), rows[1::2].astype(float)
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    model = from_text(HEADLESS)
    for size in (1, 2, 3, 4):
        parts = tuple({"x": rows[k : k + size]} for k in range(0, 12, size))
        dataset = Dataset(Feeds(parts, "x", True), cosine, "x", pairs=True)
        scored = score_model(model, dataset, "spearman")
        assert scored.value == pytest.approx(1.0)
        assert scored.count == 6
        np.testing.assert_allclose(scored.kept, cosine, rtol=1e-5)
    short = Dataset(Feeds(parts, "x", True), cosine[:-1], "x", pairs=True)
    with pytest.raises(DataError, match="5 labels for 6 results"):
        score_model(model, short, "spearman")


def test_wrong_labels_are_told_before_all_samples_are_run() -> None:
    feeds, labels = digits(1)
    seen = []
    with pytest.raises(DataError, match="505 labels for 504 results"):
        score_model(MODEL, Dataset(feeds, np.append(labels, 0), "x"), "top1", progress=seen.append)
    assert not seen
    labels[-1] = 10
    with pytest.raises(DataError, match="labels go from 0 to 10, the model has 10 classes"):
        score_model(MODEL, Dataset(feeds, labels, "x"), "top1", progress=seen.append)
    assert not seen
    with pytest.raises(DataError, match="class numbers"):
        score_model(MODEL, Dataset(feeds, labels / 2, "x"), "top1")


def test_a_model_without_an_axis_for_samples() -> None:
    model = from_text(
        """<ir_version: 8, opset_import: ["": 17]> g (float[3] x) => (float[3] y) { y = Neg(x) }"""
    )
    images = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    feeds = Feeds(tuple({"x": image} for image in images), "x", True)
    labels = images.argmin(1)
    assert score_model(model, Dataset(feeds, labels, "x"), "top1").value == 1.0
    judged = reference_labels(model, Dataset(feeds, None, "x"), "agreement")
    assert score_model(model, judged, "agreement").value == 1.0
