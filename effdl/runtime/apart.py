"""A child process for work that may crash: ONNX Runtime's faults become errors and end nothing else."""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import json
import os
import select
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

from effdl import errors
from effdl.errors import EffdlError, ModelError
from effdl.runtime.target import Target
from effdl.runtime.worker.outputs import pack, unpack

Outputs = list[dict[str, Any]]
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG
_LOOK_SECONDS = 2.0
_STALLED_LOOKS = 30


def can_run_apart(target: Target) -> bool:
    """Whether ``run_apart`` works here: on Linux, and not with CUDA, which does not survive a fork."""
    return sys.platform == "linux" and target.providers[0] == "CPUExecutionProvider"


def run_apart(work: Callable[[], Outputs]) -> Outputs:
    """Run ``work`` in a fork of this process and return the outputs that it returns.

    The child has the model without any copy (memory is shared until it is written to, and files stay
    mapped), costs some milliseconds to start, and gives all its memory back at its end. It may open
    sessions of its own but must not use one of the parent: their threads stay behind. Should the child
    stand still, as it can if another thread held a lock at the fork, ``work`` is run here instead.

    Raises:
        ModelError: the child crashed, was killed, or ended without an answer.
        EffdlError: what ``work`` raised.
    """
    results = os.memfd_create("effdl-outputs")
    try:
        told, status = _in_child(work, results)
        if status is None:
            return work()
        if os.WIFSIGNALED(status):
            raise _crash(os.WTERMSIG(status))
        code = os.waitstatus_to_exitcode(status)
        if code != 0 or not told:
            raise ModelError(
                f"the process that ran the model ended with code {code}",
                hint="something that the model loads ends the program it is in: an operator library?",
            )
        answer = json.loads(told)
        if "error" in answer:
            raise _error(answer)
        return unpack(f"/proc/self/fd/{results}")
    finally:
        os.close(results)


def _in_child(work: Callable[[], Outputs], results: int) -> tuple[bytes, int | None]:
    """Fork; returns what the child said and its wait status, None when it stood still."""
    reader, writer = os.pipe()
    try:
        pid = _fork()
        if pid == 0:
            _child(work, results, writer)
    except BaseException:  # no process can be made
        os.close(reader)
        raise
    finally:
        os.close(writer)
    try:
        told = _listen(pid, reader)
        if told is not None:
            return told, os.waitpid(pid, 0)[1]
    except BaseException:
        _end(pid)
        raise
    finally:
        os.close(reader)
    _end(pid)
    return b"", None


def _fork() -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # idle threads of a library are no harm
        return os.fork()


def _child(work: Callable[[], Outputs], results: int, writer: int) -> NoReturn:
    """Do the work, tell what came of it, and leave without any of the parent's clean-up."""
    code = 1
    try:
        # A session of the parent that is collected here would wait for threads that are not here.
        gc.disable()
        gc.freeze()
        faulthandler.disable()
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        _no_core_file()
        answer: dict[str, str] = {}
        try:
            pack(work(), f"/proc/self/fd/{results}")
        except EffdlError as e:
            answer = {
                "error": type(e).__name__,
                "message": e.message,
                "hint": e.hint,
                "where": e.where,
            }
        except MemoryError:
            answer = {"error": "ModelError", "message": "out of memory", "hint": "", "where": ""}
        except Exception:
            answer = {"error": "", "message": traceback.format_exc()}
        with os.fdopen(writer, "wb") as pipe:
            pipe.write(json.dumps(answer).encode())
        code = 0
    finally:
        os._exit(code)


def _no_core_file() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _listen(pid: int, reader: int) -> bytes | None:
    """Read until the child closes its end or is gone; None when it has stood still for a minute."""
    told = b""
    still, last = 0, -1
    while still < _STALLED_LOOKS:
        if select.select([reader], [], [], _LOOK_SECONDS)[0]:
            part = os.read(reader, 1 << 16)
            if not part:
                return told
            told += part
            continue
        state, ticks = _activity(pid)
        if state == "Z" and not select.select([reader], [], [], 0)[0]:
            return told  # it has ended, and a process that it left behind holds its end open
        still = still + 1 if state == "S" and ticks == last else 0
        last = ticks
    return None


def _activity(pid: int) -> tuple[str, int]:
    """Return the state of a process, and the processor time that all of it took, in ticks."""
    with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as f:
        fields = f.read().rsplit(")", 1)[1].split()
    return fields[0], int(fields[11]) + int(fields[12])


def _end(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def _crash(number: int) -> ModelError:
    name = signal.Signals(number).name if number in list(signal.Signals) else f"signal {number}"
    if number == signal.SIGKILL:
        return ModelError(
            "the process that ran the model was killed",
            hint="the model may need more memory than there is",
        )
    return ModelError(
        f"ONNX Runtime crashed ({name}) on the model",
        hint="this is a fault of ONNX Runtime; another version of it may run the model",
    )


def _error(answer: dict[str, str]) -> Exception:
    kind = getattr(errors, answer["error"], None) if answer["error"] else None
    if kind is None:
        return RuntimeError(f"in a child process:\n{answer['message']}")
    error: EffdlError = kind(answer["message"], hint=answer["hint"], where=answer["where"])
    return error
