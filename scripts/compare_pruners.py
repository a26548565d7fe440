"""effdl's prune_channels beside other pruners, nothing trained; docs/pruning.md.

    EFFDL_SHARED=... python scripts/compare_pruners.py [--only NAME ...] [--minilm FILE] [--write FILE]

Every tool works in a process of its own on the same 1,000 unlabelled images (512 sentences) and is asked for
the same share of the multiply-accumulates. The untouched model and all results are timed in one interleaved
run (``effdl bench``: ORT_ENABLE_ALL, fresh processes), each is scored on the test data. onnxsim, torch and
Torch-Pruning take part where they are installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import effdl  # noqa: F401  (before onnxruntime: switches its telemetry off)

# isort: split
import numpy as np
import real_data
from jobs import ask
from pruner_tools import macs
from real_models import ROOT, Arrays, Row, cifar, minilm, run_all
from sections import with_section

from effdl import api
from effdl.data.metrics import METRICS

TOOLS = Path(__file__).parent / "pruner_tools.py"
WAYS = {
    "effdl": "effdl (obs, plan)",
    "effdl_uniform": "effdl, alike everywhere",
    "effdl_activation": "effdl, activation",
    "effdl_l2": "effdl, l2",
    "effdl_random": "effdl, random",
    "magnitude": "magnitude, no repair",
    "onnxsim": "onnxsim structured",
    "onnxsim_wanda": "onnxsim structured Wanda",
    "torch_pruning": "Torch-Pruning",
}
NEEDS = {"onnxsim": "onnxsim", "onnxsim_wanda": "onnxsim", "torch_pruning": "torch_pruning"}
LIMIT = 3600
SENTENCES, LENGTH = 512, 48
Result = dict[str, Any]


@dataclass(frozen=True)
class Model:
    """What is pruned: a file, its data, what scores it, and a few words about both."""

    name: str
    path: Path
    data: Arrays
    timing: Arrays
    score: Callable[[Path], float]
    about: str = ""


def digits(name: str) -> Model:
    """A sample model, by its accuracy on 504 digits."""
    folder = ROOT / "sample_models"
    with np.load(folder / f"{name}.test.npz") as test:
        arrays = {n: test[n] for n in test.files}
    labels = next(a for n, a in arrays.items() if a.ndim == 1)
    feed = {n: a for n, a in arrays.items() if a.ndim > 1}
    with np.load(folder / f"{name}.calib.npz") as calib:
        data = {n: calib[n] for n in calib.files}
    path = folder / f"{name}.onnx"
    first = {n: a[:1] for n, a in feed.items()}
    return Model(name, path, data, first, lambda m: METRICS["top1"](run_all(m, feed, 504), labels))


def pictures(name: str) -> Model:
    """A CIFAR-10 classifier."""
    row: Row = cifar(name, 1000)
    return Model(name, row.model, row.calibration, row.timing, row.score)


MODELS: dict[str, Callable[[], Model]] = {
    "cifar_vgg": lambda: pictures("cifar_vgg"),
    "cifar_resnet20": lambda: pictures("cifar_resnet20"),
    "digits_cnn": lambda: digits("digits_cnn"),
    "digits_mlp": lambda: digits("digits_mlp"),
    "digits_transformer": lambda: digits("digits_transformer"),
}


def sentences(path: Path) -> Model:
    """MiniLM, by Spearman's correlation on STS-B; pairs of the development set are its samples."""
    row = minilm(path)
    texts = real_data.Sentences("dev")
    data = texts.batch([a for a, _ in texts.pairs[:SENTENCES]], length=LENGTH)
    about = f"{SENTENCES} sentences of {LENGTH} tokens; Spearman's correlation on STS-B"
    return Model("MiniLM", path, data, row.timing, row.score, about)


def measured(model: Model, share: float, ways: list[str], args: argparse.Namespace) -> Result:
    """All ways on one model, with what is left of its work."""
    with tempfile.TemporaryDirectory(prefix="effdl-pruners-") as name:
        folder = Path(name)
        np.savez(folder / "data.npz", **model.data)
        np.savez(folder / "timing.npz", **model.timing)
        found: dict[str, Result] = {}
        for way in ways:
            out = folder / f"{way}.onnx"
            job = {
                "model": str(model.path),
                "data": str(folder / "data.npz"),
                "out": str(out),
                "share": share,
                "threads": args.threads,
            }
            answer = ask(TOOLS, way, job, LIMIT)
            if not answer.get("failed") and out.exists():
                answer |= {"score": model.score(out), "macs": macs(out) / macs(model.path)}
                answer["path"] = str(out)
            found[way] = answer
            print(f"  {model.name} {share} {way}: {told(answer)}", flush=True)
        made = [w for w in ways if "path" in found[w]]
        report = api.bench(
            model.path,
            *(found[w]["path"] for w in made),
            data=folder / "timing.npz",
            threads=args.threads,
            seconds=args.seconds,
        )
        first = report.models[0].latency.median
        for way, timed in zip(made, report.models[1:], strict=True):
            found[way]["speed"] = first / timed.latency.median
        return {"model": model.name, "share": share, "ways": found}


def told(answer: Result) -> str:
    """One result in a few words."""
    if answer.get("failed"):
        return f"does not run: {answer['failed']}"
    return f"{answer['score']:.2%} at {answer['macs']:.1%} of the MACs, {answer['seconds']:.0f} s"


def table(model: Model, results: list[Result], ways: list[str]) -> str:
    """Markdown for one model: a row for each way, a column for each share."""
    titles = [f"asked for {r['share']:g}" for r in results]
    about = f" ({model.about})" if model.about else ""
    lines = [f"{model.name}{about}, untouched {model.score(model.path):.2%}:", ""]
    lines += ["| | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    for way in ways:
        cells = " | ".join(_cell(result["ways"][way]) for result in results)
        lines.append(f"| {WAYS[way]} | {cells} |")
    return "\n".join(lines)


def _cell(answer: Result) -> str:
    """Score, what is left of the work, the speed, and how much of the saving is saved time."""
    if answer.get("failed") or "score" not in answer:
        return "does not run"
    speed, left = answer.get("speed", 0.0), answer["macs"]
    saved = (1 - 1 / speed) / (1 - left) if speed and left < 1 else 0.0
    return f"{answer['score']:.2%} at {left:.2f}, {speed:.2f}x ({saved:.0%})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=list(MODELS), help="models")
    parser.add_argument("--minilm", type=Path, help="the MiniLM model; left out when not given")
    parser.add_argument("--ways", nargs="*", choices=list(WAYS), help="tools")
    parser.add_argument("--shares", nargs="*", type=float, default=[0.5, 0.25])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--write", type=Path, help="the page where tables are renewed")
    args = parser.parse_args()
    ways = args.ways or list(WAYS)
    ways = [w for w in ways if w not in NEEDS or importlib.util.find_spec(NEEDS[w])]
    models = [MODELS[name] for name in (MODELS if args.only is None else args.only)]
    if args.minilm:
        models.append(lambda: sentences(args.minilm))
    for make in models:
        model = make()
        results = [measured(model, s, ways, args) for s in args.shares]
        made = table(model, results, ways)
        print(made, flush=True)
        if args.write:
            old = args.write.read_text(encoding="utf-8")
            text = with_section(old, f"pruners {model.name}", made)
            args.write.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
