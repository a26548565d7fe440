"""The parent's end of ``runtime.worker``: starting it, asking it, never leaving it behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any

from effdl.errors import EffdlError, ModelError, TargetError
from effdl.runtime.session import load_error

Diagnosis = Callable[[int, list[str], str], EffdlError | None]
"""Given exit code, lines of stderr and what was being done, says what ended a worker, if it can."""

_DOING = {
    "hello": "starting",
    "load": "loading the model",
    "block": "running the model",
    "run": "running the model",
    "trace": "profiling the model",
    "traced": "profiling the model",
}


class WorkerProcess:
    """A worker that measures one model; leaving the ``with`` block ends it, however it is left.

    Args:
        where: the model's name, for messages.
        command: how to start the worker.
        environment: variables it gets besides those of this process.
        diagnose: knows why a worker of its machine ends before its time.
        patience: seconds that ``close`` waits for it to end by itself. One that runs elsewhere is
            told by the end of its stdin; killing the program that leads there does not reach it.
        place: the machine it runs on, for hints; empty for this one.
    """

    def __init__(
        self,
        where: str,
        command: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        diagnose: Diagnosis | None = None,
        patience: float = 0.0,
        place: str = "",
    ) -> None:
        self.where = where
        self._diagnose = diagnose
        self._patience = patience
        self._place = place
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 (closed by close)
        # A session of its own: Ctrl-C reaches the parent only, which then ends the worker.
        try:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                start_new_session=True,
                encoding="utf-8",
                errors="replace",
                env={**os.environ, **environment} if environment else None,
            )
        except OSError as e:
            self._stderr.close()
            raise TargetError(f"cannot run {command[0]}: {e.strerror or e}", where=where) from None

    @property
    def pid(self) -> int:
        """The process id, of the program that leads to the worker where that is elsewhere."""
        return self._process.pid

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the worker and wait for it."""
        try:
            if self._patience and self._process.stdin is not None:
                with suppress(OSError, ValueError, subprocess.TimeoutExpired):
                    self._process.stdin.close()
                    self._process.wait(self._patience)
        finally:
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout, self._stderr):
                if stream is not None:
                    with suppress(BrokenPipeError):  # an unread command is still in the buffer
                        stream.close()

    def ask(self, command: str, **options: Any) -> dict[str, Any]:
        """Send a command and return the answer.

        Raises:
            ModelError: the model does not load or run, or the worker died of it.
            TargetError: the session did not open on the provider asked for, or the machine was lost.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        with suppress(BrokenPipeError):  # it may have said why before it ended
            stdin.write(json.dumps({"do": command, **options}) + "\n")
            stdin.flush()
        answer = None
        noise = ""
        while not isinstance(answer, dict):  # a login shell may print something before
            line = stdout.readline()
            if not line.endswith("\n"):
                raise self._died(command, noise)
            try:
                answer = json.loads(line)
            except ValueError:
                noise = noise or line
        if "error" in answer:
            raise self._refusal(str(answer["error"]), str(answer["message"]))
        return answer

    def block(
        self, *, runs: int = 0, min_ms: float = 0.0, start: int = 0, cpu: int | None = None
    ) -> tuple[list[int], int | None]:
        """Return times of single inferences in ns, and the processor they ran on; see the worker."""
        answer = self.ask("block", runs=runs, min_ms=min_ms, start=start, cpu=cpu)
        return answer["ns"], answer["cpu"]

    def _refusal(self, kind: str, message: str) -> EffdlError:
        doctor = f"effdl doctor --target {self._place}" if self._place else "effdl doctor"
        match kind:
            case "provider":
                return TargetError(
                    message,
                    hint=f"see `{doctor}`: a driver or library is missing",
                    where=self.where,
                )
            case "runtime":
                other = ", or name another Python with --python" if self._place else ""
                return TargetError(
                    message,
                    hint=f"install it there: pip install onnxruntime{other}",
                    where=self.where,
                )
            case "python":
                return TargetError(
                    message, hint="name a newer one there with --python", where=self.where
                )
            case "file":
                return TargetError(message, where=self.where)
            case "load":
                error = load_error(RuntimeError(message))
                return ModelError(error.message, hint=error.hint, where=self.where)
            case "input":
                return ModelError(
                    message,
                    hint="models measured side by side take the same inputs",
                    where=self.where,
                )
            case "graph":
                return ModelError(
                    message,
                    hint="leave out --cuda-graph, or give one feed of fixed shapes",
                    where=self.where,
                )
            case "run":
                text = " ".join(message.split())[:300]
                return ModelError(f"ONNX Runtime cannot run the model: {text}", where=self.where)
        raise RuntimeError(f"worker: {message}")

    def _died(self, command: str, noise: str) -> EffdlError:
        code = self._process.wait()
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        doing = _DOING.get(command, command)
        told = self._diagnose(code, lines, doing) if self._diagnose is not None else None
        if told is not None:
            told.where = told.where or self.where
            return told
        if self._place and code > 128:  # a shell's way to tell of a signal
            code = 128 - code
        if code >= 0:
            last = f": {lines[-1][:200]}" if lines else ""
            if noise:
                said = "".join(c if c.isprintable() else " " for c in noise)[:100].strip()
                last = f": it is no worker, it says {said!r}"
            return ModelError(
                f"the measuring process ended with code {code} while {doing}{last}",
                where=self.where,
            )
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        hint = "the model may need more memory than there is" if name == "SIGKILL" else ""
        return ModelError(
            f"the measuring process was ended by {name} while {doing}", hint=hint, where=self.where
        )
