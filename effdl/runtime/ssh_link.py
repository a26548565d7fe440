"""A connection by the OpenSSH client, and a folder at its far end that is gone when the connection is."""

from __future__ import annotations

import os
import re
import select
import shlex
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from effdl.errors import EffdlError, TargetError

SILENCE = 120
"""Seconds after which the far end takes a silent connection for lost."""
BEAT = 20
_CONNECT = 10
_LOGIN = 45
"""Seconds from the call until the far end must be there."""
_PATIENCE = 10
_LINE = 1 << 16
_LOST = 255
_NO_PROGRAM = (126, 127)
_SOCKET_LENGTH = 80  # of about 104 bytes, less what ssh appends while it makes the socket
_MARK = "effdl:"
_OPTIONS = {
    "BatchMode": "yes",
    "ConnectTimeout": str(_CONNECT),
    "ServerAliveInterval": "10",
    "ServerAliveCountMax": "3",
    "LogLevel": "INFO",  # in QUIET, which a user may have set, an error has no reason
    "RemoteCommand": "none",
    "ClearAllForwardings": "yes",
    "PermitLocalCommand": "no",
    "EscapeChar": "none",
}
# The far end's half: a folder that goes when stdin ends or stays silent, and the workers with it. The
# largest place comes first: /tmp is memory on many boards.
_KEEPER = (
    'umask 077; d=; for p in "${TMPDIR:-/var/tmp}" /tmp "$HOME"; do '
    'd=$(mktemp -d "$p/effdl-XXXXXXXX" 2>/dev/null) && mkdir "$d/pids" "$d/files" && break; d=; done; '
    '[ "$d" ] || { echo "no folder can be made in /var/tmp, /tmp or the home folder" >&2; exit 73; }; '
    'trap \'cd "$d/pids" && kill -9 * 2>/dev/null; cd /; rm -rf "$d"\' EXIT; '
    "trap 'exit 0' HUP INT TERM PIPE; "
    f'echo "{_MARK}$d"; '
    'if [ "$(timeout 9 echo y 2>/dev/null)" = y ]; then '
    'while [ "$(timeout %d head -c 1)" ]; do :; done; else cat >/dev/null; fi'
)
_CLIENT_ERRORS = (
    # (what the client says, what is wrong, what to do)
    (
        r"Could not resolve hostname",
        "there is no host of that name",
        "check the name, and ~/.ssh/config",
    ),
    (r"Connection refused", "it refuses the connection", "does sshd run there, on that port?"),
    (
        r"timed out|[Tt]imeout",
        "it does not answer",
        "is it switched on, and in reach of this network?",
    ),
    (
        r"No route to host|Network is unreachable|Host is down",
        "it cannot be reached from this network",
        "is it switched on, and in this network?",
    ),
    (
        r"IDENTIFICATION HAS CHANGED",
        "its host key is not the one that is known",
        "another machine may be in its place; if it was set up anew: ssh-keygen -R {bare}",
    ),
    (
        r"Host key verification failed|No .* host key is known",
        "its host key is not known yet",
        "log in once by hand and compare the fingerprint: ssh {host}",
    ),
    (
        r"Permission denied \(|Too many authentication failures",
        "it accepts none of our keys",
        "ssh {host} must work without a password: ssh-copy-id {host}",
    ),
)


