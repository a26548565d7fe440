"""Targets: how they are written, what follows from them, and what a processor says of itself."""

from __future__ import annotations

import ast
import json
import os
import platform
import subprocess
import sys
import zipfile
from io import BytesIO
from pathlib import Path

import pytest

from effdl.errors import TargetError, UsageError
from effdl.runtime import machine
from effdl.runtime.bundle import worker_archive
from effdl.runtime.machine import this_machine
from effdl.runtime.target import (
    CORES,
    check_available,
    check_reachable,
    cores_of,
    parse_target,
    where_to_check,
)


@pytest.mark.parametrize(
    ("spec", "name", "host", "gpu"),
    [
        ("ssh:pi4", "ssh:pi4", "pi4", False),
        ("ssh:me@pi4", "ssh:me@pi4", "me@pi4", False),
        ("ssh:pi4/cpu", "ssh:pi4", "pi4", False),
        ("ssh:jetson/cuda", "ssh:jetson/cuda", "jetson", True),
        ("ssh://me@pi4:2222", "ssh://me@pi4:2222", "ssh://me@pi4:2222", False),
        ("ssh://me@pi4:2222/cuda", "ssh://me@pi4:2222/cuda", "ssh://me@pi4:2222", True),
        ("ssh:me@fe80::1", "ssh:me@fe80::1", "me@fe80::1", False),
        ({"device": "ssh", "host": "pi4", "provider": "cuda"}, "ssh:pi4/cuda", "pi4", True),
        ({"device": "ssh:pi4"}, "ssh:pi4", "pi4", False),
    ],
)
def test_ssh_targets(spec: str | dict[str, object], name: str, host: str, gpu: bool) -> None:
    target = parse_target(spec)
    assert (target.device, target.name, target.host, target.on_gpu) == ("ssh", name, host, gpu)
    assert target.remote
    assert not target.here
    assert not target.known
    assert target.providers[-1] == "CPUExecutionProvider"
    assert parse_target(name) == target


def test_the_python_of_a_target_is_a_command() -> None:
    spec = {"device": "ssh:pi4", "python": "docker run -i 'my image' python3"}
    assert parse_target(spec).python == ("docker", "run", "-i", "my image", "python3")


