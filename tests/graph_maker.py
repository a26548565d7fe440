"""Random valid graphs of many operators, of opsets 9 to 23, with a batch size that stays free."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

Dim = int | str
Shape = tuple[Dim, ...]
BATCH = "B"
_START: tuple[Shape, ...] = (
    (BATCH, 4, 6, 6),
    (BATCH, 5, 8),
    (BATCH, 8),
    (BATCH, 4, 9),
    (2, 4, 6, 6),
    (3, 5, 8),
)
_UNARY = (
    "Relu Sigmoid Tanh Neg Abs Erf Identity Softplus HardSigmoid LeakyRelu Elu Selu Softsign Sin"
)


@dataclass
class Maker:
    """A graph while it grows: every value is float32, and its shape is known but for the batch."""

    draw: Callable[[st.SearchStrategy[Any]], Any]
    opset: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: list[onnx.TensorProto] = field(default_factory=list)
    weight_inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    inputs: list[tuple[str, Shape]] = field(default_factory=list)
    pool: list[tuple[str, Shape]] = field(default_factory=list)
    count: int = 0

    def pick(self, *options: Any) -> Any:
        return self.draw(st.sampled_from(options))

    def chance(self, one_in: int) -> bool:
        return bool(self.draw(st.integers(0, one_in - 1)) == 0)

    def name(self, stem: str) -> str:
        self.count += 1
        return f"{stem}{self.count}"

    def node(self, op: str, inputs: list[str], outputs: int = 1, **attrs: Any) -> Any:
        """Add a node; returns the name of its output, or names."""
        made = [self.name("v") for _ in range(outputs)]
        self.nodes.append(helper.make_node(op, inputs, made, name=self.name(op), **attrs))
        return made[0] if outputs == 1 else made

    def keep(self, name: str, shape: Shape) -> str:
        if prod(d for d in shape if isinstance(d, int)) <= 4096:
            self.pool.append((name, shape))
        return name

    def array(self, array: np.ndarray) -> str:
        """A constant: an initializer, one that is an input too, or a Constant node."""
        array = np.asarray(array)
        tensor = numpy_helper.from_array(array, self.name("c"))
        kind = self.draw(st.integers(0, 9))
        if kind == 0:
            return str(self.node("Constant", [], value=tensor))
        self.weights.append(tensor)
        if kind == 1 and array.dtype == np.float32:
            info = helper.make_tensor_value_info(tensor.name, TensorProto.FLOAT, array.shape)
            self.weight_inputs.append(info)
        return str(tensor.name)

    def ints(self, *values: int) -> str:
        return self.array(np.array(values, np.int64))

    def weight(self, *shape: int, neutral: bool = False) -> str:
        """Random numbers; sometimes a weight that is there already, or zeros or ones."""
        if neutral and self.chance(4):
            return self.array(np.full(shape, self.pick(0.0, 1.0), np.float32))
        same = [w.name for w in self.weights if w.data_type == 1 and tuple(w.dims) == shape]
        if same and self.chance(3):
            return str(same[0])
        rng = np.random.default_rng(self.count)
        return self.array((0.5 * rng.standard_normal(shape)).astype(np.float32))

    def value(self, ok: Callable[[Shape], bool] = lambda s: True) -> tuple[str, Shape] | None:
        """A value of a fitting shape, rather a late one."""
        fit = [v for v in self.pool if ok(v[1])]
        if not fit:
            return None
        back = min(self.draw(st.integers(0, 5)), len(fit) - 1)
        return fit[-1 - back]


Op = Callable[[Maker], None]
OPS: list[Op] = []


def op(function: Op) -> Op:
    OPS.append(function)
    return function


def fixed(shape: Shape) -> list[int]:
    """Axes with a size that is known."""
    return [k for k, d in enumerate(shape) if isinstance(d, int)]


def image(shape: Shape) -> bool:
    return len(shape) in (3, 4) and fixed(shape)[-len(shape) + 1 :] == list(range(1, len(shape)))


@op
def unary(m: Maker) -> None:
    x, s = m.value() or m.pool[0]
    m.keep(m.node(m.pick(*_UNARY.split()), [x]), s)


@op
def clip(m: Maker) -> None:
    x, s = m.value() or m.pool[0]
    low, high = m.pick((-0.5, 0.7), (0.0, 6.0), (-1.0, 1.0))
    if m.opset < 11:
        m.keep(m.node("Clip", [x], min=low, max=high), s)
    else:
        ends = [m.array(np.float32(low)), m.array(np.float32(high))]
        m.keep(m.node("Clip", [x, *ends]), s)


@op
def binary_constant(m: Maker) -> None:
    x, s = m.value() or m.pool[0]
    numbers = [d if isinstance(d, int) else 1 for d in s]
    tail = numbers[m.draw(st.integers(0, len(s))) :]
    tail = [1 if m.chance(3) else d for d in tail]
    c = m.weight(*tail, neutral=True)
    kind = m.pick("Add", "Sub", "Mul", "Max", "Min", "Add", "Mul")
    m.keep(m.node(kind, [x, c] if m.chance(2) else [c, x]), s)


@op
def divide(m: Maker) -> None:
    x, s = m.value() or m.pool[0]
    c = m.array(np.float32(m.pick(1.0, 2.0, 8.0, 0.3)))
    m.keep(m.node("Div", [x, c]), s)


@op
def power(m: Maker) -> None:
    x, s = m.value() or m.pool[0]
    m.keep(m.node("Pow", [x, m.array(np.float32(m.pick(1.0, 2.0, 3.0)))]), s)


@op
def binary(m: Maker) -> None:
    x, s = m.value() or m.pool[0]
    y, _ = m.value(lambda t: t == s) or (x, s)
    m.keep(m.node(m.pick("Add", "Mul", "Sub", "Max"), [x, y]), s)


@op
def broadcast(m: Maker) -> None:
    x, s = m.value(lambda t: len(t) > 1) or m.pool[0]
    axis = m.pick(*(fixed(s) or [0]))
    if not fixed(s):
        return
    mean = reduce_node(m, "ReduceMean", x, [axis], True)
    m.keep(m.node(m.pick("Sub", "Add", "Mul"), [x, mean]), s)


@op
def matmul(m: Maker) -> None:
    found = m.value(lambda t: len(t) >= 2 and isinstance(t[-1], int))
    if found is None:
        return
    x, s = found
    n = m.pick(4, 8)
    y = m.node("MatMul", [x, m.weight(int(s[-1]), n)])
    if m.chance(2):
        b = m.weight(*m.pick((n,), (1, n), (1,)))
        y = m.node("Add", [y, b] if m.chance(2) else [b, y])
    m.keep(y, (*s[:-1], n))


@op
def matmul_self(m: Maker) -> None:
    found = m.value(lambda t: len(t) >= 3 and isinstance(t[-1], int) and isinstance(t[-2], int))
    if found is None:
        return
    x, s = found
    perm = [*range(len(s) - 2), len(s) - 1, len(s) - 2]
    y = m.node("MatMul", [x, m.node("Transpose", [x], perm=perm)])
    m.keep(m.node("Mul", [y, m.array(np.float32(0.2))]), (*s[:-1], s[-2]))


@op
def gemm(m: Maker) -> None:
    found = m.value(lambda t: len(t) == 2 and isinstance(t[1], int))
    if found is None:
        return
    x, s = found
    n, k = m.pick(4, 8), int(s[1])
    flip = m.chance(2)
    attrs = {"transB": int(flip), "alpha": m.pick(1.0, 0.5), "beta": m.pick(1.0, 2.0)}
    inputs = [x, m.weight(n, k) if flip else m.weight(k, n)]
    if m.opset < 11 or not m.chance(3):
        inputs.append(m.weight(*m.pick((n,), (1, n))))
    m.keep(m.node("Gemm", inputs, **attrs), (s[0], n))


def spatial(size: int, kernel: int, stride: int, dilation: int, pad: int) -> int:
    return (size + pad - dilation * (kernel - 1) - 1) // stride + 1


@op
def conv(m: Maker) -> None:
    found = m.value(image)
    if found is None:
        return
    x, s = found
    channels, rank = int(s[1]), len(s) - 2
    kernel = m.pick(1, 2, 3)
    stride, dilation = m.pick(1, 1, 2), m.pick(1, 1, 2)
    group = m.pick(*(g for g in (1, 1, 2, channels) if channels % g == 0))
    out = group * m.pick(1, 2)
    pads = [m.pick(0, 1) for _ in range(2 * rank)]
    size = [
        spatial(int(d), kernel, stride, dilation, pads[k] + pads[k + rank])
        for k, d in enumerate(s[2:])
    ]
    if min(size) < 1:
        return
    weights = [m.weight(out, channels // group, *[kernel] * rank)]
    if m.chance(2):
        weights.append(m.weight(out))
    attrs = {"strides": [stride] * rank, "dilations": [dilation] * rank, "group": group}
    y = m.node("Conv", [x, *weights], pads=pads, **attrs)
    m.keep(y, (s[0], out, *size))
    if m.chance(2):
        batch_norm_of(m, y, (s[0], out, *size))


@op
def conv_transpose(m: Maker) -> None:
    found = m.value(image)
    if found is None:
        return
    x, s = found
    rank, out, stride = len(s) - 2, m.pick(2, 4), m.pick(1, 2)
    size = [(int(d) - 1) * stride + 2 for d in s[2:]]
    w = m.weight(int(s[1]), out, *[2] * rank)
    y = m.node("ConvTranspose", [x, w], strides=[stride] * rank)
    m.keep(y, (s[0], out, *size))


def batch_norm_of(m: Maker, x: str, s: Shape) -> None:
    c = int(s[1])
    variance = m.array(np.linspace(0.5, 2.0, c).astype(np.float32))
    inputs = [x, m.weight(c), m.weight(c), m.weight(c), variance]
    m.keep(m.node("BatchNormalization", inputs, epsilon=1e-3), s)


@op
def batch_norm(m: Maker) -> None:
    found = m.value(lambda t: len(t) >= 2 and isinstance(t[1], int))
    if found is not None:
        batch_norm_of(m, *found)


@op
def pool(m: Maker) -> None:
    found = m.value(image)
    if found is None:
        return
    x, s = found
    rank, kernel, stride = len(s) - 2, m.pick(2, 3), m.pick(1, 2)
    pads = [m.pick(0, 1) for _ in range(2 * rank)]
    size = [
        spatial(int(d), kernel, stride, 1, pads[k] + pads[k + rank]) for k, d in enumerate(s[2:])
    ]
    if min(size) < 1:
        return
    attrs = {"kernel_shape": [kernel] * rank, "strides": [stride] * rank, "pads": pads}
    if m.chance(2):
        y = m.node("MaxPool", [x], **attrs)
    else:
        y = m.node("AveragePool", [x], count_include_pad=m.pick(0, 1), **attrs)
    m.keep(y, (*s[:2], *size))


@op
def global_pool(m: Maker) -> None:
    found = m.value(image)
    if found is not None:
        x, s = found
        kind = m.pick("GlobalAveragePool", "GlobalMaxPool")
        m.keep(m.node(kind, [x]), (*s[:2], *[1] * (len(s) - 2)))


@op
def pad(m: Maker) -> None:
    found = m.value(lambda t: len(fixed(t)) > 0)
    if found is None:
        return
    x, s = found
    mode = m.pick("constant", "constant", "reflect", "edge")
    if mode != "constant" and min(int(s[k]) for k in fixed(s)) < 2:
        return
    ends = [m.pick(0, 0, 1) if isinstance(d, int) else 0 for d in (*s, *s)]
    rank = len(s)
    shape = [d if isinstance(d, str) else d + ends[k] + ends[k + rank] for k, d in enumerate(s)]
    if m.opset < 11:
        y = m.node("Pad", [x], mode=mode, pads=ends)
    else:
        extra = (
            [m.array(np.float32(m.pick(0.0, 1.5)))] if mode == "constant" and m.chance(2) else []
        )
        y = m.node("Pad", [x, m.ints(*ends), *extra], mode=mode)
    m.keep(y, tuple(shape))


@op
def flatten(m: Maker) -> None:
    found = m.value(lambda t: len(t) >= 2 and BATCH not in t[1:])
    if found is not None:
        x, s = found
        m.keep(m.node("Flatten", [x], axis=1), (s[0], prod(int(d) for d in s[1:])))


@op
def reshape(m: Maker) -> None:
    found = m.value(lambda t: len(t) >= 2 and BATCH not in t[1:])
    if found is None:
        return
    x, s = found
    rest = prod(int(d) for d in s[1:])
    first = m.pick(*(d for d in (1, 2, 3, 4, rest) if rest % d == 0))
    goal = m.pick((first, rest // first), (rest,))
    form = m.draw(st.integers(0, 3))
    if form == 0:
        shape = m.ints(0, *goal)
    elif form == 1:
        shape = m.ints(-1, *goal)
    elif form == 2 and len(goal) == 2:
        shape = m.ints(0, goal[0], -1)
    else:
        size = m.node("Gather", [m.node("Shape", [x]), m.ints(0)], axis=0)
        shape = m.node("Concat", [size, m.ints(*goal)], axis=0)
    m.keep(m.node("Reshape", [x, shape]), (s[0], *goal))


@op
def reshape_there_and_back(m: Maker) -> None:
    found = m.value(lambda t: len(t) >= 2 and BATCH not in t[1:])
    if found is None:
        return
    x, s = found
    flat = m.node("Reshape", [x, m.ints(0, -1)])
    back = m.node("Shape", [x])
    m.keep(m.node("Reshape", [m.node("Relu", [flat]), back]), s)


@op
def transpose(m: Maker) -> None:
    x, s = m.value(lambda t: len(t) > 1) or m.pool[0]
    perm = m.draw(st.permutations(range(len(s))))
    m.keep(m.node("Transpose", [x], perm=list(perm)), tuple(s[p] for p in perm))


@op
def unsqueeze(m: Maker) -> None:
    found = m.value(lambda t: len(t) < 4)
    if found is None:
        return
    x, s = found
    axis = m.draw(st.integers(0, len(s)))
    shape = (*s[:axis], 1, *s[axis:])
    said = axis - len(shape) if m.opset >= 11 and m.chance(3) else axis
    if m.opset < 13:
        m.keep(m.node("Unsqueeze", [x], axes=[said]), shape)
    else:
        m.keep(m.node("Unsqueeze", [x, m.ints(said)]), shape)


@op
def squeeze(m: Maker) -> None:
    found = m.value(lambda t: 1 in t and len(t) > 1)
    if found is None:
        return
    x, s = found
    axis = s.index(1)
    y = (
        m.node("Squeeze", [x], axes=[axis])
        if m.opset < 13
        else m.node("Squeeze", [x, m.ints(axis)])
    )
    m.keep(y, (*s[:axis], *s[axis + 1 :]))


@op
def cut(m: Maker) -> None:
    found = m.value(lambda t: any(isinstance(d, int) and d > 1 for d in t))
    if found is None:
        return
    x, s = found
    axis = m.pick(*(k for k in fixed(s) if int(s[k]) > 1))
    size = int(s[axis])
    start, end, step = m.pick(
        (0, size, 1), (1, size, 1), (0, size - 1, 1), (-1, size, 1), (0, 99, 2)
    )
    if m.opset < 10:
        step = 1
        y = m.node("Slice", [x], starts=[start], ends=[end], axes=[axis])
    else:
        y = m.node("Slice", [x, m.ints(start), m.ints(end), m.ints(axis), m.ints(step)])
    left = len(range(size)[start:end:step])
    m.keep(y, (*s[:axis], left, *s[axis + 1 :]))


@op
def gather(m: Maker) -> None:
    found = m.value(lambda t: len(fixed(t)) > 0)
    if found is None:
        return
    x, s = found
    axis = m.pick(*fixed(s))
    last = int(s[axis]) - 1
    if m.chance(2) and len(s) > 1:
        y = m.node("Gather", [x, m.array(np.int64(m.pick(0, last)))], axis=axis)
        m.keep(y, (*s[:axis], *s[axis + 1 :]))
    else:
        y = m.node("Gather", [x, m.ints(last, 0)], axis=axis)
        m.keep(y, (*s[:axis], 2, *s[axis + 1 :]))


@op
def concat(m: Maker) -> None:
    found = m.value(lambda t: len(fixed(t)) > 0)
    if found is None:
        return
    x, s = found
    axis = m.pick(*fixed(s))
    y, _ = m.value(lambda t: t == s) or (x, s)
    m.keep(m.node("Concat", [x, y], axis=axis), (*s[:axis], 2 * int(s[axis]), *s[axis + 1 :]))


@op
def split(m: Maker) -> None:
    found = m.value(lambda t: any(isinstance(d, int) and d % 2 == 0 for d in t))
    if found is None:
        return
    x, s = found
    axis = m.pick(*(k for k in fixed(s) if int(s[k]) % 2 == 0))
    half = int(s[axis]) // 2
    if m.opset < 13:
        parts = m.node("Split", [x], 2, axis=axis, split=[half, half])
    elif m.opset >= 18 and m.chance(2):
        parts = m.node("Split", [x], 2, axis=axis, num_outputs=2)
    else:
        parts = m.node("Split", [x, m.ints(half, half)], 2, axis=axis)
    shape = (*s[:axis], half, *s[axis + 1 :])
    for part in parts:
        m.keep(part, shape)
    if m.chance(2):
        order = parts if m.chance(2) else parts[::-1]
        m.keep(m.node("Concat", order, axis=axis), s)


@op
def expand(m: Maker) -> None:
    found = m.value(lambda t: 1 in t)
    if found is None:
        return
    x, s = found
    axis = s.index(1)
    goal = [1] * len(s)
    goal[axis] = m.pick(1, 3)
    m.keep(m.node("Expand", [x, m.ints(*goal)]), (*s[:axis], goal[axis], *s[axis + 1 :]))


def reduce_node(m: Maker, kind: str, x: str, axes: list[int], keep: bool) -> str:
    attribute = m.opset < (13 if kind == "ReduceSum" else 18)
    if attribute:
        return str(m.node(kind, [x], axes=axes, keepdims=int(keep)))
    return str(m.node(kind, [x, m.ints(*axes)], keepdims=int(keep)))


@op
def reduce(m: Maker) -> None:
    found = m.value(lambda t: len(t) > 1 and len(fixed(t)) > 0)
    if found is None:
        return
    x, s = found
    axis, keep = m.pick(*fixed(s)), m.chance(2)
    kind = m.pick("ReduceMean", "ReduceSum", "ReduceMax", "ReduceL2")
    y = reduce_node(m, kind, x, [axis], keep)
    m.keep(y, (*s[:axis], *([1] if keep else []), *s[axis + 1 :]))


@op
def softmax(m: Maker) -> None:
    x, s = m.value(lambda t: len(t) > 1) or m.pool[0]
    axis = m.draw(st.integers(1, len(s) - 1)) if len(s) > 1 else 0
    m.keep(m.node(m.pick("Softmax", "LogSoftmax"), [x], axis=axis), s)


@op
def casts(m: Maker) -> None:
    x, s = m.value() or m.pool[0]
    there = m.node("Cast", [x], to=m.pick(TensorProto.DOUBLE, TensorProto.FLOAT))
    m.keep(m.node("Cast", [there], to=TensorProto.FLOAT), s)


@op
def where(m: Maker) -> None:
    x, s = m.value() or m.pool[0]
    if m.chance(3):
        condition = m.array(np.array([m.pick(True, False)]))
    else:
        condition = m.node("Less", [x, m.array(np.float32(0.3137))])
    other = m.array(np.float32(m.pick(0.0, -2.0)))
    m.keep(m.node("Where", [condition, x, other]), s)


@op
def dropout(m: Maker) -> None:
    x, s = m.value() or m.pool[0]
    m.keep(m.node("Dropout", [x]), s)


@op
def duplicate(m: Maker) -> None:
    """The last node once more."""
    if not m.nodes or len(m.nodes[-1].output) != 1 or m.nodes[-1].op_type in ("Constant", "If"):
        return
    name, shape = m.pool[-1]
    if name != m.nodes[-1].output[0]:
        return
    twin = onnx.NodeProto()
    twin.CopyFrom(m.nodes[-1])
    twin.name, twin.output[0] = m.name("twin"), m.name("v")
    m.nodes.append(twin)
    m.keep(m.node("Add", [name, twin.output[0]]), shape)


@op
def branch(m: Maker) -> None:
    x, s = m.value() or m.pool[0]
    y, _ = m.value(lambda t: t == s) or (x, s)
    total = m.node("ReduceMax", [x], keepdims=0)
    if m.chance(2):
        condition = m.array(np.array(m.pick(True, False)))
    else:
        condition = m.node("Less", [total, m.array(np.float32(0.5))])

    def body(stem: str, nodes: list[tuple[str, list[str]]]) -> onnx.GraphProto:
        made, last = [], x
        for kind, inputs in nodes:
            out = m.name(stem)
            made.append(helper.make_node(kind, [last if i == "_" else i for i in inputs], [out]))
            last = out
        info = helper.make_tensor_value_info(last, TensorProto.FLOAT, list(s))
        inner = numpy_helper.from_array(np.float32(0.25), "inner")
        return helper.make_graph(made, stem, [], [info], [inner])

    first = body("then", [("Add", ["_", "inner"]), ("Mul", ["_", y])])
    second = body("else", [("Tanh", ["_"]), ("Add", ["_", "inner"])])
    m.keep(m.node("If", [condition], then_branch=first, else_branch=second), s)


@op
def silu(m: Maker) -> None:
    x, s = m.value() or m.pool[0]
    scaled = x if m.chance(2) else m.node("Mul", [x, m.array(np.float32(1.702))])
    m.keep(m.node("Mul", [x, m.node("Sigmoid", [scaled])]), s)


@op
def hardswish(m: Maker) -> None:
    x, s = m.value() or m.pool[0]
    three = m.node("Add", [x, m.array(np.float32(3))])
    if m.opset < 11:
        cut_off = m.node("Clip", [three], min=0.0, max=6.0)
    else:
        cut_off = m.node("Clip", [three, m.array(np.float32(0)), m.array(np.float32(6))])
    if m.chance(2):
        m.keep(m.node("Div", [m.node("Mul", [x, cut_off]), m.array(np.float32(6))]), s)
    else:
        m.keep(m.node("Mul", [x, m.node("Div", [cut_off, m.array(np.float32(6))])]), s)


@op
def gelu(m: Maker) -> None:
    x, s = m.value() or m.pool[0]
    half, one, root = (m.array(np.float32(v)) for v in (0.5, 1.0, 2**0.5))
    inner = m.node("Add", [m.node("Erf", [m.node("Div", [x, root])]), one])
    if m.chance(2):
        m.keep(m.node("Mul", [m.node("Mul", [x, inner]), half]), s)
    else:
        m.keep(m.node("Mul", [m.node("Mul", [x, half]), inner]), s)


@op
def norm(m: Maker) -> None:
    found = m.value(lambda t: len(t) > 1 and isinstance(t[-1], int) and int(t[-1]) > 1)
    if found is None:
        return
    x, s = found
    n = int(s[-1])
    if m.chance(3) and m.opset >= 17:
        m.keep(m.node("LayerNormalization", [x, m.weight(n), m.weight(n)], axis=-1), s)
        return
    rms = m.chance(2)
    middle = x if rms else m.node("Sub", [x, reduce_node(m, "ReduceMean", x, [-1], True)])
    square = m.node("Pow", [middle, m.array(np.float32(2))])
    if rms and m.chance(2):
        square = m.node("Mul", [middle, middle])
    mean = reduce_node(m, "ReduceMean", square, [-1], True)
    root = m.node("Sqrt", [m.node("Add", [mean, m.array(np.float32(1e-3))])])
    y = m.node("Mul", [m.node("Div", [middle, root]), m.weight(n)])
    if m.chance(2):
        y = m.node("Add", [y, m.weight(n)])
    m.keep(y, s)


@op
def residual_norm(m: Maker) -> None:
    found = m.value(lambda t: len(t) == 3 and isinstance(t[-1], int) and int(t[-1]) > 1)
    if found is None or m.opset < 17:
        return
    x, s = found
    y, _ = m.value(lambda t: t == s) or (x, s)
    n = int(s[-1])
    total = m.keep(m.node("Add", [x, y]), s)
    m.keep(m.node("LayerNormalization", [total, m.weight(n), m.weight(n)], axis=-1), s)


@op
def parallel(m: Maker) -> None:
    found = m.value(lambda t: len(t) in (2, 3) and isinstance(t[-1], int))
    if found is None:
        return
    x, s = found
    for n in (4, 8, 4)[: m.pick(2, 3)]:
        y = m.node("MatMul", [x, m.weight(int(s[-1]), n)])
        y = m.node("Add", [y, m.weight(n)]) if m.chance(2) else y
        m.keep(y, (*s[:-1], n))


@op
def branches(m: Maker) -> None:
    """RepVGG: two convolutions of one input, and the input itself, added up."""
    found = m.value(lambda t: len(t) == 4 and image(t))
    if found is None:
        return
    x, s = found
    c = int(s[1])
    wide = m.node("Conv", [x, m.weight(c, c, 3, 3), m.weight(c)], pads=[1, 1, 1, 1])
    thin = m.node("Conv", [x, m.weight(c, c, 1, 1)])
    total = m.node("Add", [wide, thin])
    m.keep(m.node("Add", [total, x]) if m.chance(2) else total, s)


@op
def attention(m: Maker) -> None:
    found = m.value(lambda t: len(t) == 3 and t[-1] == 8 and isinstance(t[1], int))
    if found is None:
        return
    x, s = found
    heads = []
    for perm in ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]):
        y = m.node("Add", [m.node("MatMul", [x, m.weight(8, 8)]), m.weight(8)])
        heads.append(m.node("Transpose", [m.node("Reshape", [y, m.ints(0, 0, 2, 4)])], perm=perm))
    q, k, v = heads
    scores = m.node("MatMul", [q, k])
    scores = m.node("Div", [scores, m.array(np.float32(2))])
    if m.chance(2):
        scores = m.node("Add", [scores, m.weight(*m.pick((1, 1, 1, int(s[1])), (1, 1, 1, 1)))])
    mixed = m.node("MatMul", [m.node("Softmax", [scores], axis=3), v])
    back = m.node("Transpose", [mixed], perm=[0, 2, 1, 3])
    y = m.node("Reshape", [back, m.ints(0, 0, 8)])
    m.keep(m.node("MatMul", [y, m.weight(8, 8)]), s)


@st.composite
def graphs(draw: Any) -> onnx.ModelProto:
    """A model whose outputs are any values of it, each maybe twice."""
    m = Maker(draw, draw(st.integers(9, 23)))
    for k in range(draw(st.integers(1, 2))):
        shape = draw(st.sampled_from(_START))
        m.inputs.append((f"x{k}", shape))
        m.pool.append((f"x{k}", shape))
    for _ in range(draw(st.integers(1, 9))):
        draw(st.sampled_from(OPS))(m)
    last = m.pool[-1]
    more = draw(st.lists(st.sampled_from(m.pool), max_size=2))
    outputs = []
    for name, shape in [last, *more]:
        out = m.name("out")
        if draw(st.booleans()):
            m.nodes.append(helper.make_node("Identity", [name], [out], name=m.name("Identity")))
        else:  # the value itself is the output, whoever reads it inside
            out = name
        if out not in [o for o, _ in outputs] and not out.startswith("x"):
            outputs.append((out, shape))
    if not outputs:
        m.nodes.append(helper.make_node("Relu", [last[0]], ["out"], name="last"))
        outputs.append(("out", last[1]))

    def info(name: str, shape: Shape) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape))

    graph = helper.make_graph(
        m.nodes,
        "random",
        [*(info(*i) for i in m.inputs), *m.weight_inputs],
        [info(*o) for o in outputs],
        m.weights,
    )
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", m.opset)])


def feeds(proto: onnx.ModelProto, batch: int, jitter: float = 0.0) -> dict[str, np.ndarray]:
    """Normal numbers for the inputs that have no initializer, each off by a factor 1 +- jitter."""
    known = {w.name for w in proto.graph.initializer}
    found = {}
    for k, value in enumerate(v for v in proto.graph.input if v.name not in known):
        shape = [d.dim_value or batch for d in value.type.tensor_type.shape.dim]
        rng = np.random.default_rng([k, batch])
        array = rng.standard_normal(shape)
        found[value.name] = (array * (1 + jitter * rng.uniform(-1, 1, shape))).astype(np.float32)
    return found
