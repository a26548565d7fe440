"""Ways to round weights to few bits, side by side on MiniLM: the table of docs/quantization.md.

    EFFDL_SHARED=... python scripts/compare_rounding.py MINILM.onnx [--bits 4 --blocks 32 128] [--write]

Every way is one run of `effdl optimize` with `quantize_weights` on the same 256 sentences of the STS-b
development set, and is scored on the test set. Peer: onnxruntime's MatMulNBitsQuantizer (its default, round
to nearest, and HQQ), which leaves embeddings alone unless asked. Needs tokenizers.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import effdl

# isort: split
import onnx
from real_data import shared
from sections import with_section

from effdl import api
from effdl.recipe import load

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "quantization.md"
METHODS = ("rtn", "hqq", "awq", "gptq")


def ours(method: str, bits: int, block: int) -> Callable[[Path, Path], None]:
    """effdl by one method."""
    text = shared() / "data" / "text"
    recipe = {
        "name": "weights",
        "description": "weights of few bits",
        "objective": "size",
        "data": {
            "calibration": {
                "path": str(text / "stsb-en-dev.csv"),
                "tokenizer": str(text / "minilm_tokenizer.json"),
                "text": "1",
                "length": 64,
                "limit": 256,
            }
        },
        "passes": [
            "simplify",
            {"quantize_weights": {"method": method, "bits": bits, "block_size": block}},
        ],
    }

    def run(source: Path, goal: Path) -> None:
        options = effdl.RunOptions(gate="off", bench_seconds=0)
        effdl.optimize(source, load(recipe), goal, options=options)

    return run


def theirs(method: str, bits: int, block: int) -> Callable[[Path, Path], None]:
    """onnxruntime's quantizer of weights, embeddings included."""

    def run(source: Path, goal: Path) -> None:
        from onnxruntime.quantization import matmul_nbits_quantizer as nbits

        ops = ("MatMul",) if method == "hqq" else ("MatMul", "Gather")  # its HQQ takes no tables
        kinds: dict[str, Any] = {"op_types_to_quantize": ops}
        quantizer = nbits.MatMulNBitsQuantizer(
            onnx.load(source), bits=bits, block_size=block, accuracy_level=4, **kinds
        )
        if method == "hqq":
            config = nbits.HQQWeightOnlyQuantConfig(block_size=block, bits=bits, **kinds)
            quantizer = nbits.MatMulNBitsQuantizer(onnx.load(source), algo_config=config)
        quantizer.process()
        quantizer.model.save_model_to_file(str(goal), False)

    return run


def spearman(source: Path, models: list[Path]) -> list[float]:
    """Score models on the test set."""
    text = shared() / "data" / "text"
    report = api.evaluate(
        source,
        *models,
        data=text / "stsb-en-test.csv",
        tokenizer=text / "minilm_tokenizer.json",
        metric="spearman",
        labels="3",
        text=["1", "2"],
        length=128,
        output="sentence_embedding",
    )
    return [m.score for m in report.models]


def table(source: Path, bits: int, blocks: list[int]) -> str:
    """Run every way and return the table."""
    lines = [
        "| bits, block | rounding | seconds | file | Spearman | change |",
        "|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory(prefix="effdl-rounding-") as name:
        made: list[tuple[str, str, float, Path]] = []
        failed: list[str] = []
        for block in blocks:
            ways = {f"effdl {m}": ours(m, bits, block) for m in METHODS}
            ways |= {f"onnxruntime {m}": theirs(m, bits, block) for m in ("default", "hqq")}
            for way, run in ways.items():
                goal = Path(name) / f"{way.replace(' ', '_')}_{block}.onnx"
                start = time.perf_counter()
                try:
                    run(source, goal)
                except Exception as e:
                    failed.append(f"| {bits}, {block} | {way} | failed: {str(e)[:60]} | | | |")
                    continue
                made.append((f"{bits}, {block}", way, time.perf_counter() - start, goal))
                print(f"{way} {block}: {made[-1][2]:.0f} s", flush=True)
        first, *scores = spearman(source, [m[3] for m in made])
        lines.append(f"| 32 | none | | {source.stat().st_size / 1e6:.1f} MB | {first:.4f} | |")
        for (what, way, seconds, goal), score in zip(made, scores, strict=True):
            size = goal.stat().st_size / 1e6
            lines.append(
                f"| {what} | {way} | {seconds:.0f} | {size:.1f} MB | {score:.4f} | {score - first:+.4f} |"
            )
    return "\n".join([*lines, *failed])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--bits", type=int, default=4, choices=(4, 8))
    parser.add_argument("--blocks", type=int, nargs="*", default=[32, 128])
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    text = table(args.model, args.bits, args.blocks)
    print(text)
    if args.write:
        PAGE.write_text(with_section(PAGE.read_text(), "rounding", text))


if __name__ == "__main__":
    main()
