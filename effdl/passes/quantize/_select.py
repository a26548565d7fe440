"""Which nodes become 8-bit: where ONNX Runtime has kernels, and where their neighbours make it pay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import onnx
import onnx_ir as ir

from effdl.graph.proto import skeleton_proto
from effdl.graph.walk import (
    all_nodes,
    float_attr,
    function_nodes,
    int_attr,
    is_op,
    only_user,
    str_attr,
)
from effdl.graph.weights import constant_tensor, scalar
from effdl.passes.base import Context

WEIGHTED = ("Conv", "MatMul", "Gemm")
MOVEMENT = ("Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Gather")
SAME_RANGE = (*MOVEMENT, "MaxPool", "Resize")
"""Ops whose output holds values of their first input: both get one scale and zero point."""
POOLS = ("MaxPool", "AveragePool", "GlobalAveragePool")
BINARY = ("Add", "Mul")
FOLLOWERS = (*SAME_RANGE, *POOLS, *BINARY, "Concat", "Sigmoid", "LeakyRelu", "Relu", "Clip")
ABSORBERS = (*WEIGHTED, *BINARY)
"""Ops after which a Relu or Clip becomes part of the quantized output's range."""
QUANTIZED = (
    *("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger"),
    *("ConvInteger", "QLinearConv", "QLinearMatMul"),
)
PACKED_ATTENTION = "packed attention stays float: fuse_attention {form: mha} leaves its products"
"""Why com.microsoft Attention, which holds the weights of three products, is left alone."""
_THIN = 32
"""Products per output below which a layer pays only beside other 8-bit nodes (depthwise: 9)."""


@dataclass(frozen=True)
class ValueInfo:
    """Type and rank of a value, as ONNX's shape inference sees them; rank -1 is unknown."""

    dtype: ir.DataType
    rank: int


@dataclass
class Selection:
    """The nodes to quantize.

    Args:
        nodes: chosen nodes in the graph's order.
        absorbed: Relu or Clip that becomes part of the range, by the node that feeds it.
        skipped: (node, reason) of every candidate left alone.
        info: types and ranks of the main graph's values by name.
        explicit: only what layers read becomes 8-bit (``Format.explicit``).
    """

    nodes: dict[ir.Node, None] = field(default_factory=dict)
    absorbed: dict[ir.Node, ir.Node] = field(default_factory=dict)
    skipped: list[tuple[ir.Node | str, str]] = field(default_factory=list)
    info: dict[str, ValueInfo] = field(default_factory=dict)
    explicit: bool = False

    def reads(self, node: ir.Node) -> tuple[int, ...]:
        """Indices of the inputs of a chosen node that become 8-bit.

        Where the form is explicit, a sum is fused into the convolution that makes one side: that side stays.
        """
        indices = activation_inputs(node)
        if self.explicit and is_op(node, "Add"):
            fused = [i for i in indices if self._made_for(node, i)]
            return tuple(i for i in indices if i not in fused[:1])
        return indices

    def _made_for(self, node: ir.Node, index: int) -> bool:
        value = node.inputs[index]
        source = value.producer() if value is not None else None
        return is_op(source, "Conv") and source in self.nodes and only_user(value) is node

    def output(self, node: ir.Node) -> ir.Value:
        """The value that carries ``node``'s quantized result, behind an absorbed activation."""
        return self.absorbed.get(node, node).outputs[0]

    def source(self, value: ir.Value) -> ir.Node | None:
        """The chosen node that makes ``value``, None when it comes from float."""
        node = value.producer()
        if node is not None and is_op(node, "Relu", "Clip") and node not in self.nodes:
            before = node.inputs[0].producer() if node.inputs[0] is not None else None
            if before is not None and self.absorbed.get(before) is node:
                node = before
        return node if node in self.nodes else None

    def consumers(self, value: ir.Value) -> list[tuple[ir.Node, int]]:
        """The chosen nodes that read ``value`` as an activation, with the input's index."""
        return [
            (use.node, use.idx)
            for use in value.uses()
            if use.node in self.nodes and use.idx in self.reads(use.node)
        ]


