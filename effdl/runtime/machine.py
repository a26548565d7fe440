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
# (implementer, part) of /proc/cpuinfo on Arm, which has no name there: the Main ID Register's fields.
_CORES = {
    (0x41, 0xD03): "Cortex-A53",
    (0x41, 0xD04): "Cortex-A35",
    (0x41, 0xD05): "Cortex-A55",
    (0x41, 0xD07): "Cortex-A57",
    (0x41, 0xD08): "Cortex-A72",
    (0x41, 0xD09): "Cortex-A73",
    (0x41, 0xD0A): "Cortex-A75",
    (0x41, 0xD0B): "Cortex-A76",
    (0x41, 0xD0C): "Neoverse-N1",
    (0x41, 0xD0D): "Cortex-A77",
    (0x41, 0xD40): "Neoverse-V1",
    (0x41, 0xD41): "Cortex-A78",
    (0x41, 0xD42): "Cortex-A78AE",
    (0x41, 0xD44): "Cortex-X1",
    (0x41, 0xD46): "Cortex-A510",
    (0x41, 0xD47): "Cortex-A710",
    (0x41, 0xD48): "Cortex-X2",
    (0x41, 0xD49): "Neoverse-N2",
    (0x41, 0xD4D): "Cortex-A715",
    (0x41, 0xD4E): "Cortex-X3",
    (0x41, 0xD4F): "Neoverse-V2",
    (0x41, 0xD80): "Cortex-A520",
    (0x41, 0xD81): "Cortex-A720",
    (0x41, 0xD82): "Cortex-X4",
    (0x41, 0xD84): "Neoverse-V3",
    (0x41, 0xD8E): "Neoverse-N3",
    (0x4E, 0x004): "Carmel",
    (0xC0, 0xAC3): "Ampere-1",
}
# e_machine of the programs that run natively, those of the 32-bit mode last.
_ELF_MACHINE = {"x86_64": (62, 3), "arm64": (183, 40)}


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
        emulator: the program that stands in for the processor, such as ``qemu-aarch64``; empty on a
            real one. Times of an emulated processor mean nothing.
    """

    arch: str
    cpu: str
    cores: int
    memory: int
    isa: tuple[str, ...]
    emulator: str = ""


@lru_cache(maxsize=None)  # noqa: UP033 (older Pythons run this in a worker)
def this_machine() -> Machine:
    """Read the facts from the processor itself (/proc/cpuinfo; sysctl on macOS)."""
    arch = {"aarch64": "arm64", "AMD64": "x86_64"}.get(platform.machine(), platform.machine())
    darwin = platform.system() == "Darwin"
    flags, cpu = _sysctl() if darwin else _cpuinfo(Path("/proc/cpuinfo"))
    board = "" if darwin else _board(Path("/proc/device-tree/model"))
    name = cpu or platform.processor() or arch
    table = _ARM if arch == "arm64" else _X86
    return Machine(
        arch,
        f"{name} ({board})" if board and board != name else name,
        _cores(),
        _memory(),
        tuple(ours for theirs, ours in table.items() if theirs in flags),
        "Rosetta" if "translated" in flags else _emulator(arch),
    )


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0


def _cpuinfo(file: Path) -> tuple[set[str], str]:
    if not file.exists():
        return set(), ""
    flags: set[str] = set()
    cpu = ""
    implementer = 0
    parts: dict[str, None] = {}  # a processor may have cores of two kinds
    for line in file.read_text(errors="replace").splitlines():
        key, _, text = (part.strip() for part in line.partition(":"))
        if key in ("flags", "Features") and not flags:
            flags = set(text.split())
        elif key in ("model name", "Model") and not cpu:
            cpu = text
        elif key == "CPU implementer":
            implementer = int(text, 16)
        elif key == "CPU part":
            parts[_CORES.get((implementer, int(text, 16)), "")] = None
    known = [p for p in parts if p]
    return flags, " + ".join(known) if known else cpu


def _board(file: Path) -> str:
    """The name of a single-board computer, such as ``Raspberry Pi 4 Model B Rev 1.4``."""
    try:
        return file.read_text(errors="replace").strip("\0 \n")
    except OSError:  # no device tree: not a board
        return ""


def _emulator(arch: str) -> str:
    """Return the program that interprets this process, empty when the processor runs it itself.

    User-mode emulators such as qemu pretend that /proc/self/exe is the emulated program, but not
    that of the thread below it, which is read through another path. An emulator of the same
    architecture is told by its name.
    """
    real = f"/proc/self/task/{os.getpid()}/exe"
    try:
        name = os.path.basename(os.readlink(real))
        with open(real, "rb") as f:
            head = f.read(20)
    except OSError:  # no /proc
        return ""
    if head[:4] != b"\x7fELF":
        return ""
    machine = int.from_bytes(head[18:20], "little" if head[5] == 1 else "big")
    foreign = arch in _ELF_MACHINE and machine not in _ELF_MACHINE[arch]
    return name if foreign or name.startswith("qemu-") else ""


def _sysctl() -> tuple[set[str], str]:
    import subprocess

    keys = {
        "hw.optional.arm.FEAT_DotProd": "asimddp",
        "hw.optional.arm.FEAT_I8MM": "i8mm",
        "hw.optional.arm.FEAT_BF16": "bf16",
        "hw.optional.arm.FEAT_FP16": "asimdhp",
        "hw.optional.avx2_0": "avx2",
        "hw.optional.avx512vnni": "avx512_vnni",
        "sysctl.proc_translated": "translated",
    }
    text = subprocess.run(
        ["sysctl", "machdep.cpu.brand_string", *keys], capture_output=True, text=True, check=False
    ).stdout
    values = dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)
    return {f for k, f in keys.items() if values.get(k) == "1"} | {"asimd"}, values.get(
        "machdep.cpu.brand_string", ""
    )
