"""The worker's loop: a command a line in, an answer a line out."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from effdl.runtime.worker.refusal import Refusal

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when the library is loaded


def answer(worker: Any, line: str) -> dict[str, Any]:
    """Carry out one command; a refusal becomes an answer too."""
    try:
        options = json.loads(line)
        name = str(options.pop("do", ""))
        command = None if name.startswith("_") else getattr(worker, name, None)
        if command is None:
            raise Refusal("command", f"unknown command {name!r}")
        result: dict[str, Any] = command(**options)
        return result
    except Refusal as e:
        return {"error": e.kind, "message": str(e)}
    except MemoryError:
        return {"error": "run", "message": "out of memory"}


class _Unusable:
    """Stands in for a worker where onnxruntime is missing: every command is refused."""

    def __init__(self, why: str) -> None:
        self._why = why

    def __getattr__(self, name: str) -> Any:
        raise Refusal("runtime", self._why)


def make_worker() -> Any:
    """Return a worker, or what refuses every command when onnxruntime cannot be imported."""
    try:
        from effdl.runtime.worker.commands import Worker
    except ImportError as e:
        if (e.name or "").startswith("effdl"):  # not the machine's fault: ours
            raise
        return _Unusable(f"{sys.executable} cannot import {e.name or e}")
    return Worker()


def main() -> None:
    """Serve until ``quit`` or the end of stdin."""
    # Only answers may reach stdout: what libraries print there goes to stderr instead.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as replies:
        os.dup2(2, 1)
        worker = make_worker()
        for line in sys.stdin:
            if not line.strip():
                continue
            if json.loads(line).get("do") == "quit":
                return
            replies.write(json.dumps(answer(worker, line)) + "\n")
            replies.flush()
