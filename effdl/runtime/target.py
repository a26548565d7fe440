"""Where the optimized model will run, and what follows for number formats and providers."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace

from effdl.errors import TargetError, UsageError, nearest
from effdl.runtime.machine import this_machine

PROVIDERS = {
    "cpu": ("CPUExecutionProvider",),
    "cuda": ("CUDAExecutionProvider", "CPUExecutionProvider"),
    "tensorrt": ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"),
}
DEVICES = ("cpu", "cuda", "tensorrt", "arm", "ssh", "arm-emulated")
CORES = {
    "a53": ("Cortex-A53", ("neon",)),
    "n1": ("Neoverse-N1", ("neon", "dotprod", "fp16")),
    "v1": ("Neoverse-V1", ("neon", "dotprod", "i8mm", "bf16", "fp16", "sve")),
}
"""Emulated Arm cores: the processor, and its extensions. They take the three families of ONNX Runtime's
8-bit kernels: without dot products, with SDOT, with SMMLA."""
ARM_PYTHON = "python-aarch64"
_KEYS = ("device", "host", "core", "provider", "python", "isa", "threads")
_ONLY = {"host": "ssh", "provider": "ssh", "core": "arm-emulated"}


@dataclass(frozen=True)
class Target:
    """The place a model is made for.

    Args:
        device: ``cpu`` (this machine), ``cuda`` or ``tensorrt`` (this machine's GPU, by ONNX Runtime's
            own kernels or by TensorRT's), ``arm`` (a 64-bit Arm CPU that is not here), ``ssh`` (a machine
            that the OpenSSH client reaches) or ``arm-emulated`` (a foreign Python under an emulator, for
            right or wrong, never for time).
        arch: ``x86_64`` or ``arm64``: the processor that runs the CPU kernels; empty for an ssh
            machine that was not asked yet, see ``runtime.host.open_host``.
        isa: its instruction-set extensions, see ``runtime.machine``.
        threads: intra-op threads of a session, 0 for ONNX Runtime's own choice.
        host: of ssh, as the OpenSSH client takes it: an alias, ``user@host``, ``ssh://user@host:port``.
        provider: of ssh: ``cpu``, ``cuda`` or ``tensorrt``.
        core: of arm-emulated: a key of ``CORES``, empty for all of them.
        python: the command that starts a Python with onnxruntime there; empty for the default.
    """

    device: str
    arch: str
    isa: frozenset[str]
    threads: int = 0
    host: str = ""
    provider: str = ""
    core: str = ""
    python: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The target as ``--target`` takes it: ``cpu``, ``ssh:pi4``, ``arm-emulated:n1``."""
        if self.device == "ssh":
            text = self.host if self.host.startswith("ssh://") else f"ssh:{self.host}"
            return f"{text}/{self.provider}" if self.on_gpu else text
        return f"{self.device}:{self.core}" if self.core else self.device

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU does the work."""
        return self.engine != "cpu"

    @property
    def engine(self) -> str:
        """What computes: ``cpu``, ``cuda`` or ``tensorrt``."""
        return self.provider or (self.device if self.device in PROVIDERS else "cpu")

    @property
    def providers(self) -> tuple[str, ...]:
        """ONNX Runtime execution providers, most wanted first."""
        return PROVIDERS[self.engine]

    @property
    def remote(self) -> bool:
        """Whether models run in workers elsewhere only, not in this process."""
        return self.device in ("ssh", "arm-emulated")

    @property
    def known(self) -> bool:
        """Whether the processor is known; that of an ssh machine is, once it was reached."""
        return bool(self.arch)

    @property
    def here(self) -> bool:
        """Whether this process can run a model on the target."""
        if self.remote:
            return False
        return self.device != "arm" or this_machine().arch == "arm64"

    @property
    def int8_dot(self) -> bool:
        """Whether 8-bit products are summed without 16-bit saturation (VNNI, AMX, all of Arm)."""
        vnni = {"avx512_vnni", "avx_vnni", "amx_int8", "avx_vnni_int8"}
        return self.arch == "arm64" or bool(self.isa & vnni)

    @property
    def channel_block(self) -> int:
        """Channels that kernels work on at a time: other counts cost like the next multiple."""
        if self.on_gpu:
            return 32  # measured on an H100: 1.55 times as fast where multiples of 8 are 1.43 times
        return 16 if "avx512f" in self.isa else 8


def parse_target(spec: str | Mapping[str, object] = "cpu", threads: int = 0) -> Target:
    """Make a Target from what a recipe or ``--target`` says; nothing is opened.

    Args:
        spec: ``cpu``, ``cuda``, ``tensorrt``, ``arm``, ``ssh:HOST``, ``ssh:HOST/cuda``, ``arm-emulated``,
            ``arm-emulated:n1``; or a mapping such as ``{device: arm, isa: [dotprod]}`` or
            ``{device: ssh, host: pi4, python: venv/bin/python, provider: cuda}``.
        threads: intra-op threads; goes before those of a mapping.

    Raises:
        UsageError: an unknown device or key, or keys that do not go together.
    """
    options = dict(spec) if isinstance(spec, Mapping) else {"device": spec}
    for key in options:
        if key not in _KEYS:
            raise UsageError(f"unknown target key '{key}'", hint=nearest(key, _KEYS))
    options = {**options, **_spelled(str(options.get("device", "cpu")))}
    device = str(options["device"])
    for key, owner in _ONLY.items():
        if key in options and device != owner:
            raise UsageError(f"target {device} has no '{key}'", hint=f"'{key}' is for {owner}")
    if "python" in options and device not in ("ssh", "arm-emulated"):
        raise UsageError(
            f"target {device} runs in this Python: it takes no other one",
            hint="--python is for ssh:HOST and arm-emulated",
        )
    host, core = str(options.get("host", "")), str(options.get("core", ""))
    if device == "ssh":
        _check_host(host)
    if core and core not in CORES:
        raise UsageError(f"unknown core '{core}'", hint=nearest(core, CORES))
    provider = str(options.get("provider", "cpu" if device == "ssh" else ""))
    if provider and provider not in PROVIDERS:
        raise UsageError(f"unknown provider '{provider}'", hint=nearest(provider, PROVIDERS))
    arch, isa = _processor(device, core)
    return Target(
        device,
        arch,
        _isa(options.get("isa", isa)),
        threads or _threads(options.get("threads", 0)),
        host,
        provider,
        core,
        _command(options.get("python", "")),
    )


def _spelled(text: str) -> dict[str, object]:
    """Take ``ssh:pi4/cuda`` and the like apart."""
    if text.startswith(("ssh:", "ssh://")):
        scheme, rest = ("ssh://", text[6:]) if text.startswith("ssh://") else ("", text[4:])
        host, slash, provider = rest.partition("/")
        parts: dict[str, object] = {"device": "ssh", "host": scheme + host if host else ""}
        return {**parts, "provider": provider} if slash and provider else parts
    device, colon, core = text.partition(":")
    if device == "arm-emulated" and colon:
        return {"device": device, "core": core or "nothing"}
    if text not in DEVICES:
        words = ["ssh:HOST" if d == "ssh" else d for d in DEVICES]
        raise UsageError(f"unknown target '{text}'", hint=nearest(text, words))
    return {"device": text}


def _check_host(host: str) -> None:
    if not host:
        raise UsageError("target ssh needs a host", hint="ssh:HOST, such as ssh:pi4")
    # What begins with a dash would be an option of the ssh program.
    if re.search(r"[\s\x00-\x1f]", host) or host.startswith(("-", "ssh://-")):
        raise UsageError(f"'{host}' is no host name", hint="ssh:HOST, such as ssh:user@pi4")


def _processor(device: str, core: str) -> tuple[str, tuple[str, ...]]:
    machine = this_machine()
    if device == "ssh":
        return "", ()
    if device == "arm-emulated":
        # A model for all cores may count on what the least of them has.
        return "arm64", CORES[core or "a53"][1]
    if device == "arm":
        return "arm64", machine.isa if machine.arch == "arm64" else ("neon", "dotprod")
    return machine.arch, machine.isa


def _isa(value: object) -> frozenset[str]:
    if not isinstance(value, list | tuple):
        raise UsageError(f"target isa must be a list of names, not {value!r}")
    return frozenset(str(i) for i in value)


def _threads(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise UsageError(f"target threads must be a number, not {value!r}")
    return value


def _command(value: object) -> tuple[str, ...]:
    if isinstance(value, list | tuple):
        return tuple(str(v) for v in value)
    try:
        return tuple(shlex.split(str(value)))
    except ValueError as e:
        raise UsageError(f"--python {value}: {e}".rstrip(".")) from None


def cores_of(target: Target) -> list[Target]:
    """Return the target itself or, of ``arm-emulated`` without a core, one target for each core."""
    if target.device != "arm-emulated" or target.core:
        return [target]
    return [replace(target, core=c, isa=frozenset(isa)) for c, (_, isa) in CORES.items()]


def check_available(target: Target) -> None:
    """Raise TargetError when this process cannot open a session on the target."""
    import onnxruntime as ort

    wanted = target.providers[0]
    available = ort.get_available_providers()
    if not target.here:
        hint = (
            f"effdl compare MODEL --target {target.name} says whether it computes there what it "
            "computes here"
            if target.remote
            else "measure on the device itself; the model can still be written for it"
        )
        raise TargetError(f"target '{target.name}' is not this machine", hint=hint)
    if wanted not in available:
        more = " tensorrt" if target.engine == "tensorrt" else ""
        hint = f"pip install 'effdl[gpu]'{more}" if target.on_gpu else ""
        raise TargetError(
            f"{wanted} is not in this onnxruntime (it has {', '.join(available)})", hint=hint
        )


def check_reachable(target: Target) -> None:
    """Raise TargetError when it is clear already that no worker can run on the target.

    For a remote one that is a missing program; whether the machine answers shows in ``open_host``.
    """
    if target.device == "ssh":
        if shutil.which("ssh") is None:
            raise TargetError(
                "there is no OpenSSH client here", hint="install it: apt-get install openssh-client"
            )
    elif target.device == "arm-emulated":
        command = target.python[0] if target.python else ARM_PYTHON
        if shutil.which(command) is None:
            raise TargetError(
                f"there is no program '{command}' here to run Arm code with",
                hint="--python CMD: a Python for aarch64 with onnxruntime, run by qemu-user or by "
                "`docker run -i --platform linux/arm64 -e QEMU_CPU -v /tmp:/tmp IMAGE python3`",
            )
    else:
        check_available(target)


def where_to_check(target: Target) -> tuple[Target, str]:
    """Return the target that outputs are checked on and, if latency is not measured, why not.

    Outputs of a model for a device that is not here are checked on this machine's CPU. An ssh target
    is measured through its host; what is emulated, and a device that is nowhere, is not.
    """
    if target.device == "ssh":
        return parse_target("cpu"), ""
    if target.device == "arm-emulated":
        return parse_target("cpu"), f"{target.name} is emulated: its times mean nothing"
    try:
        check_available(target)
    except TargetError as e:
        return parse_target("cpu"), e.message
    return target, ""
