"""Profiles: what ONNX Runtime runs, told by the model's own nodes."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest

import effdl
from effdl.data.feeds import Feeds
from effdl.errors import ModelError, UsageError
from effdl.measure.blame import kind_of
from effdl.measure.kernels import Kernels, make_profile
from effdl.measure.origin import Origins, map_origins
from effdl.measure.owngraph import Graph, Node, named_copy, read_graph
from effdl.measure.placement import advice, placement
from effdl.measure.profile import profile
from effdl.render.profile import print_profile
from effdl.report import to_json
from effdl.runtime.host import open_host
from effdl.runtime.target import parse_target
from effdl.runtime.worker.tracing import open_traced, read_profile
from tests.loopback import MISSING, loopback
from tests.support import SAMPLES, SHARED, needs_shared

CPU = parse_target("cpu")
CNN = SAMPLES / "digits_cnn.onnx"
MODELS = sorted(SAMPLES.glob("*.onnx"))
SHARED_MODELS = sorted((SHARED / "models").glob("*.onnx")) if SHARED else []
UNRUNNABLE = {"superres_prepost_op18"}
HEAVY = ("Conv", "MatMul", "LSTM", "ConvTranspose", "Softmax", "MaxPool")


def mapped(path: Path, folder: Path) -> tuple[Graph, Graph, Origins]:
    """The graph of a model, that which ONNX Runtime runs, and the map between them."""
    named, own = named_copy(path, folder)
    goal = folder / "executed.onnx"
    _, why = open_traced(
        str(named), ["CPUExecutionProvider"], 1, str(goal), str(folder / "profile")
    )
    assert not why
    assert not list(folder.glob("executed*.data"))
    executed = read_graph(onnx.load(goal, load_external_data=False))
    return own, executed, map_origins(own, executed)


def from_text(text: str, path: Path) -> Path:
    onnx.save(onnx.parser.parse_model(text), path)
    return path


def by_label(own: Graph, executed: Graph, origins: Origins) -> dict[str, set[str]]:
    """Op types of the executed nodes that name each node of the model."""
    found: dict[str, set[str]] = {}
    for node, names in zip(executed.nodes, origins.of, strict=True):
        for name in names:
            found.setdefault(name, set()).add(node.op_type)
    return found


def check_map(own: Graph, executed: Graph, origins: Origins) -> None:
    """Every node of the model is told, once or as copies of one; heavy work stays what it is."""
    labels = {n.label for n in own.nodes}
    told = Counter(name for names in origins.of for name in names)
    assert set(told) <= labels
    assert set(origins.folded) <= labels
    assert set(told) | set(origins.folded) == labels
    assert {n for names in origins.near for n in names} <= labels
    found = by_label(own, executed, origins)
    kinds = {n.label: kind_of(n.op_type) for n in own.nodes}
    for label, kind in kinds.items():
        if kind in HEAVY and label in found:
            assert kind in {kind_of(op) for op in found[label]}, (label, kind, found[label])
    for names in origins.of:
        convs = [n for n in names if kinds[n] == "Conv"]
        assert len(convs) <= 1, names


@pytest.mark.parametrize("path", MODELS, ids=lambda p: p.stem)
def test_every_node_of_a_sample_is_told(path: Path, tmp_path: Path) -> None:
    check_map(*mapped(path, tmp_path))


@needs_shared
@pytest.mark.parametrize("path", SHARED_MODELS, ids=lambda p: p.stem)
def test_every_node_of_a_real_model_is_told(path: Path, tmp_path: Path) -> None:
    if path.stem in UNRUNNABLE:
        pytest.skip("its operators are not in ONNX Runtime")
    check_map(*mapped(path, tmp_path))


@needs_shared
def test_silu_and_focus_of_yolox(tmp_path: Path) -> None:
    assert SHARED is not None
    own, executed, origins = mapped(SHARED / "models" / "yolox_nano.onnx", tmp_path)
    of = dict(zip((n.name for n in executed.nodes), origins.of, strict=True))
    ops = {n.label: n.op_type for n in own.nodes}
    silu = [n for n, e in zip(origins.of, executed.nodes, strict=True) if e.op_type == "QuickGelu"]
    assert len(silu) == 104
    assert {tuple(ops[n] for n in names) for names in silu} == {("Sigmoid", "Mul")}
    reorders = [n for n in executed.nodes if n.op_type == "ReorderOutput"]
    assert reorders
    assert all(of[n.name] == () for n in reorders)


@needs_shared
def test_quantized_layers_of_mobilenet(tmp_path: Path) -> None:
    assert SHARED is not None
    own, executed, origins = mapped(SHARED / "models" / "mobilenetv2_qdq_int8.onnx", tmp_path)
    ops = {n.label: n.op_type for n in own.nodes}
    parts = [
        Counter(ops[n] for n in names)
        for names, e in zip(origins.of, executed.nodes, strict=True)
        if e.op_type == "QLinearConv"
    ]
    assert len(parts) == 52
    assert all(p["Conv"] == 1 and p["QuantizeLinear"] == 1 for p in parts)
    assert sum(p["Relu"] for p in parts) == 35
    assert Counter(ops[n] for n in origins.folded) == {"Identity": 300}


def test_conv_and_relu_are_both_named(tmp_path: Path) -> None:
    own, executed, origins = mapped(CNN, tmp_path)
    ops = {n.label: n.op_type for n in own.nodes}
    fused = [
        n for n, e in zip(origins.of, executed.nodes, strict=True) if kind_of(e.op_type) == "Conv"
    ]
    assert fused
    assert all(ops[names[0]] == "Conv" for names in fused)
    assert any("Relu" in {ops[n] for n in names} for names in fused)


def test_nodes_without_names_are_told_by_their_outputs(tmp_path: Path) -> None:
    proto = onnx.load(CNN)
    for node in proto.graph.node:
        node.name = ""
    bare = tmp_path / "bare.onnx"
    onnx.save(proto, bare)
    folder = tmp_path / "work"
    folder.mkdir()
    own, executed, origins = mapped(bare, folder)
    check_map(own, executed, origins)
    assert {n.label for n in own.nodes} == {n.output[0] for n in proto.graph.node}
    assert onnx.load(bare) == proto


def test_equal_names_are_told_apart(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
        g (float[1,4] x) => (float[1,4] z) {
            [same] y = Exp(x)
            [same] z = Tanh(y)
        }"""
    own, executed, origins = mapped(from_text(text, tmp_path / "m.onnx"), tmp_path)
    assert own.nodes[0].name == "same"
    assert own.nodes[1].name != "same"
    assert origins.of == (("same",), ("same",))
    assert len({n.name for n in executed.nodes}) == 2


