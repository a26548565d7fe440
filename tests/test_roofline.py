"""The roof of a machine, and where below the roof it runs."""

import json
import os
import shlex
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from effdl.errors import ModelError, TargetError
from effdl.graph import io
from effdl.measure import roofline
from effdl.measure.bench import bench
from effdl.measure.roofline import Roof, of_machine, peaks, place, placed, probe_model, probes
from effdl.measure.work import Work, model_work
from effdl.render import bench_rows, roof
from effdl.render.bench_markdown import bench_markdown
from effdl.render.doctor import print_doctor
from effdl.report import BenchReport, BenchResult, Latency, Peaks
from effdl.runtime.cache import Cache
from effdl.runtime.doctor import doctor
from effdl.runtime.host import open_host
from effdl.runtime.target import parse_target
from tests.loopback import MISSING, loopback
from tests.support import SAMPLES

CPU = parse_target("cpu")
ROOF = Peaks(1, 100.0, 400.0, 30.0, 0.0, 32 << 20, 75.0)


# --- the place below the roof


def work(macs: int | None, moved: int, resident: int | None = None, **formats: float) -> Work:
    shares = formats or {"fp32": 1.0}
    return Work(macs, 0, shares, moved, moved if resident is None else resident)


def test_near_the_compute_roof() -> None:
    # 1 GMAC = 2 GFLOP = 20 ms at 100 GFLOP/s
    gflops, share, bound = place(work(10**9, 1 << 20), 25.0, ROOF)
    assert gflops == pytest.approx(80.0)
    assert share == pytest.approx(0.8)
    assert bound == "compute"


def test_the_roof_of_a_mix_is_the_time_of_its_parts() -> None:
    # half of 2 GFLOP at 100, half at 400: 10 + 2.5 ms
    _, share, _ = place(work(10**9, 1 << 20, int8=0.5, fp32=0.5), 25.0, ROOF)
    assert share == pytest.approx(0.5)


def test_what_has_no_kernel_of_its_own_is_computed_in_float32() -> None:
    _, share, _ = place(work(10**9, 1 << 20, fp16=1.0), 25.0, ROOF)
    assert share == pytest.approx(0.8)
    _, share, _ = place(work(10**9, 1 << 20, fp16=1.0), 25.0, replace(ROOF, fp16_gflops=200.0))
    assert share == pytest.approx(0.4)


def test_near_the_memory_roof() -> None:
    # 300 MB at 30 GB/s: 10 ms; 10 MMAC: 0.2 ms
    gflops, share, bound = place(work(10**7, 300 * 10**6), 12.0, ROOF)
    assert bound == "memory"
    assert share == pytest.approx(0.2 / 12)
    assert gflops == pytest.approx(2e7 / 12e-3 / 1e9)


def test_what_fits_into_the_cache_is_held_against_the_cache() -> None:
    small = work(10**6, 3 * 10**6, resident=10**6)
    assert place(small, 0.09, ROOF)[2] == "memory"  # 0.04 ms at 75 GB/s
    assert roofline.memory_ms(small, ROOF) == pytest.approx(0.04)
    assert roofline.memory_ms(replace(small, resident=1 << 30), ROOF) == pytest.approx(0.1)
    assert roofline.memory_ms(small, replace(ROOF, cache_bytes=0)) == pytest.approx(0.1)


def test_far_from_both_roofs() -> None:
    assert place(work(10**8, 10**6), 20.0, ROOF)[2] == "overhead"


@pytest.mark.parametrize("macs", [None, 0])
def test_without_macs_there_is_no_rate(macs: int | None) -> None:
    assert place(work(macs, 100), 1.0, ROOF) == (None, None, "")


def test_without_peaks_there_is_a_rate_only() -> None:
    assert place(work(10**9, 100), 20.0, None) == (pytest.approx(100.0), None, "")


