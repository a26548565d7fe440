"""One job of ``compare_pruners.py`` in a process of its own: a pruner on a model.

    python scripts/pruner_tools.py TOOL JOB      (JOB is JSON; one line of JSON comes out)

effdl's ways differ in what decides which channels go; onnxsim and Torch-Pruning are given the sparsity
that leaves about the same multiply-accumulates, found by bisection. Nothing is trained.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import effdl

# isort: split
import numpy as np
import onnx

Job = dict[str, Any]
_STEPS = 9


def macs(path: str | Path) -> int:
    """Multiply-accumulates of one inference."""
    return effdl.inspect(path, could=False).stats.macs or 0


def run_effdl(job: Job, options: dict[str, Any]) -> None:
    """prune_channels alone, without the gate."""
    steps = ["simplify", "fold_batchnorm", {"prune_channels": {"macs": job["share"], **options}}]
    recipe = {"name": "pruned", "description": "channels", "passes": steps}
    from effdl.recipe import load

    effdl.optimize(
        job["model"],
        load(recipe),
        job["out"],
        data=Path(job["data"]),
        options=effdl.RunOptions(
            bench_seconds=0, gate="off", keep_going=True, threads=job["threads"]
        ),
    )


def by_bisection(job: Job, make: Callable[[float], onnx.ModelProto]) -> None:
    """Write what a peer makes with the smallest sparsity that meets the share of the work."""
    goal = macs(job["model"]) * job["share"]
    low, high, best = 0.0, 1.0, None
    for _ in range(_STEPS):
        sparsity = (low + high) / 2
        onnx.save(make(sparsity), job["out"])
        if macs(job["out"]) <= goal:
            best, high = sparsity, sparsity
        else:
            low = sparsity
    if best is None:
        raise SystemExit("no sparsity leaves so little")
    onnx.save(make(best), job["out"])


def onnxsim(job: Job, *, wanda: bool = False) -> None:
    """Structured pruning of onnxsim, after its simplifier: it does not prune around batch norms."""
    import onnxsim as peer

    with np.load(job["data"]) as data:
        arrays = {n: data[n] for n in data.files}
    feeds = [{n: a[k : k + 1] for n, a in arrays.items()} for k in range(64)]

    simplified, _ = peer.simplify(onnx.load(job["model"]))
    text = simplified.SerializeToString()

    def make(sparsity: float) -> onnx.ModelProto:
        model = onnx.load_from_string(text)
        if wanda:
            return peer.apply_structured_wanda_pruning(model, feeds, sparsity=sparsity)
        return peer.apply_structured_pruning(model, sparsity=sparsity)

    by_bisection(job, make)


def torch_pruning(job: Job) -> None:
    """Group magnitudes of Torch-Pruning on the same network in torch, exported again."""
    import torch
    import torch_pruning as tp
    from torch_network import Network

    with np.load(job["data"]) as data:
        name = data.files[0]
        example = torch.from_numpy(data[name][:1].copy())
    output = onnx.load(job["model"]).graph.output[0].name

    def make(sparsity: float) -> onnx.ModelProto:
        net = Network(onnx.load(job["model"])).eval()
        last = [m for m in net.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)][-1]
        pruner = tp.pruner.MagnitudePruner(
            net,
            example,
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=sparsity,
            global_pruning=True,
            ignored_layers=[last],
            round_to=8,
            max_pruning_ratio=0.875,
        )
        pruner.step()
        target = str(Path(job["out"]).with_suffix(".torch.onnx"))
        axes = {name: {0: "batch"}, output: {0: "batch"}}
        torch.onnx.export(
            net,
            (example,),
            target,
            input_names=[name],
            output_names=[output],
            dynamic_axes=axes,
            dynamo=False,
            opset_version=17,
        )
        return onnx.load(target)

    by_bisection(job, make)


WAYS: dict[str, Callable[[Job], None]] = {
    "effdl": lambda job: run_effdl(job, {}),
    "effdl_activation": lambda job: run_effdl(job, {"saliency": "activation"}),
    "effdl_l2": lambda job: run_effdl(job, {"saliency": "l2"}),
    "effdl_random": lambda job: run_effdl(job, {"saliency": "random"}),
    "effdl_uniform": lambda job: run_effdl(job, {"distribution": "uniform"}),
    "magnitude": lambda job: run_effdl(
        job, {"saliency": "l2", "repair": False, "distribution": "uniform", "rounds": 1}
    ),
    "onnxsim": onnxsim,
    "onnxsim_wanda": lambda job: onnxsim(job, wanda=True),
    "torch_pruning": torch_pruning,
}


def main() -> None:
    tool, job = sys.argv[1], json.loads(sys.argv[2])
    started = time.perf_counter()
    WAYS[tool](job)
    print(json.dumps({"seconds": time.perf_counter() - started}))


if __name__ == "__main__":
    main()
