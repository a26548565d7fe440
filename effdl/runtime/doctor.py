"""Whether a machine is ready, and what to do where it is not."""

from __future__ import annotations

import ctypes
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from effdl.errors import EffdlError
from effdl.graph.scratch import scratch
from effdl.report import DoctorReport
from effdl.runtime.machine import this_machine
from effdl.runtime.target import ARM_PYTHON, Target, parse_target
from effdl.runtime.versions import installed
from effdl.runtime.worker.files import free_memory

if TYPE_CHECKING:
    from effdl.runtime.host import Host

CORE = ("onnx", "onnxruntime", "onnxruntime-gpu", "onnxscript", "onnx-ir", "numpy")
EXTRAS = {"tune": "optuna", "train": "torch", "gpu": "onnxruntime-gpu", "data": "tokenizers"}
TESTED = {
    "onnx": ((1, 20), (2,)),
    "onnxruntime": ((1, 23), (2,)),
    "onnxruntime-gpu": ((1, 23), (2,)),
    "onnxscript": ((0, 7, 2), (0, 8)),
    "onnx-ir": ((1, 1, 0), (1, 2)),
    "numpy": ((1, 26), (3,)),
}
"""From this version on, and below that one: the ranges of the package's own requirements."""
_CUDA = "CUDAExecutionProvider"
_DOUBLING = (
    '<ir_version: 8, opset_import: ["": 13]> g (float[4] x) => (float[4] y) { y = Add(x, x) }'
)


def doctor(target: Target | None = None) -> DoctorReport:
    """Look at versions, processor, providers and the GPU, and return them with what is wrong.

    Args:
        target: an ssh or arm-emulated one is asked through a worker there; this machine otherwise.

    Raises:
        TargetError: the other machine cannot be reached, or has no Python that runs models.
    """
    if target is not None and target.remote:
        from effdl.runtime.host import open_host

        with open_host(target) as host:
            return _there(host)
    machine = this_machine()
    versions = {"effdl": installed("effdl"), "python": platform.python_version()}
    versions |= {name: installed(name) for name in CORE}
    providers = _providers()
    cuda = try_cuda(providers)
    return DoctorReport(
        versions=versions,
        system=f"{platform.system()} {platform.release()}",
        arch=machine.arch,
        cpu=machine.cpu,
        cores=machine.cores,
        memory=machine.memory,
        isa=machine.isa,
        providers=providers,
        extras={extra: installed(package) for extra, package in EXTRAS.items()},
        int8=int8_format(parse_target("cpu")),
        cuda=cuda,
        problems=(*version_problems(versions), *_runtime_problems(providers, cuda)),
        emulator=machine.emulator,
        free_memory=free_memory(),
        tools={"ssh": _ssh_version(), ARM_PYTHON: shutil.which(ARM_PYTHON) or ""},
    )


def _there(host: Host) -> DoctorReport:
    """Examine another machine: what a worker there tells, and whether its GPU works."""
    machine = host.machine
    with host.worker(host.target.name) as worker:
        facts = worker.ask("hello")
        room = worker.ask("room", path=str(Path(host.output("x")).parent))
    providers = tuple(facts["providers"])
    cuda = _try_cuda_there(host) if _CUDA in providers else "not installed"
    versions = {"effdl": installed("effdl")}
    versions |= {name: str(facts[name]) for name in ("python", "onnxruntime", "numpy")}
    problems = []
    if cuda not in ("works", "not installed"):
        problems.append(f"its onnxruntime has CUDA, but it does not run there: {cuda}")
    if machine.emulator:
        problems.append(
            f"its processor is emulated by {machine.emulator}: results can be checked, times not"
        )
    return DoctorReport(
        versions=versions,
        system=str(facts["system"]),
        arch=machine.arch,
        cpu=machine.cpu,
        cores=machine.cores,
        memory=machine.memory,
        isa=machine.isa,
        providers=providers,
        extras={},
        int8=int8_format(host.target),
        cuda=cuda,
        problems=tuple(problems),
        target=host.target.name,
        emulator=machine.emulator,
        disk=int(room["disk"]),
        free_memory=int(room["memory"]),
    )