# --- the probes


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("arch", ["x86_64", "arm64"])
def test_every_probe_computes_what_it_says(arch: str, gpu: bool) -> None:
    machine = {"arch": arch, "isa": ["fp16"], "memory": 1 << 34, "cores": 8}
    found = list(probes(machine, 1 << 20, gpu, 0))
    kinds = {p.peak for p in found}
    assert ("fp16_gflops" in kinds) == (gpu or arch == "arm64")
    assert ("int8_gops" in kinds) == (not gpu)
    for probe in {p.peak: p for p in found}.values():
        size = 8
        small = replace(probe, shape=tuple(size for _ in probe.shape))
        session = ort.InferenceSession(
            io.to_bytes(probe_model(small)), providers=["CPUExecutionProvider"]
        )
        a, b = (
            np.arange(np.prod(small.shape)).reshape(small.shape).astype(d) for d in small.dtypes
        )
        (y,) = session.run(None, {"a": a, "b": b})
        wide = a.astype(np.float64), b.astype(np.float64)
        want = wide[0] + wide[1] if probe.op_type == "Add" else wide[0] @ wide[1]
        np.testing.assert_allclose(y.astype(np.float64), want[:1], rtol=1e-2)
        if probe.op_type == "Add":
            assert probe.work == 3 * 4 * probe.shape[0]
        else:
            assert probe.work == 2 * probe.shape[0] ** 3


def test_arrays_are_far_above_the_cache_and_below_the_memory() -> None:
    machine = {"arch": "x86_64", "isa": [], "memory": 1 << 40, "cores": 1}
    stream = {p.peak: p for p in probes(machine, 32 << 20, False, 1)}
    assert 4 * stream["bandwidth"].shape[0] == 128 << 20
    assert 3 * 4 * stream["cache_bandwidth"].shape[0] < 32 << 20
    board = {**machine, "memory": 1 << 30}
    least = {p.peak: p for p in probes(board, 0, False, 1)}
    assert 4 * least["bandwidth"].shape[0] == 64 << 20
    assert "cache_bandwidth" not in least


def test_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "_BLOCK_MS", 1.0)
    with open_host(CPU) as host:
        begin = time.time()
        found = peaks(host, CPU, 1, folder=tmp_path)
        assert found is not None
        assert found.threads == 1
        assert found.fp32_gflops > 0.5
        assert found.int8_gops > 0.5
        assert 0.2 < found.bandwidth < 5000
        assert peaks(host, CPU, 1, folder=tmp_path) == found
        assert time.time() - begin < 60


@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
def test_a_machine_behind_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "_BLOCK_MS", 1.0)
    with loopback(tmp_path) as server:
        monkeypatch.setenv("PATH", f"{server.bin}{os.pathsep}{os.environ['PATH']}")
        place = parse_target({"device": "ssh:board", "python": shlex.quote(sys.executable)})
        with open_host(place) as host:
            found = peaks(host, place, 1, folder=tmp_path / "cache")
    assert found is not None
    assert found.fp32_gflops > 0.5
    assert found.int8_gops > 0.5
    # It is this machine, and the worker there said so: the same key.
    assert of_machine(CPU, measure=False, folder=tmp_path / "cache") == (found,)


# --- peaks of a machine that is made up


class FakeWorker:
    """Answers as a machine of given rates would."""

    def __init__(self, host: "FakeHost") -> None:
        self.host = host
        self.ns = 0

    def __enter__(self) -> "FakeWorker":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def ask(self, command: str, **options: Any) -> dict[str, Any]:
        if command == "hello":
            return {
                **{"machine": self.host.machine, "onnxruntime": "9.9", "cache_bytes": 1 << 20},
                "load": self.host.load,
            }
        graph = io.load(Path(options["model"])).graph
        op = graph[0].op_type
        shape = options["feeds"][0]["make"][0]["shape"]
        if self.host.largest and shape[0] > self.host.largest:
            raise ModelError("out of memory")
        self.host.loaded.append((op, shape[0]))
        kind = "fp16" if graph.inputs[0].dtype == ir.DataType.FLOAT16 else op
        amount = 3 * 4 * shape[0] if op == "Add" else 2 * shape[0] ** 3
        self.ns = round(amount / self.host.rates[kind])
        return {}

    def block(self, **options: Any) -> tuple[list[int], None]:
        return [3 * self.ns, self.ns, 2 * self.ns], None


