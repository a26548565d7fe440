"""Work in a child process: its outputs, its faults, and crashes that end nothing else."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from effdl.data.feeds import Feeds
from effdl.errors import DataError, ModelError
from effdl.graph import io
from effdl.measure import verify
from effdl.measure.verify import Verifier, run_all
from effdl.runtime import apart
from effdl.runtime.apart import can_run_apart, run_apart
from effdl.runtime.target import Target, parse_target
from tests.support import SAMPLES, from_text
from tests.test_worker import gone

CPU = parse_target("cpu")
pytestmark = pytest.mark.skipif(not can_run_apart(CPU), reason="needs Linux")
HEAD = '<ir_version: 8, opset_import: ["": 17]>'


def test_outputs_of_every_kind_come_back() -> None:
    outputs: list[dict[str, Any]] = [
        {
            "y": np.arange(6, dtype=np.float16).reshape(2, 3),
            "flag": np.array(True),
            "none": None,
            "list": [np.ones(2), np.zeros((0, 3), np.int8)],
            "map": [{0: 0.5, 7: 0.25}],
            "text": np.array(["a", "bc"], object),
        },
        {"y": np.full(1 << 20, np.inf)},
    ]
    first, second = run_apart(lambda: outputs)
    assert list(first) == list(outputs[0])
    np.testing.assert_array_equal(first["y"], outputs[0]["y"])
    assert first["y"].dtype == np.float16
    assert (first["none"], first["map"]) == (None, [{0: 0.5, 7: 0.25}])
    assert [a.shape for a in first["list"]] == [(2,), (0, 3)]
    assert first["text"].tolist() == ["a", "bc"]
    np.testing.assert_array_equal(second["y"], outputs[1]["y"])
    assert run_apart(lambda: [{"pid": np.array(os.getpid())}])[0]["pid"] != os.getpid()


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS])
def test_a_crash_is_an_error(number: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    def work() -> apart.Outputs:
        os.write(2, b"native noise")
        os.kill(os.getpid(), number)
        return []

    with pytest.raises(ModelError, match=rf"ONNX Runtime crashed \({number.name}\)") as e:
        run_apart(work)
    assert e.value.hint
    assert capfd.readouterr() == ("", "")


def test_a_true_segmentation_fault() -> None:
    def work() -> apart.Outputs:
        ctypes.string_at(0)
        return []

    with pytest.raises(ModelError, match="SIGSEGV"):
        run_apart(work)


def test_a_killed_child_points_at_memory() -> None:
    def work() -> apart.Outputs:
        os.kill(os.getpid(), signal.SIGKILL)
        return []

    with pytest.raises(ModelError, match="was killed") as e:
        run_apart(work)
    assert "memory" in e.value.hint


@pytest.mark.parametrize("code", [0, 1, 7])
def test_a_child_that_ends_without_an_answer(code: int) -> None:
    with pytest.raises(ModelError, match=f"ended with code {code}"):
        run_apart(lambda: os._exit(code))


def test_a_child_that_exits() -> None:
    with pytest.raises(ModelError, match="ended with code 1"):
        run_apart(lambda: sys.exit(1))


def test_a_process_that_the_child_leaves_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart, "_LOOK_SECONDS", 0.05)
    reader, writer = os.pipe()

    def work() -> apart.Outputs:
        if os.fork() == 0:
            os.write(writer, str(os.getpid()).encode())
            time.sleep(60)
            os._exit(0)
        os._exit(5)

    try:
        with pytest.raises(ModelError, match="ended with code 5"):
            run_apart(work)
    finally:
        os.kill(int(os.read(reader, 20)), signal.SIGKILL)
        os.close(reader)
        os.close(writer)


def test_faults_keep_their_class_and_words() -> None:
    def refuse() -> apart.Outputs:
        raise DataError("no such sample", hint="look again", where="a.npz")

    with pytest.raises(DataError, match="no such sample") as e:
        run_apart(refuse)
    assert (e.value.hint, e.value.where) == ("look again", "a.npz")

    def stumble() -> apart.Outputs:
        raise KeyError("a bug of ours")

    with pytest.raises(RuntimeError, match="KeyError: 'a bug of ours'"):
        run_apart(stumble)

    def swell() -> apart.Outputs:
        raise MemoryError

    with pytest.raises(ModelError, match="out of memory"):
        run_apart(swell)


def test_nothing_stays_behind(tmp_path: Path) -> None:
    def handles() -> int:
        return len(os.listdir("/proc/self/fd"))

    run_apart(list)
    before = handles()
    for _ in range(5):
        run_apart(list)
        with pytest.raises(ModelError):
            run_apart(lambda: os.kill(os.getpid(), signal.SIGSEGV) or [])
    assert handles() == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_no_handle_stays_when_no_process_can_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> int:
        raise BlockingIOError("no more processes")

    run_apart(list)
    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, "fork", refuse)
    for _ in range(3):
        with pytest.raises(BlockingIOError):
            run_apart(list)
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_interrupt_while_the_child_ends_leaves_none(monkeypatch: pytest.MonkeyPatch) -> None:
    wait, calls = os.waitpid, []

    def interrupted(pid: int, options: int) -> tuple[int, int]:
        calls.append(pid)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return wait(pid, options)

    monkeypatch.setattr(os, "waitpid", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_apart(list)
    monkeypatch.undo()
    assert len(calls) == 2
    with pytest.raises(ChildProcessError):
        os.waitpid(calls[0], os.WNOHANG)


def test_an_interrupt_ends_the_child(monkeypatch: pytest.MonkeyPatch) -> None:
    pids: list[int] = []

    def listen(pid: int, reader: int) -> bytes:
        pids.append(pid)
        raise KeyboardInterrupt

    def sleep() -> apart.Outputs:
        time.sleep(60)
        return []

    monkeypatch.setattr(apart, "_listen", listen)
    with pytest.raises(KeyboardInterrupt):
        run_apart(sleep)
    assert gone(pids[0])


def test_the_child_dies_with_its_parent() -> None:
    reader, writer = os.pipe()
    code = (
        "import os, time\nfrom effdl.runtime.apart import run_apart\n"
        f"def work():\n  os.write({writer}, str(os.getpid()).encode())\n  time.sleep(60)\n"
        "  return []\nrun_apart(work)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], pass_fds=[writer]) as parent:
        pid = int(os.read(reader, 20))
        parent.kill()
    os.close(reader)
    os.close(writer)
    assert gone(pid)


def test_a_child_that_stands_still_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart, "_LOOK_SECONDS", 0.02)
    monkeypatch.setattr(apart, "_STALLED_LOOKS", 3)
    here = os.getpid()

    def work() -> apart.Outputs:
        if os.getpid() != here:
            time.sleep(60)
        return [{"pid": np.array(os.getpid())}]

    assert run_apart(work)[0]["pid"] == here


def test_a_child_that_works_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart, "_LOOK_SECONDS", 0.1)
    monkeypatch.setattr(apart, "_STALLED_LOOKS", 2)
    here = os.getpid()

    def work() -> apart.Outputs:
        end = time.process_time() + 0.6
        while time.process_time() < end:
            pass
        return [{"pid": np.array(os.getpid())}]

    assert run_apart(work)[0]["pid"] != here


def test_cuda_is_not_forked() -> None:
    assert not can_run_apart(Target("cuda", "x86_64", frozenset()))


def crashing() -> Any:
    """Seen with ONNX Runtime 1.32 on the CPU: see docs/findings.md."""
    return from_text(
        f"""{HEAD} g (float[2,3,4] x) => (float16[N] y) {{
        h = Cast<to=10>(x) t = Transpose<perm=[1,0,2]>(h) q = Constant<value_floats=[1.0]>()
        r = Cast<to=10>(q) s = Constant<value_ints=[4,5]>() w = Expand(r, s) m = MatMul(t, w)
        f = Constant<value_ints=[-1]>() y = Reshape(m, f) }}"""
    )


def test_a_graph_that_crashes_onnxruntime() -> None:
    feeds = Feeds(({"x": np.ones((2, 3, 4), np.float32)},), "random", False)
    said = ""
    try:
        (outputs,) = run_all(crashing(), feeds, CPU)
    except ModelError as e:
        said = e.message
    if said:
        assert said == "ONNX Runtime crashed (SIGSEGV) on the model"
    else:  # a version in which that is repaired
        np.testing.assert_array_equal(outputs["y"], np.full(30, 4, np.float16))


def test_a_crash_is_a_failed_check(monkeypatch: pytest.MonkeyPatch) -> None:
    model = from_text(f"{HEAD} g (float[2] x) => (float[2] y) {{ y = Exp(x) }}")
    feeds = Feeds(({"x": np.ones(2, np.float32)},), "random", False)
    verifier = Verifier(model, feeds, CPU)
    here, original = os.getpid(), verify.open_session

    def open_session(*args: Any, **options: Any) -> Any:
        if os.getpid() != here:
            os.kill(os.getpid(), signal.SIGSEGV)
        return original(*args, **options)

    monkeypatch.setattr(verify, "open_session", open_session)
    verdict = verifier.check(model, model.clone(), lossy=False)
    assert not verdict.ok
    assert verdict.reason == "the model no longer runs: ONNX Runtime crashed (SIGSEGV) on the model"
    assert verdict.outputs is None


def test_sessions_in_parent_and_child_get_along() -> None:
    path = SAMPLES / "digits_cnn.onnx"
    model = io.load(path)
    feeds = Feeds(({"image": np.ones((2, 1, 8, 8), np.float32)},), "random", False)
    mine = verify.open_session(model, CPU)
    before = mine.run(feeds.batches[0])
    for _ in range(5):
        (there,) = run_all(model, feeds, CPU)
        np.testing.assert_array_equal(there["logits"], before["logits"])
        np.testing.assert_array_equal(mine.run(feeds.batches[0])["logits"], before["logits"])
