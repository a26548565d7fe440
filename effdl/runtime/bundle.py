"""The worker as one file that a bare Python with onnxruntime can run."""

from __future__ import annotations

import io
import zipfile
from functools import cache
from pathlib import Path

import effdl.runtime.worker

_FOLDER = Path(effdl.runtime.worker.__file__).parent
_DATE = (1980, 1, 1, 0, 0, 0)
# Any Python since 2.6 reads this file, so that one that is too old can say so.
_MAIN = """\
import sys

if sys.version_info < (3, 8):
    sys.stdin.readline()
    sys.stdout.write(
        '{"error": "python", "message": "Python %d.%d there is too old: 3.8 or later is needed"}\\n'
        % sys.version_info[:2]
    )
    sys.exit()
from effdl.runtime.worker.main import main

main()
"""


@cache
def worker_archive() -> bytes:
    """Return a zip application (PEP 441) of ``runtime.worker``, the same bytes every time."""
    files = {
        "__main__.py": _MAIN,
        "effdl/__init__.py": "",
        "effdl/runtime/__init__.py": "",
        "effdl/runtime/machine.py": _FOLDER.with_name("machine.py").read_text(encoding="utf-8"),
    }
    for file in sorted(_FOLDER.glob("*.py")):
        files[f"effdl/runtime/worker/{file.name}"] = file.read_text(encoding="utf-8")
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            archive.writestr(zipfile.ZipInfo(name, _DATE), text)
    return packed.getvalue()