class FakeHost:
    """A machine with the rates in operations or bytes per ns."""

    emulated = False

    def __init__(self, **rates: float) -> None:
        self.rates = {"MatMul": 100.0, "fp16": 200.0, "MatMulInteger": 400.0, "Add": 30.0, **rates}
        self.machine = {
            **{"arch": "x86_64", "cpu": "A CPU", "isa": ["avx2"], "cores": 4},
            "memory": 1 << 34,
        }
        self.loaded: list[tuple[str, int]] = []
        self.largest = 0
        self.load: float | None = None

    def worker(self, where: str) -> FakeWorker:
        return FakeWorker(self)

    def send(self, path: Path) -> str:
        return str(path)


def ask(host: FakeHost, folder: Path, device: str = "cpu", **options: Any) -> Peaks | None:
    return peaks(host, parse_target(device), 1, folder=folder, **options)  # type: ignore[arg-type]


def test_the_fastest_run_counts(tmp_path: Path) -> None:
    found = ask(FakeHost(), tmp_path)
    assert found is not None
    assert found.fp32_gflops == pytest.approx(100, rel=1e-3)
    assert found.int8_gops == pytest.approx(400, rel=1e-3)
    assert found.bandwidth == pytest.approx(30, rel=1e-3)
    assert found.fp16_gflops == 0


def test_a_gpu_has_float16_and_no_cache_of_its_own(tmp_path: Path) -> None:
    found = ask(FakeHost(), tmp_path, "cuda")
    assert found is not None
    assert found.fp16_gflops == pytest.approx(200, rel=1e-3)
    assert (found.int8_gops, found.cache_bytes) == (0, 0)


def test_a_gpu_with_little_memory_is_measured_on_what_fits(tmp_path: Path) -> None:
    host = FakeHost()
    host.largest = 2048
    found = ask(host, tmp_path, "cuda")
    assert found is not None
    assert found.fp32_gflops == pytest.approx(100, rel=1e-3)
    assert found.bandwidth == 0  # not even the stream fits
    assert max(size for op, size in host.loaded) == 2048


def test_a_bench_goes_on_without_peaks(tmp_path: Path) -> None:
    host = FakeHost()
    host.largest = 1
    over = Roof(host, CPU, 1, tmp_path)  # type: ignore[arg-type]
    assert over.known is None
    assert over.note == "the machine's peaks could not be measured: out of memory"
    (found,) = over.over([result(20.0)], [work(10**9, 1 << 20)])
    assert (found.gflops, found.peak_share) == (pytest.approx(100), None)


def test_a_slow_machine_skips_the_large_products(tmp_path: Path) -> None:
    host = FakeHost(MatMul=5.0)
    found = ask(host, tmp_path)
    assert found is not None
    assert found.fp32_gflops == pytest.approx(5, rel=1e-3)
    assert ("MatMul", 1024) not in host.loaded
    assert ("MatMulInteger", 1024) in host.loaded


def test_peaks_are_measured_once_per_machine_and_threads(tmp_path: Path) -> None:
    host = FakeHost()
    first = ask(host, tmp_path)
    count = len(host.loaded)
    assert ask(host, tmp_path) == first
    assert len(host.loaded) == count
    peaks(host, CPU, 2, folder=tmp_path)  # type: ignore[arg-type]
    host.machine["cpu"] = "Another CPU"
    ask(host, tmp_path)
    assert len(host.loaded) == 3 * count
    assert len(list(tmp_path.iterdir())) == 3


