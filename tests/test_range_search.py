"""Ranges are judged by what the whole model makes of data that was held out."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from effdl.data.feeds import Feeds
from effdl.graph import io
from effdl.passes.quantize import _select, _static
from effdl.passes.quantize._search import Judge, search_ranges
from effdl.passes.quantize.static import QuantizeStatic
from tests.support import context, from_text, outputs, rel_l2
from tests.test_quantize_static import fill

FLOAT = '<ir_version: 8, opset_import: ["": 13]> g (float[N,4] x) => (float[N,4] y) { y = Relu(x) }'


def clipped(ranges: Mapping[str, tuple[float, float]]) -> ir.Model:
    """What ranges do to the model above, and nothing else."""
    high = ranges["a"][1] + ranges["b"][1]
    return from_text(
        f"""<ir_version: 8, opset_import: ["": 13]> g (float[N,4] x) => (float[N,4] y)
        <float low = {{0.0}}, float high = {{{high}}}> {{ y = Clip(x, low, high) }}"""
    )


def samples(count: int = 4) -> Feeds:
    rng = np.random.default_rng(0)
    return Feeds(
        [{"x": rng.uniform(-9, 9, (2, 4)).astype(np.float32)} for _ in range(count)], "test", True
    )


def test_what_lowers_the_error_is_kept_and_nothing_else() -> None:
    start = {"a": (0.0, 1.0), "b": (0.0, 1.0)}
    tried = [("a", [(0.0, 0.5), (0.0, 3.0), (0.0, 2.0)]), ("b", [(0.0, 6.0), (0.0, 600.0)])]
    found = search_ranges(Judge(from_text(FLOAT), samples(), 1), start, tried, clipped)
    assert found is not None
    assert found.ranges == {"a": (0.0, 3.0), "b": (0.0, 6.0)}
    assert found.changed == ("a", "b")
    assert found.after < 1e-6 < found.before


def test_a_model_that_does_not_run_decides_nothing() -> None:
    def broken(ranges: Mapping[str, tuple[float, float]]) -> ir.Model:
        model = clipped(ranges)
        model.graph.node(0).op_type = "NoSuchOperator"
        return model

    start = {"a": (0.0, 1.0), "b": (0.0, 1.0)}
    assert search_ranges(Judge(from_text(FLOAT), samples(), 1), start, [], broken) is None


@pytest.mark.parametrize(("count", "held"), [(9, 0), (10, 2), (23, 4)])
def test_every_fifth_is_held_out_where_there_are_enough(count: int, held: int) -> None:
    rest, apart = samples(count).split(5)
    assert (len(rest), len(apart)) == (count - held, held)
    together = [*rest, *apart]
    assert len({id(f["x"]) for f in together}) == count
    if held:
        assert len(apart.first(1)) == 1


NET = """<ir_version: 8, opset_import: ["": 13]>
g (float[N,3,12,12] x) => (float[N,8] y)
<float[16,3,3,3] w1, float[16] b1, float[16,16,3,3] w2, float[16] b2, float[8,1024] wg, float[8] bg> {
  c1 = Conv(x, w1, b1)
  r1 = Relu(c1)
  c2 = Conv(r1, w2, b2)
  r2 = Relu(c2)
  f = Flatten(r2)
  y = Gemm<transB=1>(f, wg, bg)
}"""


def pictures(count: int, batch: int = 1, seed: int = 0) -> Feeds:
    """Random inputs of NET."""
    rng = np.random.default_rng(seed)
    shape = (batch, 3, 12, 12)
    return Feeds(
        [{"x": rng.standard_normal(shape).astype(np.float32)} for _ in range(count)], "t", True
    )


def test_a_network_with_rare_large_values() -> None:
    """The squared error of a tensor clips what decides the output; the search sees that."""
    model = fill(NET)
    rng = np.random.default_rng(3)
    data = []
    for _ in range(30):
        x = rng.standard_normal((2, 3, 12, 12)).astype(np.float32)
        x[:, :, 3, 3] *= 12
        data.append({"x": x})
    feeds = Feeds(data, "test", True)
    errors = {}
    for count in (0, 8):
        after = model.clone()
        ctx = context(feeds)
        step = QuantizeStatic(calibration_method="percentile", percentile=99, range_search=count)
        assert step.run(after, ctx) > 0
        if count:
            assert "ranges_changed" in ctx.log.notes
            assert "->" in str(ctx.log.notes["held_out_error"])
        pairs = [(outputs(model, f)[0], outputs(after, f)[0]) for f in data[:10]]
        errors[count] = np.mean([rel_l2(want, got) for want, got in pairs])
    assert errors[8] < 0.8 * errors[0]


def test_bytes_are_the_same_each_time() -> None:
    model = fill(NET)
    feeds = pictures(12, seed=3)
    made = []
    for _ in range(2):
        after = model.clone()
        QuantizeStatic().run(after, context(feeds))
        made.append(io.to_bytes(after))
    assert made[0] == made[1]


LAYERS = {
    "conv": ("N,12,9,9", "N,8,7,7", "Conv(x, w)", "8,12,3,3"),
    "groups": ("N,12,9,9", "N,8,7,7", "Conv<group=4>(x, w)", "8,3,3,3"),
    "depthwise": ("N,12,9,9", "N,12,5,5", "Conv<group=12, dilations=[2,2]>(x, w)", "12,1,3,3"),
    "matmul": ("N,7,64", "N,7,40", "MatMul(x, w)", "64,40"),
    "gemm": ("N,64", "N,40", "Gemm<transB=1>(x, w)", "40,64"),
}


@pytest.mark.parametrize("guard", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_weights_are_rounded_by_what_that_does_to_the_outputs(
    kind: str, guard: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Correlated inputs, as real activations are, and one large weight a row, which makes steps coarse."""
    monkeypatch.setattr(_select, "_THIN", 1)
    given, wanted, op, shape = LAYERS[kind]
    model = fill(
        f"""<ir_version: 8, opset_import: ["": 13]> g (float[{given}] x) => (float[{wanted}] y)
        <float[{shape}] w> {{ y = {op} }}"""
    )
    weight = model.graph.initializers["w"]
    array = np.array(weight.const_value.numpy() if weight.const_value else 0)
    array[(slice(None), 0) if kind != "matmul" else (0,)] *= 20
    weight.const_value = ir.tensor(array, name="w")
    sizes = [int(n) for n in given.split(",")[1:]]
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((np.prod(sizes), np.prod(sizes))) / 30 + 0.1
    rows = rng.standard_normal((600, len(mix))) @ mix
    rows = rows.astype(np.float32).reshape(-1, *sizes)
    rows[(slice(None), 0) if "conv" not in kind and kind != "matmul" else ...] *= 0.2
    data = Feeds([{"x": rows[k : k + 4]} for k in range(0, 400, 4)], "test", True)
    test = {"x": rows[400:]}
    found = {}
    for adaptive in (False, True):
        small = model.clone()
        step = QuantizeStatic(adaptive_rounding=adaptive, range_search=0, reduce_range=guard)
        assert step.run(small, context(data)) > 0
        found[adaptive] = rel_l2(outputs(model, test)[0], outputs(small, test)[0])
    assert found[True] < (0.97 if guard else 1.0) * found[False]  # activations round as well


