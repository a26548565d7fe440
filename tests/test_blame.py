"""Where a difference comes from, and how it is said."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from effdl.measure.blame import OVERHEAD, changes, explain, kind_of
from effdl.measure.kernels import op_times
from effdl.measure.parts import culprits
from effdl.report import NodeTime, OpChange, Profile


def node(
    op: str, ms: float, *origin: str, near: tuple[str, ...] = (), provider: str = "CPU"
) -> NodeTime:
    return NodeTime("-".join(origin) or op, op, provider, ms, origin, near=near)


def made(*nodes: NodeTime, rest: float = 0.0) -> Profile:
    kernel = sum(n.ms for n in nodes)
    return Profile("m.onnx", kernel + rest, kernel, 10, op_times(nodes), nodes)


BEFORE = made(
    node("Conv", 2.0, "conv1", "relu1"),
    node("QuickGelu", 0.4, "sigmoid", "mul"),
    node("Conv", 1.0, "conv2"),
    node("ReorderOutput", 0.1, near=("head",)),
    node("MatMul", 0.5, "head"),
    rest=0.2,
)
AFTER = made(
    node("QuantizeLinear", 0.3, "x_q", near=("conv1",)),
    node("QLinearConv", 1.0, "conv1", "relu1", "x_dq", "c1_q"),
    node("DequantizeLinear", 0.6, "s_dq", near=("sigmoid",)),
    node("Sigmoid", 0.5, "sigmoid"),
    node("Mul", 0.4, "mul"),
    node("QuantizeLinear", 0.7, "m_q", near=("mul",)),
    node("QLinearConv", 0.6, "conv2"),
    node("QGemm", 0.2, "head"),
    rest=0.3,
)


@pytest.mark.parametrize(
    ("op", "kind"),
    [
        ("FusedConv", "Conv"),
        ("QLinearConv", "Conv"),
        ("Gemm", "MatMul"),
        ("DynamicQuantizeMatMul", "MatMul"),
        ("MatMulNBits", "MatMul"),
        ("QLinearAdd", "Add"),
        ("NhwcMaxPool", "MaxPool"),
        ("ReorderInput", "layout reorder"),
        ("MemcpyToHost", "Memcpy"),
        ("SkipLayerNormalization", "LayerNormalization"),
        ("Relu", "Relu"),
    ],
)
def test_relatives_have_one_name(op: str, kind: str) -> None:
    assert kind_of(op) == kind


def test_changes_add_up() -> None:
    found = changes(BEFORE, AFTER)
    total = sum(c.after_ms - c.before_ms for c in found)
    assert total == pytest.approx(AFTER.wall_ms - BEFORE.wall_ms)
    by_kind = {c.kind: c for c in found}
    assert by_kind["Conv"].before_ms == pytest.approx(3.0)
    assert by_kind["Conv"].after_ms == pytest.approx(1.6)
    assert by_kind["Conv"].became == ("QLinearConv",)
    silu = by_kind["QuickGelu"]
    assert (silu.before, silu.after) == (1, 2)
    assert silu.after_ms == pytest.approx(0.9)
    assert silu.became == ("Mul", "Sigmoid")
    assert by_kind["QuantizeLinear"].after == 2
    assert by_kind[OVERHEAD].after_ms == pytest.approx(0.3)
    sizes = [abs(c.after_ms - c.before_ms) for c in found]
    assert sizes == sorted(sizes, reverse=True)


def test_the_other_way_round_is_the_opposite() -> None:
    there = {c.kind: c.after_ms - c.before_ms for c in changes(BEFORE, AFTER)}
    back = {c.kind: c.before_ms - c.after_ms for c in changes(AFTER, BEFORE)}
    assert there == pytest.approx(back)


def test_a_model_against_itself() -> None:
    assert all(c.before == c.after and c.before_ms == c.after_ms for c in changes(BEFORE, BEFORE))
    assert explain(changes(BEFORE, BEFORE)) == ""
    assert culprits(BEFORE, BEFORE) == []


def test_the_sentence() -> None:
    assert explain(
        (
            OpChange("DequantizeLinear", 0, 12, 0.0, 0.8),
            OpChange("Conv", 5, 5, 2.0, 1.5, ("QLinearConv",)),
            OpChange("QuantizeLinear", 0, 3, 0.0, 0.1),
            OpChange("Add", 2, 2, 0.5, 0.5),
            OpChange("Mul", 2, 2, 0.5, 0.51),
        )
    ) == ("12 DequantizeLinear added 0.80 ms, 3 QuantizeLinear 0.10 ms; Conv saved 0.50 ms")
    assert explain(
        (
            OpChange("Conv", 5, 5, 3.0, 1.5),
            OpChange("BatchNormalization", 5, 0, 0.4, 0.0),
            OpChange("QuickGelu", 4, 8, 1.0, 1.3, ("Sigmoid", "Mul")),
            OpChange("Add", 2, 4, 0.0, 0.09),
            OpChange(OVERHEAD, 0, 0, 0.0, 0.08),
        )
    ) == (
        "Conv saved 1.50 ms, 5 BatchNormalization gone 0.40 ms; "
        "4 QuickGelu now as 8 Sigmoid and Mul added 0.30 ms, 2 more Add 0.090 ms, "
        "overhead between operators 0.080 ms"
    )
    assert explain(()) == ""


def test_places_that_got_slower() -> None:
    found = culprits(BEFORE, AFTER)
    assert [names for names, _, _ in found] == [("sigmoid", "mul")]
    ((_, before, after),) = found
    assert before == pytest.approx(0.4)
    assert after == pytest.approx(0.6 + 0.5 + 0.4 + 0.7)


def test_a_layer_in_two_parts_is_one_place() -> None:
    before = made(node("Conv", 1.0, "conv", "relu"), node("Conv", 1.0, "next"))
    after = made(
        node("Conv", 0.9, "conv_a", near=("conv_b", "relu")),
        node("Conv", 0.4, "conv_b", "relu", near=("next",)),
        node("Conv", 0.9, "next"),
    )
    ((names, was, now),) = culprits(before, after)
    assert set(names) == {"conv", "relu"}
    assert was == 1.0
    assert now == pytest.approx(1.3)


def test_a_renamed_layer_is_the_same_place() -> None:
    after = made(
        node("QLinearConv", 2.5, "conv1_quant"),
        node("QLinearSigmoid", 0.3, "sigmoid_quant"),
        node("QLinearMul", 0.3, "mul_quant"),
        node("Conv", 1.0, "conv2_3"),
        node("MatMul", 0.5, "head"),
    )
    found = {names: (was, now) for names, was, now in culprits(BEFORE, after)}
    assert found[("conv1", "relu1")] == (2.0, 2.5)
    assert found[("sigmoid", "mul")] == pytest.approx((0.4, 0.6))
    assert found[("conv2_3",)] == (0.0, 1.0)
    silu = next(c for c in changes(BEFORE, after) if c.kind == "QuickGelu")
    assert (silu.before, silu.after) == (1, 2)


def test_a_new_layer_stands_for_itself() -> None:
    after = made(*BEFORE.nodes, node("Tanh", 0.3, "new"), rest=0.2)
    assert culprits(BEFORE, after) == [(("new",), 0.0, 0.3)]


NODES = st.lists(
    st.builds(
        lambda op, ms, names: node(op, ms, *names),
        st.sampled_from(["Conv", "QLinearConv", "Mul", "Sigmoid", "QuickGelu", "ReorderInput"]),
        st.floats(0, 10),
        st.lists(st.sampled_from("abcdefgh"), max_size=3, unique=True),
    ),
    max_size=8,
)


@given(NODES, NODES, st.floats(0, 5), st.floats(0, 5))
def test_nothing_is_lost(
    one: list[NodeTime], two: list[NodeTime], rest: float, rest2: float
) -> None:
    before, after = made(*one, rest=rest), made(*two, rest=rest2)
    found = changes(before, after)
    assert sum(c.before for c in found) == len(one)
    assert sum(c.after for c in found) == len(two)
    assert sum(c.before_ms for c in found) == pytest.approx(before.wall_ms, abs=1e-6)
    assert sum(c.after_ms for c in found) == pytest.approx(after.wall_ms, abs=1e-6)
    places = culprits(before, after)
    assert all(b < a for _, b, a in places)
    assert sum(a for _, _, a in places) <= after.kernel_ms + 1e-6
    names = [n for place, _, _ in places for n in place]
    assert len(names) == len(set(names))
    explain(found)