def test_external_weights_stay_where_they_are(tmp_path: Path) -> None:
    proto = onnx.load(CNN)
    for node in proto.graph.node:
        node.name = ""
    onnx.save(
        proto,
        tmp_path / "m.onnx",
        save_as_external_data=True,
        location="m.data",
        size_threshold=0,
    )
    folder = tmp_path / "work"
    folder.mkdir()
    check_map(*mapped(tmp_path / "m.onnx", folder))
    assert os.stat(tmp_path / "m.data").st_nlink == 2


def test_an_operator_made_of_others(tmp_path: Path) -> None:
    text = """<ir_version: 9, opset_import: ["" : 18, "own" : 1]>
        g (float[1,4,8,8] x) => (float[1,4,8,8] y) {
            [a] h = HardSwish(x)
            [b] k = own.F(h)
            [c] m = own.F(k)
            [d] y = Mish(m)
        }
        <opset_import: ["" : 18], domain: "own">
        F (u) => (v) { [in1] w = Sigmoid(u)
            [in2] q = Exp(w)
            [in3] v = Mul(u, q) }"""
    _, _, origins = mapped(from_text(text, tmp_path / "m.onnx"), tmp_path)
    assert Counter(origins.of) == {("a",): 2, ("b",): 3, ("c",): 3, ("d",): 3}
    assert origins.folded == ()


