"""What effdl finds on a machine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DoctorReport:
    """What effdl finds on this machine.

    Args:
        versions: of effdl, Python and the libraries it stands on; empty for one that is missing.
        system: the operating system and its release.
        arch, cpu, cores, memory, isa: as in ``runtime.machine.Machine``.
        providers: execution providers of this onnxruntime build, most wanted first.
        extras: optional parts (``tune``, ``train``, ``gpu``) and the version that is installed, empty
            when it is not.
        int8: the number format of int8 models for this processor: ``activation_type``,
            ``weight_type``, ``reduce_range`` and ``reason``.
        cuda: ``works``, ``not installed``, or why a CUDA session does not run here.
        problems: what is wrong, each with what to do.
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
