"""Jobs of the comparing scripts in processes of their own: a crash of a tool stays with it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

Job = dict[str, Any]


def ask(script: Path, tool: str, job: Job, limit: float) -> Job:
    """Run one job of a script of tools; ``failed`` says why there is no answer.

    Args:
        script: is started with the tool's name and the job as JSON, and prints one line of JSON.
        tool: its name.
        job: what it is to do.
        limit: seconds that it may take.
    """
    command = [sys.executable, str(script), tool, json.dumps(job)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {limit} s"}
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        if done.returncode < 0:
            return {"failed": f"killed by signal {-done.returncode}"}
        return {"failed": said[-1][:200] if said else f"exit code {done.returncode}"}
    answer: Job = json.loads(done.stdout)
    return answer
