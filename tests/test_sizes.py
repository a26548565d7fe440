"""Sizes that follow from the sizes of the inputs: what is told must hold at every size."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from effdl.graph.elements import Facts
from effdl.graph.shapes import infer
from effdl.graph.symbols import Element, Unknown
from effdl.passes.simplify import Simplify
from tests.support import assert_same, from_text, op_counts, outputs, run_pass
from tests.test_simplify import HEAD, simplified

CASES = [
    "y = Reshape(x, s) <int64[4] s = {-1,3,2,2}>",
    "y = Reshape(x, s) <int64[3] s = {0,-1,2}>",
    "y = Reshape(x, s) <int64[2] s = {-1,4}>",
    "h = Reshape(x, s) y = Transpose<perm=[0,2,1]>(h) <int64[3] s = {-1,2,6}>",
    "d = Shape(x) i = Slice(d, z, o) c = Concat<axis=0>(i, t) y = Reshape(x, c) "
    "<int64[1] z = {0}, int64[1] o = {1}, int64[1] t = {12}>",
    "d = Shape<start=0, end=1>(x) p = Slice(w, z, d) h = Reshape(x, s) y = Add(h, p) "
    "<int64[1] z = {0}, int64[2] s = {-1,12}, float[9,12] w>",
    "h = Reshape(x, s) g = Unsqueeze(h, o) y = Concat<axis=1>(g, g) <int64[2] s = {-1,12}, int64[1] o = {1}>",
    "h = Reshape(x, s) y = MatMul(h, w) <int64[3] s = {-1,1,12}, float[12,9] w>",
    "h = Reshape(x, s) y = Slice(h, z, o, o) <int64[3] s = {-1,6,2}, int64[1] z = {0}, int64[1] o = {1}>",
]


def value_of(element: Element, n: int) -> int | None:
    """Compute an element, None where it stands for something else than the dimension ``n``."""
    if isinstance(element, int):
        return element
    if isinstance(element, Unknown):
        return n if element.value == "n" else None
    a, b = value_of(element.x, n), value_of(element.y, n)
    if a is None or b is None:
        return None
    return {"Add": a + b, "Sub": a - b, "Mul": a * b, "Div": a // b, "Min": min(a, b)}[element.op]


def model_of(case: str) -> ir.Model:
    body, weights = case.split("<int64", 1)
    weights = "<int64" + weights
    ones = ",".join(["1"] * 108)
    weights = weights.replace("w>", f"w = {{{ones}}}>")
    rank = ",".join(f"o{k}" for k in range(_rank(case)))
    return from_text(HEAD + f"g (float[n,3,4] x) => (float[{rank}] y) {weights} {{ {body} }}")


def _rank(case: str) -> int:
    return (
        4
        if "{-1,3,2,2}" in case
        else 2
        if "{-1,4}" in case or "t = {12}" in case or "Add" in case
        else 3
    )


@pytest.mark.parametrize("case", CASES)
def test_what_is_told_holds(case: str) -> None:
    model = model_of(case)
    facts = Facts(infer(model), {})
    for node in model.graph:
        facts.visit(node)
    sizes = facts.dims(model.graph.outputs[0])
    assert sizes is not None
    known = 0
    for n in (1, 2, 5):
        x = np.zeros((n, 3, 4), np.float32)
        (got,) = outputs(model, {"x": x})
        told = [value_of(s, n) for s in sizes]
        known += sum(t is not None for t in told)
        assert all(t is None or t == g for t, g in zip(told, got.shape, strict=True))
    assert known == 3 * len(sizes), sizes


def test_a_long_chain_of_sizes_ends() -> None:
    """Each step uses the last one twice: written out, the expression would double each time."""
    steps = " ".join(f"m{k + 1} = Add(m{k}, m{k})" for k in range(40))
    graph = f"""g (float[n,k] x) => (int64[1] y) <int64[1] z = {{0}}, int64[1] o = {{1}}>
        {{s = Shape(x) m0 = Slice(s, z, o) {steps} y = Mul(m40, m40)}}"""
    model = from_text(HEAD + graph)
    before = model.clone()
    run_pass(Simplify(), model)
    assert_same(before, model, n=1)


def test_shapes_of_equal_tensors_settle() -> None:
    """Two sources of the same sizes: each Shape reads the first, and stays there."""
    graph = """g (float[n,k] x, float[n,k] w) => (int64[a] y, int64[b] z)
        <int64[1] zero = {0}, int64[1] one = {1}>
        {h = Relu(x) s = Shape(h) y = Slice(s, zero, one) t = Shape(w) i = Gather(t, one) z = Add(i, i)}"""
    simplified(graph, {"Shape": 2, "Add": 1})


def test_sizes_through_layers_of_an_export() -> None:
    """Heads split off and put together again, with sizes worked out anew: only constants are left."""
    graph = """g (float[b,s,8] x) => (float[b,s,8] y) <int64 i0 = {0}, int64 i1 = {1}, int64[1] ax = {0},
         int64[1] heads = {2}, int64[1] width = {4}, int64[1] all = {8}>
        { d = Shape(x) b0 = Gather(d, i0) s0 = Gather(d, i1) b1 = Unsqueeze(b0, ax) s1 = Unsqueeze(s0, ax)
          c = Concat<axis=0>(b1, s1, heads, width) h = Reshape(x, c) t = Transpose<perm=[0,2,1,3]>(h)
          m = Softmax(t) u = Transpose<perm=[0,2,1,3]>(m) e = Shape(u) b2 = Gather(e, i0) s2 = Gather(e, i1)
          b3 = Unsqueeze(b2, ax) s3 = Unsqueeze(s2, ax) f = Concat<axis=0>(b3, s3, all) y = Reshape(u, f) }"""
    model = from_text(HEAD + graph)
    before = model.clone()
    run_pass(Simplify(), model)
    assert op_counts(model) == {"Reshape": 2, "Transpose": 2, "Softmax": 1}
    for b, s in ((1, 1), (2, 3)):
        assert_same(before, model, rtol=0, atol=0, b=b, s=s)


def test_a_perm_that_names_no_axis_tells_nothing() -> None:
    """Seen in a file written by torch, which ONNX's checker takes and ONNX Runtime does not."""
    model = from_text("""<ir_version: 8, opset_import: ["": 17]>
        g (float[b,4,8] x) => (float[b,q,r] y)
        { y = Transpose <perm = [0, 49, 2]> (x) }""")
    assert run_pass(Simplify(), model)[0] == 0
