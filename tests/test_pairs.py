"""Pairs of passes: what folds and fuses leaves the later ones as much to do, as exactly."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from effdl import passes
from effdl.data.feeds import Feeds
from effdl.data.npz import load_npz
from effdl.graph import io
from effdl.graph.clean import clean
from effdl.graph.walk import opset
from effdl.graph.weights import weight_tensors
from effdl.passes.base import Context, Pass
from effdl.runtime.session import open_session
from tests.support import SAMPLES, context, rel_l2

FIRST = [n for n in passes.names() if n.startswith(("fold_", "fuse_"))]
SECOND: dict[str, dict[str, Any]] = {
    "quantize_dynamic": {"min_size": 1024},
    "quantize_static": {},
    "prune_weights": {"sparsity": 0.3, "min_size": 0},
    "low_rank": {"ratio": 0.8},
    "convert_float16": {},
}
SAMPLE_NAMES = ("digits_cnn", "digits_mlp", "digits_transformer")


class Net:
    """A graph written node by node, its weights random."""

    def __init__(self, opset: int = 20) -> None:
        self.rng = np.random.default_rng(1)
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def __call__(self, op: str, *inputs: str, outputs: int = 1, **attrs: Any) -> Any:
        stem = f"{op}_{len(self.nodes)}"
        made = [f"{stem}_{k}" for k in range(outputs)]
        self.nodes.append(helper.make_node(op, inputs, made, name=stem, **attrs))
        return made[0] if outputs == 1 else made

    def const(self, array: Any) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def weight(self, *shape: int, scale: float | None = None) -> str:
        scale = scale or float(np.prod(shape[1:] if len(shape) > 2 else shape[:1])) ** -0.5
        return self.const((scale * self.rng.standard_normal(shape)).astype(np.float32))

    def f(self, number: float) -> str:
        return self.const(np.float32(number))

    def linear(self, x: str, a: int, b: int) -> str:
        return str(self("Add", self("MatMul", x, self.weight(a, b)), self.weight(b, scale=0.1)))

    def norm(self, x: str, n: int) -> str:
        middle = self("Sub", x, self("ReduceMean", x, self.const([-1]), keepdims=1))
        square = self("Pow", middle, self.f(2))
        mean = self("ReduceMean", square, self.const([-1]), keepdims=1)
        y = self("Div", middle, self("Sqrt", self("Add", mean, self.f(1e-5))))
        gain = self.const(np.linspace(0.5, 1.5, n).astype(np.float32))
        return str(self("Add", self("Mul", y, gain), self.weight(n, scale=0.1)))

    def batch_norm(self, x: str, c: int) -> str:
        variance = self.const(np.linspace(0.5, 2, c).astype(np.float32))
        numbers = [self.weight(c, scale=0.5) for _ in range(2)]
        gain = self.const(np.linspace(0.5, 1.5, c).astype(np.float32))
        return str(self("BatchNormalization", x, gain, *numbers, variance))

    def model(self, shape: list[Any], output: str, out_shape: list[Any]) -> ir.Model:
        graph = helper.make_graph(
            self.nodes,
            "net",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, out_shape)],
            self.weights,
        )
        imports = [helper.make_opsetid("", self.opset)]
        proto = helper.make_model(graph, ir_version=9, opset_imports=imports)
        return io.from_proto(proto, "net", None)


def cnn() -> ir.Model:
    """Mean and deviation, padding, batch norms, SiLU, HardSwish, RepVGG branches, a 1x1, a head."""
    m = Net()
    x = m("Div", m("Sub", "x", m.f(0.5)), m.f(0.25))
    x = m("Pad", x, m.const([0, 0, 1, 1, 0, 0, 1, 1]))
    x = m.batch_norm(m("Conv", x, m.weight(16, 3, 3, 3), m.weight(16, scale=0.1)), 16)
    x = m("Mul", x, m("Sigmoid", x))
    wide = m("Conv", x, m.weight(16, 16, 3, 3), pads=[1, 1, 1, 1])
    thin = m("Conv", x, m.weight(16, 16, 1, 1))
    x = m("Relu", m("Add", m.batch_norm(wide, 16), m.batch_norm(thin, 16)))
    x = m("Conv", m("Conv", x, m.weight(32, 16, 1, 1)), m.weight(32, 32, 3, 3))
    cut = m("Clip", m("Add", x, m.f(3)), m.f(0), m.f(6))
    x = m("Div", m("Mul", x, cut), m.f(6))
    x = m("Flatten", m("GlobalAveragePool", x))
    return m.model(["B", 3, 12, 12], m.linear(x, 32, 64), ["B", 64])


def transformer() -> ir.Model:
    """Two layers of attention with written-out layer norms and GELU."""
    m, d, heads = Net(), 64, 4
    x = "x"
    for _ in range(2):
        parts = []
        for perm in ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]):
            y = m("Reshape", m.linear(x, d, d), m.const([0, 0, heads, d // heads]))
            parts.append(m("Transpose", y, perm=perm))
        scores = m("Div", m("MatMul", parts[0], parts[1]), m.f((d / heads) ** 0.5))
        mixed = m("MatMul", m("Softmax", scores, axis=-1), parts[2])
        y = m("Reshape", m("Transpose", mixed, perm=[0, 2, 1, 3]), m.const([0, 0, d]))
        x = m.norm(m("Add", x, m.linear(y, d, d)), d)
        y = m.linear(x, d, 2 * d)
        inner = m("Add", m("Erf", m("Div", y, m.f(2**0.5))), m.f(1))
        y = m("Mul", m("Mul", y, inner), m.f(0.5))
        x = m.norm(m("Add", x, m.linear(y, 2 * d, d)), d)
    return m.model(["B", "T", d], x, ["B", "T", d])


def rms_block() -> ir.Model:
    """A gated feed-forward block behind an RMS norm, as language models have it."""
    m, d = Net(), 64
    mean = m("ReduceMean", m("Pow", "x", m.f(2)), m.const([-1]), keepdims=1)
    y = m("Mul", "x", m("Reciprocal", m("Sqrt", m("Add", mean, m.f(1e-6)))))
    y = m("Mul", y, m.const(np.linspace(0.5, 1.5, d).astype(np.float32)))
    gate, up = m("MatMul", y, m.weight(d, 2 * d)), m("MatMul", y, m.weight(d, 2 * d))
    y = m("Mul", m("Mul", gate, m("Sigmoid", gate)), up)
    return m.model(["B", "T", d], m("Add", "x", m("MatMul", y, m.weight(2 * d, d))), ["B", "T", d])


def recurrent() -> ir.Model:
    """An LSTM between two linear layers."""
    m, d = Net(), 64
    x = m("Relu", m.linear("x", d, d))
    w, r = m.weight(1, 4 * d, d, scale=0.1), m.weight(1, 4 * d, d, scale=0.1)
    y, _, _ = m("LSTM", x, w, r, outputs=3, hidden_size=d)
    y = m("Squeeze", y, m.const([1]))
    return m.model(["T", "B", d], m.linear(m.norm(y, d), d, d), ["T", "B", d])


BUILT: dict[str, Callable[[], ir.Model]] = {
    f.__name__: f for f in (cnn, transformer, rms_block, recurrent)
}
SIZES = {"cnn": (8, 3, 12, 12)}


def net(name: str) -> ir.Model:
    return io.load(SAMPLES / f"{name}.onnx") if name in SAMPLE_NAMES else BUILT[name]()


@cache
def samples(name: str) -> Feeds:
    if name in SAMPLE_NAMES:
        return load_npz(SAMPLES / f"{name}.calib.npz", net(name)).first(2)
    rng = np.random.default_rng(3)
    shape = SIZES.get(name, (2, 10, 64))
    made = ({"x": rng.standard_normal(shape).astype(np.float32)} for _ in range(4))
    return Feeds(tuple(made), "random", False)


def run(model: ir.Model, step: Pass, feeds: Feeds) -> tuple[int, Context]:
    ctx = context(feeds)
    if opset(model) < step.min_opset:
        return 0, ctx
    changes = step.run(model, ctx)
    if changes:
        clean(model)
        io.check(model)
    return changes, ctx


def left_out(name: str, model: ir.Model, ctx: Context) -> int:
    """How many weights, or layers, a pass left as they were."""
    tensors = [t for t in weight_tensors(model) if len(t.shape) > 1 and t.size >= 64]
    if name == "low_rank":  # each layer that it splits has two weights
        return len(tensors) - 2 * len(ctx.log.touched)
    if name == "prune_weights":
        return sum(t.size for t in tensors if (t.numpy() == 0).mean() < 0.1)
    small = (ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.FLOAT16)
    return sum(t.size for t in tensors if t.dtype not in small)


Outputs = list[dict[str, Any]]


def answers(model: ir.Model, feeds: Feeds) -> Outputs:
    session = open_session(model)
    return [session.run(feed) for feed in feeds]


def error(wanted: Outputs, model: ir.Model, feeds: Feeds) -> float:
    worst = 0.0
    for want, got in zip(wanted, answers(model, feeds), strict=True):
        for a, b in zip(want.values(), got.values(), strict=True):
            assert a.shape == b.shape
            assert np.isfinite(b).all()
            worst = max(worst, rel_l2(a, b.astype(a.dtype)))
    return worst


@pytest.mark.parametrize("second", SECOND)
@pytest.mark.parametrize("name", [*SAMPLE_NAMES, *BUILT])
def test_what_comes_first_leaves_the_second_its_work(name: str, second: str) -> None:
    original, feeds = net(name), samples(name)
    run(original, passes.get("simplify")(), feeds)
    step = passes.get(second)(**SECOND[second])
    alone = original.clone()
    _, ctx = run(alone, step, feeds)
    usual, known = left_out(second, alone, ctx), {r for _, r in ctx.log.skipped}
    wanted = answers(original, feeds)
    least = error(wanted, alone, feeds)
    faults = []
    slow = second == "low_rank"  # it looks for a rank in every layer
    for first in ["all"] if slow else [*FIRST, "all"]:
        model = original.clone()
        chosen = FIRST if first == "all" else [first]
        if not sum(run(model, passes.get(n)(), feeds)[0] for n in chosen):
            continue
        _, ctx = run(model, step, feeds)
        found = left_out(second, model, ctx)
        why = {r for _, r in ctx.log.skipped} - known
        if found > usual and not why:
            faults.append(f"{first}: leaves {found} out, not {usual}, without a word")
        try:
            gap = error(wanted, model, feeds)
        except Exception as e:
            faults.append(f"{first}: {str(e)[:200]}")
            continue
        if gap > 1.5 * least + 0.01:
            faults.append(f"{first}: error {gap:.3f}, alone {least:.3f}")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("name", list(BUILT))
def test_the_networks_give_the_fusions_something_to_do(name: str) -> None:
    model, feeds = net(name), samples(name)
    done = [n for n in FIRST if run(model, passes.get(n)(), feeds)[0]]
    assert done
    assert error(answers(net(name), feeds), model, feeds) < 1e-5


ATTENTION = """<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]>
    g (float[b,t,32] x) => (float[b,t,32] y)
    { y = com.microsoft.Attention <num_heads = 4> (x, w, c) }"""


def packed() -> ir.Model:
    proto = onnx.parser.parse_model(ATTENTION)
    rng = np.random.default_rng(0)
    for name, shape in (("w", (32, 96)), ("c", (96,))):
        array = (0.2 * rng.standard_normal(shape)).astype(np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    return io.from_proto(proto, "packed", None)


def test_packed_attention_is_pruned() -> None:
    model = packed()
    assert run(model, passes.get("prune_weights")(sparsity=0.5, min_size=0), Feeds((), "", False))[
        0
    ]
    weight = model.graph.initializers["w"].const_value
    assert weight is not None
    assert abs((weight.numpy() == 0).mean() - 0.5) < 0.01
    feed = {"x": np.ones((2, 3, 32), np.float32)}
    assert rel_l2(open_session(packed()).run(feed)["y"], open_session(model).run(feed)["y"]) < 0.9


@pytest.mark.parametrize("name", ["quantize_dynamic", "low_rank"])
def test_packed_attention_is_named(name: str) -> None:
    changes, ctx = run(packed(), passes.get(name)(**SECOND[name]), Feeds((), "", False))
    assert changes == 0
    assert any("packed attention" in reason for _, reason in ctx.log.skipped)


def test_packed_attention_is_named_with_data() -> None:
    made = tuple({"x": np.ones((2, 3, 32), np.float32)} for _ in range(2))
    changes, ctx = run(packed(), passes.get("quantize_static")(), Feeds(made, "ones", False))
    assert changes == 0
    assert any("packed attention" in reason for _, reason in ctx.log.skipped)
