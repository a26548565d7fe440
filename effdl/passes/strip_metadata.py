"""The pass ``strip_metadata``."""

from __future__ import annotations

import onnx_ir as ir

from effdl.graph.io import METADATA_PREFIX
from effdl.graph.walk import all_graphs, all_nodes
from effdl.passes.base import Context, Pass


class StripMetadata(Pass):
    """Drop doc strings and metadata that runtimes ignore.

    What it does: removes the doc strings of model, graphs, nodes, functions and values, and the
    metadata properties of graphs, nodes and values. The model's own metadata properties stay unless
    ``model_properties`` asks for them, and what effdl itself wrote stays always.

    When it helps: exports of torch carry a stack trace per node, which can be half of a small file
    and names folders of the machine that exported it.

    When it does not: latency is the same.

    Example:
        passes: [{strip_metadata: {model_properties: true}}]
    """

    model_properties: bool = False
    """Also drop the model's own metadata properties, such as author and licence."""

    def run(self, model: ir.Model, ctx: Context) -> int:
        """Return the number of texts removed."""
        owners: list[ir.Model | ir.Graph | ir.Function | ir.Node | ir.Value] = [model]
        scopes: list[ir.Graph | ir.Function] = [*all_graphs(model), *model.functions.values()]
        for graph in scopes:
            owners += [graph, *graph.inputs]
            if isinstance(graph, ir.Graph):
                owners += graph.initializers.values()
        for node in all_nodes(model):
            owners += [node, *node.outputs]
        changes = 0
        for owner in dict.fromkeys(owners):
            if owner.doc_string:
                owner.doc_string = None
                changes += 1
            if isinstance(owner, ir.Model) and not self.model_properties:
                continue
            for key in [k for k in owner.metadata_props if not k.startswith(METADATA_PREFIX)]:
                del owner.metadata_props[key]
                changes += 1
        if changes:
            ctx.note("texts_removed", changes)
        return changes
