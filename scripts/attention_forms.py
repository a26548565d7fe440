"""The forms of attention that ``measure_attention.py`` times, each a small graph."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Form = Callable[["Block"], str]


class Block:
    """The graph of one form.

    Args:
        shape: batch, length, heads and size of a head.
        mask: whether there is a padding mask; ``causal`` whether a token sees only those before it.
    """

    def __init__(self, shape: tuple[int, ...], mask: bool, causal: bool, opset: int) -> None:
        self.batch, self.length, self.heads, self.size = shape
        self.mask, self.causal, self.opset = mask, causal, opset
        self.width = self.heads * self.size
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, onnx.TensorProto] = {}
        rng = np.random.default_rng(0)
        n = self.width
        self.kernel = [
            (rng.standard_normal((n, n)) / np.sqrt(n)).astype(np.float32) for _ in range(3)
        ]
        self.bias = [(0.1 * rng.standard_normal(n)).astype(np.float32) for _ in range(3)]

    def op(
        self, kind: str, *inputs: str, domain: str = "", outputs: int = 1, **attributes: object
    ) -> str:
        """Add a node; the name of its first output."""
        names = [f"v{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(
            helper.make_node(kind, list(inputs), names, names[0], domain=domain, **attributes)
        )
        return names[0]

    def const(self, value: object, dtype: type = np.float32) -> str:
        """Add an initializer."""
        name = f"w{len(self.weights)}"
        self.weights[name] = numpy_helper.from_array(np.ascontiguousarray(value, dtype), name)
        return name

    def ints(self, *values: int) -> str:
        """Add a vector of int64."""
        return self.const(values, np.int64)

    def project(self, which: int, scale: float = 1.0) -> str:
        """One projection, [B, S, H*D]."""
        product = self.op("MatMul", "x", self.const(self.kernel[which] * scale))
        return self.op("Add", product, self.const(self.bias[which] * scale))

    def packed(self, scale: float = 1.0) -> str:
        """All three projections in one product, [B, S, 3*H*D]."""
        factors = (scale, 1.0, 1.0)
        kernel = np.concatenate([k * f for k, f in zip(self.kernel, factors, strict=True)], 1)
        bias = np.concatenate([b * f for b, f in zip(self.bias, factors, strict=True)])
        return self.op("Add", self.op("MatMul", "x", self.const(kernel)), self.const(bias))

    def split(self, packed: str) -> list[str]:
        """Cut the last axis into three."""
        first = self.op("Split", packed, outputs=3, axis=-1, num_outputs=3)
        return [f"{first[:-1]}{i}" for i in range(3)]

    def heads_of(self, x: str, perm: tuple[int, ...] = (0, 2, 1, 3)) -> str:
        """[B, S, H*D] to four axes in an order."""
        cut = self.op("Reshape", x, self.ints(0, 0, self.heads, self.size))
        return self.op("Transpose", cut, perm=perm)

    def joined(self, x: str) -> str:
        """[B, H, S, D] to [B, S, H*D]."""
        back = self.op("Transpose", x, perm=(0, 2, 1, 3))
        return self.op("Reshape", back, self.ints(0, 0, self.width))

    def added(self) -> str:
        """The mask as an addend, [B, 1, 1, S], or with causality [B or 1, 1, S, S]; empty for none."""
        found = ""
        if self.mask:
            wide = self.op(
                "Unsqueeze", self.op("Cast", "mask", to=TensorProto.FLOAT), self.ints(1, 2)
            )
            found = self.op("Mul", self.op("Sub", self.const(1.0), wide), self.const(-1e4))
        if self.causal:
            upper = np.triu(np.full((1, 1, self.length, self.length), -1e4), 1)
            found = self.op("Add", found, self.const(upper)) if found else self.const(upper)
        return found

    def expanded(self) -> str:
        """The same with all its axes but the heads, as com.microsoft wants an attention bias."""
        found = self.added()
        if not found or self.causal:
            return found
        return self.op("Expand", found, self.ints(self.batch, 1, self.length, self.length))

    def int_mask(self) -> str:
        """The mask as int32, empty for none."""
        return self.op("Cast", "mask", to=TensorProto.INT32) if self.mask else ""

    def softmax(self, scores: str) -> str:
        """Softmax of the masked scores."""
        added = self.added()
        return self.op("Softmax", self.op("Add", scores, added) if added else scores, axis=-1)

    def model(self, result: str) -> bytes:
        """The graph, serialized."""
        self.nodes.append(helper.make_node("Identity", [result], ["y"], "last"))
        kind = TensorProto.FLOAT
        inputs = [helper.make_tensor_value_info("x", kind, ["batch", "seq", self.width])]
        if self.mask:
            inputs.append(
                helper.make_tensor_value_info("mask", TensorProto.INT64, ["batch", "seq"])
            )
        output = helper.make_tensor_value_info("y", kind, ["batch", "seq", self.width])
        graph = helper.make_graph(self.nodes, "form", inputs, [output], list(self.weights.values()))
        sets = [helper.make_opsetid("", self.opset), helper.make_opsetid("com.microsoft", 1)]
        made: onnx.ModelProto = helper.make_model(graph, opset_imports=sets, ir_version=10)
        return made.SerializeToString()


MS = "com.microsoft"


def eager(b: Block) -> str:
    """As transformers' eager code: one Mul after the product."""
    q, k, v = (
        b.heads_of(b.project(0)),
        b.heads_of(b.project(1), (0, 2, 3, 1)),
        b.heads_of(b.project(2)),
    )
    scores = b.op("Mul", b.op("MatMul", q, k), b.const(b.size**-0.5))
    return b.joined(b.op("MatMul", b.softmax(scores), v))


