"""Constant folding: what does not depend on an input is computed once, where the file does not grow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from effdl.graph.dedup import Report, deterministic
from effdl.graph.edit import has_reference, remove, renamed, roots, unused
from effdl.graph.elements import Facts, reshape_goal
from effdl.graph.kernels import Kernels
from effdl.graph.shape_kernels import compute
from effdl.graph.shapes import Shapes
from effdl.graph.walk import int_attr, is_op, nodes_in, subgraphs_of
from effdl.graph.weights import Array, Names, add_initializer, constant_tensor

_DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft")
# Integer weights behind these are the point of a quantized model.
_QUANTIZERS = frozenset(
    ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulNBits")
)
_INPUT_LIMIT = 4
_LIMIT = 64 << 20
_OVERHEAD = 24
"""Bytes of an initializer besides its data: dims, type, tags (its name not counted)."""


@dataclass
class Folder:
    """Folds the constants of one model, over several rounds.

    Args:
        max_growth: bytes that all results of a round that are larger than what they replace may add.
        touch, skip: where changes and reasons go.
    """

    max_growth: int
    touch: Report
    skip: Report
    kernels: Kernels = field(default_factory=Kernels)
    known: dict[ir.Value, Array] = field(default_factory=dict)

    def run(self, model: ir.Model, shapes: Shapes) -> int:
        """Fold what can be folded now; return the number of nodes that went."""
        changes = 0
        names = Names(model)
        for root, imports, is_function in roots(model):
            changes += _Round(self, shapes, imports, names, root if is_function else None).run(root)
        return changes

    def fact(self, value: ir.Value) -> Array | None:
        """Return the array that ``value`` was found to always hold."""
        return self.known.get(value)


@dataclass
class _Round:
    """One sweep forward that computes, one backward that replaces."""

    folder: Folder
    shapes: Shapes
    imports: dict[str, int]
    names: Names
    function: ir.Graph | None

    @property
    def opset(self) -> int:
        return self.imports.get("", self.imports.get("ai.onnx", 0))

    def run(self, root: ir.Graph) -> int:
        facts = Facts(self.shapes, self.folder.known)
        foldable = list(self._compute(root, facts))
        changes = 0
        growing: list[tuple[ir.Node, int]] = []
        for node in reversed(foldable):
            if node.graph is None:
                continue
            if unused(node):
                remove(node)
                changes += 1
                continue
            if not self.opset and any(o.is_graph_output() for o in node.outputs):
                # What takes its place is a Constant node of a domain the model does not import.
                self.folder.skip(node, "constant, but the model imports no default operator set")
                continue
            growth = self._growth(node)
            if growth <= 0:
                self._replace(node)
                changes += 1
            else:
                growing.append((node, growth))
        changes += self._grow(growing)
        return changes + self._shorten_reshapes(root, facts)

    def _grow(self, growing: list[tuple[ir.Node, int]]) -> int:
        """Fold the results that add a little, when all of them together add little."""
        small = [(n, g) for n, g in growing if g <= self.folder.max_growth]
        total = sum(g for _, g in small)
        changes = 0
        for node, growth in growing:
            if growth > self.folder.max_growth or total > self.folder.max_growth:
                self.folder.skip(node, f"folding it would add {growth:,} bytes to the file")
            else:
                self._replace(node)
                changes += 1
        return changes

    def _compute(self, graph: ir.Graph, facts: Facts) -> Iterator[ir.Node]:
        """Compute every node of constants, in order; yield those whose outputs are all known."""
        for node in list(graph):
            for inner in subgraphs_of(node):
                yield from self._compute(inner, facts)
            if is_op(node, "Constant"):
                if self._liftable(node):
                    yield node
                continue
            if all(o in self.folder.known for o in node.outputs) or self._evaluate(node, facts):
                yield node

    def _liftable(self, node: ir.Node) -> bool:
        """Whether a Constant node can be an initializer: not as an output, not in a function body."""
        return (
            node.graph is not self.function
            and not node.outputs[0].is_graph_output()
            and constant_tensor(node.outputs[0]) is not None
        )

    def _evaluate(self, node: ir.Node, facts: Facts) -> bool:
        known = self.folder.known
        if not self._is_candidate(node):
            return False
        inputs = [self._array(v) for v in node.inputs]
        missing = any(v is not None and a is None for v, a in zip(node.inputs, inputs, strict=True))
        if missing or not node.inputs:
            facts.visit(node)
            elements = facts.of(node.outputs[0])
            array = elements.known() if elements is not None else None
            if array is None or len(node.outputs) != 1:
                return False
            known[node.outputs[0]] = array
            return True
        refusal = self._refusal(node)
        given = sum(a.nbytes for a in inputs if a is not None)
        small = None if refusal else _shape_arithmetic(node, inputs)
        result: list[Array] | str = refusal or (
            [small]
            if small is not None
            else self.folder.kernels.run(node, inputs, self.imports, _INPUT_LIMIT * given + _LIMIT)
        )
        if isinstance(result, str):
            self.folder.skip(node, f"constant, not folded: {result}")
            return False
        made = [o for o in node.outputs if o.name]
        known.update(zip(made, result, strict=True))
        return all(o in known for o in made)

    def _is_candidate(self, node: ir.Node) -> bool:
        if has_reference(node) or subgraphs_of(node):
            return False
        # An Identity is not computed but passed through, where it leads to readers.
        passes = is_op(node, "Identity") and not node.outputs[0].is_graph_output()
        return not passes and bool(node.outputs)

    def _refusal(self, node: ir.Node) -> str:
        if node.op_type in _QUANTIZERS:
            return "quantized weights stay quantized"
        if node.domain not in _DOMAINS:
            return f"nothing is known of the domain '{node.domain}'"
        if node.domain != "com.microsoft" and not deterministic(node, self.opset):
            return "it gives other numbers each time"
        return ""

    def _array(self, value: ir.Value | None) -> Array | None:
        if value is None:
            return None
        if value in self.folder.known:
            return self.folder.known[value]
        node = value.producer()
        if node is not None and is_op(node, "Identity"):
            return self._array(node.inputs[0])
        tensor = constant_tensor(value)
        return None if tensor is None else tensor.numpy()

    def _growth(self, node: ir.Node) -> int:
        """Bytes that the file gains when constants take the place of ``node``."""
        results = [o for o in node.outputs if o.uses() or o.is_graph_output()]
        added = sum(self._bytes(o) + _OVERHEAD + len(o.name or "") for o in results)
        return added - freed_bytes(node)

    def _bytes(self, value: ir.Value) -> int:
        if value in self.folder.known:
            return self.folder.known[value].nbytes
        tensor = constant_tensor(value)
        return 0 if tensor is None else _tensor_bytes(tensor)

    def _replace(self, node: ir.Node) -> None:
        graph = node.graph
        assert graph is not None
        what = "constant made an initializer" if is_op(node, "Constant") else "folded"
        self.folder.touch(node, what)
        for output in node.outputs:
            if not (output.uses() or output.is_graph_output()):
                continue
            if output.is_graph_output() or graph is self.function:
                self._replace_by_node(graph, node, output)
            else:
                self._replace_by_initializer(graph, output)
        remove(node)

    def _tensor(self, value: ir.Value) -> ir.TensorProtocol:
        name = value.name or ""
        tensor = constant_tensor(value)
        if tensor is not None:
            return renamed(tensor, name)
        array = self.folder.known[value]
        if array.dtype.kind in "OSU":
            words = [w if isinstance(w, bytes) else str(w).encode() for w in array.ravel()]
            flat = np.array(words, dtype=object).reshape(array.shape)
            return ir.StringTensor(flat, shape=ir.Shape(array.shape), name=name)
        return ir.tensor(array, name=name)

    def _replace_by_initializer(self, graph: ir.Graph, output: ir.Value) -> None:
        tensor = self._tensor(output)
        value = ir.Value(
            name=output.name,
            shape=ir.Shape(tensor.shape.numpy()),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        for user, index in output.uses():
            user.replace_input_with(index, value)
        output.name = self.names.fresh(f"{output.name}_folded")
        graph.register_initializer(value)

    def _replace_by_node(self, graph: ir.Graph, node: ir.Node, output: ir.Value) -> None:
        made = ir.Node(
            "",
            "Constant",
            [],
            [ir.AttrTensor("value", self._tensor(output))],
            name=self.names.fresh(f"{node.name or node.op_type}_folded"),
            outputs=[ir.Value(name=self.names.fresh(output.name or "constant"))],
        )
        new = made.outputs[0]
        new.shape, new.type = output.shape, output.type
        graph.insert_before(node, made)
        for user, index in output.uses():
            user.replace_input_with(index, new)
        new.name, output.name = output.name, new.name
        new.doc_string = output.doc_string
        for i, other in enumerate(graph.outputs):
            if other is output:
                graph.outputs[i] = new

    def _shorten_reshapes(self, graph: ir.Graph, facts: Facts) -> int:
        """Give a Reshape a constant shape where what is known of its elements determines it."""
        changes = 0
        for node in list(graph):
            for inner in subgraphs_of(node):
                changes += self._shorten_reshapes(inner, facts)
            if not is_op(node, "Reshape") or len(node.inputs) < 2 or graph is self.function:
                continue
            data, shape = node.inputs
            elements = facts.of(shape) if constant_tensor(shape) is None else None
            if data is None or elements is None or int_attr(node, "allowzero", 0):
                continue
            goal = reshape_goal(facts.dims(data), elements)
            if goal is not None:
                value = add_initializer(
                    graph, self.names, f"{node.name or 'Reshape'}_shape", np.array(goal, np.int64)
                )
                node.replace_input_with(1, value)
                self.folder.touch(node, f"reshapes to the constant {list(goal)}")
                changes += 1
        return changes


def _shape_arithmetic(node: ir.Node, inputs: list[Array | None]) -> Array | None:
    """Compute on small integers without a session, where the operator is a simple one."""
    if node.domain not in ("", "ai.onnx") or len(node.outputs) != 1:
        return None
    return compute(node.op_type, inputs, {n: a.value for n, a in node.attributes.items()})


def _tensor_bytes(tensor: ir.TensorProtocol) -> int:
    if isinstance(tensor, ir.TensorProtoTensor):
        return int(tensor.raw.ByteSize())
    return tensor.nbytes


def freed_bytes(node: ir.Node) -> int:
    """Bytes of everything that nobody needs once ``node`` is gone: nodes and initializers."""
    remaining: dict[ir.Value, int] = {}
    freed = 0
    todo = [node]
    while todo:
        dead = todo.pop()
        freed += ir.serde.serialize_node(dead).ByteSize() + 4
        if dead is not node:
            freed += sum(_declared_bytes(o) for o in dead.outputs)
        for value in _reads(dead):
            if value not in remaining:
                remaining[value] = len(value.uses())
            remaining[value] -= 1
            if remaining[value] or value.is_graph_output() or value.is_graph_input():
                continue
            maker = value.producer()
            if maker is None:
                if value.is_initializer() and value.const_value is not None:
                    size = _tensor_bytes(value.const_value)
                    freed += size + _OVERHEAD + len(value.name or "")
            elif not any(
                o.is_graph_output() or remaining.get(o, len(o.uses())) for o in maker.outputs
            ):
                todo.append(maker)
    return freed


def _declared_bytes(value: ir.Value) -> int:
    """Bytes of the entry in value_info, about."""
    if value.type is None or value.shape is None:
        return 0
    return 14 + len(value.name or "") + 4 * len(value.shape)


def _reads(node: ir.Node) -> Iterator[ir.Value]:
    """Yield what ``node`` reads, once per use, what its subgraphs read from outside included."""
    yield from (v for v in node.inputs if v is not None)
    for graph in subgraphs_of(node):
        for inner in nodes_in(graph):
            yield from (v for v in inner.inputs if v is not None)
