"""What a layer could be replaced by: looked at with the data, timed, and built once it is chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from effdl.graph.dims import guess_dims, input_dims
from effdl.graph.shapes import Shapes, infer
from effdl.graph.walk import all_nodes
from effdl.graph.weights import Names
from effdl.measure.layer_times import Piece, cannot_time, cut, try_times
from effdl.measure.work import feed_dims
from effdl.observe.layers import rows_of
from effdl.observe.moments import Moments, moments
from effdl.observe.rows import Rows
from effdl.passes._low_rank_all import composed
from effdl.passes._low_rank_forms import Form, Ranks, Seen
from effdl.passes._low_rank_layer import Array, Layer, Link, layer_of, put_chain, weight_index
from effdl.passes.base import Context
from effdl.solve.output_pca import shrunk

MakeForms = Callable[[Layer, Seen], Iterator[Form]]
Grid = Callable[[Layer, Form], Sequence[Ranks]]
_SECONDS = 0.3
"""Of timing per layer and form."""


@dataclass(frozen=True)
class Option:
    """A form of a layer at a rank.

    Args:
        kind, how: of the form.
        ranks: of it.
        macs: what it costs.
        error: share of the outputs' variance that is lost.
        links: its nodes.
        full: the full ranks.
    """

    kind: str
    how: str
    ranks: Ranks
    macs: int
    error: float
    links: tuple[Link, ...] = field(compare=False)
    full: Ranks = ()


@dataclass
class Survey:
    """A model whose layers are looked at.

    Args:
        model: as it is before the pass.
        ctx: of the pass.
        tensors: the weights of the layers.
        make: the forms of a layer.
    """

    model: ir.Model
    ctx: Context
    tensors: Mapping[ir.Node, ir.TensorProtocol]
    make: MakeForms

    def __post_init__(self) -> None:
        self.dims = timing_dims(self.model, self.ctx)
        self.shapes, self.sized = infer(self.model), infer(self.model, self.dims)
        self._times: dict[object, float] = self.ctx.memo.setdefault("low_rank times", {})
        self.untimed = cannot_time(self.ctx.target)
        target = self.ctx.target
        self._place = replace(target, threads=target.threads or 1)  # as the gate measures

    def layer(self, node: ir.Node) -> Layer:
        """Return what there is to know of a node."""
        weight = self.tensors[node].numpy().astype(np.float64)
        return layer_of(node, weight, self.shapes, self.sized)

    def seen(self, nodes: Sequence[ir.Node]) -> Iterator[tuple[ir.Node, Seen]]:
        """Yield what the data shows of each node, nothing where there is no data for it."""
        waiting = dict.fromkeys(nodes)
        feeds = self.ctx.feeds
        if feeds is not None and len(feeds):
            readers: dict[str, list[ir.Node]] = {}
            rows: dict[str, Rows] = {}
            for node in nodes:
                read = rows_of(node) if node.graph is self.model.graph else None
                if read is not None and weight_index(node) == 1:
                    key = repr(read)
                    rows[key] = read
                    readers.setdefault(key, []).append(node)
            found = moments(
                self.model,
                rows,
                feeds,
                threads=self.ctx.target.threads,
                max_bytes=self.ctx.max_bytes,
            )
            for key, told in found:
                for node in readers[key]:
                    del waiting[node]
                    yield node, _seen(told, self.layer(node))
        for node in waiting:
            yield node, Seen()

    def options(
        self, nodes: Sequence[ir.Node], grid: Grid, key: object
    ) -> Iterator[tuple[ir.Node, Layer, list[Option], bool]]:
        """Yield each node with its layer, its options, and whether data told them.

        What was found with the same ``key`` (all that the grid depends on) is remembered.
        """
        known = self.ctx.memo.setdefault(("low_rank options", key), {})
        places = {node: k for k, node in enumerate(all_nodes(self.model))}
        fresh = [n for n in nodes if places[n] not in known]
        for node, seen in self.seen(fresh):
            layer = self.layer(node)
            found = [
                Option(
                    form.kind,
                    form.how,
                    ranks,
                    form.macs(ranks),
                    form.error(ranks),
                    tuple(form.links(ranks)),
                    form.limits,
                )
                for form in self.make(layer, seen)
                for ranks in grid(layer, form)
            ]
            known[places[node]] = (found, seen.covariance is not None)
        for node in nodes:
            sizes = replace(
                self.layer(node), matrix=np.empty((0, 0))
            )  # weights of all are too much
            yield node, sizes, *known[places[node]]

    def built(
        self, chosen: Mapping[ir.Node, Option]
    ) -> Iterator[tuple[ir.Node, Layer, Option, list[Array], Array | None]]:
        """Yield the weights of each chosen option, and what is to be added to the outputs."""
        for node, seen in self.seen(list(chosen)):
            layer, option = self.layer(node), chosen[node]
            form = next(f for f in self.make(layer, seen) if f.kind == option.kind).up_to(
                option.ranks
            )
            weights: list[Array] = list(form.weights(option.ranks))
            shift = None
            if seen.mean is not None:
                shift = (layer.matrix - composed(layer, form, weights)) @ seen.mean
            yield node, layer, option, weights, shift

    def times(self, layer: Layer, options: Sequence[Option]) -> list[float] | None:
        """Return the ms of the layer and of each option; None where they cannot be measured.

        A layer of the same sizes is not timed again.
        """
        if self.untimed:
            return None
        keys = [_key(layer, links, self.sized) for links in ((), *(o.links for o in options))]
        if not all(k in self._times for k in keys):
            pieces = self._pieces(layer, options)
            found, reason = (None, "its sizes are not known")
            if pieces is not None:
                found, reason = try_times(pieces, self._place, seconds=_SECONDS)
            if found is None:
                self.untimed = self.untimed or (reason if pieces is not None else "")
                return None
            self._times |= dict(zip(keys, found, strict=True))
        return [self._times[k] for k in keys]

    def model_ms(self, layers: Sequence[Layer]) -> tuple[float, list[float]] | None:
        """Return the time of the whole model and of some layers, taken in the same rounds."""
        feed = {}
        for value in self.model.graph.inputs:
            shape = self.sized.static(value)
            if shape is None or value.dtype is None or value.is_initializer():
                return None
            given = self.ctx.feeds.batches[0].get(value.name or "") if self.ctx.feeds else None
            kind = value.dtype.numpy()
            feed[value.name or ""] = (
                np.resize(given, shape) if given is not None else np.ones(shape, kind)
            )
        pieces = [cut(self.model, [layer.node], self.sized) for layer in layers]
        found, _ = try_times(
            [Piece(self.model, feed), *(p for p in pieces if p is not None)],
            self._place,
            seconds=_SECONDS,
        )
        if found is None or None in pieces:
            return None
        return found[0], found[1:]

    def _pieces(self, layer: Layer, options: Sequence[Option]) -> list[Piece] | None:
        first = cut(self.model, [layer.node], self.sized)
        if first is None:
            return None
        rng = np.random.default_rng(0)
        pieces = [first]
        for option in options:
            model = first.model.clone()
            node = next(iter(model.graph))
            weights = [rng.standard_normal(link.shape, np.float32) for link in option.links]
            plain = [_without_shape(link) for link in option.links]
            put_chain(layer, node, plain, weights, None, Names(model), "")
            for name in [n for n, v in model.graph.initializers.items() if not v.uses()]:
                del model.graph.initializers[name]
            pieces.append(Piece(model, first.feed))
        return pieces


def timing_dims(model: ir.Model, ctx: Context) -> dict[str, int]:
    """Return the dynamic dimensions for counting and timing: of one sample as large as those given."""
    given: dict[str, int] = {}
    if ctx.feeds is not None and len(ctx.feeds):
        first = {name for name, _, axis in input_dims(model) if axis == 0}
        told = feed_dims(model, ctx.feeds.batches[0])
        given = {name: size for name, size in told.items() if name not in first}
    return guess_dims(model, given)


def _seen(told: Moments, layer: Layer) -> Seen:
    if layer.shiftable:
        return Seen(shrunk(told.covariance[0], told.rows), told.mean[0])
    return Seen(shrunk(told.second[0], told.rows))


def _without_shape(link: Link) -> Link:
    return Link(link.op_type, link.attributes, link.shape, None, link.left)


def _key(layer: Layer, links: Sequence[Link], sized: Shapes) -> object:
    node = layer.node
    attributes = tuple(sorted((k, repr(a.value)) for k, a in node.attributes.items()))
    inputs = tuple(sized.static(v) for v in node.inputs)
    return node.op_type, attributes, inputs, tuple((k.op_type, k.shape) for k in links)