def sdpa(b: Block) -> str:
    """As scaled_dot_product_attention is exported: the root of the scale on both sides, NaN to 0."""
    root = b.const(b.size**-0.25)
    q = b.op("Mul", b.heads_of(b.project(0)), root)
    k = b.op("Mul", b.heads_of(b.project(1), (0, 2, 3, 1)), root)
    chances = b.softmax(b.op("MatMul", q, k))
    chances = b.op("Where", b.op("IsNaN", chances), b.const(0.0), chances)
    return b.joined(b.op("MatMul", chances, b.heads_of(b.project(2))))


def sdpa_one_scale(b: Block) -> str:
    """The same with the scale in the weights of the query."""
    q = b.heads_of(b.project(0, b.size**-0.5))
    chances = b.softmax(b.op("MatMul", q, b.heads_of(b.project(1), (0, 2, 3, 1))))
    chances = b.op("Where", b.op("IsNaN", chances), b.const(0.0), chances)
    return b.joined(b.op("MatMul", chances, b.heads_of(b.project(2))))


def sdpa_rows(b: Block) -> str:
    """NaN to 0 as a factor of each text of the result, which is 0 where nothing is seen."""
    result = folded(b)
    if not b.mask:
        return result
    seen = b.op("ReduceMax", "mask", b.ints(-1), keepdims=1)
    factor = b.op("Unsqueeze", b.op("Cast", seen, to=TensorProto.FLOAT), b.ints(-1))
    return b.op("Mul", result, factor)


def folded(b: Block) -> str:
    """The scale in the weights of the query, K transposed once."""
    q = b.heads_of(b.project(0, b.size**-0.5))
    k, v = b.heads_of(b.project(1), (0, 2, 3, 1)), b.heads_of(b.project(2))
    return b.joined(b.op("MatMul", b.softmax(b.op("MatMul", q, k)), v))


def folded_mm_trans(b: Block) -> str:
    """FusedMatMul with transB and alpha on K [B, H, S, D]."""
    q, k, v = (b.heads_of(b.project(i)) for i in range(3))
    scores = b.op("FusedMatMul", q, k, domain=MS, transB=1, alpha=b.size**-0.5)
    return b.joined(b.op("MatMul", b.softmax(scores), v))


def folded_packed(b: Block) -> str:
    """One product for all projections, Split, the rest as ``folded``."""
    q, k, v = b.split(b.packed(b.size**-0.5))
    scores = b.op("MatMul", b.heads_of(q), b.heads_of(k, (0, 2, 3, 1)))
    return b.joined(b.op("MatMul", b.softmax(scores), b.heads_of(v)))


def folded_3d(b: Block) -> str:
    """Batch and heads as one axis: [B*H, S, D]."""
    q = b.heads_of(b.project(0, b.size**-0.5))
    k, v = b.heads_of(b.project(1), (0, 2, 3, 1)), b.heads_of(b.project(2))
    q, v = (b.op("Reshape", t, b.ints(-1, b.length, b.size)) for t in (q, v))
    k = b.op("Reshape", k, b.ints(-1, b.size, b.length))
    scores = b.op("MatMul", q, k)
    four = b.ints(-1, b.heads, b.length, b.length)
    chances = b.softmax(b.op("Reshape", scores, four) if b.mask or b.causal else scores)
    chances = b.op("Reshape", chances, b.ints(-1, b.length, b.length))
    return b.joined(
        b.op("Reshape", b.op("MatMul", chances, v), b.ints(-1, b.heads, b.length, b.size))
    )


def folded_batch_trans(b: Block) -> str:
    """Length first, [S, B*H, D]: FusedMatMul transposes the batch, only the result is transposed."""
    x = b.op("Transpose", "x", perm=(1, 0, 2)) if b.batch > 1 else "x"
    lead = b.ints(b.length, b.batch * b.heads, b.size)
    q, k, v = (
        b.op(
            "Reshape",
            b.op(
                "Add",
                b.op("MatMul", x, b.const(b.kernel[i] * f)),
                b.const(b.bias[i] * f),
            ),
            lead,
        )
        for i, f in ((0, b.size**-0.5), (1, 1.0), (2, 1.0))
    )
    scores = b.op("FusedMatMul", q, k, domain=MS, transBatchA=1, transBatchB=1, transB=1)
    four = b.op("Reshape", scores, b.ints(b.batch, b.heads, b.length, b.length))
    chances = b.op("Reshape", b.softmax(four), b.ints(-1, b.length, b.length))
    mixed = b.op("FusedMatMul", chances, v, domain=MS, transBatchB=1)
    return b.joined(b.op("Reshape", mixed, b.ints(b.batch, b.heads, b.length, b.size)))