def is_quantized(model: ir.Model) -> bool:
    """Whether the model already computes in 8-bit integers somewhere."""
    return any(
        node.op_type in QUANTIZED or node.op_type.startswith("QLinear") for node in all_nodes(model)
    )


def is_half(model: ir.Model) -> bool:
    """Whether the model's inputs or weights are float16 or bfloat16."""
    half = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    return any(v.dtype in half for v in values)


def choose_nodes(
    model: ir.Model, refusal: Callable[[ir.Node], str | None], ctx: Context
) -> list[ir.Node]:
    """Return the nodes, subgraphs included, that nothing is said against; tell the others' reasons.

    Args:
        model: not changed.
        refusal: says why a node is left alone, an empty string when it is not, None when it is no
            candidate.
        ctx: is told.
    """
    chosen = []
    in_functions = set(function_nodes(model))
    for node in all_nodes(model):
        reason = refusal(node)
        if reason == "" and node in in_functions:
            reason = "inside a function"
        if reason == "":
            chosen.append(node)
        elif reason is not None:
            ctx.skip(node, reason)
    return chosen


def activation_inputs(node: ir.Node) -> tuple[int, ...]:
    """Indices of the inputs of a node that carry activations (not weights, shapes, indices)."""
    if is_op(node, "Concat"):
        return tuple(range(len(node.inputs)))
    if is_op(node, *BINARY):
        return tuple(i for i in (0, 1) if constant_tensor(node.inputs[i]) is None)
    return (0,)


def select(
    model: ir.Model,
    wanted: Callable[[ir.Node], bool],
    op_types: tuple[str, ...],
    activations_from_zero: bool = True,
    explicit: bool = False,
) -> Selection:
    """Choose the nodes of the main graph.

    Args:
        model: a float model.
        wanted: the options' say on a node.
        op_types: op types to quantize.
        activations_from_zero: the format can represent [0, high] fully, so that Relu is absorbed.
        explicit: choose for ``Format.explicit``: layers, pools, and sums that a layer makes one side of.
    """
    chosen = Selection(info=_infer(model), explicit=explicit)
    if explicit:
        op_types = tuple(t for t in op_types if t in (*WEIGHTED, *POOLS, "Add"))
    _choose(model, chosen, wanted, op_types)
    if activations_from_zero:
        _absorb(chosen)
    if explicit:
        _drop_plain_sums(chosen)
    else:
        _drop_isolated(chosen)
    _skip_inner(model, chosen)
    return chosen


def _choose(
    model: ir.Model,
    chosen: Selection,
    wanted: Callable[[ir.Node], bool],
    op_types: tuple[str, ...],
) -> None:
    for node in model.graph:
        reason = _refusal(node, chosen.info, op_types)
        if reason is None:
            continue
        if not wanted(node):
            reason = "left out by the options"
        if reason:
            if is_op(node, *WEIGHTED, "ConvTranspose", "BatchNormalization") or (
                reason == PACKED_ATTENTION
            ):
                chosen.skipped.append((node, reason))
        else:
            chosen.nodes[node] = None


def _absorb(chosen: Selection) -> None:
    """Make every Relu and Clip that the range of an 8-bit output can replace part of it."""
    for node in chosen.nodes:
        after = only_user(node.outputs[0])
        if is_op(node, *ABSORBERS) and clip_bounds(after) is not None:
            assert after is not None
            chosen.absorbed[node] = after
    for after in chosen.absorbed.values():
        chosen.nodes.pop(after, None)


def _drop_plain_sums(chosen: Selection) -> None:
    """Take out the sums that no convolution makes one side of: nothing would be fused."""
    for node in [n for n in chosen.nodes if is_op(n, "Add")]:
        sides = activation_inputs(node)
        if len(sides) < len(node.inputs) or len(chosen.reads(node)) == len(sides):
            del chosen.nodes[node]


