"""An If whose condition is known becomes the branch it takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

import onnx_ir as ir

from effdl.graph.dedup import Report
from effdl.graph.edit import forward, remove, rename_value, renamed, roots
from effdl.graph.shapes import Shapes
from effdl.graph.walk import all_graphs, all_nodes, is_op, subgraphs_in, subgraphs_of
from effdl.graph.weights import Array, Names, constant


def inline_ifs(model: ir.Model, decide: Callable[[ir.Node], bool | None], touch: Report) -> int:
    """Put the branch that is always taken in the place of each If that ``decide`` knows.

    Args:
        model: edited in place.
        decide: returns the condition of an If, None when it depends on data; see ``decided``.
        touch: told of every If that went.

    Returns:
        How many there were.
    """
    changes = 0
    for root, _, is_function in roots(model):
        changes += _inline_in(root, model, decide, root if is_function else None, touch)
    return changes


def _inline_in(
    graph: ir.Graph,
    model: ir.Model,
    decide: Callable[[ir.Node], bool | None],
    function: ir.Graph | None,
    touch: Report,
) -> int:
    changes = 0
    for node in list(graph):
        condition = decide(node) if is_op(node, "If") else None
        if condition is None:
            for inner in subgraphs_of(node):
                changes += _inline_in(inner, model, decide, function, touch)
            continue
        branch = node.attributes["then_branch" if condition else "else_branch"].as_graph()
        if len(branch.outputs) != len(node.outputs):
            continue  # an invalid If, left to whoever runs it
        _inline(node, branch, _NameUse(model), graph is function)
        touch(node, f"always takes the {'then' if condition else 'else'} branch, inlined")
        changes += 1
    return changes


def decided(node: ir.Node, shapes: Shapes, known: Mapping[ir.Value, Array]) -> bool | None:
    """Return the condition of an If that is constant or follows from shapes, else None."""
    if node.inputs[0] is None:
        return None
    array = known.get(node.inputs[0])
    if array is None:
        array = constant(node.inputs[0])
    if array is not None and array.size == 1:
        return bool(array.ravel()[0])
    return shapes.branch(node)


class _NameUse:
    """How often each name is used in the model, to rename only what would clash."""

    def __init__(self, model: ir.Model) -> None:
        self._names = Names(model)
        self._values: Counter[str] = Counter()
        self._nodes: Counter[str] = Counter()
        for graph in (*all_graphs(model), *(f.graph for f in model.functions.values())):
            self._values.update({id(v): v.name or "" for v in graph.inputs}.values())
            own = set(graph.inputs)
            self._values.update(v.name or "" for v in graph.initializers.values() if v not in own)
        for node in all_nodes(model):
            self._nodes[node.name or ""] += 1
            self._values.update(o.name or "" for o in node.outputs)

    def settle(self, value: ir.Value) -> None:
        """Give ``value`` a name that is unique in the whole model."""
        if value.name and self._values[value.name] > 1:
            self._values[value.name] -= 1
            rename_value(value, self._names.fresh(value.name))

    def fresh(self, base: str) -> str:
        return self._names.fresh(base)


def _inline(node: ir.Node, branch: ir.Graph, names: _NameUse, in_function: bool) -> None:
    graph = node.graph
    assert graph is not None
    results = list(branch.outputs)
    branch.outputs.clear()
    for value in list(branch.initializers.values()):
        names.settle(value)
        _move_initializer(value, branch, graph, node, in_function, results)
    inner_nodes = list(branch)
    branch.remove(inner_nodes)
    graph.insert_before(node, inner_nodes)
    for inner in inner_nodes:
        for output in inner.outputs:
            names.settle(output)
        for deeper in subgraphs_of(inner):
            for value in _values(deeper):
                names.settle(value)
    for old, new in zip(node.outputs, results, strict=True):
        if not forward(old, new):
            _pass_on(node, old, new, names)
    remove(node)


def _values(graph: ir.Graph) -> list[ir.Value]:
    values: dict[ir.Value, None] = {}
    for g in (graph, *subgraphs_in(graph)):
        values.update(dict.fromkeys((*g.inputs, *g.initializers.values())))
        for node in g:
            values.update(dict.fromkeys(node.outputs))
    return list(values)


def _move_initializer(
    value: ir.Value,
    branch: ir.Graph,
    graph: ir.Graph,
    node: ir.Node,
    in_function: bool,
    results: list[ir.Value],
) -> None:
    name = value.name or ""
    branch.initializers.pop(name)
    if not in_function:
        graph.register_initializer(value)
        return
    # The body of a function holds no initializers, so the weight becomes a Constant node.
    assert value.const_value is not None
    tensor = renamed(value.const_value, name)
    output = ir.Value(name=name, type=value.type, shape=value.shape)
    made = ir.Node("", "Constant", [], [ir.AttrTensor("value", tensor)], outputs=[output])
    graph.insert_before(node, made)
    for user, index in value.uses():
        user.replace_input_with(index, output)
    results[:] = [output if r is value else r for r in results]


def _pass_on(node: ir.Node, old: ir.Value, new: ir.Value, names: _NameUse) -> None:
    """Keep an output that cannot be rerouted by an Identity behind the value that it equals."""
    graph = node.graph
    assert graph is not None
    identity = ir.Node(
        "",
        "Identity",
        [new],
        name=names.fresh(f"{node.name or 'If'}_output"),
        outputs=[ir.Value(name=names.fresh(old.name or "output"), type=old.type, shape=old.shape)],
    )
    graph.insert_before(node, identity)
    forward(old, identity.outputs[0])
