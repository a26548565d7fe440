"""The pass ``fuse_gemm``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from effdl.graph.dims import Dims
from effdl.graph.edit import roots
from effdl.graph.match import Mismatch, keeps_rank, need, some, split_scalar
from effdl.graph.shapes import Shapes, infer
from effdl.graph.walk import float_attr, int_attr, ints_attr, is_op, nodes_in, only_user, producer
from effdl.graph.weights import constant_tensor, scalar
from effdl.passes.base import Context, NodePass

_DTYPES = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16)
_OPTIONAL_BIAS = 11
"""The opset from which Gemm may have no C."""
_LEAST, _MOST = 1e-30, 1e30
"""Factors outside are left alone: alpha and beta are float32."""


class FuseGemm(NodePass):
    """Turn matrix products of two axes and what stands beside them into Gemm nodes.

    What it does: MatMul and the Add behind it become one Gemm where both operands are known to have
    two axes and the bias stretches one way only. A Transpose before the product becomes transA or
    transB, and the Mul or Div by one number behind a product of two computed matrices becomes alpha
    and beta. Nothing is put where pruning, low-rank factorization and quantization would see less
    than before: products with a constant weight take a bias of one number per output only.

    When it helps: fewer nodes; static quantization gives a Gemm its bias in integers, which it
    cannot do for the Add behind a MatMul.

    When it does not: ONNX Runtime makes most of these Gemms itself when it loads a model, so latency
    stays the same. Products of three and more axes stay: between two Reshapes a Gemm is no faster.

    Example:
        passes: [simplify, fold_batchnorm, fuse_gemm]
    """

    min_opset: ClassVar[int] = 7

    any_bias: bool = False
    """Also take a bias that differs by row or is computed; quantize_static leaves such a Gemm in float."""

    def run(self, model: ir.Model, ctx: Context) -> int:
        """Return the number of nodes that became part of a Gemm."""
        rules = {op: rule for ops, rule in _RULES for op in ops}
        found = [n for g, _, _ in roots(model) for n in nodes_in(g) if is_op(n, *rules)]
        if not any(is_op(n, "MatMul", "Gemm") and self.selected(n) for n in found):
            return 0
        fuser = _Fuser(self, ctx, infer(model), {}, {})
        total = 0
        for graph, imports, is_function in roots(model):
            opset = imports.get("", imports.get("ai.onnx", 0))
            if opset >= self.min_opset:
                while changes := fuser.sweep(graph, opset, is_function):
                    total += changes
        for node, reason in fuser.declined.items():
            if node.graph is not None:
                ctx.skip(node, reason)
        return total


@dataclass
class _Fuser:
    """One run.

    Args:
        origin: the values that were replaced, by the new ones: shapes are known of the former.
        declined: the last reason, by node.
    """

    step: FuseGemm
    ctx: Context
    shapes: Shapes
    origin: dict[ir.Value, ir.Value]
    declined: dict[ir.Node, str]

    def sweep(self, graph: ir.Graph, opset: int, is_function: bool) -> int:
        """Go through all nodes once; return the number of nodes that went into a Gemm."""
        rules = {op: rule for ops, rule in _RULES for op in ops}
        changes = 0
        for node in list(nodes_in(graph)):
            if node.graph is None or not is_op(node, *rules):
                continue
            self.declined.pop(node, None)
            try:
                changes += rules[node.op_type](self, node, opset, is_function)
            except Mismatch as e:
                self.declined[node] = str(e)
        return changes

    def dims(self, value: ir.Value | None) -> Dims | None:
        """Return the shape of a value, also of one that this run made."""
        while value is not None and value in self.origin:
            value = self.origin[value]
        return self.shapes.of(value)

    def product(self, value: ir.Value | None, user: ir.Node) -> ir.Node | None:
        """Return the selected MatMul or Gemm that makes ``value`` for ``user`` alone."""
        node = producer(value, "MatMul", "Gemm")
        if node is None or only_user(value) is not user or not self.step.selected(node):
            return None
        return node if node.graph is user.graph else None

    def matrices(self, node: ir.Node) -> tuple[int | str | None, int | str | None]:
        """Return rows and columns of what a MatMul or Gemm of a type with a Gemm kernel makes.

        Raises:
            Mismatch: an operand does not have two axes, or is of another type.
        """
        sizes = []
        for k, trans in enumerate(("transA", "transB")):
            dims = self.dims(node.inputs[k])
            if not is_op(node, "Gemm"):
                dims = some(dims, f"the rank of '{_name(node.inputs[k])}' is unknown")
                need(len(dims) == 2, f"an operand of the product has {len(dims)} axes, not 2")
            transposed = is_op(node, "Gemm") and int_attr(node, trans, 0) != 0
            sizes.append(dims[k ^ transposed] if dims is not None and len(dims) == 2 else None)
        dtype = self.dtype(node)
        named = dtype.name.lower() if dtype else "of unknown type"
        need(dtype in _DTYPES, f"the product is {named}: no Gemm kernel for it")
        made = self.dims(node.outputs[0])
        if made is not None and len(made) == 2:
            sizes = [
                a if isinstance(a, int) or b is None else b
                for a, b in zip(made, sizes, strict=True)
            ]
        return sizes[0], sizes[1]

    def dtype(self, node: ir.Node) -> ir.DataType | None:
        """Return the element type of the operands."""
        for value in node.inputs[:2]:
            while value is not None and value in self.origin:
                value = self.origin[value]  # noqa: PLW2901
            dtype = self.shapes.dtype(value)
            if dtype is not None:
                return dtype
        return None

    def add(self, node: ir.Node, opset: int, is_function: bool) -> int:
        """MatMul, or Gemm without C, and Add: a Gemm with C."""
        near = None
        for k in (0, 1):
            product = self.product(node.inputs[k], node)
            bias = node.inputs[1 - k] if len(node.inputs) == 2 else None
            if product is None or bias is None or _bias(product) is not None:
                continue
            try:
                need(not is_function, "it is inside a function of the model")
                self._need_bias(product, bias)
            except Mismatch as e:
                near = near or str(e)
                continue
            self._replace(product, node, bias, {"beta": 1.0})
            return 1
        if near:
            raise Mismatch(near)
        return 0

    def _need_bias(self, product: ir.Node, bias: ir.Value) -> None:
        rows, columns = self.matrices(product)
        dims = some(self.dims(bias), f"the shape of the bias '{bias.name}' is unknown")
        need(len(dims) <= 2, f"the bias has {len(dims)} axes")
        padded = (1,) * (2 - len(dims)) + dims
        for d, size in zip(padded, (rows, columns), strict=True):
            fits = d == 1 or (d is not None and d == size)
            need(fits, "the bias may be larger than the product it is added to")
        if constant_tensor(product.inputs[1]) is None:
            left = constant_tensor(product.inputs[0]) is not None
            need(not left, "its weight is on the left, where later passes expect none in a Gemm")
            return
        tensor = constant_tensor(bias)
        one_each = tensor is not None and tensor.size == columns and padded[1] == columns
        need(
            one_each or self.step.any_bias,
            "the bias is not one constant per output: quantization would decline the Gemm "
            "(any_bias fuses it)",
        )

    def product_of_transposed(self, node: ir.Node, opset: int, is_function: bool) -> int:
        """Transpose and MatMul or Gemm: transA or transB."""
        if not self.step.selected(node):
            return 0
        inputs, flags = list(node.inputs), {}
        for k, trans in enumerate(("transA", "transB")):
            before = producer(inputs[k], "Transpose")
            if before is None or before.graph is not node.graph:
                continue
            turned = before.inputs[0]
            dims = self.dims(turned)
            perm = ints_attr(before, "perm", (1, 0) if dims and len(dims) == 2 else ())
            if perm != (1, 0):
                continue
            if only_user(inputs[k]) is not node:
                continue  # it would stay for its other users: nothing gained
            self.matrices(node)
            need(not is_function, "it is inside a function of the model")
            late = is_op(node, "Gemm") or opset >= _OPTIONAL_BIAS
            need(late, f"a Gemm without bias came with opset {_OPTIONAL_BIAS}")
            weighted = constant_tensor(node.inputs[1]) is not None
            need(k == 1 or not weighted, "quantization takes no transposed input")
            flags[trans] = 1 - (int_attr(node, trans, 0) if is_op(node, "Gemm") else 0)
            inputs[k] = turned
        if not flags:
            return 0
        self._rewrite(node, inputs, flags)
        return len(flags)

    def scaled(self, node: ir.Node, opset: int, is_function: bool) -> int:
        """A product of two computed matrices times one number: alpha and beta."""
        parts = split_scalar(node)
        product = self.product(parts[0], node) if parts is not None else None
        if parts is None or product is None or (is_op(node, "Div") and node.inputs[0] is parts[1]):
            return 0
        if any(constant_tensor(v) is not None for v in product.inputs[:2]):
            return 0  # fold_batchnorm puts it into the weights
        self.matrices(product)
        need(not is_function, "it is inside a function of the model")
        need(keeps_rank(parts[1], 2), f"the constant '{parts[1].name}' adds axes")
        late = is_op(product, "Gemm") or opset >= _OPTIONAL_BIAS
        need(late, f"a Gemm without bias came with opset {_OPTIONAL_BIAS}")
        factor = some(scalar(parts[1]), "its factor is computed")
        need(_LEAST < abs(factor) < _MOST, f"its factor {factor:g} is no fit number for alpha")
        factor = 1 / factor if is_op(node, "Div") else factor
        gemm = is_op(product, "Gemm")
        numbers = {"alpha": factor * (float_attr(product, "alpha", 1.0) if gemm else 1.0)}
        if _bias(product) is not None:
            numbers["beta"] = factor * float_attr(product, "beta", 1.0)
        dtype = self.dtype(product)
        for name, number in numbers.items():
            exact = float(np.float32(number)) == number
            fits = _LEAST < abs(number) < _MOST and dtype is not ir.DataType.FLOAT16
            need(
                fits and (exact or dtype is ir.DataType.FLOAT),
                f"{name} = {number:g}, a float32, would be less exact than the factor",
            )
        self._replace(product, node, _bias(product), numbers)
        return 1

    def _replace(
        self,
        product: ir.Node,
        last: ir.Node,
        bias: ir.Value | None,
        numbers: dict[str, float],
    ) -> None:
        """Put one Gemm in place of ``product`` and ``last``."""
        gemm = is_op(product, "Gemm")
        kept = dict(product.attributes) if gemm else {}
        kept |= {k: ir.AttrFloat32(k, float(np.float32(v))) for k, v in numbers.items()}
        kept = {k: a for k, a in kept.items() if k not in numbers or a.as_float() != 1.0}
        inputs = [*product.inputs[:2], *([bias] if bias is not None else [])]
        what = f"{product.op_type} and {last.op_type} '{last.name}' -> Gemm"
        self._put(product, last, inputs, kept, what)

    def _rewrite(self, node: ir.Node, inputs: list[ir.Value | None], flags: dict[str, int]) -> None:
        """Put a Gemm with other operands in place of ``node``; the Transposes are left without use."""
        kept = dict(node.attributes) if is_op(node, "Gemm") else {}
        kept |= {k: ir.AttrInt64(k, v) for k, v in flags.items()}
        kept = {k: a for k, a in kept.items() if k not in flags or flags[k]}
        before = [p for v in node.inputs[:2] if (p := producer(v, "Transpose")) is not None]
        what = f"Transpose and {node.op_type} -> Gemm with {' and '.join(flags)}"
        self._put(node, node, inputs, kept, what)
        for transpose in before:
            if transpose.graph is not None and not transpose.outputs[0].uses():
                transpose.graph.remove(transpose, safe=True)

    def _put(
        self,
        product: ir.Node,
        last: ir.Node,
        inputs: list[ir.Value | None],
        attributes: dict[str, ir.Attr],
        what: str,
    ) -> None:
        graph, old = last.graph, last.outputs[0]
        assert graph is not None
        node = ir.Node("", "Gemm", inputs, list(attributes.values()), name=product.name)
        ir.convenience.replace_nodes_and_values(
            graph, last, list(dict.fromkeys((product, last))), [node], [old], list(node.outputs)
        )
        self.origin[node.outputs[0]] = old
        self.declined.pop(last, None)
        self.ctx.touch(node, what)


_Rule = Callable[[_Fuser, ir.Node, int, bool], int]
_RULES: tuple[tuple[tuple[str, ...], _Rule], ...] = (
    (("Add",), _Fuser.add),
    (("MatMul", "Gemm"), _Fuser.product_of_transposed),
    (("Mul", "Div"), _Fuser.scaled),
)


def _bias(product: ir.Node) -> ir.Value | None:
    return product.inputs[2] if is_op(product, "Gemm") and len(product.inputs) > 2 else None


def _name(value: ir.Value | None) -> str:
    return (value.name or "") if value is not None else ""
