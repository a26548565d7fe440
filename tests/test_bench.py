from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from effdl.data.feeds import Feeds
from effdl.errors import DataError, ModelError, TargetError, UsageError
from effdl.graph import io
from effdl.measure import bench as bench_module
from effdl.measure import verdict
from effdl.measure.bench import Timing, bench, interleave, machine_warnings, timing_warnings
from effdl.report import Latency, to_json
from effdl.runtime.target import parse_target
from tests.support import SAMPLES, from_text

CPU = parse_target("cpu")
MLP = SAMPLES / "digits_mlp.onnx"


def mlp_feeds(count: int = 2, dtype: type = np.float32) -> Feeds:
    rng = np.random.default_rng(0)
    return Feeds(
        tuple({"image": rng.random((1, 64)).astype(dtype)} for _ in range(count)), "random", False
    )


def save_text(text: str, path: Path) -> Path:
    io.save(from_text(text), path)
    return path


def elementwise(path: Path, dtype: str = "float", shape: str = "4", name: str = "x") -> Path:
    text = f"""<ir_version: 8, opset_import: ["": 17]>
    g ({dtype}[{shape}] {name}) => ({dtype}[{shape}] y) {{ y = Neg({name}) }}"""
    return save_text(text, path)


def feeds_of(**arrays: np.ndarray) -> Feeds:
    return Feeds((arrays,), "random", False)


