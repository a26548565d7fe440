"""Facts about the machine this process runs on."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

# Names as /proc/cpuinfo prints them -> the names effdl uses.
_X86 = {
    "avx2": "avx2",
    "avx512f": "avx512f",
    "avx512_vnni": "avx512_vnni",
    "avx_vnni": "avx_vnni",
    "avx_vnni_int8": "avx_vnni_int8",
    "avx512_bf16": "avx512_bf16",
    "amx_int8": "amx_int8",
    "amx_bf16": "amx_bf16",
}
_ARM = {
    "asimd": "neon",
    "asimddp": "dotprod",
    "i8mm": "i8mm",
    "bf16": "bf16",
    "asimdhp": "fp16",
    "sve": "sve",
}


@dataclass(frozen=True)
class Machine:
    """What the processor is and can do.

    Args:
        arch: ``x86_64``, ``arm64`` or what ``platform.machine`` says.
        cpu: the processor's name.
        cores: logical processors this process may use.
        memory: bytes of main memory, 0 if unknown.
        isa: instruction-set extensions that matter for ONNX Runtime's kernels, such as
            ``avx2``, ``avx512_vnni``, ``amx_int8``, ``dotprod``, ``i8mm``.
    """

    arch: str
    cpu: str
    cores: int
    memory: int
    isa: tuple[str, ...]


@lru_cache(maxsize=None)  # noqa: UP033 (older Pythons run this in a worker)
def this_machine() -> Machine:
    """Read the facts from the processor itself (/proc/cpuinfo; sysctl on macOS)."""
    arch = {"aarch64": "arm64", "AMD64": "x86_64"}.get(platform.machine(), platform.machine())
    flags, cpu = _sysctl() if platform.system() == "Darwin" else _cpuinfo()
    table = _ARM if arch == "arm64" else _X86
    isa = tuple(ours for theirs, ours in table.items() if theirs in flags)
    return Machine(arch, cpu or platform.processor() or arch, _cores(), _memory(), isa)


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0


def _cpuinfo() -> tuple[set[str], str]:
    file = Path("/proc/cpuinfo")
    if not file.exists():
        return set(), ""
    flags: set[str] = set()
    cpu = ""
    for line in file.read_text(errors="replace").splitlines():
        key, _, text = (part.strip() for part in line.partition(":"))
        if key in ("flags", "Features") and not flags:
            flags = set(text.split())
        elif key in ("model name", "Model") and not cpu:
            cpu = text
    return flags, cpu


def _sysctl() -> tuple[set[str], str]:
    import subprocess

    keys = {
        "hw.optional.arm.FEAT_DotProd": "asimddp",
        "hw.optional.arm.FEAT_I8MM": "i8mm",
        "hw.optional.arm.FEAT_BF16": "bf16",
        "hw.optional.arm.FEAT_FP16": "asimdhp",
        "hw.optional.avx2_0": "avx2",
        "hw.optional.avx512vnni": "avx512_vnni",
    }
    text = subprocess.run(
        ["sysctl", "machdep.cpu.brand_string", *keys], capture_output=True, text=True, check=False
    ).stdout
    values = dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)
    return {f for k, f in keys.items() if values.get(k) == "1"} | {"asimd"}, values.get(
        "machdep.cpu.brand_string", ""
    )