def test_rounding_that_does_not_help_held_out_data_is_not_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    smooth = [{"x": f["x"].cumsum(-1).cumsum(-2) / 4} for f in pictures(60, batch=4)]
    data = Feeds(smooth, "correlated, as real pictures are", True)
    found = {}
    for way in ("helps", "does not help", "off"):
        if way == "does not help":
            monkeypatch.setattr(_static, "better", lambda error, than: False)
        model, ctx = fill(NET), context(data)
        assert QuantizeStatic(adaptive_rounding=way != "off").run(model, ctx) > 0
        found[way] = io.to_bytes(model)
        told = ctx.log.notes.get("rounding_error")
        assert (told is not None) == (way == "helps")
        if told is not None:
            before, after = (float(n) for n in str(told).split(" -> "))
            assert after < before
    assert found["does not help"] == found["off"] != found["helps"]


@pytest.mark.parametrize("group", [1, 12])
def test_large_means_with_small_spread(group: int) -> None:
    """Moments about the mean: in squares of single precision the spread would be lost."""
    model = fill(
        f"""<ir_version: 8, opset_import: ["": 13]> g (float[N,12,9,9] x) => (float[N,12,7,7] y)
        <float[12,{12 // group},3,3] w, float[12] b> {{ c = Conv<group={group}>(x, w, b)  y = Neg(c) }}"""
    )
    rng = np.random.default_rng(0)
    rows = (1000 + 0.1 * rng.standard_normal((80, 12, 9, 9))).astype(np.float32)
    rows[:, 4:] -= 1000
    data = Feeds([{"x": rows[k : k + 2]} for k in range(0, 80, 2)], "test", True)
    found = {}
    for adaptive in (False, True):
        small = model.clone()
        step = QuantizeStatic(adaptive_rounding=adaptive, range_search=0, targets=("Conv",))
        step.run(small, context(data))
        found[adaptive] = rel_l2(outputs(model, {"x": rows})[0], outputs(small, {"x": rows})[0])
    assert found[True] <= 1.05 * found[False]


def test_steps_with_other_types_do_not_share_rounded_weights() -> None:
    model = fill(NET)
    data = pictures(20, batch=4)
    memo: dict[object, object] = {}
    made = []
    for options in ({}, {"weight_type": "uint8"}, {"bias_correction": False}):
        for shared in (memo, {}):
            small = model.clone()
            ctx = replace(context(data), memo=shared)
            assert QuantizeStatic(range_search=0, **options).run(small, ctx) > 0
            made.append(io.to_bytes(small))
            assert np.isfinite(outputs(small, {"x": data.batches[0]["x"]})[0]).all()
    assert made[0] == made[1]
    assert made[2] == made[3]
    assert made[4] == made[5]
