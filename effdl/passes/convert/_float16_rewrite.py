"""Carries out a float16 plan: constants, types, and one Cast per value and direction."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from effdl.graph.edit import can_forward, forward, remove_if_unused, rename_value
from effdl.graph.shapes import Shapes
from effdl.graph.walk import int_attr, is_op, producer
from effdl.graph.weights import Names, add_initializer, constant
from effdl.passes.convert._float16_plan import Plan, is_default
from effdl.passes.convert._float16_range import lost, over, to_half
from effdl.passes.convert._float16_slots import FLOAT, HALF, is_tensor


@dataclass
class Counts:
    """Figures of a conversion: Casts added, constants moved into the range, weights, those lost."""

    casts: int = 0
    clamped: int = 0
    weights: int = 0
    vanished: int = 0


class Rewriter:
    """Edits one model to a plan.

    Args:
        model: changed in place.
        shapes: types of the model as it is.
        plan: what becomes float16.
        keep_io_types: graph inputs and outputs stay float32.
        max_finite: what stands for numbers beyond the range.
    """

    def __init__(
        self, model: ir.Model, shapes: Shapes, plan: Plan, keep_io_types: bool, max_finite: float
    ) -> None:
        self._model = model
        self._graph = model.graph
        self._shapes = shapes
        self._plan = plan
        self._outside = FLOAT if keep_io_types else HALF
        self._max_finite = max_finite
        self._names = Names(model)
        self._written = {
            node.outputs[i] for node, slots in plan.half.items() for i in slots.outputs
        }
        self._inputs = {
            v
            for v in model.graph.inputs
            if shapes.dtype(v) == FLOAT and is_tensor(v) and not is_default(v)
        }
        self._casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self.counts = Counts()

    def run(self) -> Counts:
        """Do all edits and return what was counted."""
        nodes = list(self._graph)
        for value in (*self._initializers(), *self._constants(nodes)):
            self._convert_constant(value)
        for node in self._plan.half:
            self._convert_attributes(node)
        values = [*self._inputs_in_order(), *(o for n in nodes for o in n.outputs)]
        values = [v for v in values if self._shapes.dtype(v) == FLOAT and is_tensor(v)]
        for value in values:
            if not is_op(value.producer(), "Constant"):
                self._connect(value)
        for value in values:
            self._set_type(value)
        self._bypass(nodes)
        return self.counts

    def _initializers(self) -> list[ir.Value]:
        found = self._graph.initializers.values()
        return [v for v in found if v.dtype == FLOAT and not v.is_graph_input()]

    def _inputs_in_order(self) -> list[ir.Value]:
        return [v for v in self._graph.inputs if v in self._inputs]

    def _constants(self, nodes: list[ir.Node]) -> list[ir.Value]:
        made = [n.outputs[0] for n in nodes if is_op(n, "Constant")]
        return [v for v in made if self._shapes.dtype(v) == FLOAT and constant(v) is not None]

    def _wants_half(self, node: ir.Node, index: int) -> bool:
        slots = self._plan.half.get(node)
        return slots is not None and index in slots.inputs

    def _convert_constant(self, value: ir.Value) -> None:
        """Give the float16 users of a constant a float16 version; replace it if it has no others."""
        uses = list(value.uses())
        half = [(n, i) for n, i in uses if self._wants_half(n, i)]
        array = constant(value)
        if not half or array is None:
            return
        nonzero, vanished = lost(array)
        self.counts.weights += nonzero
        self.counts.vanished += vanished
        self.counts.clamped += over(array)
        small = to_half(array, self._max_finite)
        node = value.producer()
        if len(half) < len(uses) or value.is_graph_output():
            # before version 4, initializers had to be graph inputs too
            self._model.ir_version = max(self._model.ir_version, 4)
            new = add_initializer(self._graph, self._names, f"{value.name}_float16", small)
            for user, index in half:
                user.replace_input_with(index, new)
            return
        tensor = ir.tensor(small, name=value.name)
        if node is None:
            value.const_value = tensor
        else:
            node.attributes.clear()
            node.attributes["value"] = ir.AttrTensor("value", tensor)
            value.const_value = tensor if value.const_value is not None else None
        value.type = ir.TensorType(HALF)

    def _convert_attributes(self, node: ir.Node) -> None:
        """Set the dtype that a node's attribute decides: Cast and ConstantOfShape."""
        slots = self._plan.half[node]
        if not slots.outputs:
            return
        if is_op(node, "Cast"):
            node.attributes["to"] = ir.AttrInt64("to", int(HALF))
        elif is_op(node, "ConstantOfShape"):
            attr = node.attributes.get("value")
            filler = np.zeros(1, np.float32) if attr is None else attr.as_tensor().numpy()
            self.counts.clamped += over(filler)
            tensor = ir.tensor(to_half(filler, self._max_finite), name="value")
            node.attributes["value"] = ir.AttrTensor("value", tensor)

    def _stored(self, value: ir.Value) -> ir.DataType:
        if value in self._inputs:
            return self._outside
        return HALF if value in self._written else FLOAT

    def _connect(self, value: ir.Value) -> None:
        """Put a Cast before the users of ``value`` that want the other dtype."""
        stored = self._stored(value)
        returned = [i for i, o in enumerate(self._graph.outputs) if o is value]
        for user, index in list(value.uses()):
            wanted = HALF if self._wants_half(user, index) else FLOAT
            if wanted != stored:
                user.replace_input_with(index, self._cast(value, wanted))
        if returned and stored != self._outside:
            result = self._cast(value, self._outside, own=True)
            name = value.name or "output"
            rename_value(value, self._names.fresh(f"{name}_{_word(stored)}"))
            result.name = name
            for i in returned:
                self._graph.outputs[i] = result

    def _cast(self, value: ir.Value, to: ir.DataType, *, own: bool = False) -> ir.Value:
        """Return ``value`` in dtype ``to``; ``own``: as an output of a Cast of this pass."""
        known = self._casts.get((value, to))
        if known is not None:
            return known
        back = producer(value, "Cast")
        source = back.inputs[0] if back is not None else None
        if not own and source is not None and self._now(source) == to:
            return source  # the model itself had cast it the other way
        made = value.producer()
        node = ir.node(
            "Cast", [value], {"to": int(to)}, name=self._names.fresh(f"{value.name}_cast")
        )
        result = node.outputs[0]
        result.name = self._names.fresh(f"{value.name}_{_word(to)}")
        result.shape = value.shape
        result.type = ir.TensorType(to)
        if made is not None:
            self._graph.insert_after(made, node)
        else:
            self._graph.insert_before(self._graph[0], node)
        self._casts[value, to] = result
        self.counts.casts += 1
        return result

    def _set_type(self, value: ir.Value) -> None:
        if self._stored(value) == HALF and value.type is not None:
            value.type = ir.TensorType(HALF)

    def _bypass(self, nodes: list[ir.Node]) -> None:
        """Remove the model's own Casts that now cast float16 to float16 or that nobody reads."""
        for node in nodes:
            if not is_op(node, "Cast") or node.graph is None:
                continue
            source, target = node.inputs[0], node.outputs[0]
            was = self._shapes.dtype(source)
            if source is None or was not in (FLOAT, HALF):
                continue
            to_same = int_attr(node, "to", 0) == int(HALF) and self._now(source) == HALF
            if to_same and can_forward(target, source):
                forward(target, source)
            if to_same or (was == HALF and not target.is_graph_output()):
                remove_if_unused(node)

    def _now(self, value: ir.Value) -> ir.DataType | None:
        """Return the dtype that ``value`` has by this plan."""
        dtype = self._shapes.dtype(value)
        if dtype == FLOAT and value.dtype != HALF:
            return self._stored(value)
        return value.dtype or dtype


def _word(dtype: ir.DataType) -> str:
    return "float16" if dtype == HALF else "float32"