def test_a_branch_that_was_put_in_place(tmp_path: Path) -> None:
    text = """<ir_version: 9, opset_import: ["" : 18]>
        g (float[1,4] x) => (float[1,4] y) <bool c = {1}> {
            [a] h = Relu(x)
            [b] k = If(c) <
                then_branch = t () => (float[1,4] p) { [i1] q = Sigmoid(h)
                    [i2] p = Exp(q) },
                else_branch = e () => (float[1,4] p) { [i3] p = Tanh(h) }>
            [d] y = Relu(k)
        }"""
    own, executed, origins = mapped(from_text(text, tmp_path / "m.onnx"), tmp_path)
    found = by_label(own, executed, origins)
    assert found == {"a": {"Relu"}, "i1": {"Sigmoid"}, "i2": {"Exp"}, "b": {"Exp"}, "d": {"Relu"}}
    assert origins.folded == ("i3",)


def test_layouts_and_sums(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    helper, tensor = onnx.helper, onnx.numpy_helper
    weights = [
        tensor.from_array(rng.standard_normal((32, 32, 3, 3)).astype(np.float32), f"w{k}")
        for k in range(2)
    ]
    pads = {"pads": [1, 1, 1, 1]}
    nodes = [
        helper.make_node("Conv", ["x", "w0"], ["a"], name="first", **pads),
        helper.make_node("Relu", ["a"], ["b"], name="relu"),
        helper.make_node("Conv", ["b", "w1"], ["c"], name="second", **pads),
        helper.make_node("Add", ["c", "b"], ["d"], name="sum"),
        helper.make_node("Relu", ["d"], ["e"], name="last"),
        helper.make_node("Erf", ["e"], ["y"], name="erf"),
    ]
    port = [
        helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1, 32, 8, 8]) for n in ("x", "y")
    ]
    graph = helper.make_graph(nodes, "g", port[:1], port[1:], weights)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8),
        tmp_path / "m.onnx",
    )
    own, executed, origins = mapped(tmp_path / "m.onnx", tmp_path)
    found = by_label(own, executed, origins)
    assert {kind_of(op) for op in found["first"]} == {"Conv"}
    convs = [set(n) for n in origins.of if "second" in n or "first" in n]
    assert {"first", "relu"} in convs
    assert {"second", "sum", "last"} in convs


def test_a_profile_of_two_models(tmp_path: Path) -> None:
    quantized = tmp_path / "int8.onnx"
    options = effdl.RunOptions(bench_seconds=0, gate="off")
    calibration = CNN.with_suffix(".calib.npz")
    effdl.optimize(CNN, "cnn-int8", quantized, data=calibration, options=options)
    report = effdl.profile(CNN, quantized, seconds=0.2)
    assert [p.path for p in report.profiles] == [str(CNN), str(quantized)]
    for path, found in zip((CNN, quantized), report.profiles, strict=True):
        labels = {n.label for n in read_graph(onnx.load(path)).nodes}
        assert {x for n in found.nodes for x in n.origin} <= labels
        assert sum(n.ms for n in found.nodes) == pytest.approx(found.kernel_ms)
        assert sum(o.ms for o in found.ops) == pytest.approx(found.kernel_ms)
        assert sum(o.count for o in found.ops) == len(found.nodes)
        assert 0 < found.kernel_ms <= found.wall_ms * (1 + 1e-9)
        assert 0 < found.scale <= 1
        assert found.event_us > 0
        assert found.idle == ()
    before, after = report.profiles
    total = sum(c.after_ms - c.before_ms for c in report.changes)
    assert total == pytest.approx(after.wall_ms - before.wall_ms)
    assert sum(c.before for c in report.changes) == len(before.nodes)
    assert sum(c.after for c in report.changes) == len(after.nodes)
    assert report.reason
    kinds = {c.kind for c in report.changes}
    assert "QuantizeLinear" in kinds
    own = {n.label for n in read_graph(onnx.load(CNN)).nodes}
    assert all(set(names) & own for names, _, _ in report.slower if names)
    json.dumps(to_json(report), allow_nan=False)


@needs_shared
def test_branches_that_were_not_taken_are_idle() -> None:
    assert SHARED is not None
    path = SHARED / "models" / "silero_vad.onnx"
    feed = {
        "input": np.zeros((1, 576), np.float32),
        "state": np.zeros((2, 1, 128), np.float32),
        "sr": np.array(16000, np.int64),
    }
    report = profile([path], Feeds((feed,), "zeros", False), CPU, seconds=0.2)
    (found,) = report.profiles
    labels = {n.label for n in named_copy(path, Path())[1].nodes}
    ran = {x for n in found.nodes for x in n.origin}
    assert ran | set(found.idle) | set(found.folded) == labels
    assert any("else_branch" in name for name in found.idle)
    assert not any("else_branch" in name for name in ran)
    outer = [n for n in found.nodes if n.op_type == "If"]
    assert len(outer) > 3
    assert sum(n.ms for n in outer) < found.kernel_ms / 2  # without what runs inside


