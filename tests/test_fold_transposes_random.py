"""Random graphs with Transposes everywhere: the pass keeps what they compute and adds none."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from effdl.graph import io
from effdl.graph.clean import clean
from effdl.graph.walk import interface
from effdl.passes.fold.transposes import FoldTransposes
from tests.support import feed_for, op_counts, outputs, run_pass

DYNAMIC = 7
KINDS = ["unary", "binary", "constant", "reduce", "concat", "softmax", "squeeze", "unsqueeze"]
KINDS += ["merge", "part", "pad", "gather", "slice"]


class Grower:
    """Grows a random graph; every tensor is known with its shape."""

    def __init__(self, draw: st.DrawFn, batch: bool) -> None:
        self.draw = draw
        self.batch = batch
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, np.ndarray] = {}
        self.tensors: dict[str, tuple[int, ...]] = {}

    def node(self, op: str, inputs: list[str], shape: tuple[int, ...], **attributes: object) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], name=f"n{name}", **attributes))
        self.tensors[name] = shape
        return name

    def weight(self, array: np.ndarray) -> str:
        name = f"w{len(self.weights)}"
        self.weights[name] = array
        return name

    def pick(self) -> str:
        names = sorted(self.tensors)
        return self.draw(st.sampled_from(names[-4:] + names))

    def transpose(self, name: str, perm: tuple[int, ...] | None = None) -> str:
        shape = self.tensors[name]
        perm = perm or tuple(self.draw(st.permutations(range(len(shape)))))
        return self.node("Transpose", [name], tuple(shape[p] for p in perm), perm=list(perm))

    def step(self) -> None:  # noqa: PLR0912
        x = self.pick()
        shape = self.tensors[x]
        rank = len(shape)
        if rank == 0:
            return
        kind = self.draw(st.sampled_from([*KINDS, "transpose", "transpose"]))
        axis = self.draw(st.integers(0, rank - 1))
        rng = np.random.default_rng(self.draw(st.integers(0, 99)))
        match kind:
            case "transpose":
                self.transpose(x)
            case "unary":
                self.node(self.draw(st.sampled_from(["Sin", "Relu", "Neg"])), [x], shape)
            case "binary":
                y = self.like(x)
                self.node(self.draw(st.sampled_from(["Add", "Sub", "Mul"])), [x, y], shape)
            case "constant":
                keep = self.draw(st.integers(0, rank))
                sizes = tuple(self.draw(st.sampled_from([1, d])) for d in shape[keep:])
                sizes = tuple(1 if self.batch and d == DYNAMIC else d for d in sizes)
                w = self.weight(rng.standard_normal(sizes).astype(np.float32))
                self.node("Mul", [w, x] if axis % 2 else [x, w], shape)
            case "reduce":
                keep = self.draw(st.booleans())
                out = tuple(1 if i == axis else d for i, d in enumerate(shape) if keep or i != axis)
                self.node("ReduceMax", [x], out, axes=[axis - rank], keepdims=int(keep))
            case "concat":
                if shape[axis] != DYNAMIC and shape[axis] < 12:
                    y = self.like(x)
                    out = tuple(2 * d if i == axis else d for i, d in enumerate(shape))
                    self.node("Concat", [y, x], out, axis=axis)
            case "softmax":
                self.node("Softmax", [x], shape, axis=axis)
            case "squeeze":
                if shape[axis] == 1:
                    w = self.weight(np.array([axis], np.int64))
                    self.node("Squeeze", [x, w], shape[:axis] + shape[axis + 1 :])
            case "unsqueeze":
                if rank < 5:
                    w = self.weight(np.array([axis], np.int64))
                    self.node("Unsqueeze", [x, w], (*shape[:axis], 1, *shape[axis:]))
            case "merge":
                if axis + 1 < rank and DYNAMIC not in shape[axis : axis + 2]:
                    out = (*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :])
                    self.reshape(x, out)
            case "part":
                if shape[axis] % 2 == 0 and rank < 5 and shape[axis] != DYNAMIC:
                    out = (*shape[:axis], 2, shape[axis] // 2, *shape[axis + 1 :])
                    self.reshape(x, out)
            case "pad":
                if shape[axis] < 12 and shape[axis] != DYNAMIC:
                    pads = np.zeros(2 * rank, np.int64)
                    pads[axis] = 1
                    out = tuple(d + (i == axis) for i, d in enumerate(shape))
                    self.node("Pad", [x, self.weight(pads)], out)
            case "gather":
                w = self.weight(np.array(0, np.int64))
                self.node("Gather", [x, w], shape[:axis] + shape[axis + 1 :], axis=axis)
            case "slice":
                if shape[axis] > 1 and shape[axis] != DYNAMIC:
                    one, end, at = (self.weight(np.array([v], np.int64)) for v in (1, 99, axis))
                    out = tuple(d - (i == axis) for i, d in enumerate(shape))
                    self.node("Slice", [x, one, end, at], out)

    def like(self, x: str) -> str:
        """Another tensor of the shape of ``x``: one that is there, perhaps after a Transpose."""
        shape = self.tensors[x]
        for name in sorted(self.tensors, key=lambda n: (n == x, n)):
            other = self.tensors[name]
            if other == shape and self.draw(st.booleans()):
                return name
            if sorted(other) == sorted(shape) and len(set(shape)) == len(shape):
                return self.transpose(name, tuple(other.index(d) for d in shape))
        return x

    def reshape(self, x: str, out: tuple[int, ...]) -> None:
        goal = [-1 if d == DYNAMIC else d for d in out]
        if goal.count(-1) < 2:
            self.node("Reshape", [x, self.weight(np.array(goal, np.int64))], out)


@st.composite
def graphs(draw: st.DrawFn) -> ir.Model:
    batch = draw(st.booleans())
    grower = Grower(draw, batch)
    shape = (DYNAMIC if batch else 2, *draw(st.sampled_from([(3, 4, 6), (1, 1, 4), (4, 5)])))
    grower.tensors["x"] = shape
    for _ in range(draw(st.integers(3, 14))):
        grower.step()
    used = {i for n in grower.nodes for i in n.input}
    outs = [
        n for n in grower.tensors if n != "x" and (n not in used or draw(st.integers(0, 5)) == 0)
    ]
    if not outs:
        outs = [grower.transpose("x")]

    def info(name: str) -> onnx.ValueInfoProto:
        dims = ["n" if batch and d == DYNAMIC else d for d in grower.tensors[name]]
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, dims)

    weights = [numpy_helper.from_array(a, n) for n, a in grower.weights.items()]
    graph = helper.make_graph(grower.nodes, "g", [info("x")], [info(n) for n in outs], weights)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return io.from_proto(proto, "test", None)


@settings(max_examples=150, deadline=None)
@given(model=graphs(), max_growth=st.sampled_from([0, 16, 8192]))
def test_random_graphs(model: ir.Model, max_growth: int) -> None:
    before = model.clone()
    step = FoldTransposes(max_growth=max_growth)
    changes, _ = run_pass(step, model)
    if not changes:
        assert io.to_bytes(model) == io.to_bytes(before)
    clean(model)
    io.check(model)
    assert interface(model) == interface(before)
    assert op_counts(model).get("Transpose", 0) <= op_counts(before).get("Transpose", 0)
    assert len(model.graph) <= len(before.graph)
    again = model.clone()
    assert run_pass(step, again)[0] == 0
    feed = feed_for(before, n=DYNAMIC)
    for a, b in zip(
        outputs(before, feed, optimize=False), outputs(model, feed, optimize=False), strict=True
    ):
        assert a.shape == b.shape
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5)
