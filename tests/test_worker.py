"""A worker process: its answers, and that it never stays behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import onnxruntime as ort
import pytest

from effdl.errors import ModelError, TargetError
from effdl.measure.bench import bench
from effdl.measure.sending import write_feeds
from effdl.runtime import client
from effdl.runtime.client import WorkerProcess
from effdl.runtime.host import Host, open_host
from tests.test_bench import CPU, MLP, mlp_feeds


@pytest.fixture
def host() -> Iterator[Host]:
    with open_host(CPU) as here:
        yield here


@pytest.mark.skipif(
    "CUDAExecutionProvider" in ort.get_available_providers(), reason="this machine may have CUDA"
)
def test_a_session_on_another_provider_is_an_error(tmp_path: Path, host: Host) -> None:
    files = write_feeds(mlp_feeds(1).batches, tmp_path, host)
    wanted = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    with (
        host.worker("m.onnx") as worker,
        pytest.raises(TargetError, match="CUDAExecutionProvider, but the session runs on CPU"),
    ):
        worker.ask("load", model=str(MLP), providers=wanted, threads=1, feeds=files)


def test_worker_speaks_json_only(host: Host) -> None:
    with host.worker("m.onnx") as worker:
        hello = worker.ask("hello")
        assert hello["pid"] == worker.pid
        assert "CPUExecutionProvider" in hello["providers"]
        with pytest.raises(RuntimeError, match="no model is loaded"):
            worker.block(runs=1)
        with pytest.raises(RuntimeError, match="unknown command"):
            worker.ask("dance")


def test_runs_and_feeds_of_a_block(tmp_path: Path, host: Host) -> None:
    files = write_feeds(mlp_feeds(3).batches, tmp_path, host)
    with host.worker("m.onnx") as worker:
        loaded = worker.ask(
            "load", model=str(MLP), providers=["CPUExecutionProvider"], threads=1, feeds=files
        )
        assert loaded["providers"] == ["CPUExecutionProvider"]
        assert len(worker.block(runs=7, start=2)[0]) == 7
        assert len(worker.block(min_ms=0.0)[0]) == 1
        assert len(worker.block(min_ms=5.0)[0]) > 1
        if hasattr(os, "sched_getaffinity"):
            cpus = os.sched_getaffinity(worker.pid)
            assert {worker.block(runs=1, cpu=cpu)[1] for cpu in cpus} == cpus
            assert worker.block(runs=1, cpu=100_000)[1] in cpus
            assert os.sched_getaffinity(worker.pid) == cpus
        assert worker.ask("stats")["peak_bytes"] >= loaded["peak_bytes"]


def gone(pid: int, seconds: float = 10.0) -> bool:
    """Whether process ``pid`` ends within the time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")


@needs_proc
def test_a_killed_worker_is_named_by_its_signal(host: Host) -> None:
    with host.worker("big.onnx") as worker:
        worker.ask("hello")
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(ModelError, match="SIGKILL") as e:
            worker.ask("hello")
        assert e.value.where == "big.onnx"
        assert "memory" in e.value.hint


def test_a_worker_that_cannot_start_says_why() -> None:
    command = [sys.executable, "-c", "import sys; sys.exit('no such module: onnxruntime')"]
    with (
        WorkerProcess("m.onnx", command) as worker,
        pytest.raises(ModelError, match="no such module"),
    ):
        worker.ask("hello")


@needs_proc
def test_no_worker_outlives_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    pids: list[int] = []
    original = WorkerProcess.ask

    def ask(self: WorkerProcess, command: str, **options: object) -> dict[str, object]:
        pids.append(self.pid)
        if command == "block":
            raise KeyboardInterrupt
        return original(self, command, **options)

    monkeypatch.setattr(client.WorkerProcess, "ask", ask)
    with pytest.raises(KeyboardInterrupt):
        bench([MLP, MLP], mlp_feeds(), CPU, seconds=0.1)
    assert len(set(pids)) == 3  # the control too
    assert all(gone(pid) for pid in set(pids))


@needs_proc
def test_no_worker_outlives_a_killed_parent() -> None:
    code = (
        "import sys\nfrom effdl.runtime.host import open_host\n"
        "from effdl.runtime.target import parse_target\n"
        "with open_host(parse_target()) as h:\n  w = h.worker('m')\n  w.ask('hello')\n"
        "  print(w.pid, flush=True)\n  sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.kill()
    assert gone(pid)
