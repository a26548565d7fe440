from effdl.graph import io
from effdl.passes.strip_metadata import StripMetadata
from tests.support import assert_same, from_text, run_pass

TEXT = """<ir_version: 8, opset_import: ["": 17]>
g (float[2,3] x) => (float[2,3] y) { y = Relu(x) }"""


def test_removes_texts_and_keeps_outputs() -> None:
    model = from_text(TEXT)
    before = model.clone()
    next(iter(model.graph)).doc_string = "File model.py, line 3"
    model.graph.metadata_props["k"] = "v"
    model.metadata_props["licence"] = "MIT"
    changes, _ = run_pass(StripMetadata(), model)
    assert changes == 2
    assert model.metadata_props == {"licence": "MIT"}
    assert io.to_bytes(model).find(b"model.py") == -1
    assert_same(before, model)
    assert run_pass(StripMetadata(), model)[0] == 0


def test_model_properties_go_on_request_but_not_those_of_effdl() -> None:
    model = from_text(TEXT)
    model.metadata_props.update({"licence": "MIT", "effdl.version": "0"})
    assert run_pass(StripMetadata(model_properties=True), model)[0] == 1
    assert model.metadata_props == {"effdl.version": "0"}
