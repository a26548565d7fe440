from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from effdl.graph import io
from effdl.measure.size import zstd_size
from effdl.measure.stats import describe, model_stats
from effdl.report import to_json
from tests.support import SAMPLES, SHARED, from_text, needs_shared


def test_facts_of_a_sample_model() -> None:
    path = SAMPLES / "digits_mlp.onnx"
    stats = model_stats(io.load(path), path)
    assert stats.path == str(path)
    assert stats.sha256 == io.file_digest(path)
    assert stats.file_bytes == path.stat().st_size
    assert stats.zstd_bytes is not None
    assert 0.5 * stats.file_bytes < stats.zstd_bytes < stats.file_bytes * 1.01
    assert stats.inputs == {"image": "float[batch,64]"}
    assert stats.dims == {"batch": 1}
    assert stats.dynamic == ("batch",)
    assert stats.macs is not None
    assert stats.macs < stats.params < stats.macs * 1.02
    assert sum(stats.ops.values()) == stats.nodes
    assert sum(stats.weight_bytes.values()) == 4 * stats.params
    assert to_json(stats)["macs"] == stats.macs


def test_in_memory_and_dims() -> None:
    model = io.load(SAMPLES / "digits_mlp.onnx")
    one = model_stats(model, None, zstd=False)
    four = model_stats(model, None, {"batch": 4, "not_any_more": 7})
    assert (one.path, one.sha256, one.file_bytes, one.zstd_bytes) == ("", "", 0, None)
    assert four.dims == {"batch": 4}
    assert four.macs == 4 * (one.macs or 0)
    same = asdict(four)
    assert same.pop("macs") != asdict(one).pop("macs")


def test_external_data_counts_into_sizes(tmp_path: Path) -> None:
    model = io.load(SAMPLES / "digits_mlp.onnx")
    path = tmp_path / "m.onnx"
    io.save(model, path, external=True)
    data = io.data_files(path)
    assert len(data) == 1
    stats = model_stats(io.load(path), path)
    assert stats.file_bytes == path.stat().st_size + data[0].stat().st_size
    both = sum(len(zstd().compress(f.read_bytes(), 3)) for f in (path, data[0]))
    assert stats.zstd_bytes == pytest.approx(both, rel=0.01)


def zstd() -> Any:
    try:
        from compression import zstd
    except ImportError:
        from backports import zstd
    return zstd


def test_zstd_size_is_that_of_a_frame_that_decompresses(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    io.save(io.load(SAMPLES / "digits_mlp.onnx"), path)
    data = path.read_bytes()
    whole = zstd().compress(data, 3)
    assert zstd().decompress(whole) == data
    assert zstd_size(path) == pytest.approx(len(whole), rel=0.01)


def test_describe() -> None:
    model = from_text("""<ir_version: 8, opset_import: ["": 17]>
        g (float[?,N,3] x, int64 n) => (float[?,N,3] y) { y = Relu(x) }""")
    assert [describe(v) for v in model.graph.inputs] == ["float[?,N,3]", "int64[]"]
    bare = ir.Value(name="v")
    assert describe(bare) == "?"
    sequence = ir.Value(name="s", type=ir.SequenceType(ir.TensorType(ir.DataType.FLOAT)))
    assert describe(sequence) == "sequence"


def test_a_model_that_cannot_run_has_facts() -> None:
    model = from_text("""<ir_version: 8, opset_import: ["": 17, "my": 1]>
        g (float[n,4] x, float[4,4] w) => (float[n,4] y) { a = MatMul(x, w)
          y = my.Thing(a) }""")
    stats = model_stats(model, None)
    assert stats.macs == 16
    assert stats.macs_unknown == ("my::Thing",)
    assert stats.ops == {"MatMul": 1, "my::Thing": 1}
    assert stats.opsets == {"": 17, "my": 1}


@needs_shared
def test_facts_of_every_real_model() -> None:
    assert SHARED is not None
    for path in sorted((SHARED / "models").glob("*.onnx")):
        model = io.load(path)
        before = io.to_bytes(model)
        stats = model_stats(model, path)
        assert io.to_bytes(model) == before, path.name
        assert stats.nodes == sum(stats.ops.values())
        assert stats.file_bytes == path.stat().st_size
        assert stats.zstd_bytes is not None
        assert stats.zstd_bytes < stats.file_bytes * 1.01
        assert sum(stats.weight_bytes.values()) < stats.file_bytes
        assert set(stats.dims) == set(stats.dynamic)
        assert np.isfinite(stats.params)
