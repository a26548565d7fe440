from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from effdl.errors import ModelError, OutputError
from effdl.graph import io
from effdl.graph.proto import skeleton_proto
from effdl.runtime.session import open_session
from tests.support import SAMPLES, assert_same, from_text

CNN = SAMPLES / "digits_cnn.onnx"


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))


def test_inline_round_trip(tmp_path: Path) -> None:
    model = io.load(CNN)
    io.save(model, tmp_path / "m.onnx")
    again = io.load(tmp_path / "m.onnx")
    assert io.content_digest(again) == io.content_digest(model)
    assert_same(model, again)
    assert os.listdir(tmp_path) == ["m.onnx"]


def test_external_round_trip_has_the_same_content_digest(tmp_path: Path) -> None:
    model = io.load(CNN)
    io.save(model, tmp_path / "m.onnx", external=True)
    again = io.load(tmp_path / "m.onnx")
    assert io.external_tensors(again)
    assert io.content_digest(again) == io.content_digest(model)
    assert io.files_size(tmp_path / "m.onnx") > CNN.stat().st_size * 0.95
    io.save(again, tmp_path / "inline.onnx")
    assert not io.external_tensors(io.load(tmp_path / "inline.onnx"))
    assert_same(model, io.load(tmp_path / "inline.onnx"))


def test_shards_and_their_clean_up(tmp_path: Path) -> None:
    model = io.load(CNN)
    io.save(model, tmp_path / "m.onnx", external=True, max_shard_bytes=300_000)
    assert len(io.data_files(tmp_path / "m.onnx")) > 1
    assert_same(model, io.load(tmp_path / "m.onnx"))
    io.save(model, tmp_path / "m.onnx")
    assert os.listdir(tmp_path) == ["m.onnx"]


def test_saving_over_the_file_that_is_memory_mapped(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    io.save(io.load(CNN), path, external=True)
    model = io.load(path)
    before = open_session(io.load(CNN)).run({"image": np.ones((1, 1, 8, 8), np.float32)})["logits"]
    io.save(model, path, external=True)
    after = open_session(io.load(path)).run({"image": np.ones((1, 1, 8, 8), np.float32)})["logits"]
    np.testing.assert_array_equal(before, after)


def test_split_sessions_share_weights_and_give_the_same(tmp_path: Path) -> None:
    feed = {"image": np.random.default_rng(0).random((3, 1, 8, 8), np.float32)}
    from_memory = open_session(io.load(CNN)).run(feed)["logits"]
    from_file = open_session(CNN).run(feed)["logits"]
    np.testing.assert_array_equal(from_memory, from_file)


def test_skeleton_is_small_and_valid() -> None:
    proto = skeleton_proto(io.load(CNN))
    assert proto.ByteSize() < CNN.stat().st_size / 20
    onnx.checker.check_model(proto)


def test_leftovers_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    goal = tmp_path / "m.onnx"
    code = (
        "import sys,os\nfrom effdl.graph import io\nfrom pathlib import Path\n"
        "s=io.Stage(Path(sys.argv[1])).__enter__()\n"
        "s.write(io.load(sys.argv[2]), external=True); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, str(goal), str(CNN)], check=False)
    assert leftovers(tmp_path)
    orphan = tmp_path / "m.onnx.0123456789ab.data"
    orphan.write_bytes(b"x")
    mine = tmp_path / "m.onnx.data"
    mine.write_bytes(b"the user's own")
    io.save(io.load(CNN), goal)
    assert sorted(os.listdir(tmp_path)) == ["m.onnx", "m.onnx.data"]


def test_a_stage_that_is_held_is_not_removed(tmp_path: Path) -> None:
    goal = tmp_path / "m.onnx"
    with io.Stage(goal) as stage:
        stage.write(io.load(CNN))
        io.clean_leftovers(goal)
        assert stage.path.exists()
        stage.commit()
    assert os.listdir(tmp_path) == ["m.onnx"]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: None, "no such file"),
        (lambda p: p.mkdir(), "folder"),
        (lambda p: p.write_bytes(b""), "empty"),
        (lambda p: p.write_bytes(np.random.default_rng(0).bytes(4000)), "not an ONNX model"),
        (lambda p: p.write_bytes(CNN.read_bytes()[:100_000]), "not an ONNX model"),
        (lambda p: p.write_text("hello world, this is no model"), "not an ONNX model"),
    ],
)
def test_what_is_no_model_is_named(tmp_path: Path, make, says: str) -> None:
    path = tmp_path / "m.onnx"
    make(path)
    with pytest.raises(ModelError, match=says) as e:
        io.load(path)
    assert "\n" not in str(e.value)


