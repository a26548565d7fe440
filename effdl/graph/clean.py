"""What follows every change: dead code out, nodes in order, names unique, interface untouched."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import onnx
import onnx_ir as ir

from effdl.graph.edit import raise_ir_version, remove, rename_value, renamed, roots, unused
from effdl.graph.walk import all_graphs, all_nodes, is_op, nodes_in, subgraphs_of
from effdl.graph.weights import Names

_DEFAULT_DOMAINS = ("", "ai.onnx")


def clean(model: ir.Model) -> int:
    """Remove what no graph output needs, restore order and unique names; return the changes made.

    Dead nodes, initializers nobody reads, functions nobody calls and opset imports nobody needs go,
    in subgraphs and functions too. Graph inputs and outputs stay, also unused ones.
    """
    changes = sum(_sort(graph) for graph, _, _ in roots(model))
    changes += _remove_functions(model)
    changes += _remove_dead(model)
    changes += _remove_functions(model)
    changes += _remove_imports(model)
    return changes + fix_names(model) + int(raise_ir_version(model))


def cut(model: ir.Model, outputs: Sequence[ir.Value]) -> None:
    """Make values of the main graph the model's outputs, and leave what they need.

    ONNX Runtime computes what it is given, needed or not; a weight that is a graph input too and read by
    nobody it drops, and then fails to find it.
    """
    graph = model.graph
    graph.outputs[:] = outputs
    _remove_dead(model)
    for value in [v for v in graph.inputs if v.is_initializer() and not v.uses()]:
        if not value.is_graph_output():
            graph.inputs.remove(value)
            del graph.initializers[value.name or ""]


def _remove_dead(model: ir.Model) -> int:
    changes = sum(_remove_dead_nodes(graph, imports) for graph, imports, _ in roots(model))
    return changes + sum(_remove_initializers(graph) for graph in all_graphs(model))


def _sort(graph: ir.Graph) -> int:
    if _is_sorted(graph, set(), set(nodes_in(graph))):
        return 0
    graph.sort()
    return 1


def _is_sorted(graph: ir.Graph, seen: set[ir.Node], inside: set[ir.Node]) -> bool:
    for node in graph:
        for value in node.inputs:
            maker = value.producer() if value is not None else None
            if maker is not None and maker not in seen and maker in inside:
                return False
        if not all(_is_sorted(g, seen, inside) for g in subgraphs_of(node)):
            return False
        seen.add(node)
    return True


def _remove_dead_nodes(graph: ir.Graph, imports: dict[str, int]) -> int:
    changes = 0
    for node in reversed(list(graph)):
        if unused(node):
            remove(node)
            changes += 1
            continue
        changes += _trim(node, imports)
        for inner in subgraphs_of(node):
            changes += _remove_dead_nodes(inner, imports)
    return changes


def _trim(node: ir.Node, imports: dict[str, int]) -> int:
    """Drop absent optional inputs and unread optional outputs at the end of the lists."""
    if node.domain not in _DEFAULT_DOMAINS:
        return 0
    version = imports.get("", imports.get("ai.onnx", 0))
    if not version or not onnx.defs.has(node.op_type, version, ""):
        return 0
    schema = onnx.defs.get_schema(node.op_type, version, "")
    inputs = len(node.inputs)
    while inputs > schema.min_input and node.inputs[inputs - 1] is None:
        inputs -= 1
    outputs = len(node.outputs)
    # The number of outputs says whether an old BatchNormalization or Dropout is training.
    if not is_op(node, "BatchNormalization", "Dropout"):
        while outputs > max(1, schema.min_output) and _droppable(node, outputs - 1, schema):
            outputs -= 1
    changes = int(inputs < len(node.inputs)) + int(outputs < len(node.outputs))
    node.resize_inputs(inputs)
    node.resize_outputs(outputs)
    return changes


def _droppable(node: ir.Node, index: int, schema: onnx.defs.OpSchema) -> bool:
    value = node.outputs[index]
    if value.uses() or value.is_graph_output() or index >= len(schema.outputs):
        return False
    return bool(schema.outputs[index].option == onnx.defs.OpSchema.FormalParameterOption.Optional)


def _remove_initializers(graph: ir.Graph) -> int:
    dead = [
        name
        for name, value in graph.initializers.items()
        if not (value.uses() or value.is_graph_input() or value.is_graph_output())
    ]
    for name in dead:
        del graph.initializers[name]
    return len(dead)


def _remove_functions(model: ir.Model) -> int:
    called: set[ir.OperatorIdentifier] = set()
    todo = [n.op_identifier() for n in nodes_in(model.graph)]
    while todo:
        key = todo.pop()
        if key in model.functions and key not in called:
            called.add(key)
            todo += [n.op_identifier() for n in nodes_in(model.functions[key])]
    dead = [key for key in model.functions if key not in called]
    for key in dead:
        del model.functions[key]
    return len(dead)


def _remove_imports(model: ir.Model) -> int:
    keep = {*_DEFAULT_DOMAINS, *(f.domain for f in model.functions.values())}
    changes = 0
    for graph, imports, _ in roots(model):
        used = keep | {n.domain for n in nodes_in(graph)}
        dead = [domain for domain in imports if domain not in used]
        for domain in dead:
            del imports[domain]
        changes += len(dead)
    return changes


def fix_names(model: ir.Model) -> int:
    """Make the names of nodes unique, and those of values in their scope; return the renamings."""
    changes = 0
    names: Names | None = None
    seen: set[str] = set()
    for node in all_nodes(model):
        if node.name and node.name in seen:
            names = names or Names(model)
            node.name = names.fresh(node.name)
            changes += 1
        seen.add(node.name or "")
    for value in _clashing(model):
        names = names or Names(model)
        rename_value(value, names.fresh(value.name or "value"))
        changes += 1
    for graph in all_graphs(model):
        for name, value in graph.initializers.items():
            # Serialization writes the tensor's own name, which a shared tensor may have lost.
            if value.const_value is not None and value.const_value.name != name:
                value.const_value = renamed(value.const_value, name)
                changes += 1
    return changes


def name_nodes(model: ir.Model) -> set[str]:
    """Give nodes without a name that of their first output, by which they are told; return the names."""
    nameless = [n for n in all_nodes(model) if not n.name]
    names = Names(model) if nameless else None
    taken = {n.name for n in all_nodes(model)}
    for node in nameless:
        assert names is not None
        name = next((o.name for o in node.outputs if o.name), None) or node.op_type
        node.name = names.fresh(name) if name in taken else name
        taken.add(node.name)
    return {n.name or "" for n in nameless}


def take_names(model: ir.Model, names: Collection[str]) -> None:
    """Take the names back that ``name_nodes`` gave, for the file: they double the size of a tiny one."""
    for node in all_nodes(model) if names else ():
        if node.name in names:
            node.name = None


def _clashing(model: ir.Model) -> list[ir.Value]:
    """Values without a name, or with one that another value of their scope has."""
    found: list[ir.Value] = []
    for root, _, _ in roots(model):
        _clashing_in(root, set(), found)
    return found


def _clashing_in(graph: ir.Graph, outer: set[str], found: list[ir.Value]) -> None:
    own: dict[str, ir.Value] = {}
    for value in _values(graph):
        if not value.name or value.name in outer or own.get(value.name, value) is not value:
            found.append(value)
        else:
            own[value.name] = value
    inners = [inner for node in graph for inner in subgraphs_of(node)]
    visible = outer | set(own) if inners else outer
    for inner in inners:
        _clashing_in(inner, visible, found)


def _values(graph: ir.Graph) -> list[ir.Value]:
    values = [*graph.inputs, *graph.initializers.values()]
    # An output without a name and without a reader stands for an optional one that is absent.
    made = (o for n in graph for o in n.outputs)
    return [*values, *(o for o in made if o.name or o.uses() or o.is_graph_output())]
