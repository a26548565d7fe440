"""Energy and memory counters, on a fake powercap folder and a fake NVML."""

import ctypes
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from effdl.data.random import random_feeds
from effdl.graph import io
from effdl.measure.sending import write_feeds
from effdl.runtime.host import open_host
from effdl.runtime.target import parse_target
from effdl.runtime.worker import energy
from effdl.runtime.worker.energy import Board, Meter, Rapl, Unreadable, open_meter
from effdl.runtime.worker.nvml import Nvml, open_nvml
from tests.support import SAMPLES

MLP = SAMPLES / "digits_mlp.onnx"

linux = pytest.mark.skipif(sys.platform != "linux", reason="RAPL is read on Linux only")


def domain(root: Path, name: str, title: str, uj: int, span: int = 10_000_000) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{title}\n")
    (folder / "energy_uj").write_text(f"{uj}\n")
    (folder / "max_energy_range_uj").write_text(f"{span}\n")
    return folder / "energy_uj"


def test_packages_are_summed_and_their_parts_and_the_board_are_not(tmp_path: Path) -> None:
    domain(tmp_path, "intel-rapl:0", "package-0", 100)
    domain(tmp_path, "intel-rapl:1", "package-1", 1000)
    domain(tmp_path, "intel-rapl:0:0", "core", 5)
    domain(tmp_path, "intel-rapl:2", "psys", 7)
    domain(tmp_path, "intel-rapl-mmio:0", "package-0", 9)
    rapl = Rapl(str(tmp_path))
    assert rapl.read() == [100, 1000]
    assert rapl.between([100, 1000], [150, 1200]) == 250


def test_a_counter_that_wrapped(tmp_path: Path) -> None:
    domain(tmp_path, "intel-rapl:0", "package-0", 0, span=1000)
    assert Rapl(str(tmp_path)).between([990], [15]) == 25


def test_why_there_is_no_counter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Unreadable, match="no RAPL counter"):
        Rapl(str(tmp_path / "absent"))
    file = domain(tmp_path, "intel-rapl:0", "package-0", 1)
    file.write_text("nonsense")
    with pytest.raises(Unreadable, match="cannot be read"):
        Rapl(str(tmp_path))
    original = energy._text

    def refuse(path: Path) -> str:
        if path == file:
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)

    monkeypatch.setattr(energy, "_text", refuse)
    with pytest.raises(Unreadable, match=r"energy_uj can be read by root only"):
        Rapl(str(tmp_path))


def test_a_domain_without_a_range_is_left_out(tmp_path: Path) -> None:
    domain(tmp_path, "intel-rapl:0", "package-0", 1)
    (tmp_path / "intel-rapl:0" / "max_energy_range_uj").unlink()
    with pytest.raises(Unreadable, match="no RAPL"):
        Rapl(str(tmp_path))


class Ticking:
    """A counter that gains 3000 uJ at each reading."""

    source = "fake"

    def __init__(self) -> None:
        self.value = 0

    def read(self) -> list[int]:
        self.value += 3000
        return [self.value]

    def between(self, before: list[int], after: list[int]) -> int:
        return after[0] - before[0]


def test_a_meter_sums_blocks_and_divides_by_runs() -> None:
    meter = Meter(Ticking(), "fake")
    assert meter.millijoule is None
    for runs in (2, 4):
        meter.begin()
        meter.end(runs)
    assert meter.millijoule == pytest.approx(2 * 3.0 / 6)


def test_a_counter_that_stands_still_tells_nothing(tmp_path: Path) -> None:
    domain(tmp_path, "intel-rapl:0", "package-0", 42)
    meter = Meter(Rapl(str(tmp_path)), "RAPL")
    meter.begin()
    meter.end(5)
    assert meter.millijoule is None


def test_a_counter_that_goes_away_ends_the_sum(tmp_path: Path) -> None:
    file = domain(tmp_path, "intel-rapl:0", "package-0", 0)
    meter = Meter(Rapl(str(tmp_path)), "RAPL")
    meter.begin()
    file.write_text("5000")
    meter.end(1)
    meter.begin()
    file.unlink()
    meter.end(1)
    meter.begin()
    meter.end(1)
    assert meter.millijoule == pytest.approx(5.0)
    assert "cannot be read any more" in meter.note


def test_other_systems_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    meter = open_meter(gpu=False)
    assert meter.note == "no energy counter is read on darwin"
    assert meter.millijoule is None
    assert "libnvidia-ml" in open_meter(gpu=True).note