def test_measured_again_the_higher_of_both_holds(tmp_path: Path) -> None:
    ask(FakeHost(), tmp_path)
    again = ask(FakeHost(MatMul=120.0, Add=10.0), tmp_path, refresh=True)
    assert again is not None
    assert again.fp32_gflops == pytest.approx(120, rel=1e-3)
    assert again.bandwidth == pytest.approx(30, rel=1e-3)
    assert ask(FakeHost(), tmp_path) == again


def test_what_a_busy_machine_reached_is_not_kept_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy = FakeHost(MatMul=40.0)
    busy.load = 3.9
    ask(busy, tmp_path)
    calm = FakeHost()
    calm.load = 0.2
    found = ask(calm, tmp_path)  # a moment later
    assert found is not None
    assert found.fp32_gflops == pytest.approx(40, rel=1e-3)
    monkeypatch.setattr(roofline, "BUSY_AGE", -1.0)
    found = ask(calm, tmp_path)
    assert found is not None
    assert found.fp32_gflops == pytest.approx(100, rel=1e-3)
    count = len(calm.loaded)
    ask(calm, tmp_path)
    assert len(calm.loaded) == count


def test_what_is_kept_of_this_machine(tmp_path: Path) -> None:
    assert of_machine(CPU, measure=False, folder=tmp_path) == ()
    with open_host(CPU) as host, host.worker("m") as worker:
        key = roofline._key(worker.ask("hello"), CPU, 1)
    Cache("peaks", roofline.SCHEMA, tmp_path).put(key, {"peaks": asdict(ROOF), "calm": True})
    assert of_machine(CPU, measure=False, folder=tmp_path) == (ROOF,)
    assert of_machine(parse_target("ssh:nowhere"), measure=False, folder=tmp_path) == ()