def _skip_inner(model: ir.Model, chosen: Selection) -> None:
    for node in all_nodes(model):
        if node.graph is not model.graph and is_op(node, *WEIGHTED):
            chosen.skipped.append((node, "inside a subgraph or function, which has no statistics"))


def _refusal(node: ir.Node, info: dict[str, ValueInfo], op_types: tuple[str, ...]) -> str | None:
    """Return why ``node`` cannot be 8-bit, an empty string when it can, None when it is no candidate."""
    if is_op(node, "ConvTranspose"):
        return "ONNX Runtime has no 8-bit ConvTranspose"
    if is_op(node, "Attention", domain="com.microsoft"):
        return PACKED_ATTENTION
    if is_op(node, "BatchNormalization"):
        return "fold it first (fold_batchnorm)"
    if not is_op(node, *WEIGHTED, *FOLLOWERS):
        return None
    if node.op_type not in op_types:
        return "its op type is left out by the options" if is_op(node, *WEIGHTED) else None
    for index in activation_inputs(node):
        value = node.inputs[index]
        if value is None or value.is_initializer() or constant_tensor(value) is not None:
            return "its input is constant"
        found = info.get(value.name or "")
        if found is None or found.dtype != ir.DataType.FLOAT:
            return "its input is not known to be float32"
    return _weighted(node, info) if is_op(node, *WEIGHTED) else _follower(node, info)


def _weighted(node: ir.Node, info: dict[str, ValueInfo]) -> str:
    if is_op(only_user(node.outputs[0]), "BatchNormalization"):
        return "a BatchNormalization follows: fold it first (fold_batchnorm)"
    weight = constant_tensor(node.inputs[1])
    if weight is None:
        return "its weight is computed (try simplify) or an activation"
    if weight.dtype != ir.DataType.FLOAT or weight.size == 0:
        return f"its weight is {weight.dtype.name.lower()}"
    if is_op(node, "MatMul"):
        return "" if len(weight.shape) == 2 else f"its weight has {len(weight.shape)} dimensions"
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None:
        tensor = constant_tensor(bias)
        outputs = weight.shape[0]
        if is_op(node, "Gemm") and not int_attr(node, "transB", 0):
            outputs = weight.shape[1]
        if tensor is None or tensor.size != outputs:
            return "its bias is computed or does not fit one number per output"
    if is_op(node, "Gemm"):
        scaled = float_attr(node, "alpha", 1.0) != 1.0 or float_attr(node, "beta", 1.0) != 1.0
        if scaled or int_attr(node, "transA", 0):
            return "its alpha, beta or transA is not the default"
    return ""


def _follower(node: ir.Node, info: dict[str, ValueInfo]) -> str:
    """Followers that cannot be 8-bit are no candidates: their reason is never shown."""
    inputs = activation_inputs(node)
    if is_op(node, "Relu", "Clip") and clip_bounds(node) is None:
        return "bounds are computed"
    if is_op(node, "Concat") and any(constant_tensor(v) is not None for v in node.inputs):
        return "joins a constant"
    if is_op(node, *BINARY) and (not inputs or _constant_is_not_float(node)):
        return "constant"
    if is_op(node, *POOLS) and info[_name(node.inputs[0])].rank not in (3, 4):
        return "unusual rank"
    if is_op(node, "MaxPool") and len([o for o in node.outputs if o.name]) > 1:
        return "returns indices"
    if is_op(node, "AveragePool", "MaxPool") and int_attr(node, "ceil_mode", 0):
        return "ceil_mode"
    if is_op(node, "Resize"):
        mode = str_attr(node, "mode", "nearest")
        if mode not in ("nearest", "linear") or info[_name(node.inputs[0])].rank != 4:
            return "mode"
    return ""


def _constant_is_not_float(node: ir.Node) -> bool:
    tensors = [constant_tensor(v) for v in node.inputs]
    return any(t is not None and (t.dtype != ir.DataType.FLOAT or t.size == 0) for t in tensors)


def _name(value: ir.Value | None) -> str:
    return (value.name or "") if value is not None else ""