class FakeClock:
    """Time that passes only while a fake worker computes."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class FakeWorker:
    """Inferences of a given time with noise; ``warm`` inferences are slower at first."""

    def __init__(
        self, clock: FakeClock, ms: float, seed: int, *, noise: float = 0.03, warm: int = 0
    ) -> None:
        self.clock, self.ms, self.noise, self.warm = clock, ms, noise, warm
        self.rng = np.random.default_rng(seed)
        self.runs = 0
        self.calls: list[tuple[float, int, int]] = []
        self.cpus: list[int | None] = []

    def block(
        self, *, runs: int = 0, min_ms: float = 0.0, start: int = 0, cpu: int | None = None
    ) -> tuple[list[int], int | None]:
        self.cpus.append(cpu)
        self.calls.append((self.clock.now, runs, start))
        count = runs or max(1, int(min_ms / self.ms))
        times = self.ms * self.rng.lognormal(0.0, self.noise, count)
        for i in range(count):
            if self.runs + i < self.warm:
                times[i] *= 3
        # One inference in fifty meets an interrupt.
        times[self.rng.random(count) < 0.02] *= 5
        self.runs += count
        self.clock.now += float(times.sum()) / 1e3
        return [int(t * 1e6) for t in times], len(self.calls) % 3


def fake_timing(ratio: float, seed: int, *, ms: float = 2.0, drift: float = 0.0) -> Timing:
    clock = FakeClock()
    workers = [FakeWorker(clock, ms, seed), FakeWorker(clock, ms * ratio, seed + 1000)]
    timing = interleave(workers, seconds=2.0, min_runs=5, seed=seed, clock=clock)
    if drift:  # the whole machine gets slower while both are measured
        for blocks in timing.blocks:
            for k, block in enumerate(blocks):
                block[:] = [int(t * (1 + drift * k / len(blocks))) for t in block]
    return timing


def word(timing: Timing, seed: int = 0) -> str:
    a, b = ([verdict.block_time(x) for x in blocks] for blocks in timing.blocks)
    floor = max(verdict.own_noise(a, seed), verdict.own_noise(b, seed))
    return verdict.judge(verdict.paired_ratio(a, b, seed), floor)


def test_same_model_is_called_same_and_planted_slow_down_is_found() -> None:
    same = [word(fake_timing(1.0, seed), seed) for seed in range(40)]
    slower = [word(fake_timing(1.05, seed), seed) for seed in range(40)]
    faster = [word(fake_timing(1 / 1.05, seed), seed) for seed in range(40)]
    assert same.count("same") >= 38
    assert slower.count("slower") >= 38
    assert faster.count("faster") >= 38


def test_a_drift_of_the_whole_machine_is_no_difference() -> None:
    words = [word(fake_timing(1.0, seed, drift=0.5), seed) for seed in range(20)]
    assert words.count("same") >= 19
    assert word(fake_timing(1.3, 1, drift=0.5)) == "slower"


def test_the_interval_covers_the_true_ratio() -> None:
    covered = 0
    for seed in range(60):
        timing = fake_timing(1.25, seed)
        a, b = ([verdict.block_time(x) for x in blocks] for blocks in timing.blocks)
        ratio = verdict.paired_ratio(a, b, seed)
        assert ratio.low <= ratio.value <= ratio.high
        covered += ratio.low <= 1 / 1.25 <= ratio.high
    assert covered >= 53  # of 60; 57 expected


def test_paired_ratio_of_known_blocks() -> None:
    ratio = verdict.paired_ratio([2.0, 4.0, 6.0], [1.0, 2.0, 3.0], seed=0)
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((2.0, 2.0, 2.0))


def test_own_noise_ignores_the_place_in_a_round_and_grows_with_noise() -> None:
    place = [1.0 if k % 4 in (0, 3) else 1.0001 for k in range(40)]
    assert verdict.own_noise(place, 0) < 0.001
    rng = np.random.default_rng(0)
    quiet = verdict.own_noise(list(rng.lognormal(0, 0.01, 40)), 0)
    loud = verdict.own_noise(list(rng.lognormal(0, 0.20, 40)), 0)
    assert 0 < quiet < 0.02 < loud
    assert verdict.own_noise([1.0, 2.0, 3.0], 0) == 0.0


def test_of_few_rounds_the_interval_is_their_range() -> None:
    ratio = verdict.paired_ratio([1.0, 1.1, 1.2, 1.3], [1.0, 1.0, 1.0, 1.0], 0)
    assert (ratio.low, ratio.high) == pytest.approx((1.0, 1.3))


@pytest.mark.parametrize(
    ("ratio", "floor", "expected"),
    [
        ((1.42, 1.38, 1.46), 0.01, "faster"),
        ((0.80, 0.78, 0.82), 0.01, "slower"),
        ((1.005, 1.001, 1.009), 0.0, "same"),  # certain, but below one per cent
        ((1.04, 1.02, 1.06), 0.05, "same"),  # below what the model differs from itself
        ((1.05, 0.99, 1.09), 0.01, "same"),
        ((1.05, 0.90, 1.30), 0.01, "noisy"),
        ((1.02, 1.01, 1.03), 0.30, "noisy"),
        ((1.00, 1.00, 1.00), 0.0, "same"),
    ],
)
def test_judge(ratio: tuple[float, float, float], floor: float, expected: str) -> None:
    assert verdict.judge(verdict.Ratio(*ratio), floor) == expected


def test_sentences() -> None:
    ratio = verdict.Ratio(1.42, 1.38, 1.46)
    assert verdict.sentence("faster", ratio) == "faster 1.42x [1.38, 1.46]"
    assert verdict.sentence("same", ratio) == "same speed (within noise) 1.42x [1.38, 1.46]"
    assert verdict.sentence("noisy", ratio) == "too noisy to say 1.42x [1.38, 1.46]"


def test_latency_figures() -> None:
    latency = verdict.latency([int(k * 1e6) for k in range(1, 101)])
    assert latency.median == pytest.approx(50.5)
    assert latency.p90 == pytest.approx(90.1)
    assert latency.p99 == pytest.approx(99.01)
    assert (latency.minimum, latency.mean, latency.runs) == (1.0, 50.5, 100)
    assert latency.spread == pytest.approx(49.5 / 2 / 50.5)


def test_block_time_ignores_a_fifth_on_each_side() -> None:
    assert verdict.block_time([1, 10, 10, 10, 1000]) == 10
    assert verdict.block_time([4]) == 4


def test_blocks_alternate_and_only_one_worker_computes() -> None:
    clock = FakeClock()
    workers = [FakeWorker(clock, 2.0, 1), FakeWorker(clock, 3.0, 2)]
    timing = interleave(workers, seconds=1.0, min_runs=5, seed=0, clock=clock)
    rounds = len(timing.blocks[0])
    assert rounds == len(timing.blocks[1])
    assert rounds % 2 == 0
    timed = sorted(
        (t, k) for k, w in enumerate(workers) for t, runs, _ in w.calls if runs
    )  # after warm-up
    order = [k for _, k in timed]
    assert order in ([0, 1, 1, 0] * (rounds // 2), [1, 0, 0, 1] * (rounds // 2))
    assert len({t for t, _ in timed}) == len(timed)


def test_a_round_stays_on_the_processor_it_began_on() -> None:
    clock = FakeClock()
    workers = [FakeWorker(clock, 2.0, 1), FakeWorker(clock, 3.0, 2)]
    timing = interleave(workers, seconds=1.0, min_runs=5, seed=0, same_cpu=True, clock=clock)
    rounds = len(timing.blocks[0])
    given = [w.cpus[-rounds:] for w in workers]
    assert all((a is None) != (b is None) for a, b in zip(*given, strict=True))
    assert given[0].count(None) == given[1].count(None) == rounds // 2


def test_every_place_comes_equally_often_with_three_models() -> None:
    orders = bench_module._orders(3, np.random.default_rng(0))
    taken = [next(orders) for _ in range(200)]
    assert all(sorted(o) == [0, 1, 2] for o in taken)
    assert all(b == a[::-1] for a, b in zip(taken[::2], taken[1::2], strict=True))
    assert len({tuple(o) for o in taken}) == 6


def test_warm_up_is_dropped_and_reported_when_it_does_not_end() -> None:
    clock = FakeClock()
    workers = [FakeWorker(clock, 2.0, 1, warm=30, noise=0.001), FakeWorker(clock, 2.0, 2)]
    timing = interleave(workers, seconds=2.0, min_runs=5, seed=0, clock=clock)
    times = [t / 1e6 for block in timing.blocks[0] for t in block]
    assert np.percentile(times, 95) < 2.2
    assert timing.unsettled == []

    class Heating(FakeWorker):
        def block(self, **options: Any) -> tuple[list[int], int | None]:
            self.ms *= 1.3
            return super().block(**options)

    clock = FakeClock()
    heating = Heating(clock, 0.1, 1)
    assert interleave([heating], seconds=0.3, min_runs=1, seed=0, clock=clock).unsettled == [0]


def test_a_slow_model_gets_its_runs_and_no_more() -> None:
    clock = FakeClock()
    workers = [FakeWorker(clock, 1000.0, 1), FakeWorker(clock, 1500.0, 2)]
    timing = interleave(workers, seconds=1.0, min_runs=5, seed=0, clock=clock)
    assert [sum(map(len, blocks)) for blocks in timing.blocks] == [6, 6]


def test_feeds_of_different_shapes_are_run_by_all_alike() -> None:
    clock = FakeClock()
    workers = [FakeWorker(clock, 0.5, 1), FakeWorker(clock, 5.0, 2)]
    interleave(workers, seconds=1.0, min_runs=5, seed=0, same_work=False, clock=clock)
    done = [[(runs, start) for _, runs, start in w.calls if runs] for w in workers]
    assert done[0] == done[1]


def test_warnings_say_what_to_do() -> None:
    steady = Latency(1.0, 1.1, 1.2, 0.9, 1.0, 0.02, 1000)
    shaky = Latency(1.0, 1.9, 3.0, 0.5, 1.2, 0.31, 8)
    said = timing_warnings({"a.onnx": steady, "b.onnx": shaky}, [1], min_runs=5)
    assert all(s.startswith("b.onnx") and "seconds" in s for s in said)
    assert [("±31%" in s, "8 runs" in s, "warm-up" in s) for s in said] == [
        (True, False, False),
        (False, True, False),
        (False, False, True),
    ]
    assert timing_warnings({"a.onnx": steady}, [], min_runs=5) == []
    assert machine_warnings(1, 4, 0.3) == []
    assert machine_warnings(1, 4, None) == []
    assert "share 4 cores" in machine_warnings(8, 4, 0.0)[0]
    assert "close them" in machine_warnings(1, 2, 1.8)[0]
    assert "fewer than 4 threads" in machine_warnings(0, 4, 2.0)[0]


def test_bench_of_a_model_with_itself() -> None:
    stages: list[tuple[str, float]] = []
    report = bench(
        [MLP, MLP], mlp_feeds(), CPU, seconds=0.1, progress=lambda s, f: stages.append((s, f))
    )
    first, second = report.models
    assert report.provider == "CPUExecutionProvider"
    assert report.threads == 1
    assert report.feeds == {"image": "float32[1,64]"}
    assert report.source == "random"
    assert first.sha256 == second.sha256 == io.file_digest(MLP)
    assert first.file_bytes == MLP.stat().st_size
    assert first.zstd_bytes is not None
    assert 0 < first.zstd_bytes <= first.file_bytes
    assert first.verdict == "reference"
    assert second.verdict in ("faster", "slower", "same", "noisy")
    assert second.ci[0] <= second.ratio <= second.ci[1]
    assert len(report.verdict) == 1
    for result in report.models:
        latency = result.latency
        assert latency.runs >= 5
        assert 0 < latency.minimum <= latency.median <= latency.p90 <= latency.p99
        assert result.load_ms > 0
        assert result.first_ms > 0
        assert result.rounds >= 4
        # The weights are 1.7 MB: held at least once, and a small model takes no gigabyte.
        assert 1.7e6 < result.peak_bytes < 300e6
    assert {s for s, _ in stages} == {"load", "warm-up", "measure"}
    assert all(0 <= f <= 1 for _, f in stages)
    assert json.loads(json.dumps(to_json(report)))["models"][1]["verdict"] == second.verdict


def test_one_model_needs_no_verdict() -> None:
    report = bench([str(MLP)], mlp_feeds(1), CPU, seconds=0.05, threads=2)
    assert report.verdict == ()
    assert report.models[0].ratio == 1.0


def test_floats_of_another_precision_are_cast_and_noted(tmp_path: Path) -> None:
    a, b = elementwise(tmp_path / "a.onnx"), elementwise(tmp_path / "b.onnx", "float16")
    report = bench([a, b], feeds_of(x=np.ones(4, np.float32)), CPU, seconds=0.05)
    assert "b.onnx: input 'x' cast from float32 to float16" in report.warnings


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"name": "z"}, "has no input 'x'"),
        ({"shape": "5"}, "input 'x' has shape [5], given is [4]"),
        ({"shape": "4,1"}, "input 'x' has shape"),
        ({"dtype": "int32"}, "input 'x' takes int32, given is float32"),
    ],
)
def test_other_inputs_are_refused(tmp_path: Path, change: dict[str, str], says: str) -> None:
    a = elementwise(tmp_path / "a.onnx")
    b = elementwise(tmp_path / "b.onnx", **change)
    with pytest.raises(ModelError) as e:
        bench([a, b], feeds_of(x=np.ones(4, np.float32)), CPU, seconds=0.05)
    assert says in e.value.message
    assert e.value.where == str(b)


def test_texts_and_odd_input_names_reach_the_worker(tmp_path: Path) -> None:
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", [n], [f"{n}_y"]) for n in ("file", "a/b:0")],
        "g",
        [
            onnx.helper.make_tensor_value_info("file", onnx.TensorProto.STRING, [2]),
            onnx.helper.make_tensor_value_info("a/b:0", onnx.TensorProto.INT64, [1]),
        ],
        [
            onnx.helper.make_tensor_value_info("file_y", onnx.TensorProto.STRING, [2]),
            onnx.helper.make_tensor_value_info("a/b:0_y", onnx.TensorProto.INT64, [1]),
        ],
    )
    opsets = [onnx.helper.make_opsetid("", 17)]
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "m.onnx"
    )
    feeds = Feeds(
        ({"file": np.array(["é", "bc"], object), "a/b:0": np.array([1])},), "random", False
    )
    report = bench([tmp_path / "m.onnx"], feeds, CPU, seconds=0.05)
    assert report.feeds == {"file": "string[2]", "a/b:0": "int64[1]"}
    assert report.warnings == () or "cast" not in " ".join(report.warnings)


def test_bad_models_are_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(MLP.read_bytes()[:1000])
    empty = tmp_path / "empty.onnx"
    empty.touch()
    for path, says in [
        (tmp_path / "missing.onnx", "no such file"),
        (tmp_path, "folder"),
        (empty, "empty"),
        (broken, "not an ONNX model"),
    ]:
        with pytest.raises(ModelError, match=says) as e:
            bench([MLP, path], mlp_feeds(), CPU)
        assert e.value.where == str(path)
    unknown = tmp_path / "unknown.onnx"
    onnx.save(
        onnx.parser.parse_model(
            '<ir_version: 8, opset_import: ["": 17, "my.ops": 1]> '
            "g (float[4] x) => (float[4] y) { y = my.ops.Magic(x) }"
        ),
        unknown,
    )
    with pytest.raises(ModelError, match=r"no operator 'Magic' of domain 'my\.ops'"):
        bench([unknown], feeds_of(x=np.ones(4, np.float32)), CPU)


def test_bad_options_are_refused() -> None:
    for options in (
        {"seconds": 0},
        {"threads": -1},
        {"min_runs": 0},
        {"seconds": float("nan")},
        {"seconds": float("inf")},
    ):
        with pytest.raises(UsageError):
            bench([MLP], mlp_feeds(), CPU, **options)
    with pytest.raises(UsageError):
        bench([], mlp_feeds(), CPU)
    with pytest.raises(DataError):
        bench([MLP], Feeds((), "empty.npz", True), CPU)


def test_a_target_that_is_not_here_is_no_number() -> None:
    absent = parse_target("arm" if CPU.arch == "x86_64" else "cuda")
    with pytest.raises(TargetError):
        bench([MLP], mlp_feeds(), absent)