def _try_cuda_there(host: Host) -> str:
    """Run a one-node model on the GPU of another machine; returns as ``try_cuda``."""
    import numpy as np
    import onnx

    from effdl.runtime.worker.outputs import unpack

    with scratch() as folder:
        model, feed = folder / "try.onnx", folder / "try.npz"
        model.write_bytes(onnx.parser.parse_model(_DOUBLING).SerializeToString())
        np.savez(feed, np.arange(4, dtype=np.float32))
        try:
            with host.worker(host.target.name) as worker:
                output = host.output("try-out.npz")
                worker.ask(
                    "run",
                    model=host.send(model),
                    providers=[_CUDA, "CPUExecutionProvider"],
                    threads=1,
                    feeds=[{"path": host.send(feed), "names": ["x"]}],
                    output=output,
                )
                result = unpack(str(host.fetch(output)))[0]["y"]
        except EffdlError as e:
            return e.message
    return "works" if result.tolist() == [0, 2, 4, 6] else f"gives wrong results: {result.tolist()}"


def _ssh_version() -> str:
    """The OpenSSH client's version, empty when there is none."""
    if shutil.which("ssh") is None:
        return ""
    done = subprocess.run(["ssh", "-V"], capture_output=True, text=True, check=False)
    return (done.stderr or done.stdout).strip().split(",")[0]


def int8_format(target: Target) -> dict[str, str | bool]:
    """Return the number format of int8 models for the target's processor, with the reason.

    Source: the kernel tables of ONNX Runtime's MLAS, see docs of ``quantize_static``.
    """
    if target.arch == "arm64":
        kind = "i8mm" if "i8mm" in target.isa else "dotprod" if "dotprod" in target.isa else "NEON"
        return {
            "activation_type": "int8",
            "weight_type": "int8",
            "reduce_range": False,
            "reason": f"Arm has signed 8-bit kernels ({kind})",
        }
    if target.int8_dot:
        kinds = [i for i in sorted(target.isa) if i == "amx_int8" or "vnni" in i]
        return {
            "activation_type": "uint8",
            "weight_type": "int8",
            "reduce_range": False,
            "reason": f"{', '.join(kinds)} multiplies unsigned by signed bytes without saturation",
        }
    return {
        "activation_type": "uint8",
        "weight_type": "int8",
        "reduce_range": True,
        "reason": "without VNNI two products share a 16-bit sum: 8-bit weights would saturate it",
    }


def version_problems(versions: Mapping[str, str]) -> list[str]:
    """Return a sentence for each package that is missing, doubled or of an untested version.

    Args:
        versions: by distribution name, empty for one that is not installed.
    """
    problems = []
    if versions["onnxruntime"] and versions["onnxruntime-gpu"]:
        problems.append(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files: "
            "pip uninstall both, then install only one"
        )
    for name, (low, high) in TESTED.items():
        found = versions[name]
        if not found:
            if not name.startswith("onnxruntime"):
                problems.append(f"{name} is missing: pip install --upgrade effdl")
        elif not low <= _numbers(found) < high:
            wanted = f"{name}>={_dotted(low)},<{_dotted(high)}"
            problems.append(f"{name} {found} was not tested with effdl: pip install '{wanted}'")
    return problems


def try_cuda(providers: tuple[str, ...]) -> str:
    """Run a one-node model on the GPU; returns ``works``, ``not installed`` or what went wrong."""
    if _CUDA not in providers:
        return "not installed"
    import numpy as np
    import onnx
    import onnx_ir as ir

    from effdl.runtime.session import open_session

    model = ir.from_proto(onnx.parser.parse_model(_DOUBLING))
    try:
        session = open_session(model, parse_target("cuda"))
        result = session.run({"x": np.arange(4, dtype=np.float32)})["y"]
    except EffdlError as e:
        return e.message
    return "works" if result.tolist() == [0, 2, 4, 6] else f"gives wrong results: {result.tolist()}"


def _providers() -> tuple[str, ...]:
    try:
        import onnxruntime as ort
    except ImportError:
        return ()
    return tuple(getattr(ort, "get_available_providers", tuple)())


def _runtime_problems(providers: tuple[str, ...], cuda: str) -> list[str]:
    if not providers:
        return [
            "onnxruntime cannot be imported: pip install --force-reinstall onnxruntime "
            "(or onnxruntime-gpu, not both)"
        ]
    if cuda not in ("works", "not installed"):
        if not _driver():
            todo = "there is no NVIDIA driver: install it, or use the package onnxruntime instead"
        else:
            todo = "the driver is there: install CUDA and cuDNN with pip install 'effdl[gpu]'"
        return [f"this onnxruntime has CUDA, but it does not run here: {cuda}; {todo}"]
    return []


def _driver() -> bool:
    """Whether the NVIDIA driver's library can be loaded."""
    name = "nvcuda.dll" if platform.system() == "Windows" else "libcuda.so.1"
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def _numbers(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: 1.24.0rc1 is (1, 24, 0)."""
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))
