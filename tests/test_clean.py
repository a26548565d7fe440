"""Cleaning up after a change: what goes, what stays, and that clones are not touched."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from effdl.graph import io
from effdl.graph.clean import clean
from effdl.graph.edit import forward, rename_value
from effdl.graph.walk import interface
from tests.support import assert_same, from_text, op_counts

PLAIN = """<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]>
g (float[2] x, float[2] unused) => (float[2] y)
<float[2] w = {1,2}, float[2] dead = {3,4}>
{ a = Add(x, w)  b = Mul(a, dead)  c = Relu(b)  y = Relu(a) }"""

NESTED = """<ir_version: 8, opset_import: ["": 17]>
g (float[2] x, bool c) => (float[2] y)
<float[2] outer = {1,2}>
{ far = Mul(x, outer)
  z = If(c) <then_branch = t () => (float[2] r) { r = Add(x, far) },
             else_branch = e () => (float[2] r) { r = Relu(x) }>
  y = If(c) <then_branch = t2 () => (float[2] r2) <float[2] w = {1,2}, float[2] d = {5,6}>
             { k = Mul(x, d)  r2 = Add(x, w) },
             else_branch = e2 () => (float[2] r3) { r3 = Relu(x) }> }"""

FUNCTIONS = """<ir_version: 8, opset_import: ["": 17, "local": 1]>
g (float[2] x) => (float[2] y) { y = local.outer(x) }
<domain: "local", opset_import: ["": 17, "local": 1]> outer (v) => (r) { d = Exp(v)  r = local.inner(v) }
<domain: "local", opset_import: ["": 17, "other": 3]> inner (v) => (r) { r = Relu(v) }
<domain: "local", opset_import: ["": 17]> uncalled (v) => (r) { r = Relu(v) }"""


def cleaned(text: str) -> tuple[ir.Model, int]:
    model = from_text(text)
    before = model.clone()
    changes = clean(model)
    io.check(model)
    assert interface(model) == interface(before)
    assert_same(before, model)
    data = io.to_bytes(model)
    assert clean(model) == 0
    assert io.to_bytes(model) == data
    return model, changes


def test_dead_nodes_weights_and_imports_go_but_inputs_stay() -> None:
    model, changes = cleaned(PLAIN)
    assert op_counts(model) == {"Add": 1, "Relu": 1}
    assert list(model.graph.initializers) == ["w"]
    assert model.opset_imports == {"": 17}
    assert [v.name for v in model.graph.inputs] == ["x", "unused"]
    assert changes == 4


def test_a_dead_node_lets_go_of_what_its_subgraphs_read() -> None:
    model, _ = cleaned(NESTED)
    assert op_counts(model) == {"If": 1, "Add": 1, "Relu": 1}
    assert list(model.graph.initializers) == []
    inner = [list(g.initializers) for g in model.graph.subgraphs()]
    assert inner == [["w"], []]


def test_functions() -> None:
    model, _ = cleaned(FUNCTIONS)
    assert sorted(f.name for f in model.functions.values()) == ["inner", "outer"]
    outer, inner = (
        next(f for f in model.functions.values() if f.name == n) for n in ("outer", "inner")
    )
    assert [n.op_type for n in outer] == ["inner"]
    assert "other" not in inner.opset_imports


def test_a_clean_model_stays_byte_equal() -> None:
    model = from_text(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[2] x) => (float[2] y) { y = Relu(x) }"""
    )
    before = io.to_bytes(model)
    assert clean(model) == 0
    assert io.to_bytes(model) == before


def test_order_is_restored() -> None:
    model = from_text(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[2] x, bool c) => (float[2] y)
        { a = Relu(x)
          y = If(c) <then_branch = t () => (float[2] r) { r = Add(x, a) },
                     else_branch = e () => (float[2] r) { r = Relu(x) }> }"""
    )
    relu, branch = model.graph[0], model.graph[1]
    model.graph.remove(relu)
    model.graph.insert_after(branch, relu)
    assert clean(model) == 1
    assert [n.op_type for n in model.graph] == ["Relu", "If"]
    io.check(model)


def test_absent_inputs_and_unread_outputs_at_the_end_are_trimmed() -> None:
    model, changes = cleaned(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[1,1,4,4] x) => (float[1,1,2,2] y)
        { a = Clip(x, , )  y, i = MaxPool<kernel_shape = [2,2], strides = [2,2]>(a) }"""
    )
    clip, pool = model.graph
    assert (len(clip.inputs), len(pool.outputs), changes) == (1, 1, 2)


def test_a_loop_keeps_its_absent_inputs_and_a_batch_norm_its_outputs() -> None:
    model, changes = cleaned(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[2,3] x, bool c) => (float[2,3] y)
        <float[3] s = {1,1,1}, float[3] z = {0,0,0}>
        { a = Loop(, c) <body = b (int64 i, bool ci) => (bool co, float[2,3] v)
              { t = Not(ci)  co = And(ci, t)  v = Relu(x) }>
          n, rm, rv = BatchNormalization<training_mode = 1>(x, s, z, z, s)
          k = ReduceSum<keepdims = 0>(a)  y = Add(n, k) }"""
    )
    assert changes == 0
    assert len(model.graph[0].inputs) == 2
    assert len(model.graph[1].outputs) == 3


def test_names_become_unique_without_touching_a_clone() -> None:
    model = from_text(PLAIN)
    clean(model)
    model.graph[0].name = model.graph[1].name = "same"
    model.graph[0].outputs[0].name = "w"
    clone = model.clone()
    before = io.to_bytes(clone)
    assert clean(model) == 2
    assert [n.name for n in model.graph] == ["same", "same_2"]
    assert model.graph[0].outputs[0].name == "w_2"
    assert io.to_bytes(clone) == before
    io.check(model)


def test_renaming_a_weight_leaves_the_snapshot_alone() -> None:
    model = from_text(PLAIN)
    clean(model)
    clone = model.clone()
    before = io.to_bytes(clone)
    rename_value(model.graph.initializers["w"], "w2")
    assert io.to_bytes(clone) == before
    assert list(model.graph.initializers) == ["w2"]
    io.check(model)


def test_a_tensor_that_lost_its_name_gets_it_back() -> None:
    model = from_text(PLAIN)
    clean(model)
    model.graph.initializers["w"].const_value = ir.tensor(np.ones(2, np.float32), name="elsewhere")
    assert clean(model) == 1
    io.check(model)


def test_a_new_weight_in_an_old_format_raises_the_format() -> None:
    model = from_text(PLAIN)
    clean(model)
    model.ir_version = 3
    assert clean(model) == 1
    assert model.ir_version == 4


def test_forward_keeps_the_name_and_declaration_of_an_output() -> None:
    model = from_text(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[n] x) => (float[n] y, float[n] z) { a = Relu(x)  y = Identity(a)  z = Identity(y) }"""
    )
    relu, first, second = model.graph
    assert not forward(first.outputs[0], model.graph.inputs[0])
    assert forward(first.outputs[0], relu.outputs[0])
    assert [v.name for v in model.graph.outputs] == ["y", "z"]
    assert model.graph.outputs[0] is relu.outputs[0]
    assert not forward(second.outputs[0], relu.outputs[0])
