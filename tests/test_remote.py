"""Outputs that are computed elsewhere: how they travel, and how they are judged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from typer.testing import CliRunner

from effdl import api
from effdl.cli.app import app
from effdl.data.feeds import Feeds
from effdl.data.random import random_feeds
from effdl.errors import ModelError, TargetError, UsageError
from effdl.graph import io
from effdl.measure import remote
from effdl.measure.remote import (
    LOW_PRECISION,
    ONE_VALUE,
    Rule,
    compare_there,
    cross_rule,
    outputs_on,
)
from effdl.report import Place
from effdl.runtime import host as host_module
from effdl.runtime.client import WorkerProcess
from effdl.runtime.host import Host, LocalHost, open_host
from effdl.runtime.session import open_session
from effdl.runtime.target import Target, parse_target
from effdl.runtime.worker import files
from effdl.runtime.worker.outputs import pack, unpack
from effdl.runtime.worker.refusal import Refusal
from tests.support import SAMPLES, from_text

MLP = SAMPLES / "digits_mlp.onnx"
STRANGE = """
<ir_version: 8, opset_import: ["": 17]>
g (string[N] words, float[2] x) => (string[N] same, seq(float[2]) both, float[2] y, int64[1] n)
{
    same = Identity(words)
    both = SequenceConstruct(x, x)
    y = Neg(x)
    n = Shape(x)
}
"""
QUANTIZED = """
<ir_version: 8, opset_import: ["": 17]>
g (float[4] x) => (float[4] y, uint8[4] q, int64[1] label)
<float scale = {0.1}, uint8 zero = {128}>
{
    q = QuantizeLinear(x, scale, zero)
    y = DequantizeLinear(q, scale, zero)
    label = ArgMax <axis = 0, keepdims = 1> (y)
}
"""


def test_outputs_come_back_as_they_were(tmp_path: Path) -> None:
    runs: list[dict[str, Any]] = [
        {
            "z": np.arange(6, dtype=np.float16).reshape(2, 3),
            "a": np.array(["é", "", "x y"], dtype=object),
            "list": [np.zeros((0, 2), np.int64), np.array(3.5)],
            "maps": [{1: 0.25, 2: float("nan")}, {"k": 1.0}],
            "nothing": None,
        },
        {"z": np.array([np.inf], np.float32)},
    ]
    pack(runs, str(tmp_path / "o.npz"))
    got = unpack(str(tmp_path / "o.npz"))
    assert [list(r) for r in got] == [list(r) for r in runs]
    np.testing.assert_array_equal(got[0]["z"], runs[0]["z"])
    assert got[0]["z"].dtype == np.float16
    assert got[0]["a"].tolist() == ["é", "", "x y"]
    assert got[0]["list"][0].shape == (0, 2)
    assert got[0]["list"][1].shape == ()
    assert list(got[0]["maps"][0]) == [1, 2]
    assert got[0]["maps"][1] == {"k": 1.0}
    assert got[0]["nothing"] is None
    assert np.isinf(got[1]["z"]).all()


def test_outputs_on_a_host_are_those_of_a_session(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    io.save(from_text(STRANGE), path)
    words = np.array(["a", "bc"], dtype=object)
    feeds = [{"words": words, "x": np.array([k, 2], np.float32)} for k in range(3)]
    with open_host(parse_target()) as here:
        got = outputs_on(here, path, feeds)
    session = open_session(path)
    for one, feed in zip(got, feeds, strict=True):
        want = session.run(feed)
        assert list(one) == list(want)
        assert one["same"].tolist() == ["a", "bc"]
        for a, b in zip(one["both"], want["both"], strict=True):
            np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(one["y"], want["y"])


def test_a_model_that_does_not_run_there_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    node = helper.make_node("Nope", ["x"], ["y"], domain="my.ops")
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in "xy"]
    graph = helper.make_graph([node], "g", ports[:1], ports[1:])
    opsets = [helper.make_opsetid("my.ops", 1), helper.make_opsetid("", 17)]
    path.write_bytes(helper.make_model(graph, opset_imports=opsets).SerializeToString())
    feed = {"x": np.zeros(1, np.float32)}
    with (
        open_host(parse_target()) as here,
        pytest.raises(ModelError, match="no operator 'Nope'") as caught,
    ):
        outputs_on(here, path, [feed])
    assert caught.value.where == str(path)


def test_files_of_a_far_machine(tmp_path: Path) -> None:
    source = tmp_path / "a"
    source.write_bytes(b"abc")
    assert files.digest(str(source))["sha256"].startswith("ba7816bf")
    files.place(str(source), str(tmp_path / "new" / "deep" / "b"))
    assert (tmp_path / "new" / "deep" / "b").read_bytes() == b"abc"
    room = files.room(str(tmp_path))
    assert room["disk"] > 0
    files.remove(str(tmp_path / "new"))
    files.remove(str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()
    for command in (files.digest, files.room):
        with pytest.raises(Refusal, match="No such file"):
            command(str(tmp_path / "none"))
    with pytest.raises(Refusal, match="No such file"):
        files.place(str(tmp_path / "none"), str(tmp_path / "c"))


def test_tolerances_follow_the_number_format() -> None:
    assert cross_rule(io.load(MLP)) == Rule()
    rule = cross_rule(from_text(QUANTIZED))
    assert rule.rtol == {"y": ONE_VALUE, "q": ONE_VALUE}  # a class must be the same
    assert rule.rel_l2 == LOW_PRECISION
    assert "5%" in rule.notes[0]
    half = from_text(
        "<ir_version: 8, opset_import: ['': 17]> g (float16[2] x) => (float16[2] y) "
        "<float16[2] w = {1, 2}> { y = Mul(x, w) }".replace("'", '"')
    )
    assert cross_rule(half).rtol == {"y": ONE_VALUE}


def test_an_output_is_held_as_a_whole_too() -> None:
    rule = Rule({"y": ONE_VALUE}, LOW_PRECISION)
    want = [{"y": np.ones(100, np.float32)}]
    place = Place("ssh:x", "arm64", "x", (), "", "1")
    feeds = Feeds(({},), "random", False)

    def judged(change: float, values: int) -> tuple[bool, str]:
        got = np.ones(100, np.float32)
        got[:values] += change
        report = remote._report(want, [{"y": got}], feeds, (MLP, MLP), rule, place)
        return report.equal, report.outputs[0].reason

    assert judged(0.2, 5) == (True, "")  # a few quanta
    assert judged(0.04, 100) == (True, "")
    assert judged(0.3, 1)[0] is False  # one wild value
    equal, reason = judged(0.1, 100)
    assert not equal
    assert reason == "relative L2 error 0.1 is above 0.05"


class Elsewhere(LocalHost):
    """This machine, playing another."""

    def __init__(self, target: Target, folder: Path) -> None:
        super().__init__(parse_target("cpu"), folder)
        self.target = parse_target("arm-emulated:n1")
        self.emulated = True

    def worker(self, where: str) -> WorkerProcess:
        worker = super().worker(where)
        worker.where = where
        return worker


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    @contextmanager
    def opened(target: Target) -> Iterator[Host]:
        yield Elsewhere(target, tmp_path)

    monkeypatch.setattr(remote, "open_host", opened)
    monkeypatch.setattr(api.comparing, "check_reachable", lambda target: None)


@pytest.mark.usefixtures("elsewhere")
def test_here_against_there() -> None:
    feeds = random_feeds(io.load(MLP), count=2)
    report = compare_there(parse_target("arm-emulated"), [MLP], feeds)
    assert report.equal
    assert [r.equal for r in report.results] == [True] * 3  # a core each
    first = report.results[0]
    assert first.place is not None
    assert first.place.target == "arm-emulated:n1"
    assert (first.feeds, first.real) == (2, False)


@pytest.mark.usefixtures("elsewhere")
def test_two_models_may_differ_and_both_be_right(tmp_path: Path) -> None:
    other = tmp_path / "other.onnx"
    model = io.load(MLP)
    weight = next(
        v for v in model.graph.initializers.values() if v.dtype == ir.DataType.FLOAT and v.shape
    )
    assert weight.const_value is not None
    weight.const_value = ir.tensor(weight.const_value.numpy() * 2, name=weight.name)
    io.save(model, other)
    feeds = random_feeds(io.load(MLP), count=1)
    report = compare_there(parse_target("arm-emulated:n1"), [MLP, other], feeds)
    assert [r.equal for r in report.results] == [True, True, False]
    assert report.equal


@pytest.mark.usefixtures("elsewhere")
def test_a_wrong_result_is_seen_and_ends_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    real = outputs_on

    def wrong(host: Host, model: Path, feeds: Feeds) -> list[dict[str, Any]]:
        return [{n: v * 1.01 for n, v in run.items()} for run in real(host, model, feeds)]

    monkeypatch.setattr(remote, "outputs_on", wrong)
    done = CliRunner().invoke(app, ["compare", str(MLP), "--target", "arm-emulated"])
    assert done.exit_code == 1
    assert "DIFFERS" in done.output
    assert "NOT right on" in done.output
    assert "beyond the tolerance of 0.0001" in done.output


def test_what_cannot_be_compared() -> None:
    with pytest.raises(UsageError, match="is this machine") as caught:
        api.compare_there(MLP, target="cpu")
    assert "second model" in caught.value.hint


def test_no_latency_where_the_processor_is_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TargetError, match="emulated, its times mean nothing") as caught:
        api.bench(MLP, target="arm-emulated")
    assert "effdl compare MODEL --target arm-emulated" in caught.value.hint
    facts = host_module.this_machine()
    fake = type(facts)(**{**facts.__dict__, "emulator": "qemu-x86_64"})
    monkeypatch.setattr(host_module, "this_machine", lambda: fake)
    with pytest.raises(TargetError, match="emulated by qemu-x86_64"):
        api.bench(MLP, seconds=0.1)