def event(name: str, op: str, ts: int, dur: int, cat: str = "Node") -> dict[str, object]:
    args = {"op_name": op, "provider": "CPU", "node_index": "1", "output_type_shape": []}
    suffix = "_kernel_time" if cat == "Node" else ""
    return {"cat": cat, "name": name + suffix, "ts": ts, "dur": dur, "tid": 1, "args": args}


def test_time_inside_a_loop_counts_once(tmp_path: Path) -> None:
    body = "SequentialExecutor::Execute"
    events = [
        event("a", "Add", 5, 10),
        event("in", "Mul", 23, 4),
        event(body, "", 22, 8, "Session"),
        event("in", "Mul", 43, 6),
        event(body, "", 41, 9, "Session"),
        event("loop", "Loop", 20, 40),
        event(body, "", 4, 60, "Session"),
        event("model_run", "", 0, 100, "Session"),
    ]
    path = tmp_path / "p.json"
    path.write_text(json.dumps(events))
    told = read_profile(str(path), 0, True)
    assert {r["name"]: (round(r["ms"], 6), r["calls"]) for r in told["nodes"]} == {
        "a": (0.010, 1.0),
        "in": (0.010, 2.0),
        "loop": (0.023, 1.0),
    }


def test_runs_out_of_the_ordinary_are_left_out(tmp_path: Path) -> None:
    events = []
    for k, dur in enumerate([500, 10, 10, 10, 900, 20, 20, 1, 20]):
        events += [event("a", "Add", 1000 * k + 1, dur), event("model_run", "", 1000 * k, 990, "S")]
    path = tmp_path / "p.json"
    path.write_text(json.dumps(events))
    told = read_profile(str(path), 1, True)
    assert told["runs"] == 4
    assert told["nodes"][0]["ms"] == pytest.approx(0.015)
    assert read_profile(str(path), 0, False)["runs"] == 9


def rows(*times: tuple[str, float], provider: str = "CPU") -> list[dict[str, object]]:
    return [
        {
            "name": name,
            "op_type": "Add",
            "index": str(k),
            "provider": provider,
            "shape": "",
            "ms": ms,
            "calls": 1.0,
        }
        for k, (name, ms) in enumerate(times)
    ]


def test_the_cost_of_profiling_is_taken_off() -> None:
    graph = Graph([Node(n, "Add", (), (n + "o",), (), n) for n in "abc"])
    told = rows(("a", 1.002), ("b", 0.003), ("c", 0.001))
    found = make_profile("m", graph, graph, Kernels(told, 8, event_us=2.0), 1.5)
    assert [n.ms for n in found.nodes] == pytest.approx([1.0, 0.001, 0.0])
    assert (found.scale, found.event_us) == (1.0, 2.0)
    # More than the whole inference: up to twice the cost, what is left is scaled.
    found = make_profile("m", graph, graph, Kernels(told, 8, event_us=2.0), 0.999)
    assert found.kernel_ms == pytest.approx(0.999)
    assert found.event_us == pytest.approx(3.0, abs=1e-3)
    found = make_profile("m", graph, graph, Kernels(told, 8, event_us=2.0), 0.5)
    assert found.kernel_ms == pytest.approx(0.5)
    assert found.event_us == pytest.approx(4.0)
    assert found.scale == pytest.approx(0.5 / 0.998)


def test_nodes_that_a_provider_compiled() -> None:
    own = Graph([Node(n, "Add", (), (n + "o",), (), n) for n in "abc"])
    told = [*rows(("TRTKernel_0", 1.0), provider="Trt"), *rows(("c", 0.5))]
    assigned = [
        {"provider": "Trt", "nodes": [["a", "Add", ""], ["b", "Add", ""]]},
        {"provider": "CPU", "nodes": [["c", "Add", ""]]},
    ]
    found = make_profile("m", own, Graph(), Kernels(told, 8, 0.0, assigned), 2.0)
    assert [n.origin for n in found.nodes] == [("a", "b"), ("c",)]
    assert found.folded == ()
    where = placement(found, "Trt")
    assert where.providers == {"Trt": 1, "CPU": 1}
    assert where.fallback == (("c", "Add", "CPU"),)
    assert where.fallback_share == pytest.approx(1 / 3)
    assert "no kernel for 1 Add" in advice(where)[0]