@pytest.mark.parametrize(
    ("spec", "says", "hint"),
    [
        ("ssh:", "needs a host", "ssh:pi4"),
        ("ssh:-oProxyCommand=x", "no host name", ""),
        ("ssh://-oProxyCommand=x", "no host name", ""),
        ("ssh:a b", "no host name", ""),
        ("ssh:pi4/gpu", "unknown provider 'gpu'", "cpu"),
        ("ssh", "needs a host", ""),
        ("shh:pi4", "unknown target", ""),
        ("arm-emulated:n2", "unknown core 'n2'", "n1"),
        ("arm-emulated:", "unknown core", "a53, n1, v1"),
        ({"device": "cpu", "core": "n1"}, "has no 'core'", "arm-emulated"),
        ({"device": "arm-emulated", "host": "pi4"}, "has no 'host'", "ssh"),
        ({"device": "cpu", "python": "python3"}, "runs in this Python", "--python is for"),
        ({"device": "ssh:pi4", "python": "a 'b"}, "No closing quotation", ""),
        ({"device": "ssh:pi4", "hots": "x"}, "unknown target key 'hots'", "host"),
    ],
)
def test_targets_that_are_none(spec: str | dict[str, object], says: str, hint: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        parse_target(spec)
    assert hint in caught.value.hint


def test_emulated_cores() -> None:
    every = parse_target("arm-emulated")
    assert (every.arch, every.isa) == ("arm64", {"neon"})  # what the least of them has
    assert [t.name for t in cores_of(every)] == [f"arm-emulated:{c}" for c in CORES]
    assert {"dotprod", "i8mm"} <= cores_of(every)[-1].isa
    one = parse_target("arm-emulated:n1")
    assert cores_of(one) == [one]
    assert "dotprod" in one.isa
    assert cores_of(parse_target("cpu")) == [parse_target("cpu")]


def test_where_outputs_are_checked() -> None:
    here = parse_target("cpu")
    assert where_to_check(here) == (here, "")
    assert where_to_check(parse_target("ssh:pi4")) == (here, "")
    place, why = where_to_check(parse_target("arm-emulated"))
    assert place == here
    assert "emulated" in why


def test_no_session_of_this_process_stands_in_for_another_machine() -> None:
    for name in ("ssh:pi4", "arm-emulated"):
        with pytest.raises(TargetError, match="is not this machine"):
            check_available(parse_target(name))


def test_missing_programs_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(TargetError, match="no OpenSSH client here"):
        check_reachable(parse_target("ssh:pi4"))
    with pytest.raises(TargetError, match="no program 'python-aarch64'") as caught:
        check_reachable(parse_target("arm-emulated"))
    assert "qemu-user" in caught.value.hint
    assert "docker" in caught.value.hint
    with pytest.raises(TargetError, match="no program 'mine'"):
        check_reachable(parse_target({"device": "arm-emulated", "python": "mine -x"}))


PI = """\
processor\t: {n}
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm aes crc32 cpuid {more}
CPU implementer\t: 0x41
CPU part\t: {part}

"""
X86 = """\
processor\t: 0
model name\t: Intel(R) Xeon(R) Platinum
flags\t\t: fpu sse avx avx2 avx512f avx512_vnni amx_bf16 amx_tile amx_int8 avx_vnni

"""


@pytest.mark.parametrize(
    ("text", "cpu", "flags"),
    [
        (PI.format(n=0, part="0xd08", more="") * 2, "Cortex-A72", {"asimd"}),
        (
            PI.format(n=0, part="0xd05", more="asimddp") + PI.format(n=4, part="0xd0b", more=""),
            "Cortex-A55 + Cortex-A76",
            {"asimddp"},
        ),
        (PI.format(n=0, part="0xfff", more="") + "Model : Some Board\n", "Some Board", set()),
        (X86, "Intel(R) Xeon(R) Platinum", {"avx2", "avx512_vnni", "amx_int8", "avx_vnni"}),
        ("", "", set()),
    ],
)
def test_cpuinfo(tmp_path: Path, text: str, cpu: str, flags: set[str]) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(text)
    found, name = machine._cpuinfo(file)
    assert name == cpu
    assert flags <= found


def test_board_name(tmp_path: Path) -> None:
    file = tmp_path / "model"
    file.write_bytes(b"Raspberry Pi 4 Model B Rev 1.4\0")
    assert machine._board(file) == "Raspberry Pi 4 Model B Rev 1.4"
    assert machine._board(tmp_path / "none") == ""


@pytest.mark.skipif(not Path("/proc/self/exe").exists(), reason="needs /proc")
def test_a_program_of_another_architecture_is_emulated() -> None:
    here = {"aarch64": "arm64"}.get(platform.machine(), platform.machine())
    other = "x86_64" if here == "arm64" else "arm64"
    if this_machine().emulator:
        pytest.skip("this machine is emulated itself")
    assert machine._emulator(here) == ""
    assert machine._emulator(other) == os.path.basename(os.path.realpath(sys.executable))


def test_the_worker_is_python_3_8() -> None:
    """Boards have old Pythons; newer syntax would fail there and nowhere else."""
    with zipfile.ZipFile(BytesIO(worker_archive())) as archive:
        for name in archive.namelist():
            ast.parse(archive.read(name), name, feature_version=(3, 8))


def test_an_old_python_says_so(tmp_path: Path) -> None:
    archive = tmp_path / "worker.pyz"
    archive.write_bytes(worker_archive())
    code = (
        "import sys, runpy; sys.version_info = (3, 6, 9); "
        f"runpy.run_path({str(archive)!r}, run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input='{"do": "hello"}\n',
        capture_output=True,
        text=True,
        check=True,
    )
    answer = json.loads(done.stdout)
    assert answer["error"] == "python"
    assert "Python 3.6 there is too old" in answer["message"]