def mha(b: Block) -> str:
    """com.microsoft.MultiHeadAttention, the mask as key_padding_mask."""
    q, k, v = (b.project(i) for i in range(3))
    rest = ["", b.int_mask()] if b.mask else []
    return b.op("MultiHeadAttention", q, k, v, *rest, domain=MS, num_heads=b.heads,
                unidirectional=int(b.causal))  # fmt: skip


def mha_bias(b: Block) -> str:
    """The same, the projections' biases given to it."""
    q, k, v = (b.op("MatMul", "x", b.const(k)) for k in b.kernel)
    rest = [b.const(np.concatenate(b.bias)), *([b.int_mask()] if b.mask else [])]
    return b.op("MultiHeadAttention", q, k, v, *rest, domain=MS, num_heads=b.heads,
                unidirectional=int(b.causal))  # fmt: skip


def mha_added(b: Block) -> str:
    """The same, the mask as attention_bias, expanded to [B, 1, S, S]."""
    q, k, v = (b.project(i) for i in range(3))
    return b.op("MultiHeadAttention", q, k, v, "", "", b.expanded(), domain=MS, num_heads=b.heads)


def mha_packed(b: Block) -> str:
    """One product for all projections, Split, MultiHeadAttention."""
    rest = ["", b.int_mask()] if b.mask else []
    return b.op("MultiHeadAttention", *b.split(b.packed()), *rest, domain=MS, num_heads=b.heads,
                unidirectional=int(b.causal))  # fmt: skip


def attention(b: Block) -> str:
    """com.microsoft.Attention with packed weights."""
    weight, bias = b.const(np.concatenate(b.kernel, 1)), b.const(np.concatenate(b.bias))
    rest = [b.int_mask()] if b.mask else []
    return b.op("Attention", "x", weight, bias, *rest, domain=MS, num_heads=b.heads,
                unidirectional=int(b.causal))  # fmt: skip


def standard_3d(b: Block) -> str:
    """ai.onnx Attention of opset 23 on [B, S, H*D]."""
    q, k, v = (b.project(i) for i in range(3))
    rest = [b.expanded()] if b.mask else []
    return b.op("Attention", q, k, v, *rest, q_num_heads=b.heads, kv_num_heads=b.heads,
                is_causal=int(b.causal and not b.mask))  # fmt: skip


def standard_4d(b: Block) -> str:
    """The same on [B, H, S, D], as torch exports it for opset 23."""
    q, k, v = (b.heads_of(b.project(i)) for i in range(3))
    rest = [b.expanded()] if b.mask else []
    return b.joined(b.op("Attention", q, k, v, *rest, is_causal=int(b.causal and not b.mask)))


def standard_bool(b: Block) -> str:
    """The same, the mask as booleans; it has to be expanded to [B, 1, S, S] as well."""
    q, k, v = (b.heads_of(b.project(i)) for i in range(3))
    mask = b.op("Unsqueeze", b.op("Cast", "mask", to=TensorProto.BOOL), b.ints(1, 2))
    mask = b.op("Expand", mask, b.ints(b.batch, 1, b.length, b.length))
    return b.joined(b.op("Attention", q, k, v, mask))


def grouped(b: Block) -> str:
    """com.microsoft.GroupQueryAttention, which is always causal."""
    q, k, v = (b.project(i) for i in range(3))
    last = b.const(np.full(b.batch, b.length - 1), np.int32)
    return b.op("GroupQueryAttention", q, k, v, "", "", last, b.const(b.length, np.int32), domain=MS,
                outputs=3, num_heads=b.heads, kv_num_heads=b.heads)  # fmt: skip


def projections(b: Block) -> str:
    """No attention at all: the three projections and their sum."""
    return b.op("Sum", *(b.project(i) for i in range(3)))


def again(b: Block) -> str:
    """The first form once more, to show the noise."""
    return eager(b)


def forms(mask: bool, causal: bool) -> list[tuple[Form, int]]:
    """The forms of a cell, each with its opset."""
    plain: list[Form] = [
        eager,
        sdpa,
        sdpa_one_scale,
        sdpa_rows,
        folded,
        folded_mm_trans,
        folded_packed,
        folded_3d,
    ]
    plain += [again, folded_batch_trans, mha, mha_bias, mha_packed, attention]
    if mask:
        plain.append(mha_added)
    if causal and not mask:
        plain.append(grouped)
    new: list[Form] = [standard_3d, standard_4d, *([standard_bool] if mask and not causal else [])]
    return [(projections, 18), *((f, 18) for f in plain), *((f, 23) for f in new)]
