"""Models on emulated Arm cores: right or wrong, here and at the other end of a connection, never a time.

They need a Python for aarch64 with onnxruntime that an emulator runs: ``python-aarch64`` on PATH, or the
command that EFFDL_ARM_PYTHON names. An emulated worker takes seconds to start, so they are few.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from effdl import api
from effdl.cli.app import app
from effdl.data.random import random_feeds
from effdl.errors import TargetError
from effdl.graph import io
from effdl.measure.remote import LOW_PRECISION, verify_there
from effdl.measure.sending import write_feeds
from effdl.runtime.host import Host, need_clock, open_host
from effdl.runtime.machine import this_machine
from effdl.runtime.target import ARM_PYTHON, parse_target
from tests.loopback import MISSING, loopback
from tests.support import SAMPLES, from_text

PYTHON = os.environ.get("EFFDL_ARM_PYTHON") or ARM_PYTHON
MLP = SAMPLES / "digits_mlp.onnx"
needs_arm = pytest.mark.skipif(
    shutil.which(shlex.split(PYTHON)[0]) is None,
    reason=f"no {ARM_PYTHON} on PATH and EFFDL_ARM_PYTHON is not set",
)
INT8 = """
<ir_version: 8, opset_import: ["": 17]>
g (float[N, 8] x) => (float[N, 4] y)
<float s = {0.03}, int8 z = {1}, float ws = {0.02}, int8 wz = {0}, int8[8, 4] w = {
    1, -2, 3, -4, 50, 60, -70, 80, 9, -10, 11, 12, -13, 14, -15, 16,
    17, -18, 19, 20, -121, 122, -123, 124, 25, 26, -27, 28, 29, -30, 31, 32}>
{
    xq = QuantizeLinear(x, s, z)
    xd = DequantizeLinear(xq, s, z)
    wd = DequantizeLinear(w, ws, wz)
    m = MatMul(xd, wd)
    mq = QuantizeLinear(m, s, z)
    y = DequantizeLinear(mq, s, z)
}
"""


def spec(core: str = "n1", python: str = PYTHON) -> dict[str, object]:
    return {"device": f"arm-emulated:{core}", "python": python}


@pytest.fixture(scope="module")
def n1() -> Iterator[Host]:
    with open_host(parse_target(spec())) as host:
        yield host


@needs_arm
def test_an_emulated_core_tells_what_it_is(n1: Host) -> None:
    assert n1.machine.cpu.startswith("Neoverse-N1")
    assert n1.machine.arch == "arm64"
    assert {"neon", "dotprod"} <= set(n1.machine.isa)
    assert "i8mm" not in n1.machine.isa
    assert n1.machine.emulator.startswith("qemu")
    assert n1.emulated
    assert n1.target.int8_dot


@needs_arm
def test_results_are_those_of_this_machine(n1: Host) -> None:
    feeds = random_feeds(io.load(MLP), count=2)
    report = verify_there(n1, MLP, feeds)
    assert report.equal
    assert report.outputs[0].rel_l2 < 1e-5
    assert report.notes == ()
    assert report.place is not None
    assert report.place.target == "arm-emulated:n1"


@needs_arm
def test_int8_is_held_to_a_wider_tolerance(n1: Host, tmp_path: Path) -> None:
    path = tmp_path / "int8.onnx"
    io.save(from_text(INT8), path)
    report = verify_there(n1, path, random_feeds(io.load(path), count=2))
    assert report.equal
    assert report.outputs[0].rel_l2 < LOW_PRECISION
    assert "quantized" in report.notes[0]


@needs_arm
def test_compare_from_the_command_line() -> None:
    arguments = ["compare", str(MLP), "--target", "arm-emulated:a53", "--python", PYTHON]
    done = CliRunner().invoke(app, [*arguments, "--samples", "1", "--json"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.output)
    assert report["equal"]
    assert [r["place"]["cpu"].split(" (")[0] for r in report["results"]] == ["Cortex-A53"]
    assert report["results"][0]["place"]["isa"] == ["neon"]


@needs_arm
def test_another_core_than_was_asked_for(tmp_path: Path) -> None:
    stubborn = tmp_path / "stubborn"
    stubborn.write_text(f'#!/bin/sh\nexport EFFDL_QEMU_CPU=cortex-a53\nexec {PYTHON} "$@"\n')
    stubborn.chmod(0o755)
    with (
        pytest.raises(TargetError, match="runs as Cortex-A53, not as Neoverse-V1") as caught,
        open_host(parse_target(spec("v1", str(stubborn)))),
    ):
        pass
    assert "QEMU_CPU" in caught.value.hint


@pytest.mark.skipif(this_machine().arch == "arm64", reason="this machine is an Arm machine")
def test_a_python_that_is_none_for_arm() -> None:
    arch = this_machine().arch
    with (
        pytest.raises(TargetError, match=f"is a Python for {arch}, not for 64-bit Arm"),
        open_host(parse_target(spec(python=shlex.quote(sys.executable)))),
    ):
        pass


def test_a_python_that_does_not_work() -> None:
    with (
        pytest.raises(TargetError, match="its Python does not work"),
        open_host(parse_target(spec(python="false"))),
    ):
        pass


def test_no_latency() -> None:
    with pytest.raises(TargetError, match="latency is not measured on arm-emulated:n1"):
        api.bench(MLP, target=spec())


@needs_arm
@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
def test_an_arm_board_behind_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the times of a board: an Arm Python at the other end of a connection."""
    try:
        with loopback(tmp_path) as server:
            monkeypatch.setenv("PATH", f"{server.bin}{os.pathsep}{os.environ['PATH']}")
            python = " ".join([str(shutil.which(shlex.split(PYTHON)[0])), *shlex.split(PYTHON)[1:]])
            with open_host(parse_target({"device": "ssh:board", "python": python})) as board:
                _behind_ssh(board, tmp_path)
            assert os.listdir(server.far) == []
    except RuntimeError as e:
        pytest.skip(str(e))


def _behind_ssh(board: Host, folder: Path) -> None:
    assert board.target.arch == "arm64"
    assert "dotprod" in board.target.isa
    with pytest.raises(TargetError, match="latency is not measured on ssh:board") as caught:
        need_clock(board)
    assert "qemu" in caught.value.message
    feeds = random_feeds(io.load(MLP), count=2)
    assert verify_there(board, MLP, feeds).equal
    files = write_feeds(feeds.batches, folder, board)
    with board.worker("m.onnx") as worker:  # the way of a bench, whose times nobody may see
        worker.ask(
            "load",
            model=board.send(MLP),
            providers=list(board.target.providers),
            threads=1,
            feeds=files,
        )
        assert len(worker.block(runs=3)[0]) == 3
