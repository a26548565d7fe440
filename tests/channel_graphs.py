"""Small graphs, one for each structure that channels go through."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from effdl.graph import io

RNG = np.random.default_rng(5)


def build(
    nodes: list[onnx.NodeProto],
    weights: dict[str, tuple[int, ...] | np.ndarray],
    x: tuple[int | str, ...],
    *,
    opset: int = 17,
    contrib: bool = False,
) -> ir.Model:
    """A model of nodes from ``x`` to ``y``; weights by shape are random."""
    arrays = {
        n: w if isinstance(w, np.ndarray) else (0.3 * RNG.standard_normal(w)).astype(np.float32)
        for n, w in weights.items()
    }
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(a, n) for n, a in arrays.items()],
    )
    imports = [helper.make_opsetid("", opset)]
    if contrib:
        imports.append(helper.make_opsetid("com.microsoft", 1))
    proto = helper.make_model(graph, opset_imports=imports, ir_version=8 if opset < 21 else 10)
    proto = onnx.shape_inference.infer_shapes(proto)
    return io.from_proto(proto, "test", None)


def node(op: str, inputs: str, outputs: str, name: str = "", **attrs: object) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), outputs.split(), name=name or op, **attrs)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def conv(x: str, w: str, y: str, **attrs: object) -> onnx.NodeProto:
    return node("Conv", f"{x} {w}", y, w, pads=[1, 1, 1, 1], **attrs)


IMAGE = ("N", 3, 8, 8)

GRAPHS: dict[str, ir.Model] = {
    "residual": build(
        [
            conv("x", "w0", "a"),
            node("Relu", "a", "b"),
            conv("b", "w1", "c"),
            node("Add", "c b", "d"),
            node("Relu", "d", "e", "relu2"),
            conv("e", "w2", "y"),
        ],
        {"w0": (6, 3, 3, 3), "w1": (6, 6, 3, 3), "w2": (4, 6, 3, 3)},
        IMAGE,
    ),
    "concat": build(
        [
            conv("x", "w0", "a"),
            conv("x", "w1", "b"),
            node("Concat", "a b", "c", axis=1),
            conv("c", "w2", "y"),
        ],
        {"w0": (5, 3, 3, 3), "w1": (4, 3, 3, 3), "w2": (2, 9, 3, 3)},
        IMAGE,
    ),
    "split": build(
        [
            conv("x", "w0", "a"),
            node("Split", "a sizes", "b c", axis=1),
            node("Sigmoid", "c", "d"),
            node("Mul", "b d", "e"),
            conv("e", "w1", "y"),
        ],
        {"w0": (10, 3, 3, 3), "w1": (4, 5, 3, 3), "sizes": ints(5, 5)},
        IMAGE,
    ),
    "split_into_equal_parts": build(
        [
            conv("x", "w0", "a"),
            node("Split", "a", "b c", axis=1, num_outputs=2),
            conv("b", "w1", "d"),
            conv("c", "w2", "e"),
            node("Add", "d e", "y"),
        ],
        {"w0": (10, 3, 3, 3), "w1": (4, 5, 3, 3), "w2": (4, 5, 3, 3)},
        IMAGE,
        opset=18,
    ),
    "slice": build(
        [
            conv("x", "w0", "a"),
            node("Slice", "a s e ax", "b"),
            conv("b", "w1", "c"),
            node("Slice", "a s2 e2 ax", "d", "slice2"),
            conv("d", "w2", "f"),
            node("Add", "c f", "y"),
        ],
        {
            "w0": (10, 3, 3, 3),
            "w1": (4, 6, 3, 3),
            "w2": (4, 3, 3, 3),
            "s": ints(2),
            "e": ints(8),
            "ax": ints(1),
            "s2": ints(-3),
            "e2": ints(2**31 - 1),
        },
        IMAGE,
    ),
    "shuffle_by_gather": build(
        [
            conv("x", "w0", "a"),
            node("Gather", "a idx", "b", axis=1),
            conv("b", "w1", "y"),
        ],
        {"w0": (6, 3, 3, 3), "w1": (4, 6, 3, 3), "idx": ints(0, 3, -5, 4, 2, 5)},
        IMAGE,
    ),
    "flatten": build(
        [
            conv("x", "w0", "a"),
            node("MaxPool", "a", "b", kernel_shape=[4, 4], strides=[4, 4]),
            node("Flatten", "b", "c"),
            node("Gemm", "c w1 b1", "d", transB=1),
            node("Relu", "d", "e"),
            node("Gemm", "e w2", "y", "gemm2"),
        ],
        {"w0": (6, 3, 3, 3), "w1": (9, 24), "b1": (9,), "w2": (9, 5)},
        IMAGE,
    ),
    "reshape_with_numbers": build(
        [
            conv("x", "w0", "a"),
            node("Reshape", "a shape", "b"),
            node("MatMul", "b w1", "y"),
        ],
        {"w0": (6, 3, 3, 3), "w1": (384, 5), "shape": ints(-1, 384)},
        IMAGE,
    ),
    "depthwise": build(
        [
            conv("x", "w0", "a"),
            node("BatchNormalization", "a s b m v", "c"),
            node("Clip", "c lo hi", "d"),
            conv("d", "w1", "e", group=6),
            conv("e", "w2", "y"),
        ],
        {
            "w0": (6, 3, 3, 3),
            "w1": (12, 1, 3, 3),
            "w2": (4, 12, 3, 3),
            "s": (6,),
            "b": (6,),
            "m": (6,),
            "v": np.ones(6, np.float32),
            "lo": np.array(0, np.float32),
            "hi": np.array(6, np.float32),
        },
        IMAGE,
    ),
    "narrow_groups": build(
        [
            conv("x", "w0", "a"),
            conv("a", "w1", "b", group=4),
            conv("b", "w2", "y"),
        ],
        {"w0": (8, 3, 3, 3), "w1": (12, 2, 3, 3), "w2": (4, 12, 3, 3)},
        IMAGE,
    ),
    "wide_groups": build(
        [
            conv("x", "w0", "a"),
            conv("a", "w1", "b", group=2),
            conv("b", "w2", "y"),
        ],
        {"w0": (24, 3, 3, 3), "w1": (8, 12, 3, 3), "w2": (4, 8, 3, 3)},
        IMAGE,
    ),
    "conv_transpose": build(
        [
            conv("x", "w0", "a"),
            node("ConvTranspose", "a w1 b1", "b", strides=[2, 2]),
            node("ConvTranspose", "b w2", "c", "up2", group=5),
            conv("c", "w3", "y"),
        ],
        {
            "w0": (6, 3, 3, 3),
            "w1": (6, 5, 2, 2),
            "b1": (5,),
            "w2": (5, 2, 2, 2),
            "w3": (2, 10, 3, 3),
        },
        IMAGE,
    ),
    "squeeze_excite": build(
        [
            conv("x", "w0", "a"),
            node("GlobalAveragePool", "a", "b"),
            node("Conv", "b w1", "c", "squeeze"),
            node("Relu", "c", "d"),
            node("Conv", "d w2", "e", "excite"),
            node("HardSigmoid", "e", "f"),
            node("Mul", "a f", "g"),
            conv("g", "w3", "y"),
        ],
        {"w0": (8, 3, 3, 3), "w1": (4, 8, 1, 1), "w2": (8, 4, 1, 1), "w3": (2, 8, 3, 3)},
        IMAGE,
    ),
    "depth_to_space": build(
        [
            conv("x", "w0", "a"),
            node("DepthToSpace", "a", "b", blocksize=2),
            conv("b", "w1", "c"),
            node("DepthToSpace", "c", "d", "d2s", blocksize=2, mode="CRD"),
            conv("d", "w2", "e"),
            node("SpaceToDepth", "e", "f", blocksize=2),
            conv("f", "w3", "y"),
        ],
        {
            "w0": (12, 3, 3, 3),
            "w1": (8, 3, 3, 3),
            "w2": (3, 2, 3, 3),
            "w3": (2, 12, 3, 3),
        },
        IMAGE,
    ),
    "resize_by_sizes": build(
        [
            conv("x", "w0", "a"),
            helper.make_node("Resize", ["a", "", "", "sizes"], ["b"]),
            conv("b", "w1", "y"),
        ],
        {"w0": (6, 3, 3, 3), "w1": (2, 6, 3, 3), "sizes": ints(2, 6, 16, 16)},
        (2, 3, 8, 8),
    ),
    "lstm": build(
        [
            node("LSTM", "x w r b", "h", hidden_size=6, direction="bidirectional"),
            node("Transpose", "h", "t", perm=[0, 2, 1, 3]),
            node("Reshape", "t shape", "u"),
            node("MatMul", "u w1", "y"),
        ],
        {
            "w": (2, 24, 5),
            "r": (2, 24, 6),
            "b": (2, 48),
            "w1": (12, 4),
            "shape": ints(0, 0, 12),
        },
        (7, "N", 5),
    ),
    "gru_after_conv": build(
        [
            node("MatMul", "x w0", "a"),
            node("Relu", "a", "b"),
            node("GRU", "b w r", "h", hidden_size=4, linear_before_reset=1),
            node("Squeeze", "h one", "s"),
            node("MatMul", "s w1", "y", "out"),
        ],
        {"w0": (5, 6), "w": (1, 12, 6), "r": (1, 12, 4), "w1": (4, 3), "one": ints(1)},
        (7, "N", 5),
    ),
    "heads": build(
        [
            node("MatMul", "x wq", "q", "query"),
            node("MatMul", "x wk", "k", "key"),
            node("MatMul", "x wv", "v", "value"),
            node("Reshape", "q heads", "q4", "rq"),
            node("Reshape", "k heads", "k4", "rk"),
            node("Reshape", "v heads", "v4", "rv"),
            node("Transpose", "q4", "qt", "tq", perm=[0, 2, 1, 3]),
            node("Transpose", "k4", "kt", "tk", perm=[0, 2, 3, 1]),
            node("Transpose", "v4", "vt", "tv", perm=[0, 2, 1, 3]),
            node("MatMul", "qt kt", "s", "scores"),
            node("Softmax", "s", "p"),
            node("MatMul", "p vt", "c", "context"),
            node("Transpose", "c", "ct", "tc", perm=[0, 2, 1, 3]),
            node("Reshape", "ct flat", "f", "rf"),
            node("MatMul", "f wo", "y", "output"),
        ],
        {
            "wq": (10, 12),
            "wk": (10, 12),
            "wv": (10, 12),
            "wo": (12, 10),
            "heads": ints(0, 0, 4, 3),
            "flat": ints(0, 0, 12),
        },
        ("N", "S", 10),
    ),
    "one_matrix_for_three": build(
        [
            node("MatMul", "x wqkv", "qkv", "qkv"),
            node("Reshape", "qkv parts", "r", "r5"),
            node("Transpose", "r", "t", perm=[2, 0, 3, 1, 4]),
            node("Gather", "t zero", "q", "g0", axis=0),
            node("Gather", "t one", "k", "g1", axis=0),
            node("Gather", "t two", "v", "g2", axis=0),
            node("Transpose", "k", "kt", "tk", perm=[0, 1, 3, 2]),
            node("MatMul", "q kt", "s", "scores"),
            node("Softmax", "s", "p"),
            node("MatMul", "p v", "c", "context"),
            node("Transpose", "c", "ct", "tc", perm=[0, 2, 1, 3]),
            node("Reshape", "ct flat", "f", "rf"),
            node("MatMul", "f wo", "y", "output"),
        ],
        {
            "wqkv": (10, 36),
            "wo": (12, 10),
            "parts": ints(0, 0, 3, 4, 3),
            "flat": ints(0, 0, 12),
            "zero": np.array(0, np.int64),
            "one": np.array(1, np.int64),
            "two": np.array(2, np.int64),
        },
        ("N", "S", 10),
    ),
    "grouped_queries": build(
        [
            node("MatMul", "x wq", "q", "query"),
            node("MatMul", "x wk", "k", "key"),
            node("Reshape", "q heads", "q4", "rq"),
            node("Reshape", "k few", "k4", "rk"),
            node("Transpose", "q4", "qt", "tq", perm=[0, 2, 1, 3]),
            node("Transpose", "k4", "kt", "tk", perm=[0, 2, 1, 3]),
            node("Unsqueeze", "kt two", "ku"),
            node("Expand", "ku many", "ke"),
            node("Reshape", "ke all", "kk", "rall"),
            node("Mul", "qt kk", "c"),
            node("Transpose", "c", "ct", "tc", perm=[0, 2, 1, 3]),
            node("Reshape", "ct flat", "f", "rf"),
            node("MatMul", "f wo", "y", "output"),
        ],
        {
            "wq": (10, 18),
            "wk": (10, 9),
            "wo": (18, 10),
            "heads": ints(0, 0, 6, 3),
            "few": ints(0, 0, 3, 3),
            "two": ints(2),
            "many": ints(1, 1, 2, 1, 1),
            "all": ints(0, 6, -1, 3),
            "flat": ints(0, 0, 18),
        },
        ("N", "S", 10),
    ),
    "packed_attention": build(
        [
            node("Attention", "x w b", "a", domain="com.microsoft", num_heads=4),
            node("MatMul", "a wo", "y", "output"),
        ],
        {"w": (10, 36), "b": (36,), "wo": (12, 10)},
        ("N", "S", 10),
        contrib=True,
    ),
    "multi_head_attention": build(
        [
            node("MatMul", "x wq", "q", "query"),
            node("MatMul", "x wk", "k", "key"),
            node("MatMul", "x wv", "v", "value"),
            node("MultiHeadAttention", "q k v b", "a", domain="com.microsoft", num_heads=4),
            node("MatMul", "a wo", "y", "output"),
        ],
        {"wq": (10, 12), "wk": (10, 12), "wv": (10, 12), "b": (36,), "wo": (12, 10)},
        ("N", "S", 10),
        contrib=True,
    ),
    "standard_attention": build(
        [
            node("MatMul", "x wq", "q", "query"),
            node("MatMul", "x wk", "k", "key"),
            node("MatMul", "x wv", "v", "value"),
            node("Attention", "q k v", "a", q_num_heads=6, kv_num_heads=3),
            node("MatMul", "a wo", "y", "output"),
        ],
        {"wq": (10, 18), "wk": (10, 9), "wv": (10, 9), "wo": (18, 10)},
        ("N", "S", 10),
        opset=23,
    ),
}