class Link:
    """An open connection.

    Args:
        host: as the OpenSSH client takes it.
        name: of the target, for messages.
        here: a temporary folder on this machine.

    Raises:
        TargetError: there is no connection, or no command is started there; names the reason.
    """

    def __init__(self, host: str, name: str, here: Path) -> None:
        self.host = host
        self.name = name
        socket = here / "s"
        short = len(os.fsencode(socket)) <= _SOCKET_LENGTH
        self._shared = ["-o", f"ControlPath={socket}"] if short else []
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 (closed by close)
        master = ["-o", "ControlMaster=yes", "-o", "ControlPersist=no"] if short else []
        self._keeper = subprocess.Popen(
            self._ssh(_KEEPER % SILENCE, master),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            start_new_session=True,  # Ctrl-C reaches this process only
        )
        self._over = threading.Event()
        try:
            self.folder = self._folder()
        except BaseException:
            self.close()
            raise
        threading.Thread(target=self._beat, daemon=True).start()

    def command(self, script: str) -> list[str]:
        """Return the command line here that runs a line of POSIX shell there."""
        return self._ssh(script, ["-o", "ControlMaster=no"])

    def put(self, source: Path, there: str) -> None:
        """Copy a file to the far end.

        Raises:
            TargetError: no room there, or the connection was lost.
        """
        with source.open("rb") as data:
            done = subprocess.run(
                self.command(f"cat > {shlex.quote(there)}"),
                stdin=data,
                capture_output=True,
                start_new_session=True,
                check=False,
            )
        self._check(done, "sending a file")

    def get(self, there: str, goal: Path) -> None:
        """Copy a file from the far end.

        Raises:
            TargetError: it is not there, or the connection was lost.
        """
        with goal.open("wb") as data:
            done = subprocess.run(
                self.command(f"cat {shlex.quote(there)}"),
                stdin=subprocess.DEVNULL,
                stdout=data,
                stderr=subprocess.PIPE,
                start_new_session=True,
                check=False,
            )
        self._check(done, "fetching a file")

    def fault(self, code: int, lines: Sequence[str], doing: str) -> EffdlError | None:
        """Return the error of a lost connection or a program that is not there, None of anything else."""
        if code == _LOST or self._keeper.poll() is not None:
            return TargetError(
                f"the connection was lost while {doing}{_last(lines)}",
                hint=f"is it still up? ssh {self.host}",
                where=self.name,
            )
        if code in _NO_PROGRAM:
            return TargetError(
                f"the Python to run there cannot be started{_last(lines)}",
                hint="--python CMD names one on that machine that has onnxruntime, such as "
                "'~/venv/bin/python'",
                where=self.name,
            )
        return None

    def close(self) -> None:
        """Give the folder there back, with all that still runs in it."""
        self._over.set()
        assert self._keeper.stdin is not None
        try:
            with suppress(OSError):
                self._keeper.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                self._keeper.wait(_PATIENCE)
        finally:
            self._keeper.kill()
            self._keeper.wait()
            assert self._keeper.stdout is not None
            self._keeper.stdout.close()
            self._stderr.close()

    def _ssh(self, script: str, options: list[str]) -> list[str]:
        fixed = [o for k, v in _OPTIONS.items() for o in ("-o", f"{k}={v}")]
        # Whatever the login shell is, sh runs the script.
        remote = f"sh -c {shlex.quote(script)}"
        return ["ssh", "-T", "-a", "-x", *fixed, *options, *self._shared, "--", self.host, remote]

    def _folder(self) -> str:
        """Read the keeper's first line; what a login shell prints before it is passed over."""
        for line in self._lines():
            text = line.decode(errors="replace")
            if text.startswith(_MARK + "/"):
                return text.removeprefix(_MARK)
        code = self._keeper.wait()
        self._stderr.seek(0)
        raise _no_connection(
            self.host, self.name, code, self._stderr.read().decode(errors="replace")
        )

    def _lines(self) -> Iterator[bytes]:
        """Yield what the far end prints, a line at a time, until its end or the limit of a login."""
        assert self._keeper.stdout is not None
        out, rest = self._keeper.stdout.fileno(), b""
        end = time.monotonic() + _LOGIN
        while (left := end - time.monotonic()) > 0:
            if not select.select([out], [], [], left)[0]:
                continue
            part = os.read(out, 1 << 16)
            if not part:
                return
            *lines, rest = (rest + part).split(b"\n")
            rest = rest[-_LINE:]
            yield from lines
        self._keeper.kill()  # it would not hear that stdin is closed
        raise TargetError(
            f"it takes the connection, but its login shell starts no command within {_LOGIN} s",
            hint=f"does its login shell wait for a key, or print without end? ssh {self.host} true",
            where=self.name,
        )

    def _beat(self) -> None:
        """Let the far end know that this one lives."""
        assert self._keeper.stdin is not None
        while not self._over.wait(BEAT):
            try:
                self._keeper.stdin.write(b".")
                self._keeper.stdin.flush()
            except (OSError, ValueError):  # it is over
                return

    def _check(self, done: subprocess.CompletedProcess[bytes], doing: str) -> None:
        if done.returncode == 0:
            return
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        lost = self.fault(done.returncode, lines, doing) if done.returncode == _LOST else None
        raise lost or TargetError(f"{doing} failed{_last(lines)}", where=self.name)


def _no_connection(host: str, name: str, code: int, said: str) -> TargetError:
    lines = [text for line in said.splitlines() if (text := line.strip(" \r@"))]
    if code != _LOST:
        return TargetError(
            f"it takes the connection, but not the command{_last(lines)}",
            hint=f"a POSIX shell is needed there: ssh {host} uname",
            where=name,
        )
    bare = host.removeprefix("ssh://").rpartition("@")[2]
    for pattern, what, todo in _CLIENT_ERRORS:
        if re.search(pattern, said):
            hint = todo.format(host=host, bare=bare)
            return TargetError(f"no connection: {what}", hint=hint, where=name)
    return TargetError(f"no connection{_last(lines)}", hint=f"try: ssh {host}", where=name)


def _last(lines: Sequence[str]) -> str:
    said = [line.strip() for line in lines if line.strip()]
    return f": {said[-1][:200]}" if said else ""
