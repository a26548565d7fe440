"""BERT as tf2onnx writes it, from the weights of a torch model.

``google``: the original BERT code. Everything between the embedding and the output is 2-D,
[batch * length, hidden]; the scores are multiplied, Gelu is a tanh. ``keras``: Dense layers are a Tensordot,
which is Reshape to 2-D, MatMul, Reshape back; the scores are divided, Gelu is an erf. Both build the mask as
(1 - m) * -10000 and write layer norm as ``tf.nn.batch_normalization`` does: x * f + (beta - mean * f) with
f = rsqrt(var + eps) * gamma. Shapes are computed by Shape, Slice and Concat; ids and mask are int32.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Arrays = dict[str, np.ndarray]


class Writer:
    """Nodes and initializers as they are written."""

    def __init__(self, weights: Arrays, heads: int, google: bool) -> None:
        self.weights, self.heads, self.google = weights, heads, google
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        self.hidden = weights["embeddings.LayerNorm.weight"].size

    def op(self, kind: str, *inputs: str, **attributes: object) -> str:
        """Add a node; the name of its output."""
        name = f"StatefulPartitionedCall/bert/{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [f"{name}:0"], name, **attributes))
        return f"{name}:0"

    def const(self, value: object, dtype: type = np.float32) -> str:
        """Add a constant, once for each value."""
        array = np.asarray(value, dtype)
        name = f"const_{dtype.__name__}_{'_'.join(map(str, array.ravel()))}_{array.ndim}"
        self.initializers.setdefault(name, numpy_helper.from_array(array, name))
        return name

    def weight(self, name: str, transpose: bool = False) -> str:
        """Add a weight of the torch model."""
        array = self.weights[name].T if transpose else self.weights[name]
        array = np.ascontiguousarray(array, np.float32)
        self.initializers.setdefault(name, numpy_helper.from_array(array, name))
        return name

    def dim(self, tensor: str, axis: int) -> str:
        """One dimension as a vector of one."""
        shape = self.op("Cast", self.op("Shape", tensor), to=TensorProto.INT32)
        ints = [self.const([v], np.int64) for v in (axis, axis + 1, 0)]
        return self.op("Slice", shape, *ints)

    def shape(self, *dims: str | int) -> str:
        """Dimensions put together, int64."""
        parts = [self.const([d], np.int32) if isinstance(d, int) else d for d in dims]
        return self.op("Cast", self.op("Concat", *parts, axis=0), to=TensorProto.INT64)

    def dense(self, x: str, name: str) -> str:
        """A Dense layer."""
        kernel, bias = self.weight(f"{name}.weight", transpose=True), self.weight(f"{name}.bias")
        if self.google:
            return self.op("Add", self.op("MatMul", x, kernel), bias)
        flat = self.op(
            "Reshape", x, self.const([-1, self.weights[f"{name}.weight"].shape[1]], np.int64)
        )
        width = self.weights[f"{name}.weight"].shape[0]
        back = self.shape(self.dim(x, 0), self.dim(x, 1), width)
        return self.op("Add", self.op("Reshape", self.op("MatMul", flat, kernel), back), bias)

    def norm(self, x: str, name: str) -> str:
        """Layer norm."""
        mean = self.op("ReduceMean", x, axes=[-1], keepdims=1)
        apart = self.op("Sub", x, mean)
        spread = self.op("ReduceMean", self.op("Mul", apart, apart), axes=[-1], keepdims=1)
        root = self.op("Sqrt", self.op("Add", spread, self.const(1e-12)))
        factor = self.op("Mul", self.op("Reciprocal", root), self.weight(f"{name}.weight"))
        rest = self.op("Sub", self.weight(f"{name}.bias"), self.op("Mul", mean, factor))
        return self.op("Add", self.op("Mul", x, factor), rest)

    def gelu(self, x: str) -> str:
        """Gelu."""
        if not self.google:
            inner = self.op("Erf", self.op("Div", x, self.const(np.sqrt(2))))
            return self.op(
                "Mul", self.op("Mul", x, self.const(0.5)), self.op("Add", inner, self.const(1))
            )
        cube = self.op("Mul", self.const(0.044715), self.op("Pow", x, self.const(3)))
        inner = self.op("Mul", self.const(np.sqrt(2 / np.pi)), self.op("Add", x, cube))
        gate = self.op("Add", self.op("Tanh", inner), self.const(1))
        return self.op("Mul", x, self.op("Mul", self.const(0.5), gate))

    def attention(self, x: str, name: str, bias: str, batch: str, length: str) -> str:
        """Self-attention without its output projection."""
        size = self.hidden // self.heads
        split = self.shape(batch, length, self.heads, size)
        parts = [
            self.op(
                "Transpose", self.op("Reshape", self.dense(x, f"{name}.self.{n}"), split), perm=perm
            )
            for n, perm in (("query", [0, 2, 1, 3]), ("key", [0, 2, 3, 1]), ("value", [0, 2, 1, 3]))
        ]
        scores = self.op("MatMul", parts[0], parts[1])
        if self.google:
            scores = self.op("Mul", scores, self.const(1 / np.sqrt(size)))
        else:
            scores = self.op("Div", scores, self.const(np.sqrt(size)))
        chances = self.op("Softmax", self.op("Add", scores, bias), axis=3)
        mixed = self.op("Transpose", self.op("MatMul", chances, parts[2]), perm=[0, 2, 1, 3])
        if self.google:
            return self.op("Reshape", mixed, self.const([-1, self.hidden], np.int64))
        return self.op("Reshape", mixed, self.shape(batch, length, self.hidden))

    def mask(self, batch: str, length: str) -> str:
        """The addend of the scores, [B, 1, S, S] or [B, 1, 1, S]."""
        wide = self.op("Reshape", "attention_mask", self.shape(batch, 1, length))
        wide = self.op("Cast", wide, to=TensorProto.FLOAT)
        if self.google:  # ones of [batch, length, 1] times the mask
            ones = self.op("Expand", self.const(1.0), self.shape(batch, length, 1))
            wide = self.op("Mul", ones, wide)
        wide = self.op("Unsqueeze", wide, self.const([1], np.int64))
        return self.op("Mul", self.op("Sub", self.const(1.0), wide), self.const(-10000.0))

    def embedding(self, length: str) -> str:
        """Words, types and places, normed."""
        words = self.op("Gather", self.weight("embeddings.word_embeddings.weight"), "input_ids")
        types = self.op(
            "Gather", self.weight("embeddings.token_type_embeddings.weight"), "token_type_ids"
        )
        last = self.op("Cast", length, to=TensorProto.INT64)
        place = self.weight("embeddings.position_embeddings.weight")
        zero = self.const([0], np.int64)
        place = self.op("Unsqueeze", self.op("Slice", place, zero, last, zero), zero)
        return self.norm(
            self.op("Add", self.op("Add", words, types), place), "embeddings.LayerNorm"
        )


def build(weights: Arrays, layers: int, heads: int, goal: Path, style: str = "google") -> None:
    """Write the model; ``weights`` by the names of a torch BertModel."""
    w = Writer(weights, heads, style == "google")
    batch, length = w.dim("input_ids", 0), w.dim("input_ids", 1)
    bias = w.mask(batch, length)
    x = w.embedding(length)
    if w.google:
        x = w.op("Reshape", x, w.const([-1, w.hidden], np.int64))
    for number in range(layers):
        name = f"encoder.layer.{number}"
        mixed = w.dense(
            w.attention(x, f"{name}.attention", bias, batch, length),
            f"{name}.attention.output.dense",
        )
        x = w.norm(w.op("Add", mixed, x), f"{name}.attention.output.LayerNorm")
        wide = w.dense(w.gelu(w.dense(x, f"{name}.intermediate.dense")), f"{name}.output.dense")
        x = w.norm(w.op("Add", wide, x), f"{name}.output.LayerNorm")
    x = w.op("Reshape", x, w.shape(batch, length, w.hidden)) if w.google else x
    w.nodes.append(helper.make_node("Identity", [x], ["last_hidden_state"], "Identity"))
    names = ("input_ids", "attention_mask", "token_type_ids")
    graph = helper.make_graph(
        w.nodes,
        "tf2onnx",
        [helper.make_tensor_value_info(n, TensorProto.INT32, ["batch", "seq"]) for n in names],
        [
            helper.make_tensor_value_info(
                "last_hidden_state", TensorProto.FLOAT, ["batch", "seq", w.hidden]
            )
        ],
        list(w.initializers.values()),
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8)
    made.producer_name = "tf2onnx"
    onnx.checker.check_model(made)
    onnx.save(made, goal)