def clip_bounds(node: ir.Node | None) -> tuple[float, float] | None:
    """Return the constant bounds of a Relu or Clip that keeps zero, None for anything else."""
    if is_op(node, "Relu"):
        return 0.0, float("inf")
    if node is None or not is_op(node, "Clip"):
        return None
    bounds = [float("-inf"), float("inf")]
    for index in (1, 2):
        value = node.inputs[index] if len(node.inputs) > index else None
        if value is not None:
            number = scalar(value)
            if number is None:
                return None
            bounds[index - 1] = number
    return (bounds[0], bounds[1]) if bounds[0] <= 0 < bounds[1] else None


def _drop_isolated(chosen: Selection) -> None:
    """Take out, to a fixed point, the nodes whose conversions would cost more than they save."""
    while True:
        drop = [n for n in chosen.nodes if not _pays(n, chosen)]
        if not drop:
            return
        for node in drop:
            del chosen.nodes[node]
            chosen.absorbed.pop(node, None)
            if is_op(node, *WEIGHTED):
                chosen.skipped.append(
                    (node, "small, and no 8-bit neighbour: conversions cost more")
                )


def _pays(node: ir.Node, chosen: Selection) -> bool:
    values = [node.inputs[i] for i in activation_inputs(node)]
    fed = [v is not None and _arrives_quantized(v, node, chosen) for v in values]
    used = bool(chosen.consumers(chosen.output(node)))
    if is_op(node, *WEIGHTED):
        return _products_per_output(node) >= _THIN or used or any(fed)
    if not all(fed):
        return False
    # One 8-bit Add in place of two conversions to float; a pool's output is small.
    smaller = is_op(node, *POOLS) or (is_op(node, *BINARY) and len(values) == 2)
    return used or (smaller and not chosen.output(node).is_graph_output())


def _arrives_quantized(value: ir.Value, node: ir.Node, chosen: Selection) -> bool:
    """Whether ``node`` would read ``value`` in 8 bits anyway.

    MatMul and Gemm write float at no cost, and the Add behind them (a bias, a residual before a
    layer norm) is fused there. Moving a graph input is cheaper in 8 bits: it is converted once.
    """
    source = chosen.source(value)
    if source is not None:
        return not (is_op(node, *BINARY) and is_op(source, "MatMul", "Gemm"))
    return value.is_graph_input() and is_op(node, *MOVEMENT)


def _products_per_output(node: ir.Node) -> int:
    weight = constant_tensor(node.inputs[1])
    assert weight is not None
    shape = weight.shape.numpy()
    if is_op(node, "Conv"):
        count = 1
        for size in shape[1:]:
            count *= size
        return count
    return shape[1] if is_op(node, "Gemm") and int_attr(node, "transB", 0) else shape[0]


def _infer(model: ir.Model) -> dict[str, ValueInfo]:
    """Types and ranks of the main graph's values, from ONNX's shape inference."""
    graph = onnx.shape_inference.infer_shapes(skeleton_proto(model)).graph
    found = {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        if value.type.HasField("tensor_type"):
            tensor = value.type.tensor_type
            rank = len(tensor.shape.dim) if tensor.HasField("shape") else -1
            found[value.name] = ValueInfo(ir.DataType(tensor.elem_type), rank)
    return found


def without(chosen: Selection, values: set[str], reason: str) -> Selection:
    """Return the selection less the nodes that read or write one of ``values``."""
    left = replace(
        chosen,
        nodes=dict(chosen.nodes),
        absorbed=dict(chosen.absorbed),
        skipped=list(chosen.skipped),
    )
    for node in chosen.nodes:
        touched = {_name(node.inputs[i]) for i in chosen.reads(node)}
        if not chosen.explicit:
            touched.add(_name(chosen.output(node)))
        if touched & values:
            del left.nodes[node]
            left.absorbed.pop(node, None)
            left.skipped.append((node, reason))
    if left.explicit:  # a sum whose layer is gone would read what nothing is known of
        for node in [n for n in left.nodes if left.reads(n) != chosen.reads(n)]:
            del left.nodes[node]
    else:
        _drop_isolated(left)
    return left
