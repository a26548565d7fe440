"""The pass prune_channels: what it removes, what it makes up for, what it says."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from pydantic import ValidationError

from effdl.data.feeds import Feeds
from effdl.data.npz import load_npz
from effdl.graph import io
from effdl.graph.clean import clean
from effdl.graph.cost import model_cost
from effdl.graph.cost import params as count_params
from effdl.passes.fold.batchnorm import FoldBatchnorm
from effdl.passes.prune import _channel_latency
from effdl.passes.prune._channel_guess import rectified
from effdl.passes.prune.channels import PruneChannels
from effdl.passes.simplify import Simplify
from tests.support import SAMPLES, Effdl, context, from_text, outputs, rel_l2, run_pass


def sample(name: str) -> tuple[ir.Model, Feeds]:
    model = io.load(SAMPLES / f"{name}.onnx")
    Simplify().run(model, context())
    clean(model)
    return model, load_npz(SAMPLES / f"{name}.calib.npz", model).first(48)


def error(before: ir.Model, after: ir.Model, name: str) -> float:
    """Relative error of the outputs on test samples."""
    with np.load(SAMPLES / f"{name}.test.npz") as test:
        feed = {n: test[n][:200] for n in test.files if test[n].ndim > 1}
    return rel_l2(outputs(before, feed)[0], outputs(after, feed)[0])


def pruned(name: str, **options: Any) -> tuple[ir.Model, ir.Model, Any]:
    model, feeds = sample(name)
    before = model.clone()
    changes, log = run_pass(PruneChannels(rounds=1, **options), model, feeds=feeds)
    assert changes == len(log.touched) > 0
    clean(model)
    return before, model, log


@pytest.mark.parametrize("name", ["digits_cnn", "digits_mlp", "digits_transformer"])
def test_half_of_the_work_costs_little(name: str) -> None:
    before, after, log = pruned(name, macs=0.6)
    assert model_cost(after).macs <= 0.6 * model_cost(before).macs
    assert error(before, after, name) < 0.25
    assert log.notes["layers_fitted"] > 0


def test_repair_makes_up_for_most_of_it() -> None:
    errors = {}
    for repair in (False, True):
        before, after, _ = pruned("digits_mlp", macs=0.4, repair=repair, saliency="l2")
        errors[repair] = error(before, after, "digits_mlp")
    assert errors[True] < 0.5 * errors[False]


def test_the_exact_error_chooses_better_than_chance() -> None:
    errors = {}
    for saliency in ("obs", "random"):
        before, after, _ = pruned("digits_mlp", macs=0.3, saliency=saliency, repair=False)
        errors[saliency] = error(before, after, "digits_mlp")
    assert errors["obs"] < errors["random"]


@pytest.mark.parametrize("saliency", ["l1", "l2", "batchnorm", "activation", "random"])
@pytest.mark.parametrize("distribution", ["plan", "global", "uniform"])
def test_every_way_meets_the_target(saliency: str, distribution: str) -> None:
    before, after, _ = pruned("digits_mlp", macs=0.5, saliency=saliency, distribution=distribution)
    left = model_cost(after).macs / model_cost(before).macs
    assert 0.3 < left <= 0.5


def test_share_of_the_params_and_of_every_group() -> None:
    before, after, _ = pruned("digits_cnn", params=0.5)
    assert 0.35 < count_params(after) / count_params(before) <= 0.5
    _, _, log = pruned("digits_mlp", keep=0.5)
    assert dict(log.touched) == {
        "/fc1/Gemm": "512 -> 256 channels",
        "/fc2/Gemm": "512 -> 256 channels",
        "/fc3/Gemm": "256 -> 128 channels",
    }


def test_channels_left_are_multiples() -> None:
    _, _, log = pruned("digits_cnn", macs=0.6, multiple_of=4)
    counts = [int(what.split()[2]) for _, what in log.touched]
    assert counts
    assert all(c % 4 == 0 for c in counts)


def test_rounds_end_where_one_round_does() -> None:
    model, feeds = sample("digits_mlp")
    before = model_cost(model).macs
    PruneChannels(macs=0.5, rounds=3).run(model, context(feeds))
    assert 0.45 * before < model_cost(model).macs <= 0.5 * before


def test_latency_is_measured(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_channel_latency, "_SECONDS", 0.1)
    monkeypatch.setattr(_channel_latency, "_TRIES", 2)
    model, feeds = sample("digits_mlp")
    before = model_cost(model).macs
    ctx = context(feeds)
    object.__setattr__(ctx, "workdir", tmp_path)
    assert PruneChannels(latency=0.8, rounds=1).run(model, ctx) > 0
    assert model_cost(model).macs < before
    assert 0 < float(ctx.log.notes["latency_planned"]) < 1


def test_without_data_nothing_is_fitted() -> None:
    model, _ = sample("digits_mlp")
    changes, log = run_pass(PruneChannels(macs=0.6), model)
    assert changes
    assert "layers_fitted" not in log.notes
    assert "--data" in str(log.notes["repair"])


@pytest.mark.parametrize("name", ["digits_mlp", "digits_cnn"])
def test_without_data_the_weights_tell_what_makes_up_for_it(name: str) -> None:
    errors = {}
    for repair in (False, True):
        model, _ = sample(name)
        FoldBatchnorm().run(model, context())
        clean(model)
        before = model.clone()
        run_pass(PruneChannels(macs=0.7, repair=repair), model)
        errors[repair] = error(before, model, name)
    assert errors[True] < 0.9 * errors[False]


def test_moments_of_rectified_normal_numbers() -> None:
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((4, 4))
    seen = np.maximum(rng.standard_normal((400_000, 4)) @ mix.T, 0)
    np.testing.assert_allclose(rectified(mix @ mix.T), np.cov(seen.T), atol=0.05)


def test_what_stays_and_why() -> None:
    model, feeds = sample("digits_mlp")
    _, log = run_pass(PruneChannels(macs=0.9, rounds=1, ignore=("/fc1/*",)), model, feeds=feeds)
    assert ("/head/Gemm", "the model's output logits") in log.skipped
    assert ("/fc1/Gemm", "left out by the options") in log.skipped
    assert "/fc1/Gemm" not in dict(log.touched)


def test_out_of_reach_changes_nothing() -> None:
    model, feeds = sample("digits_mlp")
    before = io.to_bytes(model)
    changes, log = run_pass(PruneChannels(macs=0.01, min_keep=0.5), model, feeds=feeds)
    assert changes == 0
    assert io.to_bytes(model) == before
    assert "lower min_keep" in log.skipped[0][1]


def test_one_goal_at_a_time() -> None:
    with pytest.raises(ValidationError, match="exclude each other"):
        PruneChannels(macs=0.5, keep=0.5)


def test_a_shortcut_is_made_up_for() -> None:
    """The layer before a residual sum also learns what the shortcut lost."""
    rng = np.random.default_rng(0)

    def numbers(*shape: int) -> str:
        flat = (rng.standard_normal(int(np.prod(shape))) / np.sqrt(shape[0])).tolist()
        return "{" + ",".join(f"{v:.4f}" for v in flat) + "}"

    model = from_text(
        f"""<ir_version: 8, opset_import: ["": 17]>
        g (float[N,16] x) => (float[N,4] y)
        <float[16,24] w0 = {numbers(16, 24)}, float[24,24] w1 = {numbers(24, 24)},
         float[24] b1 = {numbers(24)}, float[24,4] w2 = {numbers(24, 4)}>
        {{ a = MatMul(x, w0) r = Relu(a) h = Gemm(r, w1, b1) s = Add(h, r) t = Relu(s)
           y = MatMul(t, w2) }}"""
    )
    mix = rng.standard_normal((5, 16))

    def rows(count: int) -> np.ndarray:
        return np.asarray(rng.standard_normal((count, 5)) @ mix, np.float32)

    feeds = Feeds([{"x": rows(1)} for _ in range(400)], "t", True)
    errors = {}
    for repair in (True, False):
        copy = model.clone()
        step = PruneChannels(keep=0.5, rounds=1, repair=repair, multiple_of=1)
        assert step.run(copy, context(feeds)) == 1
        x = {"x": rows(500)}
        errors[repair] = rel_l2(outputs(model, x)[0], outputs(copy, x)[0])
    assert errors[True] < 0.8 * errors[False]


def test_from_the_command_line(effdl: Effdl, tmp_path: Any) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "name: r\ndescription: d\npasses: [simplify, {prune_channels: {macs: 0.7, rounds: 1}}]\n"
    )
    done = effdl(
        "optimize",
        SAMPLES / "digits_mlp.onnx",
        "-c",
        recipe,
        "--data",
        SAMPLES / "digits_mlp.calib.npz",
        "-o",
        tmp_path / "o.onnx",
        "--gate",
        "off",
        "--bench-seconds",
        "0",
    )
    assert done.code == 0, done.err
    assert "prune_channels" in done.out
    listed = effdl("inspect", SAMPLES / "digits_mlp.onnx", "--channels")
    assert "groups of channels: 4, of which 3 can lose some" in listed.out
    assert "stays: the model's output logits" in " ".join(listed.out.split())
