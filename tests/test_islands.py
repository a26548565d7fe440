"""Which nodes a pass had better leave alone, from profiles and from errors."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir import from_onnx_text as from_text

from effdl.gate.islands import Islands
from effdl.report import NodeTime, Profile, TensorError

CHAIN = """<ir_version: 8, opset_import: ["": 17]>
g (float[1, 8] x) => (float[1, 8] y) {
    [n0] a = Tanh(x)
    [n1] b = Tanh(a)
    [n2] c = Tanh(b)
    [n3] y = Tanh(c)
}"""
NAMES = ("n0", "n1", "n2", "n3")


def chain() -> ir.Model:
    model = from_text(CHAIN)
    for k, node in enumerate(model.graph):
        node.name = f"n{k}"
    return model


def kernel(op: str, ms: float, *origin: str, near: str = "") -> NodeTime:
    shape = "float[1,8]"
    return NodeTime(op, op, "CPU", ms, origin, shape, (near,) if near else ())


def made(*nodes: NodeTime) -> Profile:
    ms = sum(n.ms for n in nodes)
    return Profile("", ms, ms, 10, (), nodes)


def profiles(before: Sequence[float], after: Sequence[float], border: float) -> list[Profile]:
    return [
        made(*(kernel("Tanh", ms, name) for name, ms in zip(NAMES, before, strict=True))),
        made(
            *(kernel("QTanh", ms, name) for name, ms in zip(NAMES, after, strict=True)),
            kernel("QuantizeLinear", border, near="n0"),
            kernel("DequantizeLinear", border, near="n3"),
        ),
    ]


@pytest.mark.parametrize(
    ("before", "after", "border", "left"),
    [
        ((4, 4, 4, 4), (2, 2, 2, 2), 0.5, []),
        ((4, 4, 4, 4), (3, 6, 2, 2), 0.7, ["n0", "n1"]),  # alone, n0 would need two conversions
        ((4, 4, 4, 4), (1, 6, 2, 2), 0.5, ["n1"]),
        ((4, 4, 4, 4), (2, 6, 2, 2), 2.5, list(NAMES)),  # nothing is worth its borders
        ((4, 1, 4, 4), (2, 2, 2, 2), 1.5, []),  # n1 loses less than going round it
        ((4, 1, 4, 4), (2, 6, 2, 2), 0.1, ["n1"]),
    ],
)
def test_what_is_slower_goes_back_where_its_borders_allow(
    before: tuple[float, ...], after: tuple[float, ...], border: float, left: list[str]
) -> None:
    islands = Islands(chain(), NAMES, *profiles(before, after, border))
    assert islands.slower() == left


def test_what_the_pass_did_not_change_is_not_named() -> None:
    islands = Islands(chain(), NAMES[2:], *profiles((1, 1, 4, 4), (9, 9, 2, 2), 0.1))
    assert islands.slower() == []


def test_names_that_are_no_nodes_of_the_main_graph_do_no_harm() -> None:
    before, after = profiles((4, 4, 4, 4), (2, 6, 1, 1), 0.1)
    inner = made(*before.nodes, kernel("Conv", 3.0, "body/conv"))
    assert Islands(chain(), [*NAMES, "body/conv"], inner, after).slower() == ["n1"]


def jump(k: int, effect: float, **more: object) -> TensorError:
    return TensorError(
        tensor=f"t{k}",
        node=f"n{k}",
        op_type="Tanh",
        other="",
        other_node="",
        other_op="",
        error=0.0,
        max_abs=0.0,
        tolerance=0.0,
        equal=False,
        inputs=(),
        nodes=(f"n{k}",),
        effect=effect,
        **more,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("effects", "limit", "left"),
    [
        ((0.3, 0.1, 0.01, 0.0), 0.2, ("n0",)),
        ((0.3, 0.1, 0.01, 0.0), 0.05, ("n0", "n1")),
        ((0.3, 0.3, 0.0, 0.0), 0.4, ("n0",)),
    ],
)
def test_as_many_nodes_are_left_alone_as_the_error_asks_for(
    effects: tuple[float, ...], limit: float, left: tuple[str, ...]
) -> None:
    islands = Islands(chain(), NAMES, *profiles((4, 4, 4, 4), (2, 1.9, 1.8, 1.7), 0.0))
    error = float(np.hypot.reduce(effects))
    jumps = [jump(k, e) for k, e in enumerate(effects)]
    assert islands.repair(jumps, error, limit) == left


def test_among_equal_errors_the_cheapest_layers_go_back() -> None:
    """The error of n1 is the largest, but it saves most; n2 and n3 save nearly nothing."""
    islands = Islands(chain(), NAMES, *profiles((4, 40, 4, 4), (2, 2, 3.9, 3.9), 0.0))
    jumps = [jump(0, 0.01), jump(1, 0.2), jump(2, 0.15), jump(3, 0.19)]
    first = islands.repair(jumps, 0.314, 0.26)
    assert first == ("n2", "n3")


def test_a_rounded_result_goes_back_with_those_that_read_it() -> None:
    islands = Islands(chain(), NAMES, *profiles((4, 4, 4, 4), (2, 2, 2, 2), 0.0))
    rounding = jump(1, 0.3, alone=0.2, unrounded=0.01, readers=("n2",))
    assert islands.repair([rounding, jump(0, 0.001)], 0.3, 0.01) == ("n1", "n2")


def test_what_comes_from_steps_that_are_not_known_stays() -> None:
    """Two known steps make a part of the error: both must go where the rest leaves no room."""
    islands = Islands(chain(), NAMES, *profiles((4, 4, 4, 4), (2, 2, 2, 2), 0.0))
    jumps = [jump(0, 0.08), jump(1, 0.06)]
    assert islands.repair(jumps, 0.21, 0.2) == ("n0", "n1")
    assert islands.repair(jumps, 0.1, 0.09) == ("n0",)
    assert len(islands.repair(jumps, 5.0, None)) == 1  # what a metric allows is not known


def test_nothing_hurts() -> None:
    assert Islands(chain(), NAMES).repair([], 0.3, 0.1) == ()


def test_a_layer_that_leaves_no_number_goes_first() -> None:
    islands = Islands(chain(), NAMES, *profiles((4, 4, 4, 4), (2, 2, 2, 2), 0.0))
    jumps = [jump(0, 0.01), jump(1, float("inf")), jump(2, 0.01)]
    assert islands.repair(jumps, 3.0, 0.1) == ("n1",)
    assert "n1" in islands.repair(jumps, float("inf"), 0.1)
    assert islands.repair([jump(3, float("inf"))], float("nan"), 0.1) == ("n3",)
