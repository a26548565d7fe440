"""Which inputs and outputs of a node may change from float32 to float16: what its schema says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import onnx
import onnx_ir as ir

from effdl.graph.walk import int_attr, is_op, str_attr, subgraphs_of

DtypeOf = Callable[[ir.Value | None], ir.DataType | None]
FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16

# Operators that only move, select or convert numbers: they run in the dtype of their neighbours.
NEUTRAL = frozenset(
    (
        *("Identity", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Expand", "Tile"),
        *("Slice", "Split", "Concat", "Gather", "GatherElements", "GatherND", "Pad", "Where"),
        *("DepthToSpace", "SpaceToDepth", "ReverseSequence", "Dropout", "Trilu", "Compress"),
        *("ConstantOfShape", "Cast", "Shape", "Size"),
    )
)
# ONNX Runtime's own operators whose floating-point inputs and outputs all have one type.
_CONTRIB = (
    *(
        "Gelu",
        "FastGelu",
        "QuickGelu",
        "BiasGelu",
        "FusedMatMul",
        "Attention",
        "MultiHeadAttention",
    ),
    *("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "RotaryEmbedding"),
)
# Inputs that hold coordinates, sizes or indices: they lose their meaning when rounded.
_EXACT_INPUTS = {("Resize", 1), ("Resize", 2), ("OneHot", 0), ("OneHot", 1)}
_SCATTER = ("ScatterND", "ScatterElements")
_SEQUENCES = ("Sequence", "Optional")


@dataclass(frozen=True)
class Slots:
    """The positions of a node's float32 inputs and outputs that become float16."""

    inputs: frozenset[int]
    outputs: frozenset[int]


def slots_of(
    node: ir.Node, dtype: DtypeOf, opsets: Mapping[str, int], functions: set[tuple[str, str]]
) -> Slots | str | None:
    """Return what of ``node`` may become float16.

    Args:
        node: a node of the main graph, no Constant.
        dtype: element types of values as the model is written.
        opsets: versions of the domains.
        functions: (domain, name) of the model's own functions.

    Returns:
        The positions; the reason why none may change; None when the node has no float32 at all.
    """
    ins = [i for i, v in enumerate(node.inputs) if dtype(v) == FLOAT]
    outs = [i for i, v in enumerate(node.outputs) if dtype(v) == FLOAT]
    if subgraphs_of(node):
        return "control flow and everything inside stays float32"
    if not ins and not outs:
        return None
    if (node.domain, node.op_type) in functions:
        return "it calls a function of the model, which stays float32"
    words = any(word in node.op_type for word in _SEQUENCES)
    if words or not all(is_tensor(v) for v in (*node.inputs, *node.outputs)):
        return "it works on sequences or optionals"
    if is_op(node, "Cast"):
        return _cast_slots(node, dtype)
    if is_op(node, "BitCast"):
        return "it reads the bits of float32"
    if is_op(node, *_SCATTER) and str_attr(node, "reduction", "none") != "none":
        return "ONNX Runtime's CPU provider cannot reduce while it scatters float16"
    if is_op(node, "ConstantOfShape"):
        return Slots(frozenset(), frozenset(outs))
    if node.domain == "com.microsoft" and node.op_type in _CONTRIB:
        return Slots(frozenset(ins), frozenset(outs))
    domain = "" if node.domain == "ai.onnx" else node.domain
    version = opsets.get(domain, opsets.get("ai.onnx", 0) if domain == "" else 0)
    if version < 1 or not onnx.defs.has(node.op_type, version, domain):
        return f"{node.op_type} of domain '{domain}' is not known to take float16"
    return _schema_slots(
        node, ins, outs, onnx.defs.get_schema(node.op_type, version, domain), dtype
    )


def is_tensor(value: ir.Value | None) -> bool:
    """Whether ``value`` is a dense tensor, as far as its declaration says."""
    return value is None or value.type is None or isinstance(value.type, ir.TensorType)


def _cast_slots(node: ir.Node, dtype: DtypeOf) -> Slots | None:
    source, to = dtype(node.inputs[0]), int_attr(node, "to", 0)
    if source in (None, HALF, ir.DataType.BFLOAT16):
        return None  # a float32 island that somebody made on purpose starts here
    return Slots(
        frozenset([0] if source == FLOAT else []), frozenset([0] if to == int(FLOAT) else [])
    )


def _schema_slots(
    node: ir.Node,
    ins: Sequence[int],
    outs: Sequence[int],
    schema: onnx.defs.OpSchema,
    dtype: DtypeOf,
) -> Slots | str:
    allowed = {c.type_param_str: set(c.allowed_type_strs) for c in schema.type_constraints}
    half = {name for name, types in allowed.items() if "tensor(float16)" in types}
    variables = [_variable(schema.inputs, i) for i in range(len(node.inputs))]
    chosen = frozenset(
        i for i in ins if variables[i] in half and (node.op_type, i) not in _EXACT_INPUTS
    )
    bound = {variables[i] for i in chosen}
    for i, value in enumerate(node.inputs):
        if value is not None and variables[i] in bound and dtype(value) is None:
            return f"the type of '{value.name}' is unknown"
    if any(variables[i] in bound and i not in chosen for i in ins):
        return f"{node.op_type} mixes sizes and data in one type"
    if any((v := _variable(schema.outputs, i)) in half and v not in bound for i in outs):
        return f"nothing says which type the outputs of {node.op_type} would get"
    results = frozenset(i for i in outs if _variable(schema.outputs, i) in bound)
    if not chosen and not results:
        return f"the schema of {node.op_type} (opset {schema.since_version}) has no float16 here"
    return Slots(chosen, results)


def _variable(parameters: Sequence[onnx.defs.OpSchema.FormalParameter], index: int) -> str:
    """Return the type variable at a position; the last parameter may stand for many."""
    if not parameters:
        return ""
    parameter = parameters[min(index, len(parameters) - 1)]
    return "" if not parameter.is_homogeneous else parameter.type_str
