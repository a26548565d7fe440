"""Shapes at several sizes of the dynamic dimensions."""

from __future__ import annotations

from effdl.graph.probes import probe
from tests.attention_graphs import Graph
from tests.support import from_text

HEAD = '<ir_version: 8, opset_import: ["": 17]>'


def test_a_static_model_has_one_probe() -> None:
    model = from_text(f"{HEAD} g (float[2,3] x) => (float[3,2] y) {{ y = Transpose(x) }}")
    shapes = probe(model)
    assert shapes.of(model.graph.outputs[0]) == ((3, 2),)
    assert shapes.axis(model.graph.outputs[0], -1) == (2,)
    assert shapes.axis(model.graph.outputs[0], 2) is None
    assert shapes.of(None) is None


def test_dimensions_that_differ_stay_apart() -> None:
    model = from_text(
        f"""{HEAD} g (float[B,S,8] x, float[B,T,8] z, float[N,C,H,W] i, float[P] p) => (float[a,b,c] y)
        {{ t = Transpose<perm = [0, 2, 1]>(z) y = MatMul(x, t) }}"""
    )
    shapes = probe(model)
    sizes = shapes.of(model.graph.outputs[0])
    assert sizes is not None
    assert len(sizes) == 2
    x, z = (shapes.of(v) for v in model.graph.inputs[:2])
    assert x is not None
    assert z is not None
    assert [s[1:] for s in sizes] == [(a[1], b[1]) for a, b in zip(x, z, strict=True)]
    for known in shapes.shapes:
        assert len(set(known.dims.values())) == len(known.dims) == 8


def test_halved_lengths_still_differ() -> None:
    halves = " ".join(
        f"x{k + 1} = MaxPool<kernel_shape = [3], pads = [1, 1], strides = [2]>(x{k})"
        for k in range(5)
    )
    model = from_text(f"{HEAD} g (float[B,4,S] x0) => (float[B,4,T] x5) {{ {halves} }}")
    lengths = probe(model).axis(model.graph.outputs[0], 2)
    assert lengths is not None
    assert len(set(lengths)) == 2


def test_sums_of_dimensions() -> None:
    g = Graph(17)
    for name, length in (("x", "P"), ("mask", "P + 1")):
        g.output(g.op("Relu", g.input(name, ["B", length])), 2)
    model = g.model()
    past, total = (probe(model).axis(v, 1) for v in model.graph.outputs)
    assert past is not None
    assert total == tuple(p + 1 for p in past)


def test_what_depends_on_data_is_unknown() -> None:
    model = from_text(f"{HEAD} g (float[B] x) => (int64[1,n] y) {{ y = NonZero(x) }}")
    assert probe(model).of(model.graph.outputs[0]) is None


def test_inputs_of_one_shape_without_names() -> None:
    g = Graph(17)
    ids, mask = (g.input(n, [f"{n}0", f"{n}1"]) for n in ("ids", "mask"))
    g.input("picture", ["other", 3, "h", "w"])
    g.output(g.op("Add", ids, mask), 2)
    model = g.model()
    assert probe(model).of(model.graph.outputs[0]) is None
    shapes = probe(model, alike=True)
    sizes = shapes.of(model.graph.outputs[0])
    assert sizes == shapes.of(model.graph.inputs[0])
    assert shapes.axis(model.graph.inputs[2], 0) == shapes.axis(model.graph.inputs[0], 0)
    assert len({d for known in shapes.shapes for d in known.dims.values()}) == 8
