"""Converting the opset: every shared model, subgraphs, functions, refusals."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from pydantic import ValidationError

from effdl.errors import ModelError
from effdl.graph import io
from effdl.graph.versions import convert_opset
from effdl.graph.walk import interface, opset
from effdl.passes.convert.opset import ConvertOpset
from tests.node_cases import cases, equal, in_one_worker, session, usable
from tests.support import (
    SAMPLES,
    SHARED,
    assert_same,
    feed_for,
    from_text,
    needs_shared,
    op_counts,
    outputs,
    run_pass,
)

NESTED = """<ir_version: 7, opset_import: ["": 11]>
g (float[2,1,3] x, bool c) => (float[2,3] y)
{ w = Squeeze<axes=[1]>(x)
  y = If(c) <then_branch = t () => (float[2,3] r) { r = Squeeze<axes=[1]>(x) },
     else_branch = e () => (float[2,3] r) {
        q = Softmax<axis=0>(w)
        u = If(c) <then_branch = tt () => (float[2,1,3] rr) { rr = Unsqueeze<axes=[1]>(q) },
                   else_branch = ee () => (float[2,1,3] rr) { rr = Unsqueeze<axes=[1]>(w) }>
        r = Squeeze<axes=[1]>(u) }> }"""

FUNCTION = """<ir_version: 8, opset_import: ["": 11, "local": 1]>
g (float[2,1,3] x) => (float[2,3] y) { a = local.f<k = 2>(x)  y = Squeeze<axes=[1]>(a) }
<domain: "local", opset_import: ["": 11]>
f <k> (v) => (r) { a = Squeeze<axes=[1]>(v)  b = Softmax<axis=1>(a)  c = Unsqueeze<axes=[1]>(b)
  h = Flatten<axis: int = @k>(c)  i = Shape(c)  r = Reshape(h, i) }"""


@pytest.mark.parametrize("goal", [13, 17, 18, 21])
@pytest.mark.parametrize("text", [NESTED, FUNCTION], ids=["nested", "function"])
def test_subgraphs_and_functions(text: str, goal: int) -> None:
    model = from_text(text)
    before = model.clone()
    data = io.to_bytes(before)
    changes, log = run_pass(ConvertOpset(to=goal), model)
    assert changes >= 4
    assert log.touched == [("model", f"opset 11 became {goal}")]
    assert opset(model) == goal
    assert all(f.opset_imports[""] == goal for f in model.functions.values())
    assert len(model.functions) == len(before.functions)
    assert interface(model) == interface(before)
    assert io.to_bytes(before) == data
    for flag in (True, False):
        feed = feed_for(before)
        if "c" in feed:
            feed["c"] = np.array(flag)
        np.testing.assert_allclose(outputs(model, feed)[0], outputs(before, feed)[0], rtol=1e-6)
    assert run_pass(ConvertOpset(to=goal), model)[0] == 0


def test_down_again() -> None:
    model = from_text(NESTED)
    before = model.clone()
    run_pass(ConvertOpset(to=17), model)
    with pytest.raises(ModelError, match=r"operator '\w+' cannot be converted from opset 17 to 11"):
        run_pass(ConvertOpset(to=11), model)
    assert opset(model) == 17
    run_pass(ConvertOpset(to=18), model)
    run_pass(ConvertOpset(to=15), model)
    assert opset(model) == 15
    assert_same(before, model)


def test_only_the_import_changes_where_no_operator_did() -> None:
    model = from_text(
        """<ir_version: 8, opset_import: ["": 14]>
        g (float[2] x) => (float[2] y) { a = Relu(x)  y = Add(a, x) }"""
    )
    nodes = list(model.graph)
    before = model.clone()
    run_pass(ConvertOpset(at_least=17), model)
    assert [n.op_type for n in model.graph] == [n.op_type for n in nodes]
    assert opset(model) == 17
    assert_same(before, model)


def test_at_least_leaves_newer_models_alone() -> None:
    model = io.load(SAMPLES / "digits_cnn.onnx")
    before = io.to_bytes(model)
    assert run_pass(ConvertOpset(at_least=opset(model) - 2), model)[0] == 0
    assert io.to_bytes(model) == before
    assert run_pass(ConvertOpset(), model)[0] >= 1
    assert opset(model) == 21


def test_names_metadata_and_weights_stay() -> None:
    model = io.load(SAMPLES / "digits_cnn.onnx")
    node = next(iter(model.graph))
    node.metadata_props["k"] = "v"
    node.doc_string = "text"
    names = [n.name for n in model.graph]
    before = model.clone()
    run_pass(ConvertOpset(to=21), model)
    first = next(n for n in model.graph if n.name == node.name)
    assert first.metadata_props == {"k": "v"}
    assert first.doc_string == "text"
    assert set(names) <= {n.name for n in model.graph}
    big = max(before.graph.initializers.values(), key=lambda v: v.const_value.nbytes)
    assert model.graph.initializers[big.name].const_value is big.const_value
    assert_same(before, model)


def test_other_domains_are_kept() -> None:
    model = from_text(
        """<ir_version: 8, opset_import: ["": 11, "com.microsoft": 1]>
        g (float[2,1,3] x) => (float[2,3] y)
        { a = com.microsoft.Gelu(x)  y = Squeeze<axes=[1]>(a) }"""
    )
    before = model.clone()
    run_pass(ConvertOpset(to=17), model)
    assert op_counts(model)["Gelu"] == 1
    assert model.opset_imports == {"": 17, "com.microsoft": 1}
    assert_same(before, model)


def test_weights_that_are_inputs_stay_inputs() -> None:
    model = from_text(NESTED.replace("(float[2,3] y)\n", "(float[2,3] y)\n", 1))
    value = ir.Value(
        name="extra",
        shape=ir.Shape([600]),
        type=ir.TensorType(ir.DataType.FLOAT),
        const_value=ir.tensor(np.zeros(600, np.float32), name="extra"),
    )
    model.graph.inputs.append(value)
    model.graph.register_initializer(value)
    run_pass(ConvertOpset(to=17), model)
    assert [v.name for v in model.graph.inputs] == ["x", "c", "extra"]
    assert model.graph.inputs[2].is_initializer()


def test_external_weights_stay_outside(tmp_path) -> None:
    io.save(io.load(SAMPLES / "digits_mlp.onnx"), tmp_path / "m.onnx", external=True)
    model = io.load(tmp_path / "m.onnx")
    before = model.clone()
    run_pass(ConvertOpset(to=21), model)
    assert io.external_tensors(model)
    assert_same(before, model)


def test_no_default_domain_is_left_alone() -> None:
    model = from_text(
        """<ir_version: 8, opset_import: ["com.microsoft": 1]>
        g (float[2] x) => (float[2] y) { y = com.microsoft.Gelu(x) }"""
    )
    changes, log = run_pass(ConvertOpset(), model)
    assert changes == 0
    assert log.skipped == [("model", "it imports no default operator set")]


@pytest.mark.parametrize(
    ("text", "goal", "operator"),
    [
        ("y = Gelu(x)", 17, "Gelu"),
        ("y = Mish(x)", 17, "Mish"),
    ],
)
def test_a_refusal_names_the_operator(text: str, goal: int, operator: str) -> None:
    model = from_text(
        f"""<ir_version: 9, opset_import: ["": 20]>
        g (float[2] x) => (float[2] y) {{ {text} }}"""
    )
    before = io.to_bytes(model)
    with pytest.raises(
        ModelError, match=f"'{operator}' cannot be converted from opset 20 to {goal}"
    ):
        run_pass(ConvertOpset(to=goal), model)
    assert io.to_bytes(model) == before


@pytest.mark.parametrize(
    "options", [{"to": 3}, {"to": 999}, {"to": 17, "at_least": 17}, {"to": "x"}]
)
def test_option_values_are_checked(options: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        ConvertOpset.model_validate(options)


def dims_of(name: str) -> dict[str, int]:
    return {"nnsplit_en": {"length": 8, "batch": 2}}.get(name, {})


@needs_shared
@pytest.mark.shared
@pytest.mark.parametrize("goal", [17, 21])
@pytest.mark.parametrize(
    "name",
    [
        "dtln_1",
        "mnist_selfattn",
        "mnist_winml",
        "mobilenetv2_qdq_int8",
        "seg_pan_mbv3s",
        "squeezenet_fp16_winml",
        "tract_qlstm",
        "ultraface_rfb320",
        "voice_commands",
        "yolox_nano",
    ],
)
def test_shared_models(name: str, goal: int) -> None:
    assert SHARED is not None
    model = io.load(SHARED / "models" / f"{name}.onnx")
    before = model.clone()
    convert_opset(model, goal)
    assert opset(model) == goal
    assert interface(model) == interface(before)
    feed = feed_for(before, **dims_of(name))
    for want, got in zip(
        outputs(before, feed, optimize=False), outputs(model, feed, optimize=False), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)


@in_one_worker
def test_node_cases_go_up() -> None:
    """A sample of onnx's own cases: the same outputs after going up to opset 21."""
    failures = []
    tried = 0
    for case in cases()[::6]:
        found = usable(case)
        if found is None or "Scan" in {n.op_type for n in found[0].graph.node}:
            continue
        proto, feed, want = found
        version = next((o.version for o in proto.opset_import if o.domain == ""), 99)
        if version >= 21:
            continue
        tried += 1
        model = ir.from_proto(proto)
        convert_opset(model, 21)
        got = session(ir.to_proto(model)).run(None, feed)
        if not all(equal(a, b, 1e-3, 1e-3) for a, b in zip(got, want, strict=True)):
            failures.append(case.name)
    assert not failures
    assert tried > 80


def test_an_old_scan_is_refused() -> None:
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["a"], ["b"])],
        "body",
        [onnx.helper.make_tensor_value_info("a", 1, [2])],
        [onnx.helper.make_tensor_value_info("b", 1, [2])],
    )
    scan = onnx.helper.make_node("Scan", ["", "x"], ["y"], body=graph, num_scan_inputs=1)
    main = onnx.helper.make_graph(
        [scan],
        "g",
        [onnx.helper.make_tensor_value_info("x", 1, [1, 3, 2])],
        [onnx.helper.make_tensor_value_info("y", 1, [1, 3, 2])],
    )
    proto = onnx.helper.make_model(main, opset_imports=[onnx.helper.make_opsetid("", 8)])
    with pytest.raises(ModelError, match="'Scan' cannot be converted from opset 8 to 17"):
        convert_opset(ir.from_proto(proto), 17)