def test_what_a_profile_refuses(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="one model or two, not 3"):
        effdl.profile(CNN, CNN, CNN)
    with pytest.raises(UsageError, match="no model"):
        effdl.profile()
    with pytest.raises(ModelError, match="no such file"):
        effdl.profile(tmp_path / "none.onnx")
    feeds = Feeds(({"wrong": np.zeros(3, np.float32)},), "here", False)
    with pytest.raises(ModelError, match="no input 'wrong'"):
        profile([CNN], feeds, CPU)
    with pytest.raises(UsageError, match="seconds"):
        profile([CNN], feeds, CPU, seconds=0)


@pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")
def test_a_profile_on_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with loopback(tmp_path) as place:
        monkeypatch.setenv("PATH", f"{place.bin}{os.pathsep}{os.environ['PATH']}")
        board = {"device": "ssh", "host": "board", "python": sys.executable}
        report = effdl.profile(CNN, target=board, seconds=0.1)
        assert list(place.far.iterdir()) == []
    assert report.target == "ssh:board"
    labels = {n.label for n in read_graph(onnx.load(CNN)).nodes}
    assert {x for n in report.profiles[0].nodes for x in n.origin} <= labels


def unnamed(path: Path) -> Path:
    proto = onnx.load(CNN)
    for node in proto.graph.node:
        node.name = ""
    onnx.save(proto, path)
    return path


@pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")
def test_a_profile_leaves_a_machine_that_stays_open_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = unnamed(tmp_path / "unnamed.onnx")
    feeds = Feeds(({"image": np.ones((1, 1, 8, 8), np.float32)},), "random", False)

    def files(folder: Path) -> list[Path]:
        return sorted(p for p in folder.rglob("*") if p.is_file() and p.parent.name != "pids")

    with loopback(tmp_path) as place:
        monkeypatch.setenv("PATH", f"{place.bin}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.setenv("TMPDIR", str(here := tmp_path / "here"))
        monkeypatch.setattr("tempfile.tempdir", str(here))
        here.mkdir()
        board = parse_target({"device": "ssh", "host": "board", "python": sys.executable})
        with open_host(board) as host:
            before = files(place.far), files(here)
            found = profile([model], feeds, board, seconds=0.1, host=host)
            assert found.profiles[0].nodes
            assert (files(place.far), files(here)) == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--profile"], ["slowest nodes", "op type"]),
        (["--placement"], ["provider", "every node runs on CPUExecutionProvider"]),
        (["--profile", "--placement", "--top", "1"], ["slowest nodes", "provider"]),
    ],
)
def test_what_is_printed(
    options: list[str], said: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    report = effdl.profile(CNN, CNN, seconds=0.1)
    print_profile(report, times="--profile" in options, places="--placement" in options, top=1)
    out = capsys.readouterr().out
    for text in said:
        assert text in out
    assert ("where the time went" in out) == ("--profile" in options)
    assert max(map(len, out.splitlines())) <= 100


def test_the_command(tmp_path: Path) -> None:
    def run(*args: object) -> subprocess.CompletedProcess[str]:
        code = "from effdl.cli.app import main; main()"
        command = [sys.executable, "-c", code, "bench", *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    goal = tmp_path / "p.json"
    done = run(CNN, "--profile", "--json", "--seconds", "0.1", "--export-json", goal)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report == json.loads(goal.read_text())
    assert report["profiles"][0]["nodes"][0]["origin"]
    for options, message in (
        (["--scan", "batch=1,2"], "--scan does not go with"),
        (["--threads", "1,2"], "one number of --threads"),
        ([CNN, CNN], "one model or two, not 3"),
    ):
        done = run(CNN, "--profile", *options)
        assert done.returncode == 2
        assert message in done.stderr
        assert len(done.stderr.splitlines()) <= 2
