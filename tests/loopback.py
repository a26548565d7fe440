"""An sshd of our own on this machine: throw-away keys, a random port, and nothing of the user's touched."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

SSHD = shutil.which("sshd") or next(
    (p for p in ("/usr/sbin/sshd", "/usr/local/sbin/sshd") if os.access(p, os.X_OK)), None
)
SSH = shutil.which("ssh")
KEYGEN = shutil.which("ssh-keygen")
MISSING = [
    name for name, found in (("sshd", SSHD), ("ssh", SSH), ("ssh-keygen", KEYGEN)) if not found
]

_SERVER = """\
Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/authorized_keys
PidFile none
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
PermitRootLogin yes
SetEnv TMPDIR={far}
"""
_CLIENT = """\
Host board
  IdentityFile {folder}/user_key
  UserKnownHostsFile {folder}/known_hosts
Host wrong-key
  IdentityFile {folder}/other_key
  UserKnownHostsFile {folder}/known_hosts
Host unknown-key
  IdentityFile {folder}/user_key
  UserKnownHostsFile {folder}/empty
Host changed-key
  IdentityFile {folder}/user_key
  UserKnownHostsFile {folder}/stale_hosts
Host closed
  Port {closed}
Host nowhere
  HostName nowhere.invalid
Host *
  HostName 127.0.0.1
  Port {port}
  User {user}
  IdentitiesOnly yes
  GlobalKnownHostsFile /dev/null
"""


@dataclass(frozen=True)
class Loopback:
    """A running sshd.

    Args:
        folder: keys and configuration; ``bin`` a folder for PATH whose ``ssh`` knows the hosts ``board``
            (the way in), ``wrong-key``, ``unknown-key``, ``changed-key``, ``closed`` and ``nowhere``.
        far: where the far end makes its temporary folders.
    """

    folder: Path
    bin: Path
    far: Path


@contextmanager
def loopback(folder: Path) -> Iterator[Loopback]:
    """Run an sshd in ``folder``.

    Raises:
        RuntimeError: it does not start, or lets nobody in; says why.
    """
    assert SSHD is not None
    assert SSH is not None
    for name in ("host_key", "user_key", "other_key", "stale_key"):
        subprocess.run(
            [str(KEYGEN), "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True
        )
    far = folder / "far"
    far.mkdir()
    port, closed = _free_ports()
    _write(folder, port, closed, far)
    if os.getuid() == 0:
        with suppress(OSError):
            os.makedirs("/run/sshd", exist_ok=True)  # an sshd that root starts wants it
    log = folder / "log"
    with log.open("wb") as out:
        command = [SSHD, "-D", "-e", "-f", str(folder / "sshd_config")]
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    try:
        _wait(server, port, log)
        place = Loopback(folder, folder / "bin", far)
        tried = subprocess.run(
            [str(place.bin / "ssh"), "-o", "BatchMode=yes", "board", "true"],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        if tried.returncode:
            last = [*log.read_text().splitlines(), tried.stderr.strip()][-2:]
            raise RuntimeError(f"sshd lets nobody in: {' / '.join(last)}")
        yield place
    finally:
        server.terminate()
        server.wait()


def _write(folder: Path, port: int, closed: int, far: Path) -> None:
    (folder / "authorized_keys").write_text((folder / "user_key.pub").read_text())
    host_key = (folder / "host_key.pub").read_text()
    stale_key = (folder / "stale_key.pub").read_text()
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {host_key}")
    (folder / "stale_hosts").write_text(f"[127.0.0.1]:{port} {stale_key}")
    (folder / "empty").touch()
    (folder / "sshd_config").write_text(_SERVER.format(port=port, folder=folder, far=far))
    (folder / "ssh_config").write_text(
        _CLIENT.format(port=port, closed=closed, folder=folder, user=getpass.getuser())
    )
    (folder / "bin").mkdir()
    wrapper = folder / "bin" / "ssh"
    wrapper.write_text(f'#!/bin/sh\nexec {SSH} -F {folder}/ssh_config "$@"\n')
    wrapper.chmod(0o755)


def _free_ports() -> tuple[int, int]:
    with socket.socket() as a, socket.socket() as b:
        a.bind(("127.0.0.1", 0))
        b.bind(("127.0.0.1", 0))
        return a.getsockname()[1], b.getsockname()[1]


def _wait(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    end = time.monotonic() + 10
    while time.monotonic() < end:
        if server.poll() is not None:
            raise RuntimeError(f"sshd does not start: {log.read_text().strip()[-200:]}")
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.05)
    raise RuntimeError("sshd does not answer")