@linux
def test_a_worker_counts_timed_blocks_only(tmp_path: Path) -> None:
    """The counter is moved by the test: what it gains in a warm-up block belongs to no run."""
    file = domain(tmp_path / "powercap", "intel-rapl:0", "package-0", 0)
    with open_host(parse_target()) as host, host.worker("m") as worker:
        feeds = write_feeds(list(random_feeds(io.load(MLP), count=1)), tmp_path, host)
        worker.ask(
            "load",
            model=str(MLP),
            providers=["CPUExecutionProvider"],
            threads=1,
            feeds=feeds,
            powercap=str(tmp_path / "powercap"),
        )
        worker.block(runs=3)
        file.write_text("9000")
        worker.block(min_ms=1.0)
        stats = worker.ask("stats")
        assert stats["energy_mj"] is None
        assert stats["energy"] == "RAPL, whole processor package"
        assert stats["device_bytes"] is None


class FakeNvml:
    """What libnvidia-ml does, as Python functions that fill in ctypes arguments."""

    def __init__(self, **missing: int) -> None:
        self.asked: list[Any] = []
        self.codes = missing
        self.total_mj = 500
        self.used = 3 << 30
        self.processes = [(os.getpid(), 1 << 20), (1, 5 << 20)]

    def nvmlInit_v2(self) -> int:
        return self.codes.get("init", 0)

    def nvmlDeviceGetHandleByIndex_v2(self, index: Any, handle: Any) -> int:
        self.asked.append(index.value)
        return 0

    def nvmlDeviceGetHandleByUUID(self, name: bytes, handle: Any) -> int:
        self.asked.append(name)
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any, total: Any) -> int:
        total._obj.value = self.total_mj
        return self.codes.get("energy", 0)

    def nvmlDeviceGetMemoryInfo(self, handle: Any, memory: Any) -> int:
        memory._obj.used = self.used
        return 0

    def nvmlDeviceGetComputeRunningProcesses_v3(self, handle: Any, count: Any, found: Any) -> int:
        for entry, (pid, used) in zip(found, self.processes, strict=False):
            entry.pid, entry.used = pid, used
        count._obj.value = len(self.processes)
        return self.codes.get("processes", 0)


def test_nvml_memory_and_energy() -> None:
    library = FakeNvml()
    gpu = Nvml(library)
    assert gpu.energy_uj() == 500_000
    assert gpu.used_bytes() == 3 << 30
    assert gpu.process_bytes(os.getpid()) == 1 << 20
    assert gpu.process_bytes(4_000_000) is None
    library.processes = [(os.getpid(), (1 << 64) - 1)]
    assert gpu.process_bytes(os.getpid()) is None
    meter = Meter(Board(gpu), "NVML")
    meter.begin()
    library.total_mj += 80
    meter.end(4)
    assert meter.millijoule == pytest.approx(20.0)


def test_which_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    library = FakeNvml()
    for devices in ("", "2,0", "GPU-5f3a,1"):
        Nvml(library, devices)
    assert library.asked == [0, 2, b"GPU-5f3a"]
    with pytest.raises(OSError, match="error 9"):
        Nvml(FakeNvml(init=9))

    def absent(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", absent)
    assert open_nvml() is None


def test_a_gpu_that_does_not_tell() -> None:
    gpu = Nvml(FakeNvml(energy=3, processes=3))
    assert gpu.energy_uj() is None
    assert gpu.process_bytes(os.getpid()) is None
    with pytest.raises(Unreadable, match="no energy counter"):
        Board(gpu)


def test_the_library_by_ctypes(tmp_path: Path) -> None:
    """The structures have the layout that the C interface says, checked against compiled code."""
    import shutil
    import subprocess

    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    source = tmp_path / "nvml.c"
    source.write_text(
        """
        typedef struct { unsigned int pid; unsigned long long used; unsigned int gi, ci; } process;
        typedef struct { unsigned long long total, free, used; } memory;
        int nvmlInit_v2(void) { return 0; }
        int nvmlDeviceGetHandleByIndex_v2(unsigned int i, void **h) { *h = (void *)0x1234567890; return 0; }
        int nvmlDeviceGetTotalEnergyConsumption(void *h, unsigned long long *mj) {
            *mj = 7; return h == (void *)0x1234567890 ? 0 : 1; }
        int nvmlDeviceGetMemoryInfo(void *h, memory *m) { m->total = 3; m->free = 2; m->used = 1; return 0; }
        int nvmlDeviceGetComputeRunningProcesses_v3(void *h, unsigned int *n, process *p) {
            if (*n < 2) return 7;
            p[0] = (process){11, 100, 0, 0}; p[1] = (process){22, 200, 0, 0}; *n = 2; return 0; }
        """
    )
    library = tmp_path / "libnvml.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    gpu = Nvml(ctypes.CDLL(str(library)))
    assert gpu.energy_uj() == 7000
    assert gpu.used_bytes() == 1
    assert gpu.process_bytes(22) == 200
