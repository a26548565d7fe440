from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from effdl.data.feeds import Feeds
from effdl.errors import DataError, ModelError, TargetError, UsageError
from effdl.graph import io
from effdl.measure.bench import bench
from effdl.measure.yardstick import write_yardstick
from effdl.report import from_json, to_json
from effdl.report.bench import BenchReport
from effdl.runtime.client import WorkerProcess
from effdl.runtime.target import parse_target
from tests.support import SAMPLES, from_text

CPU = parse_target("cpu")
MLP = SAMPLES / "digits_mlp.onnx"


def mlp_feeds(count: int = 2, dtype: type = np.float32) -> Feeds:
    rng = np.random.default_rng(0)
    return Feeds(
        tuple({"image": rng.random((1, 64)).astype(dtype)} for _ in range(count)), "random", False
    )


def save_text(text: str, path: Path) -> Path:
    io.save(from_text(text), path)
    return path


def elementwise(path: Path, dtype: str = "float", shape: str = "4", name: str = "x") -> Path:
    text = f"""<ir_version: 8, opset_import: ["": 17]>
    g ({dtype}[{shape}] {name}) => ({dtype}[{shape}] y) {{ y = Neg({name}) }}"""
    return save_text(text, path)


def feeds_of(**arrays: np.ndarray) -> Feeds:
    return Feeds((arrays,), "random", False)


def test_bench_of_a_model_with_itself() -> None:
    stages: list[tuple[str, float]] = []
    report = bench(
        [MLP, MLP], mlp_feeds(), CPU, seconds=0.1, progress=lambda s, f: stages.append((s, f))
    )
    first, second = report.models
    assert report.provider == "CPUExecutionProvider"
    assert report.threads == 1
    assert report.feeds == {"image": "float32[1,64]"}
    assert report.source == "random"
    assert first.sha256 == second.sha256 == io.file_digest(MLP)
    assert first.file_bytes == MLP.stat().st_size
    assert first.zstd_bytes is not None
    assert 0 < first.zstd_bytes <= first.file_bytes
    assert first.verdict == "reference"
    assert second.verdict in ("faster", "slower", "same", "noisy")
    assert second.ci[0] <= second.ratio <= second.ci[1]
    assert len(report.verdict) == 1
    for result in report.models:
        latency = result.latency
        assert latency.runs >= 5
        assert 0 < latency.minimum <= latency.median <= latency.p90 <= latency.p99
        assert result.load_ms > 0
        assert result.first_ms > 0
        assert result.rounds >= 4
        # The weights are 1.7 MB: held at least once, and a small model takes no gigabyte.
        assert 1.7e6 < result.peak_bytes < 300e6
    assert {s for s, _ in stages} == {"load", "warm-up", "measure"}
    assert all(0 <= f <= 1 for _, f in stages)
    assert report.control is not None
    assert report.control[1] <= report.control[0] <= report.control[2]
    assert report.min_effect == 0.02 <= second.noise_floor
    assert report.target == "cpu"
    assert report.yardstick is None
    plain = json.loads(json.dumps(to_json(report)))
    assert plain["models"][1]["verdict"] == second.verdict
    assert from_json(BenchReport, plain) == report


def test_what_a_model_is_and_does_is_told() -> None:
    result = bench([MLP], mlp_feeds(), CPU, seconds=0.1, dims={"batch": 1}).models[0]
    assert result.params > 400_000
    assert result.macs is not None
    assert abs(result.macs - result.params) < 0.01 * result.params  # one sample of an MLP
    assert result.batch == 1
    assert result.throughput == pytest.approx(1e3 / result.latency.median)


def test_throughput_counts_samples() -> None:
    batch = Feeds(({"image": np.zeros((8, 64), np.float32)},), "random", False)
    result = bench([MLP], batch, CPU, seconds=0.1).models[0]
    assert result.batch == 8
    assert result.throughput == pytest.approx(8e3 / result.latency.median)


