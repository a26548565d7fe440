"""How a recipe is run, apart from what is in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from effdl.errors import UsageError, nearest
from effdl.observe import MAX_BYTES

Progress = Callable[[str, str], None]
"""Called with a pass (or stage) name and what is being done with it."""
GATES = ("off", "final", "each")


@dataclass(frozen=True)
class RunOptions:
    """How a recipe is run, apart from what is in it.

    Args:
        dry_run: tell what each pass would do; nothing is checked, measured or written.
        keep_going: drop a pass that fails its check and go on, instead of stopping with nothing
            written; write a result that misses its budget.
        strict: a pass that finds nothing to do is an error.
        stop_after: run only the first passes.
        save_after_each: a folder that gets the model after every pass.
        gate: ``each``: every pass that claims speed or size is measured and dropped where it does not
            deliver, every lossy one is held to the budget; ``final``: only the result is; ``off``:
            everything stays, the result is measured only.
        gate_seconds: time for measuring each of the two models of a pass.
        bench_seconds: time for measuring input against output at the end, 0 for no measuring at all.
        threads: intra-op threads of the measurement; None: those of the recipe's target, else 1.
        dims: values of dynamic dimensions for random inputs.
        seed: of every random choice.
        max_memory: bytes of activations or statistics that calibration holds at a time: less memory,
            more runs over the data.
        external: weights beside the output; None: as the input has them, or where they must.
    """

    dry_run: bool = False
    keep_going: bool = False
    strict: bool = False
    stop_after: int | None = None
    save_after_each: Path | None = None
    gate: str = "each"
    gate_seconds: float = 1.0
    bench_seconds: float = 3.0
    threads: int | None = None
    dims: Mapping[str, int] = field(default_factory=dict)
    seed: int = 0
    max_memory: int = MAX_BYTES
    external: bool | None = None

    def __post_init__(self) -> None:
        if self.gate not in GATES:
            raise UsageError(f"unknown gate '{self.gate}'", hint=nearest(self.gate, GATES))
        if self.max_memory < 1:
            raise UsageError(f"max_memory must be above 0 bytes, not {self.max_memory}")


class PassBug(Exception):
    """A pass of ours failed on a model; ``reproducer`` is the folder that shows it."""

    def __init__(self, name: str, reproducer: Path, cause: BaseException) -> None:
        super().__init__(f"pass '{name}' failed: {type(cause).__name__}: {cause}")
        self.reproducer = reproducer
