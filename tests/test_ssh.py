"""Models on another machine, which here is this one behind an sshd of our own."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from typer.testing import CliRunner

from effdl.cli.app import app
from effdl.data.random import random_feeds
from effdl.errors import ModelError, TargetError
from effdl.graph import io
from effdl.measure.remote import outputs_on, verify_there
from effdl.measure.verify import run_all
from effdl.runtime import ssh_link
from effdl.runtime.client import WorkerProcess
from effdl.runtime.host import open_host
from effdl.runtime.machine import this_machine
from effdl.runtime.ssh import SshHost
from effdl.runtime.target import Target, parse_target
from tests.loopback import MISSING, Loopback, loopback
from tests.support import ROOT, SAMPLES

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
MLP = SAMPLES / "digits_mlp.onnx"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    try:
        with loopback(tmp_path_factory.mktemp("ssh")) as place:
            yield place
    except RuntimeError as e:
        pytest.skip(str(e))


@pytest.fixture
def board(server: Loopback, monkeypatch: pytest.MonkeyPatch) -> Iterator[Loopback]:
    """The server with its ssh on PATH; every test leaves its far end empty."""
    monkeypatch.setenv("PATH", f"{server.bin}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
    yield server
    assert emptied(server.far), os.listdir(server.far)


def target(host: str = "board", python: str = sys.executable) -> Target:
    return parse_target({"device": f"ssh:{host}", "python": shlex.quote(python)})


def emptied(folder: Path, seconds: float = 15.0) -> bool:
    end = time.monotonic() + seconds
    while os.listdir(folder):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def gone(pid: int, seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.kill(pid, 0)
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.05)
    return False


def effdl(*arguments: str) -> tuple[int, str]:
    """Run the command line; returns the exit code and what it printed, errors as ``effdl`` does."""
    done = subprocess.run(
        [sys.executable, "-m", "effdl", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout + done.stderr


def test_a_host_knows_its_machine(board: Loopback) -> None:
    with open_host(target()) as host:
        machine = this_machine()
        assert host.machine == machine
        assert (host.target.arch, host.target.isa) == (machine.arch, frozenset(machine.isa))
        assert host.target.known
        assert host.emulated is bool(machine.emulator)
        assert len(os.listdir(board.far)) == 1
        assert isinstance(host, SshHost)
        assert host.room()["disk"] > 0
        assert host.load_average() is not None


@pytest.mark.usefixtures("board")
def test_bench_end_to_end(tmp_path: Path) -> None:
    export = tmp_path / "b.json"
    code, text = effdl(
        "bench", str(MLP), str(MLP), "--target", "ssh:board", "--python", sys.executable,
        "--seconds", "0.3", "--no-peaks", "--export-json", str(export),
    )  # fmt: skip
    assert code == 0, text
    report = json.loads(export.read_text())
    assert report["target"] == "ssh:board"
    assert report["cpu"] == this_machine().cpu
    assert report["models"][0]["verdict"] == "reference"
    assert report["models"][1]["latency"]["runs"] > 0


@pytest.mark.usefixtures("board")
def test_compare_end_to_end() -> None:
    far = ["--target", "ssh:board", "--python", sys.executable, "--samples", "2"]
    both = CliRunner().invoke(app, ["compare", str(MLP), str(MLP), *far])
    assert both.exit_code == 0, both.output
    assert "equal within tolerance" in both.output
    one = CliRunner().invoke(app, ["compare", str(MLP), *far, "--json"])
    assert one.exit_code == 0, one.output
    result = json.loads(one.output)["results"][0]
    assert result["place"]["target"] == "ssh:board"
    assert result["feeds"] == 2


@pytest.mark.usefixtures("board")
def test_doctor_of_another_machine() -> None:
    far = ["--target", "ssh:board", "--python", sys.executable]
    report = json.loads(CliRunner().invoke(app, ["doctor", *far, "--json"]).output)
    assert report["target"] == "ssh:board"
    assert report["cpu"] == this_machine().cpu
    assert report["isa"] == list(this_machine().isa)
    assert report["disk"] > 0
    assert "CPUExecutionProvider" in report["providers"]


def external_model(folder: Path) -> Path:
    model = ir.from_proto(ir.to_proto(io.load(MLP)))
    path = folder / "external.onnx"
    io.save(model, path, external=True)
    assert io.data_files(path)
    return path


def test_weights_beside_a_model_are_sent_once(
    board: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = external_model(tmp_path)
    sent: list[str] = []
    real = ssh_link.Link.put
    monkeypatch.setattr(
        ssh_link.Link, "put", lambda self, f, to: (sent.append(f.name), real(self, f, to))[1]
    )
    feeds = random_feeds(io.load(MLP), count=2)
    with open_host(target()) as host:
        there = host.send(path)
        assert host.send(path) == there
        assert sorted(os.listdir(Path(there).parent)) == sorted(os.listdir(tmp_path))
        copy = tmp_path / "again.onnx"
        copy.write_bytes(path.read_bytes())  # another name, nothing new in it
        host.send(copy)
        assert len([n for n in sent if not n.endswith((".pyz", ".npz"))]) == 2
        got = outputs_on(host, path, feeds)
        assert verify_there(host, path, feeds).equal
        host.discard(path)
        assert not Path(there).parent.exists()
        assert Path(host.send(copy)).is_file()
        host.discard(copy)
        folder = Path(there).parent.parent
        assert os.listdir(folder / "files") == []
        assert board.far in folder.parents
    for a, b in zip(got, run_all(path, feeds, parse_target()), strict=True):
        np.testing.assert_array_equal(a["logits"], b["logits"])


@pytest.mark.parametrize(
    ("host", "says", "hint"),
    [
        ("nowhere", "there is no host of that name", "~/.ssh/config"),
        ("closed", "it refuses the connection", "sshd"),
        ("wrong-key", "it accepts none of our keys", "ssh-copy-id wrong-key"),
        ("unknown-key", "its host key is not known yet", "ssh unknown-key"),
        ("changed-key", "its host key is not the one that is known", "ssh-keygen -R"),
    ],
)
@pytest.mark.usefixtures("board")
def test_no_connection(host: str, says: str, hint: str) -> None:
    with pytest.raises(TargetError) as caught, open_host(target(host)):
        pass
    assert str(caught.value) == f"ssh:{host}: no connection: {says}"
    assert hint in caught.value.hint


@pytest.mark.usefixtures("board")
def test_an_error_is_one_line_and_code_3() -> None:
    code, text = effdl("bench", str(MLP), "--target", "ssh:closed")
    assert code == 3
    error, hint = text.strip().splitlines()
    assert error == "effdl: error: ssh:closed: no connection: it refuses the connection"
    assert hint.startswith("  hint: ")


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("ssh: connect to host pi4 port 22: Connection timed out", "does not answer"),
        ("Connection timed out during banner exchange", "does not answer"),
        ("ssh: connect to host pi4 port 22: No route to host", "cannot be reached from this"),
        ("Connection closed by 10.0.0.7 port 22", "no connection: Connection closed by 10.0.0.7"),
        ("Received disconnect: Too many authentication failures", "accepts none of our keys"),
        ("", "no connection"),
    ],
)
def test_what_the_client_says_is_understood(said: str, reason: str) -> None:
    error = ssh_link._no_connection("pi4", "ssh:pi4", 255, said)
    assert reason in error.message
    assert error.hint
    assert error.exit_code == 3


@pytest.mark.parametrize(
    ("python", "says", "hint"),
    [
        ("python9", "the Python to run there cannot be started: ", "--python CMD names one"),
        (f"{sys.executable} -S", "cannot import", "pip install onnxruntime"),
        ("false", "its Python does not work", ""),
        ("cat", "it is no worker, it says", ""),
        ("'~/no/python'", "cannot be started: ", "~/venv/bin/python"),
    ],
)
@pytest.mark.usefixtures("board")
def test_no_python_there(python: str, says: str, hint: str) -> None:
    spec = parse_target({"device": "ssh:board", "python": python})
    with pytest.raises(TargetError, match=says) as caught, open_host(spec):
        pass
    assert hint in caught.value.hint
    assert caught.value.where == "ssh:board"


@pytest.mark.usefixtures("board")
def test_a_python_that_is_too_old(tmp_path: Path) -> None:
    old = tmp_path / "old-python"
    code = "import sys, runpy; sys.version_info = (3, 6, 9); runpy.run_path(sys.argv[1], run_name='__main__')"
    old.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{code}" "$@"\n')
    old.chmod(0o755)
    with pytest.raises(TargetError, match=r"Python 3.6 there is too old"):  # noqa: SIM117
        with open_host(target(python=str(old))):
            pass


@pytest.mark.usefixtures("board")
def test_a_provider_that_is_not_there() -> None:
    import onnxruntime as ort

    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("this machine may have CUDA")
    with (
        pytest.raises(TargetError, match=r"CUDAExecutionProvider is not in its.*CPUExec") as caught,
        open_host(target("board/cuda")),
    ):
        pass
    assert "onnxruntime-gpu" in caught.value.hint


@pytest.mark.parametrize(
    ("room", "says"),
    [
        ({"disk": 1000, "memory": 1 << 40}, "MB of disk free there"),
        ({"disk": 1 << 40, "memory": 1000}, "MB of memory free there"),
    ],
)
@pytest.mark.usefixtures("board")
def test_a_model_too_large_for_the_device(
    room: dict[str, int], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SshHost, "room", lambda self: room)
    with (
        open_host(target()) as host,
        pytest.raises(TargetError, match=r"digits_mlp.onnx is too large for the device") as caught,
    ):
        host.send(MLP)
    assert says in caught.value.message
    assert caught.value.hint


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.usefixtures("board")
def test_a_full_disk_is_named() -> None:
    with open_host(target()) as host:
        assert isinstance(host, SshHost)
        with pytest.raises(TargetError, match=r"sending a file failed: .*No space left on device"):
            host._link.put(MLP, "/dev/full")
        with pytest.raises(TargetError, match="fetching a file failed"):
            host.fetch(host.output("none"))


@pytest.mark.usefixtures("board")
def test_a_worker_that_is_killed_there() -> None:
    with open_host(target()) as host, host.worker("big.onnx") as worker:
        os.kill(int(worker.ask("hello")["pid"]), signal.SIGKILL)
        with pytest.raises(ModelError, match="SIGKILL") as caught:
            worker.ask("hello")
        assert "memory" in caught.value.hint
        with host.worker("next.onnx") as other:  # the connection is as good as before
            assert other.ask("hello")["pid"]


def test_a_lost_connection(board: Loopback) -> None:
    with open_host(target()) as host, host.worker("m.onnx") as worker:
        pid = int(worker.ask("hello")["pid"])
        assert isinstance(host, SshHost)
        host._link._keeper.kill()
        with pytest.raises(TargetError, match="the connection was lost") as caught:
            worker.ask("hello")
        assert caught.value.where == "ssh:board"
        assert emptied(board.far)
        assert gone(pid)
        with pytest.raises(TargetError, match="connection was lost"):
            host.send(MLP)


@pytest.mark.parametrize(("beat", "lives"), [(0.3, True), (60.0, False)])
def test_silence_ends_the_far_end(
    beat: float, lives: bool, board: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssh_link, "SILENCE", 5 if lives else 2)
    monkeypatch.setattr(ssh_link, "BEAT", beat)
    with open_host(target()):
        assert emptied(board.far, 7.0 if lives else 20.0) is not lives


@pytest.mark.parametrize("shell", ["exec sleep 60", "exec yes", "exec tr '\\\\0' x </dev/zero"])
def test_a_login_shell_that_starts_no_command(
    shell: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck = tmp_path / "ssh"
    stuck.write_text(f"#!/bin/sh\n{shell}\n")
    stuck.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(ssh_link, "_LOGIN", 1)
    with pytest.raises(TargetError, match="starts no command within 1 s") as caught:
        ssh_link.Link("board", "ssh:board", tmp_path)
    assert caught.value.where == "ssh:board"
    assert "login shell" in caught.value.hint


def test_ctrl_c_leaves_nothing_but_a_line(board: Loopback) -> None:
    command = [sys.executable, "-m", "effdl", "bench", str(MLP), "--seconds", "60", "--no-peaks"]
    far = ["--target", "ssh:board", "--python", sys.executable]
    with (
        heard(),
        subprocess.Popen([*command, *far], stderr=subprocess.PIPE, text=True, cwd=ROOT) as run,
    ):
        end = time.monotonic() + 60
        while len(pids := [p.name for p in board.far.glob("effdl-*/pids/*")]) < 2:
            assert time.monotonic() < end
            time.sleep(0.05)
        time.sleep(0.5)
        run.send_signal(signal.SIGINT)
        _, said = run.communicate(timeout=30)
    assert run.returncode == 130
    assert said.splitlines()[-1] == "effdl: error: interrupted; nothing was written"
    assert emptied(board.far)
    assert all(gone(int(pid)) for pid in pids)


@contextlib.contextmanager
def heard() -> Iterator[None]:
    """Let Ctrl-C reach what is started: a shell's background job, such as CI, is born deaf to it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_killed_effdl_leaves_nothing(board: Loopback, tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom effdl.runtime.host import open_host\n"
        "from effdl.runtime.target import parse_target\n"
        "t = parse_target({'device': 'ssh:board', 'python': sys.executable})\n"
        "with open_host(t) as h, h.worker('m') as w:\n"
        "  print(w.ask('hello')['pid'], flush=True)\n  time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert len(os.listdir(board.far)) == 1
        parent.kill()
    assert emptied(board.far)
    assert gone(pid)


@pytest.mark.usefixtures("board")
def test_a_login_shell_may_talk(tmp_path: Path) -> None:
    with open_host(target()) as host:
        assert isinstance(host, SshHost)
        chatty = host._link.command(
            f"echo Welcome; echo 42; exec {sys.executable} {shlex.quote(host._archive)}"
        )
        with WorkerProcess("m.onnx", chatty) as worker:
            assert worker.ask("hello")["pid"]


@pytest.mark.usefixtures("board")
def test_without_a_control_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the temporary folder's name is too long for a socket every call connects by itself."""
    monkeypatch.setattr(ssh_link, "_SOCKET_LENGTH", 0)
    feeds = random_feeds(io.load(MLP), count=1)
    with open_host(target()) as host:
        assert verify_there(host, MLP, feeds).equal


def test_the_option_is_in_the_help() -> None:
    for verb in ("bench", "compare", "optimize", "doctor"):
        assert "--python" in CliRunner().invoke(app, [verb, "--help"]).output
