"""The process a model is measured in: its memory, and the processor it runs on."""

from __future__ import annotations

import glob
import os
import sys


def reset_peak() -> bool:
    """Make the peak of resident memory start again at what is resident now (Linux only)."""
    try:
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")
    except OSError:
        return False
    return True


def peak_bytes() -> int:
    """Return the peak of resident memory in bytes, 0 where the system does not tell."""
    try:
        with open("/proc/self/status") as f:
            for line in f:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass  # no /proc: macOS and Windows
    try:
        import resource
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def this_cpu() -> int | None:
    """Return the number of the processor this thread runs on, None where that is not told."""
    try:
        with open("/proc/self/stat") as f:
            return int(f.read().rsplit(")", 1)[1].split()[36])
    except OSError:
        return None


def pin(cpu: int) -> set[int] | None:
    """Keep this thread on one processor; returns where it could run before, None if not pinned."""
    if not hasattr(os, "sched_setaffinity"):
        return None
    allowed = os.sched_getaffinity(0)
    if cpu not in allowed:
        return None
    os.sched_setaffinity(0, {cpu})
    return allowed


def cache_bytes() -> int:
    """Return the size of the last-level cache that the first processor sees, 0 where it is not told."""
    sizes = [0]
    for file in glob.glob("/sys/devices/system/cpu/cpu0/cache/index*/size"):
        try:
            with open(file) as f:
                text = f.read().strip()
            sizes.append(int(text.rstrip("KM")) << {"K": 10, "M": 20}.get(text[-1:], 0))
        except (OSError, ValueError):
            continue  # an emulator or a container may show files that cannot be read
    return max(sizes)
