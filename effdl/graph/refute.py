"""Branches of an If that cannot be taken, because an operator behind them would refuse the result.

Exporters of scripted models leave such questions in the graph: "is the last size 1? then squeeze".
Where the other answer gives a tensor of a rank that a later LSTM or Gemm does not accept, the model
could not have run, and the If is no question.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import onnx
import onnx_ir as ir

from effdl.graph.outline import outline
from effdl.graph.shape_values import graphs, set_nodes, take_branch
from effdl.graph.shapes import Types, solve, values_by_name
from effdl.graph.walk import all_nodes, is_op

_STRICT = frozenset(
    (
        *("LSTM", "GRU", "RNN", "Gemm", "Conv", "ConvTranspose", "BatchNormalization"),
        *("MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool"),
    )
)
"""Operators that take one rank only, to ONNX and to every runtime; others may be less strict than ONNX."""
_OP = re.compile(r"op_type:\s*(\w+)")
_HIDDEN = "effdl.hidden"
_MOST = 32
"""Ifs of one model that are looked at: each costs two inferences of the whole."""


def settled_ifs(model: ir.Model) -> dict[ir.Node, bool]:
    """Return the Ifs of which one branch contradicts what follows, with the condition that remains.

    Args:
        model: not changed. Ifs that inference itself decides are not among the results.
    """
    if not any(is_op(n, "If") for n in all_nodes(model)):
        return {}
    table = values_by_name(model)
    if table is None:
        return {}
    proto = outline(model)
    types = solve(proto, model)
    if types is None or _complaint(proto):
        return {}
    found: dict[ir.Node, bool] = {}
    for name in _open_ifs(proto, types)[:_MOST]:
        trials = {c: _complaint(_assuming(proto, model, name, c)) for c in (True, False)}
        refuted = [c for c, why in trials.items() if any(op in _STRICT for op in _OP.findall(why))]
        node = table[name].producer()
        if len(refuted) == 1 and not trials[not refuted[0]] and node is not None:
            found[node] = not refuted[0]
    return found


def _open_ifs(proto: onnx.ModelProto, types: Types) -> list[str]:
    """Return the first output of each If whose branches make tensors of different rank."""
    found = []
    for graph in graphs(proto.graph):
        for node in graph.node:
            if node.op_type != "If" or node.domain not in ("", "ai.onnx"):
                continue
            branches = [a.g for a in node.attribute]
            ends = zip(*([o.name for o in g.output] for g in branches), strict=False)
            if any(len({_rank(name, types) for name in names}) > 1 for names in ends):
                found.append(next(o for o in node.output if o))
    return found


def _rank(name: str, types: Mapping[str, tuple[int, tuple[object, ...] | None]]) -> int:
    shape = types.get(name, (0, None))[1]
    return -1 if shape is None else len(shape)


def _assuming(
    proto: onnx.ModelProto, model: ir.Model, output: str, condition: bool
) -> onnx.ModelProto:
    """Return a copy in which an If takes the branch of ``condition``, as far inferred as possible.

    What lies inside other nodes of the same graph is hidden: a loop may run no times, a branch may not
    be taken, and what would be refused in there proves nothing.
    """
    trial = onnx.ModelProto()
    trial.CopyFrom(proto)
    graph = _home(trial, output)
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        nodes += take_branch(node, condition) if output in node.output else [node]
    set_nodes(graph, nodes)
    solve(trial, model)
    graph = _home(trial, output)
    hidden = [n for n in graph.node if any(a.HasField("g") or a.graphs for a in n.attribute)]
    for node in hidden:
        node.domain = _HIDDEN
        del node.attribute[:]
    if hidden:
        trial.opset_import.add(domain=_HIDDEN, version=1)
    return trial


def _home(proto: onnx.ModelProto, output: str) -> onnx.GraphProto:
    """Return the graph in which a value is made."""
    return next(g for g in graphs(proto.graph) if any(output in n.output for n in g.node))


def _complaint(proto: onnx.ModelProto) -> str:
    """Return what ONNX has to say against the model, with the operators it names; empty for nothing."""
    try:
        onnx.shape_inference.infer_shapes(proto, data_prop=True, strict_mode=True)
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError) as e:
        return str(e) or type(e).__name__
    return ""
