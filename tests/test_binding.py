"""Inputs and outputs bound to a device, on the device "cpu"; and what does not run on it."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from effdl.data.feeds import Feed, Feeds
from effdl.data.random import random_feeds
from effdl.errors import ModelError, TargetError, UsageError
from effdl.graph import io
from effdl.measure.bench import bench
from effdl.measure.doubts import device_warnings
from effdl.measure.sending import write_feeds
from effdl.passes.quantize._format import decline
from effdl.runtime.client import WorkerProcess
from effdl.runtime.host import Host, open_host
from effdl.runtime.target import parse_target
from effdl.runtime.worker.binding import Bound, check_graph_feeds, why_not_bound
from effdl.runtime.worker.refusal import Refusal
from effdl.runtime.worker.session import CPU, fallback, open_on, session_options
from tests.support import SAMPLES, from_text

MODELS = ("digits_mlp", "digits_cnn", "digits_transformer")
TEXT = '<ir_version: 8, opset_import: ["": 13]> g '


def session(tmp_path: Path, text: str) -> ort.InferenceSession:
    path = tmp_path / "m.onnx"
    io.save(from_text(TEXT + text), path)
    return open_on(str(path), [CPU], 1)


@pytest.fixture
def worker() -> Iterator[tuple[Host, WorkerProcess]]:
    with open_host(parse_target()) as host, host.worker("m.onnx") as process:
        yield host, process


def load(pair: tuple[Host, WorkerProcess], model: Path, feeds: list[Feed], **options: Any) -> Any:
    host, process = pair
    files = write_feeds(feeds, model.parent, host)
    return process.ask("load", model=str(model), providers=[CPU], threads=1, feeds=files, **options)


@pytest.mark.parametrize("name", MODELS)
def test_bound_outputs_are_those_of_a_plain_run(name: str) -> None:
    path = SAMPLES / f"{name}.onnx"
    opened = open_on(str(path), [CPU], 1)
    for feed in random_feeds(io.load(path), count=2, seed=3):
        bound = Bound(opened, feed, "cpu")
        want = opened.run(None, feed)
        for _ in range(3):
            bound()
            for a, b in zip(bound.outputs(), want, strict=True):
                np.testing.assert_array_equal(a, b)


def test_fixed_outputs_keep_their_memory(tmp_path: Path) -> None:
    opened = session(tmp_path, "(float[2,3] x) => (float[2,3] y) { y = Mul(x, x) }")
    bound = Bound(opened, {"x": np.full((2, 3), 3.0, np.float32)}, "cpu", fixed=True)
    places = set()
    for _ in range(3):
        bound()
        places.add(bound._binding.get_outputs()[0].data_ptr())
    assert len(places) == 1
    assert bound.outputs()[0].tolist() == [[9.0] * 3] * 2


def test_shapes_that_depend_on_data_scalars_and_halves(tmp_path: Path) -> None:
    opened = session(
        tmp_path,
        "(float[N] x, float f, float16[N] h) => (int64[1,M] y, float z, float16[N] w)"
        " { y = NonZero(x)\n z = Mul(f, f)\n w = Add(h, h) }",
    )
    feed = {
        "x": np.array([1, 0, 2], np.float32),
        "f": np.array(3, np.float32),
        "h": np.ones(3, np.float16),
    }
    bound = Bound(opened, feed, "cpu")
    for _ in range(2):
        bound()
    y, z, w = bound.outputs()
    assert y.tolist() == [[0, 2]]
    assert z.shape == ()
    assert z == 9
    assert w.dtype == np.float16


def test_arrays_that_are_not_in_order(tmp_path: Path) -> None:
    opened = session(tmp_path, "(float[2,3] x) => (float[2,3] y) { y = Add(x, x) }")
    x = np.arange(6, dtype=np.float32).reshape(3, 2).T
    bound = Bound(opened, {"x": x}, "cpu")
    bound()
    np.testing.assert_array_equal(bound.outputs()[0], x + x)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("(string[2] x) => (string[2] y) { y = Identity(x) }", r"input 'x' is a tensor\(string\)"),
        (
            "(float[2] x) => (seq(float[2]) y) { y = SequenceConstruct(x) }",
            r"output 'y' is a seq\(tensor\(float\)\)",
        ),
    ],
)
def test_strings_and_sequences_run_plainly_with_a_note(
    tmp_path: Path, worker: tuple[Host, WorkerProcess], text: str, what: str
) -> None:
    opened = session(tmp_path, text)
    assert re.match(what, why_not_bound(opened))
    kind = opened.get_inputs()[0].type
    x = np.array(["a", "b"]) if "string" in kind else np.ones(2, np.float32)
    answer = load(worker, tmp_path / "m.onnx", [{"x": x}], bind="cpu")
    assert re.match(what, answer["unbound"])
    assert len(worker[1].block(runs=3)[0]) == 3
    said = device_warnings(["m.onnx"], [answer])
    assert said[0].startswith("m.onnx: times include copies to and from the device: ")


def test_a_worker_runs_bound_feeds_in_turn(
    tmp_path: Path, worker: tuple[Host, WorkerProcess]
) -> None:
    io.save(io.load(SAMPLES / "digits_cnn.onnx"), tmp_path / "m.onnx")
    feeds = list(random_feeds(io.load(tmp_path / "m.onnx"), count=3))
    answer = load(worker, tmp_path / "m.onnx", feeds, bind="cpu")
    assert answer["unbound"] == ""
    assert answer["fallback"] == {}
    assert len(worker[1].block(runs=7, start=2)[0]) == 7


def test_plain_feeds_are_not_bound_on_the_cpu(
    tmp_path: Path, worker: tuple[Host, WorkerProcess]
) -> None:
    io.save(from_text(TEXT + "(string[2] x) => (string[2] y) { y = Identity(x) }"), tmp_path / "m")
    assert load(worker, tmp_path / "m", [{"x": np.array(["a", "b"])}])["unbound"] == ""


def test_what_a_cuda_graph_cannot_replay(tmp_path: Path) -> None:
    fixed = session(tmp_path, "(float[2] x) => (float[2] y) { y = Add(x, x) }")
    feed = {"x": np.ones(2, np.float32)}
    check_graph_feeds(fixed, [feed])
    with pytest.raises(Refusal, match="one feed, given are 2"):
        check_graph_feeds(fixed, [feed, feed])
    dynamic = session(tmp_path, "(float[N] x) => (float[N] y) { y = Add(x, x) }")
    with pytest.raises(Refusal, match=r"fixed shapes: output 'y'"):
        check_graph_feeds(dynamic, [feed])
    text = session(tmp_path, "(string[2] x) => (string[2] y) { y = Identity(x) }")
    with pytest.raises(Refusal, match=r"on the device, but input 'x' is a tensor\(string\)"):
        check_graph_feeds(text, [{"x": np.array(["a", "b"])}])


def test_a_refused_cuda_graph_is_the_models_fault(
    tmp_path: Path, worker: tuple[Host, WorkerProcess]
) -> None:
    """The CPU provider ignores options of another one, so the check is reached without a GPU."""
    path = tmp_path / "m.onnx"
    io.save(from_text(TEXT + "(float[N] x) => (float[N] y) { y = Add(x, x) }"), path)
    with pytest.raises(ModelError, match="a CUDA graph needs fixed shapes") as e:
        load(worker, path, [{"x": np.ones(2, np.float32)}], bind="cpu", cuda_graph=True)
    assert "--cuda-graph" in e.value.hint


def test_a_cuda_graph_needs_a_gpu_target() -> None:
    feeds = Feeds(({"x": np.ones(2, np.float32)},), "random", False)
    with pytest.raises(UsageError, match="target cpu has no CUDA graph"):
        bench([SAMPLES / "digits_mlp.onnx"], feeds, parse_target(), cuda_graph=True)


class Opened:
    """Stands in for InferenceSession: keeps what it was opened with."""

    def __init__(self, model: str, options: ort.SessionOptions, providers: list[Any]) -> None:
        self.providers, self.options = providers, options


@pytest.mark.parametrize(
    ("provider", "option"),
    [
        ("CUDAExecutionProvider", "enable_cuda_graph"),
        ("TensorrtExecutionProvider", "trt_cuda_graph_enable"),
    ],
)
def test_provider_options(monkeypatch: pytest.MonkeyPatch, provider: str, option: str) -> None:
    monkeypatch.setattr(ort, "InferenceSession", Opened)
    plain: Any = open_on("m", [provider, CPU], 1)
    assert plain.providers == [provider, CPU]
    key = "session.record_ep_graph_assignment_info"
    assert plain.options.get_session_config_entry(key) == "1"
    graph: Any = open_on("m", [provider, CPU], 1, cuda_graph=True)
    assert graph.providers == [(provider, {option: "1"}), CPU]


@pytest.mark.skipif(
    not hasattr(ort.InferenceSession, "get_provider_graph_assignment_info"),
    reason="this onnxruntime does not tell where nodes run",
)
def test_nodes_that_run_elsewhere_are_named() -> None:
    options = session_options(1)
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    opened = ort.InferenceSession(str(SAMPLES / "digits_cnn.onnx"), options, providers=[CPU])
    assert fallback(opened, CPU) == {}
    found = fallback(opened, "CUDAExecutionProvider")
    assert list(found) == [CPU]
    assert found[CPU]["Conv"] > 1
    load = {
        "unbound": "",
        "fallback": {CPU: {"Shape": 3, "Gather": 2, "Cast": 1, "Concat": 1, "Where": 1}},
        "providers": ["CUDAExecutionProvider"],
    }
    said = device_warnings(["a.onnx"], [load])
    assert said[0] == f"a.onnx: 8 nodes on {CPU} (Shape 3, Gather 2, Cast 1, Concat 1, ...)"
    assert "TF32" in said[1]


def test_an_older_onnxruntime_is_not_asked() -> None:
    assert fallback(object(), CPU) == {}  # type: ignore[arg-type]


def test_the_tensorrt_target() -> None:
    target = parse_target("tensorrt")
    assert target.providers[:2] == ("TensorrtExecutionProvider", "CUDAExecutionProvider")
    assert target.on_gpu
    assert target.name == "tensorrt"
    assert parse_target("ssh:box/tensorrt").providers == target.providers
    assert parse_target("ssh:box/tensorrt").name == "ssh:box/tensorrt"
    assert parse_target("ssh:box").providers == (CPU,)
    assert decline(target) == ""
    assert "TensorRT" in decline(target, dynamic=True)
    assert "CUDA" in decline(parse_target("ssh:box/cuda"))


@pytest.mark.skipif(
    "TensorrtExecutionProvider" in ort.get_available_providers(), reason="TensorRT may be here"
)
@pytest.mark.parametrize("device", ["tensorrt", "cuda"])
def test_a_provider_that_is_not_there_is_named(device: str) -> None:
    feeds = Feeds(({"x": np.ones(2, np.float32)},), "random", False)
    target = parse_target(device)
    with pytest.raises(TargetError, match=f"{target.providers[0]} is not in this onnxruntime"):
        bench([SAMPLES / "digits_mlp.onnx"], feeds, target)
