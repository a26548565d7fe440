"""Takes channels out of a model: weights, attributes and the numbers that tell shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from effdl.graph.channels.groups import Channels
from effdl.graph.channels.rules_moves import slice_ranges
from effdl.graph.channels.shape_inputs import wanted_shape
from effdl.graph.channels.trace import IN
from effdl.graph.probes import Probes, probe
from effdl.graph.walk import MICROSOFT, int_attr, opset
from effdl.graph.weights import (
    Names,
    add_initializer,
    constant,
    constant_tensor,
    replace_weight,
)

Mask = npt.NDArray[np.bool_]


def remove(model: ir.Model, channels: Channels, units: Iterable[int]) -> None:
    """Remove units from a model, which ``channels`` was made of and which has not changed since.

    Raises:
        ValueError: a unit is frozen, or an axis would lose all of its channels.
    """
    _Removal(model, channels, units).run()


def mask(model: ir.Model, channels: Channels, units: Iterable[int]) -> None:
    """Let nobody read units: what layers multiply them with becomes zero. Removing them computes the same."""
    gone = np.zeros(len(channels.units.frozen), bool)
    gone[list(units)] = True
    names = Names(model)
    for role in {(r.value, r.axis): r for g in channels.groups for r in g.of_kind(IN)}.values():
        of = channels.of(role.value, role.axis)
        value = role.node.inputs[role.index]
        if of is None or value is None or not gone[of].any():
            continue
        array = constant(value)
        assert array is not None
        along = [1] * array.ndim
        along[role.axis] = -1
        replaced = np.where(gone[of].reshape(along), np.zeros((), array.dtype), array)
        if value.is_initializer():
            value.const_value = ir.tensor(replaced, name=value.name)
        else:
            replace_weight(role.node, role.index, replaced, names)


class _Removal:
    def __init__(self, model: ir.Model, channels: Channels, units: Iterable[int]) -> None:
        self.model = model
        self.channels = channels
        self.gone = np.zeros(len(channels.units.frozen), bool)
        self.gone[list(units)] = True
        frozen = np.flatnonzero(self.gone & (channels.units.frozen >= 0))
        if frozen.size:
            reason = channels.units.reasons[channels.units.frozen[frozen[0]]]
            raise ValueError(f"cannot be removed: {reason}")
        self.names = Names(model)
        self.probes: Probes | None = None

    def run(self) -> None:
        cut = {v: kept for v in self.channels.axes if (kept := self.kept(v)) is not None}
        if not cut:
            return
        for value, kept in cut.items():
            for mask in kept:
                if mask is not None and not mask.any():
                    raise ValueError(f"{value.name} would lose all of its channels")
        for node in list(self.model.graph):  # before the lengths change
            if any(v in cut for v in (*node.inputs, *node.outputs) if v is not None):
                self.fix(node)
        for value, kept in cut.items():
            self.cut(value, kept)

    def kept(self, value: ir.Value) -> list[Mask | None] | None:
        """Return what stays along each axis, None for all of it; None where nothing goes."""
        found: list[Mask | None] = []
        for k in range(len(self.channels.axes[value])):
            of = self.channels.of(value, k)
            gone = None if of is None else self.gone[of]
            found.append(None if gone is None or not gone.any() else ~gone)
        return found if any(m is not None for m in found) else None

    def along(self, value: ir.Value | None, axis: int) -> Mask | None:
        kept = self.kept(value) if value is not None and value in self.channels.axes else None
        return None if kept is None else kept[axis]

    def length(self, value: ir.Value, axis: int) -> int | None:
        """Return the new length of an axis that loses some, None for the others."""
        mask = self.along(value, axis)
        return None if mask is None else int(mask.sum())

    def cut(self, value: ir.Value, kept: list[Mask | None]) -> None:
        tensor = constant_tensor(value)
        if tensor is not None:
            array = tensor.numpy()
            for axis, mask in enumerate(kept):
                if mask is not None:
                    array = np.compress(mask, array, axis=axis)
            self.set(value, array, tensor.dtype)
        elif value.shape is not None:
            dims = list(value.shape)
            for axis, mask in enumerate(kept):
                if mask is not None:
                    dims[axis] = int(mask.sum())
            value.shape = ir.Shape(dims)

    def set(self, value: ir.Value, array: npt.NDArray[np.generic], dtype: ir.DataType) -> None:
        """Give a constant other numbers, for all who read it."""
        made = ir.Tensor(np.ascontiguousarray(array), dtype=dtype, name=value.name)
        if value.is_initializer():
            value.const_value, value.shape = made, ir.Shape(made.shape.numpy())
            return
        fresh = add_initializer(self.model.graph, self.names, value.name or "weight", made)
        for node, index in list(value.uses()):
            node.replace_input_with(index, fresh)

    def fix(self, node: ir.Node) -> None:
        """Rewrite the numbers in a node that tell lengths."""
        domain = "" if node.domain == "ai.onnx" else node.domain
        fixer = _FIXERS.get((domain, node.op_type))
        if fixer is not None:
            fixer(self, node)

    def numbers(self, node: ir.Node, index: int, values: Iterable[int]) -> None:
        """Write a constant of integers as an input."""
        array = np.array(list(values), np.int64)
        old = node.inputs[index] if len(node.inputs) > index else None
        if old is not None and constant_tensor(old) is not None and old.is_initializer():
            replace_weight(node, index, array, self.names)
            return
        made = add_initializer(self.model.graph, self.names, f"{node.name}/lengths", array)
        while len(node.inputs) <= index:
            node.resize_inputs(len(node.inputs) + 1)
        node.replace_input_with(index, made)

    # what tells lengths, by operator

    def conv(self, node: ir.Node) -> None:
        groups = int_attr(node, "group", 1)
        mask = self.along(node.inputs[0], 1)
        if groups == 1 or mask is None:
            return
        grouped = mask.reshape(groups, -1)
        if (grouped.all(1) | ~grouped.any(1)).all():  # whole groups went
            node.attributes["group"] = ir.AttrInt64("group", int(grouped.any(1).sum()))

    def reshape(self, node: ir.Node) -> None:
        x, y = node.inputs[0], node.outputs[0]
        if self.kept(y) is None and (x is None or self.kept(x) is None):
            return
        if self.probes is None:
            self.probes = probe(self.model, alike=True)
        wanted = wanted_shape(self.probes, node)
        assert wanted is not None
        rank = len(self.channels.axes[y])
        lead = rank - len(wanted)  # an Expand may say the last axes only
        told = [
            n if n in (0, -1, 1) or (new := self.length(y, lead + k)) is None else new
            for k, n in enumerate(wanted)
        ]
        self.numbers(node, 1, told)

    def split(self, node: ir.Node) -> None:
        axis = int_attr(node, "axis", 0)
        if self.along(node.inputs[0], axis) is None:
            return
        lengths = []
        for out in node.outputs:
            labels = self.channels.axes[out][axis]
            mask = self.along(out, axis)
            whole = 1 if labels is None else len(labels)
            lengths.append(whole if mask is None else int(mask.sum()))
        node.attributes.pop("num_outputs", None)
        if opset(self.model) < 13:
            node.attributes["split"] = ir.AttrInt64s("split", lengths)
        else:
            self.numbers(node, 1, lengths)

    def slice(self, node: ir.Node) -> None:
        x = node.inputs[0]
        assert x is not None
        ranges = slice_ranges(node, len(self.channels.axes[x]))
        assert ranges is not None
        changed = False
        starts, ends = [], []
        for axis, (start, end, _) in ranges.items():
            mask = self.along(x, axis)
            if mask is None:
                starts.append(start)
                ends.append(end)
                continue
            first, last, _ = slice(start, end).indices(len(mask))
            starts.append(int(mask[:first].sum()))
            ends.append(int(mask[: max(first, last)].sum()))
            changed = True
        if not changed:
            return
        if "starts" in node.attributes:
            node.attributes["starts"] = ir.AttrInt64s("starts", starts)
            node.attributes["ends"] = ir.AttrInt64s("ends", ends)
        else:
            self.numbers(node, 1, starts)
            self.numbers(node, 2, ends)
            if len(node.inputs) > 3 and node.inputs[3] is not None:
                self.numbers(node, 3, ranges)

    def gather(self, node: ir.Node) -> None:
        axis = int_attr(node, "axis", 0)
        x, where = node.inputs[0], node.inputs[1]
        mask, indices = self.along(x, axis), constant(where)
        if mask is None or indices is None:
            return
        places = np.cumsum(mask) - 1
        old = indices.reshape(-1).astype(np.int64) % len(mask)
        self.numbers(node, 1, (int(places[i]) for i in old if mask[i]))

    def recurrent(self, node: ir.Node) -> None:
        mask = self.along(node.inputs[2], 2)
        if mask is not None:
            node.attributes["hidden_size"] = ir.AttrInt64("hidden_size", int(mask.sum()))

    def heads(self, node: ir.Node) -> None:
        for name, value, axis in (
            ("num_heads", node.outputs[0], 2),
            ("q_num_heads", node.outputs[0], 2),
            ("kv_num_heads", node.inputs[1], 2),
        ):
            mask = self.along(value, axis) if name in node.attributes else None
            if mask is not None:
                heads = int_attr(node, name, 1)
                stay = int(mask.reshape(heads, -1).all(1).sum())
                node.attributes[name] = ir.AttrInt64(name, stay)
        sizes = node.attributes.get("qkv_hidden_sizes")
        mask = self.along(node.outputs[0], 2)
        if sizes is not None and mask is not None:
            node.attributes["qkv_hidden_sizes"] = ir.AttrInt64s(
                "qkv_hidden_sizes", [int(mask.sum())] * 3
            )

    def resize(self, node: ir.Node) -> None:
        sizes = constant(node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3] else None
        if sizes is None or not sizes.size or node.attributes.get("axes") is not None:
            return
        y = node.outputs[0]
        told = [self.length(y, k) or int(n) for k, n in enumerate(sizes.reshape(-1))]
        if told != sizes.reshape(-1).tolist():
            self.numbers(node, 3, told)


_FIXERS: dict[tuple[str, str], Callable[[_Removal, ir.Node], None]] = {
    **{("", op): _Removal.conv for op in ("Conv", "ConvTranspose")},
    (MICROSOFT, "FusedConv"): _Removal.conv,
    **{("", op): _Removal.reshape for op in ("Reshape", "Expand")},
    ("", "Split"): _Removal.split,
    ("", "Slice"): _Removal.slice,
    ("", "Gather"): _Removal.gather,
    **{("", op): _Removal.recurrent for op in ("LSTM", "GRU", "RNN")},
    ("", "Attention"): _Removal.heads,
    (MICROSOFT, "Attention"): _Removal.heads,
    (MICROSOFT, "MultiHeadAttention"): _Removal.heads,
    ("", "Resize"): _Removal.resize,
}