def test_an_invalid_graph_is_refused(tmp_path: Path) -> None:
    proto = onnx.load(CNN)
    proto.graph.node[3].input[0] = "nobody_makes_this"
    onnx.save(proto, tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="invalid ONNX graph"):
        io.load(tmp_path / "m.onnx")


def external(tmp_path: Path) -> tuple[Path, Path]:
    path = tmp_path / "in" / "m.onnx"
    path.parent.mkdir()
    io.save(io.load(CNN), path, external=True)
    return path, io.data_files(path)[0]


def test_an_old_model_whose_weights_are_no_inputs_is_read(tmp_path: Path) -> None:
    text = """<ir_version: 3, opset_import: ["": 7]> g (float[2] x) => (float[2] y)
        <float[2] w = {1, 2}> { y = Mul(x, w) }"""
    proto = onnx.parser.parse_model(text)
    assert [i.name for i in proto.graph.input] == ["x"]
    onnx.save(proto, tmp_path / "m.onnx")
    model = io.load(tmp_path / "m.onnx")
    assert model.ir_version == 4
    assert_same(model, io.load_bytes(io.to_bytes(model)))


def test_what_cannot_be_held_is_named() -> None:
    text = """<ir_version: 8, opset_import: ["ai.onnx.ml": 1]> g (float[1, 2] x) => (z)
        { z = ai.onnx.ml.ZipMap <classlabels_int64s = [0, 1]> (x) }"""
    proto = onnx.parser.parse_model(text)
    item = proto.graph.output[0].type.sequence_type.elem_type.map_type
    item.key_type = onnx.TensorProto.INT64
    item.value_type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    with pytest.raises(ModelError, match="Map types"):
        io.from_proto(proto, "text", None)


def test_missing_short_and_foreign_weights(tmp_path: Path) -> None:
    path, data = external(tmp_path)
    content = data.read_bytes()
    data.write_bytes(content[:-1000])
    with pytest.raises(ModelError, match="too short"):
        io.load(path)
    data.unlink()
    with pytest.raises(ModelError, match="missing"):
        io.load(path)
    (tmp_path / "elsewhere").write_bytes(content)
    data.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match="outside"):
        io.load(path)
    proto = onnx.load(path, load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../elsewhere"
    onnx.save(proto, path)
    with pytest.raises(ModelError, match="outside"):
        io.load(path)


def test_outputs_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="folder"):
        io.check_goal(tmp_path)
    with pytest.raises(OutputError, match="does not exist"):
        io.check_goal(tmp_path / "no" / "m.onnx")


def test_digest_ignores_own_metadata_and_sees_weights() -> None:
    model = io.load(CNN)
    digest = io.content_digest(model)
    model.metadata_props["effdl.note"] = "x"
    assert io.content_digest(model) == digest
    model.metadata_props["licence"] = "x"
    assert io.content_digest(model) != digest
    del model.metadata_props["licence"]
    weight = next(v for v in model.graph.initializers.values() if v.const_value.size > 100)
    weight.const_value = ir.tensor(weight.const_value.numpy() + 1, name=weight.name)
    assert io.content_digest(model) != digest


def test_functions_and_subgraphs_survive(tmp_path: Path) -> None:
    model = from_text("""<ir_version: 8, opset_import: ["": 17, "local": 1]>
        g (float[2] x, bool c) => (float[2] y)
        <float[2] w = {1, 2}>
        {
            a = local.twice(x)
            y = If(c) <then_branch = t () => (float[2] r) { r = Add(a, w) },
                       else_branch = e () => (float[2] r) { r = Mul(a, w) }>
        }
        <domain: "local", opset_import: ["": 17]>
        twice (v) => (r) { r = Add(v, v) }""")
    io.save(model, tmp_path / "m.onnx")
    assert_same(model, io.load(tmp_path / "m.onnx"))