def test_an_emulated_machine_has_no_peaks(tmp_path: Path) -> None:
    host = FakeHost()
    host.emulated = True
    assert ask(host, tmp_path) is None
    assert host.loaded == []


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"schema": 1}', '{"time": "x", "schema": 1, "key": {}, "facts": {}}']
)
def test_a_broken_cache_file_is_measured_again(tmp_path: Path, text: str) -> None:
    first = ask(FakeHost(), tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_text(text)
    host = FakeHost()
    assert ask(host, tmp_path) == first
    assert host.loaded
    assert json.loads(file.read_text())["facts"] == {"peaks": asdict(first), "calm": True}


@pytest.mark.parametrize(
    "change",
    [{"fp32_gflops": "fast"}, {"bandwidth": -1.0}, {"unknown": 3}, {"fp32_gflops": 0.0}],
)
def test_facts_that_make_no_sense_are_measured_again(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    ask(FakeHost(), tmp_path)
    (file,) = tmp_path.iterdir()
    content = json.loads(file.read_text())
    content["facts"]["peaks"].update(change)
    file.write_text(json.dumps(content))
    host = FakeHost()
    ask(host, tmp_path)
    assert host.loaded


def test_a_model_above_the_peak_has_it_measured_again(tmp_path: Path) -> None:
    slow, fast = FakeHost(MatMul=50.0), FakeHost(MatMul=100.0)
    ask(slow, tmp_path)
    over = Roof(fast, CPU, 1, tmp_path)  # type: ignore[arg-type]
    assert over.known is not None
    assert over.known.fp32_gflops == pytest.approx(50, rel=1e-3)
    (calm,) = over.over([result(41.0)], [work(10**9, 1 << 20)])
    assert calm.peak_share == pytest.approx(40 / 41, rel=1e-3)
    assert fast.loaded == []
    (found,) = over.over([result(25.0)], [work(10**9, 1 << 20)])
    assert fast.loaded
    assert found.peak_share == pytest.approx(0.8, rel=1e-3)
    assert found.bound == "compute"


@pytest.mark.parametrize("fault", [ModelError("out of memory"), TargetError("connection lost")])
def test_results_stay_when_peaks_cannot_be_measured_again(
    fault: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = Roof(FakeHost(MatMul=50.0), CPU, 1, tmp_path)  # type: ignore[arg-type]
    known = over.known

    def fail(*_: Any) -> Peaks:
        raise fault

    monkeypatch.setattr(roofline, "_measure", fail)
    (found,) = over.over([result(25.0)], [work(10**9, 1 << 20)])
    assert found.peak_share == pytest.approx(1.6, rel=1e-3)
    assert over.known == known
    assert str(fault) in over.note


def result(ms: float) -> BenchResult:
    latency = Latency(ms, ms, ms, ms, ms, 0.0, 10)
    return BenchResult("m", "", 0, None, 0.0, 0.0, None, latency, 1.0, (1.0, 1.0))


def test_results_without_a_roof() -> None:
    (found,) = placed([result(20.0)], [work(10**9, 1 << 20)], None)
    assert found.gflops == pytest.approx(100)
    assert (found.peak_share, found.bound) == (None, "")


def test_bench_measures_peaks_only_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from effdl.data.random import random_feeds

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr(roofline, "_BLOCK_MS", 1.0)
    model = SAMPLES / "digits_cnn.onnx"
    feeds = random_feeds(io.load(model), count=1)
    plain = bench([model], feeds, CPU, seconds=0.05)
    assert plain.peaks is None
    assert list(tmp_path.iterdir()) == []
    assert plain.models[0].gflops is not None
    assert plain.models[0].bound == ""
    report = bench([model], feeds, CPU, seconds=0.05, peaks=True)
    assert report.peaks is not None
    assert list(tmp_path.rglob("peaks-*.json"))
    (m,) = report.models
    assert m.macs == model_work(io.load(model), list(feeds)).macs
    assert m.gflops == pytest.approx(2 * (m.macs or 0) / m.latency.median / 1e6)
    assert m.peak_share is not None
    assert m.bound in ("compute", "memory", "overhead")
    assert m.batch == 1
    assert m.throughput == pytest.approx(1e3 / m.latency.median)
    assert report.energy


# --- what people see


def test_the_columns_of_a_bench() -> None:
    base = replace(result(25.0), path="a.onnx", gflops=80.0, peak_share=0.8, bound="compute")
    plain = BenchReport("P", 1, "1", "cpu", {}, "random", (base,), ())
    assert bench_rows.work(plain) is None
    assert roof.sources(plain) == []
    full = replace(
        plain,
        models=(replace(base, energy_mj=12.34, device_bytes=5_000_000),),
        peaks=ROOF,
        energy="RAPL, whole processor package",
    )
    grid = bench_rows.work(full)
    assert grid is not None
    assert grid.head == ("model", "GFLOP/s", "of peak", "limit", "energy", "device memory")
    assert grid.rows == (("a.onnx", "80", "80%", "compute", "12.3 mJ", "5.00 MB"),)
    assert roof.sources(full) == [
        "measured peaks: fp32 100 GFLOP/s, int8 400 GOP/s, memory 30 GB/s, cache 75 GB/s",
        "energy of one inference: RAPL, whole processor package, idle power included",
    ]
    text = bench_markdown(full)
    assert "| a.onnx | 80 | 80% | compute | 12.3 mJ | 5.00 MB |" in text
    assert "measured peaks: fp32 100 GFLOP/s" in text


def test_doctor_shows_peaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(roofline, "_BLOCK_MS", 1.0)
    found = of_machine(CPU, measure=True, folder=tmp_path)
    assert [p.threads for p in found] == [1, 0]
    assert of_machine(CPU, measure=False, folder=tmp_path) == found
    print_doctor(replace(doctor(), peaks=(ROOF, replace(ROOF, threads=0))))
    shown = " ".join(capsys.readouterr().out.split())
    assert "peaks 1 thread: fp32 100 GFLOP/s" in shown
    assert "; all threads: fp32 100 GFLOP/s" in shown
    print_doctor(replace(doctor(), peaks=()))
    assert "peaks" not in capsys.readouterr().out
