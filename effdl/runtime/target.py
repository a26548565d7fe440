"""Where the optimized model will run, and what follows for number formats and providers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from effdl.errors import TargetError, UsageError, nearest
from effdl.runtime.machine import this_machine

PROVIDERS = {
    "cpu": ("CPUExecutionProvider",),
    "cuda": ("CUDAExecutionProvider", "CPUExecutionProvider"),
    "arm": ("CPUExecutionProvider",),
}
DEVICES = tuple(PROVIDERS)


@dataclass(frozen=True)
class Target:
    """The place a model is made for.

    Args:
        device: ``cpu`` (this machine), ``cuda`` (this machine's GPU) or ``arm`` (a 64-bit Arm CPU
            that is not here).
        arch: ``x86_64`` or ``arm64``: the processor that runs the CPU kernels.
        isa: its instruction-set extensions, see ``runtime.machine``.
        threads: intra-op threads of a session, 0 for ONNX Runtime's own choice.
    """

    device: str
    arch: str
    isa: frozenset[str]
    threads: int = 0

    @property
    def providers(self) -> tuple[str, ...]:
        """ONNX Runtime execution providers, most wanted first."""
        return PROVIDERS[self.device]

    @property
    def here(self) -> bool:
        """Whether this process can measure on the target."""
        return self.device != "arm" or this_machine().arch == "arm64"

    @property
    def int8_dot(self) -> bool:
        """Whether 8-bit products are summed without 16-bit saturation (VNNI, AMX, all of Arm)."""
        vnni = {"avx512_vnni", "avx_vnni", "amx_int8", "avx_vnni_int8"}
        return self.arch == "arm64" or bool(self.isa & vnni)


def parse_target(spec: str | Mapping[str, object] = "cpu", threads: int = 0) -> Target:
    """Make a Target from ``cpu``, ``cuda``, ``arm`` or ``{device: arm, isa: [dotprod]}``.

    Nothing is opened: whether a GPU is there shows when a session is made.

    Raises:
        UsageError: an unknown device or key.
    """
    options: Mapping[str, object] = {"device": spec} if isinstance(spec, str) else spec
    unknown = set(options) - {"device", "isa", "threads"}
    if unknown:
        key = sorted(unknown)[0]
        raise UsageError(
            f"unknown target key '{key}'", hint=nearest(key, ["device", "isa", "threads"])
        )
    device = str(options.get("device", "cpu"))
    if device not in PROVIDERS:
        raise UsageError(f"unknown target '{device}'", hint=nearest(device, DEVICES))
    machine = this_machine()
    arch = "arm64" if device == "arm" else machine.arch
    default = ("neon", "dotprod") if device == "arm" and machine.arch != "arm64" else machine.isa
    isa = options.get("isa", default)
    if not isinstance(isa, list | tuple):
        raise UsageError(f"target isa must be a list of names, not {isa!r}")
    count = options.get("threads", 0)
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        raise UsageError(f"target threads must be a number, not {count!r}")
    return Target(device, arch, frozenset(str(i) for i in isa), threads or count)


def check_available(target: Target) -> None:
    """Raise TargetError when this onnxruntime build has not the target's first provider."""
    import onnxruntime as ort

    wanted = target.providers[0]
    available = ort.get_available_providers()
    if not target.here:
        raise TargetError(
            f"target '{target.device}' is not this machine",
            hint="measure on the device itself; the model can still be written for it",
        )
    if wanted not in available:
        hint = "pip install 'effdl[gpu]'" if target.device == "cuda" else ""
        raise TargetError(
            f"{wanted} is not in this onnxruntime (it has {', '.join(available)})", hint=hint
        )


def where_to_check(target: Target) -> tuple[Target, str]:
    """Return the target that outputs are checked on and, if it is not the real one, why not.

    A model for a device that is not here is checked on this machine's CPU and measured nowhere.
    """
    try:
        check_available(target)
    except TargetError as e:
        return parse_target("cpu"), e.message
    return target, ""
