"""Run reports made by hand, for the tests of what is rendered from them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from effdl.report import (
    BenchReport,
    BenchResult,
    CompareReport,
    GateReport,
    Latency,
    ModelStats,
    OpChange,
    OutputError,
    PassReport,
    RunReport,
)

EVIL = 'a|b`c`<script src="x">&"\'\n\x00*_@you #1'
"""A node name that breaks whatever does not escape it."""


def stats(path: str = "m.onnx", **more: Any) -> ModelStats:
    base = ModelStats(
        path=path,
        sha256="ab" * 32,
        opset=17,
        opsets={"": 17},
        ir_version=8,
        nodes=120,
        ops={"Conv": 40, "Relu": 40},
        params=910_000,
        macs=540_000_000,
        macs_unknown=(),
        weight_bytes={"FLOAT": 3_640_000},
        file_bytes=3_660_000,
        zstd_bytes=3_380_000,
        inputs={"images": "float[1,3,416,416]"},
        outputs={"output": "float[1,3549,85]"},
        dims={},
        dynamic=(),
    )
    return replace(base, **more)


def gate(ratio: float, low: float, high: float, before_ms: float, **more: Any) -> GateReport:
    """A measured step: ``ratio`` [``low``, ``high``] against a model of ``before_ms``."""
    verdict = "faster" if low > 1 else "slower" if high < 1 else "same"
    base = GateReport(
        kept=True,
        by="latency",
        reason="",
        verdict=verdict,
        ratio=ratio,
        ci=(low, high),
        noise_floor=0.012,
        latency_ms=before_ms / ratio,
        before_ms=before_ms,
    )
    return replace(base, **more)


def step(name: str, status: str = "changed", **more: Any) -> PassReport:
    base = PassReport(
        name=name,
        options={},
        lossy=False,
        status=status,
        changes=1,
        reason="",
        touched=(),
        skipped=(),
        notes={},
        error=0.0 if status == "changed" else None,
        nodes=120,
        weight_bytes=3_640_000,
        seconds=0.12,
        check_seconds=0.3,
    )
    return replace(base, **more)


AT_FAULT = (
    OpChange("QuantizeLinear, DequantizeLinear", 0, 74, 0.0, 3.31),
    OpChange("Conv", 66, 66, 14.2, 12.6),
    OpChange("Concat", 12, 12, 0.42, 1.05),
    OpChange("Sigmoid, Mul", 58, 58, 2.9, 3.0),
)
"""Why an int8 pass lost: the conversions cost more than the convolutions saved."""

GAINS = (
    OpChange("Conv", 66, 66, 14.2, 6.1, ("QLinearConv",)),
    OpChange("Sigmoid, Mul", 58, 58, 2.9, 2.7),
    OpChange("QuantizeLinear, DequantizeLinear", 0, 18, 0.0, 0.61),
    OpChange("Concat", 12, 12, 0.42, 0.43),
    OpChange("MaxPool", 6, 6, 0.61, 0.6),
    OpChange("Resize", 2, 2, 0.2, 0.2),
    OpChange("Transpose", 3, 0, 0.31, 0.0),
    OpChange("overhead between operators", 0, 0, 0.26, 0.25),
)

PASSES = (
    step("simplify", changes=12, notes={"folded": 9, "identities": 3}, error=0.0),
    step(
        "fold_batchnorm",
        changes=66,
        error=1.8e-7,
        notes={"folded": 66},
        skipped=(("/head/bn", "its input has two users"),),
    ),
    step("fuse_gelu", "unchanged", changes=0, reason="no Erf in the model"),
    step(
        "quantize_static",
        "dropped",
        changes=70,
        lossy=True,
        error=2.1e-2,
        seconds=8.2,
        touched=tuple((f"/backbone/conv{k}", "Conv in uint8") for k in range(70)),
        gate=gate(
            0.84,
            0.82,
            0.87,
            18.9,
            kept=False,
            reason="slower: 74 QuantizeLinear, DequantizeLinear added 3.31 ms; Conv saved 1.6 ms",
            file_bytes=1_010_000,
            fidelity=2.1e-2,
            score=0.4031,
            changes=AT_FAULT,
        ),
    ),
    step(
        "prune_channels",
        changes=31,
        lossy=True,
        error=1.9e-2,
        weight_bytes=2_610_000,
        seconds=2.4,
        notes={"channels_removed": 412, "macs_saved": 171_000_000},
        options={"macs": 0.7, "ignore": [f"/head/conv{k}" for k in range(30)]},
        gate=gate(1.42, 1.38, 1.46, 18.9, file_bytes=2_630_000, fidelity=1.9e-2, score=0.4102),
    ),
    step(
        "low_rank",
        "dropped",
        changes=9,
        lossy=True,
        error=0.31,
        seconds=1.7,
        options={"energy": 0.8},
        gate=gate(
            1.09,
            1.05,
            1.12,
            13.3,
            kept=False,
            by="accuracy",
            reason="map fell by 0.0610, the budget allows 0.0100",
            file_bytes=2_100_000,
            fidelity=0.33,
            score=0.3542,
        ),
    ),
    step(
        "cluster_weights", "rolled_back", changes=4, lossy=True, error=None, reason="output has NaN"
    ),
    step(
        "quantize_dynamic",
        changes=2,
        lossy=True,
        error=3.4e-3,
        weight_bytes=2_400_000,
        gate=gate(
            1.003,
            0.99,
            1.015,
            13.3,
            by="size",
            reason="same speed, kept for the 8% smaller file",
            file_bytes=2_420_000,
            fidelity=1.95e-2,
            score=0.4099,
        ),
    ),
    step("strip_metadata", "not_run", changes=0, reason="--stop-after 8", seconds=0.0),
)


def latency(median: float) -> Latency:
    return Latency(median, median * 1.1, median * 1.3, median * 0.95, median * 1.01, 0.03, 400)


def bench(ratio: float = 1.43, verdict: str = "faster", before_ms: float = 18.9) -> BenchReport:
    low, high = ratio * 0.97, ratio * 1.03
    first = BenchResult(
        path="models/yolox_nano.onnx",
        sha256="ab" * 32,
        file_bytes=3_660_000,
        zstd_bytes=3_380_000,
        load_ms=41.0,
        first_ms=22.0,
        peak_bytes=48_100_000,
        latency=latency(before_ms),
        ratio=1.0,
        ci=(1.0, 1.0),
        noise_floor=0.012,
        rounds=40,
    )
    second = replace(
        first,
        path="out/yolox_nano.fast.onnx",
        sha256="cd" * 32,
        file_bytes=2_420_000,
        zstd_bytes=2_210_000,
        load_ms=33.0,
        peak_bytes=37_500_000,
        latency=latency(before_ms / ratio),
        ratio=ratio,
        ci=(low, high),
        verdict=verdict,
    )
    return BenchReport(
        provider="CPUExecutionProvider",
        threads=1,
        onnxruntime="1.32.0",
        cpu="AMD EPYC 9654",
        feeds={"images": "float32[1,3,416,416]"},
        source="calib.npz",
        models=(first, second),
        verdict=(f"{verdict} {ratio:.2f}x [{low:.2f}, {high:.2f}]",),
        min_effect=0.01,
    )


def output_error(name: str = "output", rel: float = 1.95e-2, *, equal: bool = False) -> OutputError:
    return OutputError(name, 0.12, 0.004, rel, 0.99981, 34.2, 0.9844, equal, 1e-4)


def verified(*outputs: OutputError, real: bool = True) -> CompareReport:
    found = outputs or (output_error(),)
    return CompareReport(
        "models/yolox_nano.onnx",
        "out/yolox_nano.fast.onnx",
        8,
        "calib.npz" if real else "random",
        real,
        all(o.equal for o in found),
        found,
    )


def rich_run(**more: Any) -> RunReport:
    """A run in which every kind of step occurs, measured, scored and verified."""
    base = RunReport(
        recipe={
            "name": "cnn-int8-prune",
            "description": "fold, int8, thin to 70 % of the MACs",
            "target": "cpu",
            "budget": {"accuracy_drop": 0.01, "fidelity": 0.05, "speedup": 1.3},
            "passes": [
                "simplify",
                "fold_batchnorm",
                "fuse_gelu",
                "quantize_static",
                {
                    "prune_channels": {
                        "macs": 0.7,
                        "ignore": [f"/head/conv{k}" for k in range(30)],
                    }
                },
                {"low_rank": {"energy": 0.8}},
                "cluster_weights",
                "quantize_dynamic",
                "strip_metadata",
            ],
        },
        target="cpu",
        versions={"effdl": "0.1.0", "onnxruntime": "1.32.0", "onnx": "1.23.2", "numpy": "2.4.6"},
        before=stats("models/yolox_nano.onnx"),
        after=stats(
            "out/yolox_nano.fast.onnx",
            sha256="cd" * 32,
            nodes=138,
            params=652_000,
            macs=369_000_000,
            file_bytes=2_420_000,
            zstd_bytes=2_210_000,
        ),
        passes=PASSES,
        verified=verified(),
        unverified="",
        bench=bench(),
        unmeasured="",
        accuracy={
            "metric": "map",
            "before": 0.4129,
            "after": 0.4099,
            "samples": 500,
            "ci": [-0.0064, 0.0004],
            "verdict": "same",
        },
        output="out/yolox_nano.fast.onnx",
        dry_run=False,
        seconds=84.2,
        warnings=("other programs kept about 1.2 of 2 cores busy in the last minute: close them",),
        gate="each",
        changes=GAINS,
        seed=0,
    )
    return replace(base, **more)


def lost_run() -> RunReport:
    """A run of which nothing was kept: the output is the input."""
    tried = tuple(
        replace(
            p,
            status="dropped",
            gate=replace(p.gate, kept=False, reason=p.gate.reason or "map fell by 0.0200"),
        )
        for p in PASSES
        if p.gate is not None
    )
    return rich_run(
        passes=(PASSES[0], PASSES[2], *tried),
        after=stats("out/yolox_nano.fast.onnx"),
        won=False,
        bench=None,
        unmeasured="the output is the input",
        verified=None,
        unverified="the output is the input",
        accuracy=None,
        changes=(),
        warnings=("nothing helped: the best that was found is no faster",),
    )


def plain_run() -> RunReport:
    """A run without gate, evaluation data or measurement; random feeds; outputs equal."""
    return rich_run(
        recipe={"name": "lossless", "passes": ["simplify", "fold_batchnorm", "fuse_gelu"]},
        passes=PASSES[:3],
        bench=None,
        unmeasured="switched off",
        accuracy=None,
        verified=verified(output_error(rel=0.0, equal=True), real=False),
        changes=(),
        warnings=(),
        gate="off",
        seed=None,
    )


def dry_run() -> RunReport:
    """A plan: nothing checked, measured or written."""
    return rich_run(
        dry_run=True,
        passes=(
            replace(PASSES[0], error=None, touched=(("Identity_0", "does nothing, removed"),)),
            replace(PASSES[2]),
            replace(PASSES[8], reason="needs calibration data (--data): these are its candidates"),
        ),
        before=stats("models/yolox_nano.onnx", zstd_bytes=None),
        after=stats("", file_bytes=0, zstd_bytes=None, nodes=111),
        bench=None,
        verified=None,
        unverified="a dry run checks nothing",
        accuracy=None,
        changes=(),
        warnings=(),
        gate="off",
    )


def unverified_run() -> RunReport:
    """The model does not run here."""
    return replace(
        plain_run(),
        verified=None,
        unverified="no kernel for MyOp",
        unmeasured="the model does not run here",
    )


def evil_run() -> RunReport:
    """Every free text is hostile."""
    bad = step(
        EVIL,
        "dropped",
        reason=EVIL,
        touched=((EVIL, EVIL),),
        skipped=((EVIL, EVIL),),
        notes={EVIL: EVIL, "n": 3},
        options={EVIL: EVIL},
        error=1e-3,
        gate=gate(
            0.9, 0.88, 0.92, 5.0, kept=False, reason=EVIL, changes=(OpChange(EVIL, 1, 2, 1.0, 2.0),)
        ),
    )
    return rich_run(
        recipe={"name": EVIL, "passes": [EVIL]},
        passes=(bad,),
        warnings=(EVIL,),
        before=stats(EVIL, inputs={EVIL: EVIL}),
        output=EVIL,
        changes=(OpChange(EVIL, 1, 1, 1.0, 0.5),),
        verified=replace(verified(output_error(EVIL)), source=EVIL, notes=(EVIL,)),
        bench=replace(bench(), cpu=EVIL),
        accuracy={"metric": EVIL, "before": 0.5, "after": 0.4, "samples": 3},
    )


EXAMPLES = {
    "rich": rich_run,
    "lost": lost_run,
    "plain": plain_run,
    "dry": dry_run,
    "unverified": unverified_run,
    "evil": evil_run,
}
