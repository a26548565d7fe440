"""NVIDIA's management library by ctypes: energy and memory of a GPU, without any package.

Source: NVML API reference, "Device Queries".
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from typing import Any

_PROCESSES = 1 << 10
_NOT_AVAILABLE = (1 << 64) - 1


class _Memory(ctypes.Structure):
    _fields_ = [
        ("total", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    ]


class _OldProcess(ctypes.Structure):
    _fields_ = [("pid", ctypes.c_uint), ("used", ctypes.c_ulonglong)]


class _Process(ctypes.Structure):
    _fields_ = [
        ("pid", ctypes.c_uint),
        ("used", ctypes.c_ulonglong),
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    ]


class Nvml:
    """One GPU as the driver sees it; every question is answered with None where the GPU cannot.

    Args:
        library: the loaded ``libnvidia-ml``.
        device: what CUDA_VISIBLE_DEVICES says: its first entry is the GPU that a session runs on.

    Raises:
        OSError: the library is there, but the driver or the GPU is not.
    """

    def __init__(self, library: Any, device: str = "") -> None:
        self._library = library
        self._handle = ctypes.c_void_p()
        self._call("nvmlInit_v2")
        first = device.split(",", maxsplit=1)[0].strip()
        if first and not first.isdigit():  # a UUID
            self._call("nvmlDeviceGetHandleByUUID", first.encode(), ctypes.byref(self._handle))
        else:
            index = ctypes.c_uint(int(first or 0))
            self._call("nvmlDeviceGetHandleByIndex_v2", index, ctypes.byref(self._handle))

    def energy_uj(self) -> int | None:
        """Return what the GPU has used since the driver was loaded, in microjoule (Volta and later)."""
        total = ctypes.c_ulonglong()  # in millijoule
        if not self._asked("nvmlDeviceGetTotalEnergyConsumption", ctypes.byref(total)):
            return None
        return int(total.value) * 1000

    def used_bytes(self) -> int | None:
        """Return the memory that is taken on the GPU, by whoever."""
        memory = _Memory()
        if not self._asked("nvmlDeviceGetMemoryInfo", ctypes.byref(memory)):
            return None
        return int(memory.used)

    def process_bytes(self, pid: int) -> int | None:
        """Return the memory that a process has on the GPU; None also in a container, whose process
        numbers the driver does not know."""
        for name, kind in (
            ("nvmlDeviceGetComputeRunningProcesses_v3", _Process),
            ("nvmlDeviceGetComputeRunningProcesses_v2", _Process),
            ("nvmlDeviceGetComputeRunningProcesses", _OldProcess),
        ):
            count, found = ctypes.c_uint(_PROCESSES), (kind * _PROCESSES)()
            if self._asked(name, ctypes.byref(count), found):
                used = [int(p.used) for p in found[: count.value] if p.pid == pid]
                return sum(used) if used and _NOT_AVAILABLE not in used else None
        return None

    def _asked(self, name: str, *arguments: Any) -> bool:
        try:
            self._call(name, self._handle, *arguments)
        except OSError:
            return False
        return True

    def _call(self, name: str, *arguments: Any) -> None:
        function: Callable[..., int] | None = getattr(self._library, name, None)
        code = function(*arguments) if function is not None else None
        if code != 0:
            raise OSError(f"{name}: {'not in this driver' if code is None else f'error {code}'}")


def open_nvml() -> Nvml | None:
    """Return the GPU that CUDA takes first, None where there is no driver or no GPU."""
    name = "nvml.dll" if os.name == "nt" else "libnvidia-ml.so.1"
    try:
        return Nvml(ctypes.CDLL(name), os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    except OSError:
        return None
