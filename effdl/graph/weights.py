"""Constants of a graph: reading them, finding their users, replacing them without side effects."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from effdl.graph.walk import all_graphs, all_nodes, is_op

Array = npt.NDArray[np.generic]


def constant_tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    """Return the tensor that ``value`` always holds, None when it is computed or can be overridden.

    Initializers and the outputs of Constant nodes are constant; an initializer that is also a graph
    input is not, since a caller may feed another value (``simplify`` removes such inputs).
    """
    if value is None:
        return None
    node = value.producer()
    if node is not None:
        return _constant_node_tensor(node) if is_op(node, "Constant") else None
    if value.is_initializer() and not value.is_graph_input():
        return value.const_value
    return None


def constant(value: ir.Value | None) -> Array | None:
    """Return what ``constant_tensor`` returns as a read-only numpy array."""
    tensor = constant_tensor(value)
    if tensor is None or tensor.dtype == ir.DataType.STRING:
        return None
    return tensor.numpy()


def scalar(value: ir.Value | None) -> float | None:
    """Return the single number that the constant ``value`` holds, None for anything else."""
    tensor = constant_tensor(value)
    if tensor is None or tensor.size != 1 or tensor.dtype == ir.DataType.STRING:
        return None
    return float(tensor.numpy().reshape(()))


def _constant_node_tensor(node: ir.Node) -> ir.TensorProtocol | None:
    for name, attr in node.attributes.items():
        if attr.is_ref():
            return None
        match name:
            case "value":
                tensor: ir.TensorProtocol = attr.value  # as_tensor() checks a protocol, slowly
                return tensor
            case "value_float":
                return ir.tensor(np.array(attr.as_float(), np.float32))
            case "value_int":
                return ir.tensor(np.array(attr.as_int(), np.int64))
            case "value_floats":
                return ir.tensor(np.array(attr.as_floats(), np.float32))
            case "value_ints":
                return ir.tensor(np.array(attr.as_ints(), np.int64))
            case _:
                return None
    return None


def initializers(model: ir.Model) -> Iterator[ir.Value]:
    """Yield every initializer of the main graph and of all subgraphs."""
    for graph in all_graphs(model):
        yield from graph.initializers.values()


def weight_tensors(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    """Yield each distinct constant tensor of the model once: initializers and Constant nodes."""
    seen: set[int] = set()
    for value in initializers(model):
        tensor = value.const_value
        if tensor is not None and id(tensor) not in seen:
            seen.add(id(tensor))
            yield tensor
    for node in all_nodes(model):
        if is_op(node, "Constant"):
            tensor = _constant_node_tensor(node)
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield tensor


def shared(value: ir.Value) -> bool:
    """Whether ``value`` has more than one use, or leaves the graph."""
    return value.is_graph_output() or len(list(value.uses())) > 1


class Names:
    """The names taken in a model; ``fresh`` hands out new ones.

    Value names are unique over the whole model, subgraphs included, since an inner graph sees the
    values of the graphs around it.
    """

    def __init__(self, model: ir.Model) -> None:
        self._taken: set[str] = set()
        scopes: list[ir.Graph | ir.Function] = [*all_graphs(model), *model.functions.values()]
        for graph in scopes:
            self._taken.update(v.name or "" for v in graph.inputs)
            if isinstance(graph, ir.Graph):
                self._taken.update(graph.initializers)
            for node in graph:
                self._taken.add(node.name or "")
                self._taken.update(o.name or "" for o in node.outputs)

    def fresh(self, base: str) -> str:
        """Return ``base``, or ``base_2``, ``base_3``... if taken, and reserve it."""
        name, k = base, 1
        while name in self._taken:
            k += 1
            name = f"{base}_{k}"
        self._taken.add(name)
        return name


def add_initializer(
    graph: ir.Graph, names: Names, base: str, array: Array | ir.TensorProtocol
) -> ir.Value:
    """Add a constant to ``graph`` under a fresh name made from ``base`` and return its value.

    Pass an ``ir.TensorProtocol`` for dtypes that numpy lacks (4-bit integers, bfloat16).
    """
    name = names.fresh(base)
    if isinstance(array, ir.TensorProtocol):
        tensor = array
        tensor.name = name
    else:
        tensor = ir.tensor(np.asarray(array), name=name)
    value = ir.Value(
        name=name,
        shape=ir.Shape(tensor.shape.numpy()),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value


def replace_weight(node: ir.Node, index: int, array: Array, names: Names) -> ir.Value:
    """Give input ``index`` of ``node`` a new constant; the old one stays for its other users.

    The initializer keeps its name when ``node`` is its only user, else a new one is added beside
    it, in the graph of ``node``. What nobody uses any more is left to the pipeline's clean-up.
    """
    old = node.inputs[index]
    if old is None or not isinstance(node.graph, ir.Graph):
        raise ValueError(f"{node.name}: input {index} is no weight of a graph")
    if old.is_initializer() and not old.is_graph_input() and not shared(old):
        tensor = ir.tensor(np.asarray(array), name=old.name)
        old.const_value = tensor
        old.shape = ir.Shape(tensor.shape.numpy())
        old.type = ir.TensorType(tensor.dtype)
        return old
    value = add_initializer(node.graph, names, old.name or f"{node.name}_weight", array)
    node.replace_input_with(index, value)
    return value


def with_initial_values(graph: ir.Graph) -> Mapping[str, ir.Value]:
    """Return the graph inputs that also have an initializer: defaults that a caller may override."""
    return {v.name or "": v for v in graph.inputs if v.is_initializer()}