def test_generations_are_fresh_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    pids: list[int] = []
    original = WorkerProcess.ask

    def ask(self: WorkerProcess, command: str, **options: object) -> dict[str, object]:
        if command == "load":
            pids.append(self.pid)
        return original(self, command, **options)

    monkeypatch.setattr(WorkerProcess, "ask", ask)
    report = bench([MLP, MLP], mlp_feeds(), CPU, seconds=0.2, generations=3)
    assert report.generations == 3
    assert len(pids) == len(set(pids)) == 9  # base, candidate and control, three times
    pids.clear()
    report = bench([MLP, MLP], mlp_feeds(), CPU, seconds=0.2, generations=2, control=False)
    assert len(set(pids)) == 4
    assert report.control is None
    assert report.models[1].noise_floor >= 0.02


def test_a_control_that_does_not_fit_into_memory_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = WorkerProcess.ask

    def ask(self: WorkerProcess, command: str, **options: object) -> dict[str, object]:
        answer = original(self, command, **options)
        return {**answer, "memory": 1 << 20} if command == "room" else answer

    monkeypatch.setattr(WorkerProcess, "ask", ask)
    report = bench([MLP, MLP], mlp_feeds(), CPU, seconds=0.2, generations=2)
    assert report.control is None
    assert any("no control was run" in w and "memory" in w for w in report.warnings)
    assert report.models[1].verdict in ("faster", "slower", "same", "noisy")


def test_a_yardstick_runs_beside() -> None:
    report = bench([MLP], mlp_feeds(), CPU, seconds=0.2, yardstick=True)
    assert report.yardstick is not None
    assert report.yardstick.ms > 0
    low, high = report.yardstick.ci
    assert low <= report.yardstick.ratio <= high
    # The network takes about a tenth of the yardstick's time; upside down it would be ten times.
    assert report.models[0].latency.median < report.yardstick.ms
    assert report.yardstick.ratio < 1
    assert len(report.models) == 1


def test_the_yardstick_is_the_same_every_time(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, x = write_yardstick(tmp_path / "a")
    second, y = write_yardstick(tmp_path / "b")
    assert first.read_bytes() == second.read_bytes()
    np.testing.assert_array_equal(x["x"], y["x"])
    result = onnxruntime_run(first, x)
    assert result.shape == (256, 256)
    assert 0.1 < float(np.abs(result).mean()) < 10  # no overflow, no denormals


def onnxruntime_run(path: Path, feed: dict[str, np.ndarray]) -> np.ndarray:
    import onnxruntime as ort

    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, feed)[0])


@pytest.mark.slow
def test_a_model_with_twice_the_work_is_slower(tmp_path: Path) -> None:
    def model(layers: int) -> Path:
        body = "".join(f"h{k + 1} = MatMul(h{k}, w) " for k in range(layers))
        text = f"""<ir_version: 8, opset_import: ["": 17]>
        g (float[1,400] h0) => (float[1,400] h{layers}) <float[400,400] w> {{ {body} }}"""
        loaded = onnx.parser.parse_model(text)
        weight = np.eye(400, dtype=np.float32)
        loaded.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
        path = tmp_path / f"{layers}.onnx"
        onnx.save(loaded, path)
        return path

    feeds = feeds_of(h0=np.ones((1, 400), np.float32))
    models = [model(8), model(16), model(4)]
    report = bench(models, feeds, CPU, seconds=1.0)
    if [m.verdict for m in report.models] != ["reference", "slower", "faster"]:
        report = bench(models, feeds, CPU, seconds=4.0)  # other programs were too loud
    assert [m.verdict for m in report.models] == ["reference", "slower", "faster"]
    assert report.verdict[0].startswith("slower 0.")
    assert report.verdict[1].startswith("faster ")


def test_one_model_needs_no_verdict() -> None:
    report = bench([str(MLP)], mlp_feeds(1), CPU, seconds=0.05, threads=2)
    assert report.verdict == ()
    assert report.models[0].ratio == 1.0


