"""What effdl finds on a machine."""

from __future__ import annotations

from dataclasses import dataclass, field

from effdl.report.bench import Peaks


@dataclass(frozen=True)
class Place:
    """A machine that ran a model.

    Args:
        target: as ``--target`` takes it: ``ssh:pi4``, ``arm-emulated:n1``.
        arch, cpu, isa, emulator: as in ``runtime.machine.Machine``.
        onnxruntime: its version there.
    """

    target: str
    arch: str
    cpu: str
    isa: tuple[str, ...]
    emulator: str
    onnxruntime: str


@dataclass(frozen=True)
class DoctorReport:
    """What effdl finds on a machine.

    Args:
        versions: of effdl, Python and the libraries it stands on; empty for one that is missing. Of
            another machine: what a worker there needs.
        system: the operating system and its release.
        arch, cpu, cores, memory, isa: as in ``runtime.machine.Machine``.
        providers: execution providers of this onnxruntime build, most wanted first.
        extras: optional parts (``tune``, ``train``, ``gpu``, ``data``) and the version that is
            installed, empty when it is not.
        int8: the number format of int8 models for this processor: ``activation_type``,
            ``weight_type``, ``reduce_range`` and ``reason``.
        cuda: ``works``, ``not installed``, or why a CUDA session does not run here.
        problems: what is wrong, each with what to do.
        target: ``cpu`` for this machine.
        emulator: the program that stands in for the processor, empty for a real one.
        disk: free bytes where models would be put, 0 when not asked; ``free_memory`` bytes that
            programs may still take.
        tools: programs that reach other targets, with what they are; empty when not found.
        peaks: what matrix products and memory reach, as far as it was measured.
    """

    versions: dict[str, str]
    system: str
    arch: str
    cpu: str
    cores: int
    memory: int
    isa: tuple[str, ...]
    providers: tuple[str, ...]
    extras: dict[str, str]
    int8: dict[str, str | bool]
    cuda: str
    problems: tuple[str, ...]
    target: str = "cpu"
    emulator: str = ""
    disk: int = 0
    free_memory: int = 0
    tools: dict[str, str] = field(default_factory=dict)
    peaks: tuple[Peaks, ...] = ()
