"""What is going on, on a terminal's stderr only: one line per pass, live while it works."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from effdl.render.console import err

Show = Callable[[str, str], None]


@contextmanager
def live(quiet: bool = False) -> Iterator[Show]:
    """Yield ``show(name, what)``; each new ``name`` leaves the line of the one before it behind."""
    if quiet or not sys.stderr.isatty():
        yield lambda name, what: None
        return
    console = err()
    current = ""
    started = time.perf_counter()
    with console.status("") as status:

        def show(name: str, what: str) -> None:
            nonlocal current, started
            if name != current:
                if current:
                    console.print(
                        f"  {current:<20} {time.perf_counter() - started:6.1f} s", style="dim"
                    )
                current, started = name, time.perf_counter()
            status.update(f"{name}: {what}")

        yield show