def test_floats_of_another_precision_are_cast_and_noted(tmp_path: Path) -> None:
    a, b = elementwise(tmp_path / "a.onnx"), elementwise(tmp_path / "b.onnx", "float16")
    report = bench([a, b], feeds_of(x=np.ones(4, np.float32)), CPU, seconds=0.05)
    assert "b.onnx: input 'x' cast from float32 to float16" in report.warnings


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"name": "z"}, "has no input 'x'"),
        ({"shape": "5"}, "input 'x' has shape [5], given is [4]"),
        ({"shape": "4,1"}, "input 'x' has shape"),
        ({"dtype": "int32"}, "input 'x' takes int32, given is float32"),
    ],
)
def test_other_inputs_are_refused(tmp_path: Path, change: dict[str, str], says: str) -> None:
    a = elementwise(tmp_path / "a.onnx")
    b = elementwise(tmp_path / "b.onnx", **change)
    with pytest.raises(ModelError) as e:
        bench([a, b], feeds_of(x=np.ones(4, np.float32)), CPU, seconds=0.05)
    assert says in e.value.message
    assert e.value.where == str(b)


def test_texts_and_odd_input_names_reach_the_worker(tmp_path: Path) -> None:
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", [n], [f"{n}_y"]) for n in ("file", "a/b:0")],
        "g",
        [
            onnx.helper.make_tensor_value_info("file", onnx.TensorProto.STRING, [2]),
            onnx.helper.make_tensor_value_info("a/b:0", onnx.TensorProto.INT64, [1]),
        ],
        [
            onnx.helper.make_tensor_value_info("file_y", onnx.TensorProto.STRING, [2]),
            onnx.helper.make_tensor_value_info("a/b:0_y", onnx.TensorProto.INT64, [1]),
        ],
    )
    opsets = [onnx.helper.make_opsetid("", 17)]
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "m.onnx"
    )
    feeds = Feeds(
        ({"file": np.array(["é", "bc"], object), "a/b:0": np.array([1])},), "random", False
    )
    report = bench([tmp_path / "m.onnx"], feeds, CPU, seconds=0.05)
    assert report.feeds == {"file": "string[2]", "a/b:0": "int64[1]"}
    assert report.warnings == () or "cast" not in " ".join(report.warnings)


def test_bad_models_are_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(MLP.read_bytes()[:1000])
    empty = tmp_path / "empty.onnx"
    empty.touch()
    for path, says in [
        (tmp_path / "missing.onnx", "no such file"),
        (tmp_path, "folder"),
        (empty, "empty"),
        (broken, "not an ONNX model"),
    ]:
        with pytest.raises(ModelError, match=says) as e:
            bench([MLP, path], mlp_feeds(), CPU)
        assert e.value.where == str(path)
    unknown = tmp_path / "unknown.onnx"
    onnx.save(
        onnx.parser.parse_model(
            '<ir_version: 8, opset_import: ["": 17, "my.ops": 1]> '
            "g (float[4] x) => (float[4] y) { y = my.ops.Magic(x) }"
        ),
        unknown,
    )
    with pytest.raises(ModelError, match=r"no operator 'Magic' of domain 'my\.ops'"):
        bench([unknown], feeds_of(x=np.ones(4, np.float32)), CPU)


def test_bad_options_are_refused() -> None:
    for options in (
        {"seconds": 0},
        {"threads": -1},
        {"min_runs": 0},
        {"seconds": float("nan")},
        {"seconds": float("inf")},
        {"min_effect": 0.0},
        {"generations": 0},
    ):
        with pytest.raises(UsageError):
            bench([MLP], mlp_feeds(), CPU, **options)
    with pytest.raises(UsageError):
        bench([], mlp_feeds(), CPU)
    with pytest.raises(DataError):
        bench([MLP], Feeds((), "empty.npz", True), CPU)


def test_a_target_that_is_not_here_is_no_number() -> None:
    absent = parse_target("arm" if CPU.arch == "x86_64" else "cuda")
    with pytest.raises(TargetError):
        bench([MLP], mlp_feeds(), absent)
