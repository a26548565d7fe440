"""The parent's end of ``runtime.worker``: starting it, asking it, never leaving it behind."""

from __future__ import annotations

import json
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any

from effdl.errors import EffdlError, ModelError, TargetError
from effdl.runtime.session import load_error


class WorkerProcess:
    """A worker that measures one model; leaving the ``with`` block ends it, however it is left.

    Args:
        where: the model's name, for messages.
        command: how to start the worker.
    """

    def __init__(self, where: str, command: Sequence[str]) -> None:
        self.where = where
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 (closed by close)
        # A session of its own: Ctrl-C reaches the parent only, which then ends the worker.
        self._process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            start_new_session=True,
            encoding="utf-8",
        )

    @property
    def pid(self) -> int:
        """The worker's process id."""
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
        """End the worker at once and wait for it."""
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
            TargetError: the session did not open on the provider asked for.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(json.dumps({"do": command, **options}) + "\n")
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line.endswith("\n"):
            raise self._died(command)
        answer: dict[str, Any] = json.loads(line)
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
        match kind:
            case "provider":
                return TargetError(
                    message,
                    hint="see `effdl doctor`: a driver or library is missing",
                    where=self.where,
                )
            case "runtime":
                return TargetError(
                    message, hint="install it there: pip install onnxruntime", where=self.where
                )
            case "load":
                error = load_error(RuntimeError(message))
                return ModelError(error.message, hint=error.hint, where=self.where)
            case "input":
                return ModelError(
                    message,
                    hint="models measured side by side take the same inputs",
                    where=self.where,
                )
            case "run":
                text = " ".join(message.split())[:300]
                return ModelError(f"ONNX Runtime cannot run the model: {text}", where=self.where)
        raise RuntimeError(f"worker: {message}")

    def _died(self, command: str) -> ModelError:
        code = self._process.wait()
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        doing = {"load": "loading the model", "block": "running the model"}.get(command, command)
        if code >= 0:
            last = f": {lines[-1][:200]}" if lines else ""
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
