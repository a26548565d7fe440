"""What a pass is, and what it is given."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar

import onnx_ir as ir
from pydantic import BaseModel, ConfigDict

from effdl.data.feeds import Feeds
from effdl.errors import RecipeError
from effdl.graph.walk import all_nodes, opset
from effdl.observe import MAX_BYTES
from effdl.runtime.target import Target


@dataclass
class PassLog:
    """What a pass said about its work; the pipeline turns it into a PassReport."""

    touched: list[tuple[str, str]] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    notes: dict[str, float | str] = field(default_factory=dict)

    def why_nothing(self) -> str:
        """Return the commonest reason for leaving nodes alone, with its count."""
        if not self.skipped:
            return "nothing to do"
        reasons = Counter(reason for _, reason in self.skipped)
        reason, count = reasons.most_common(1)[0]
        rest = len(self.skipped) - count
        tail = f"; {rest} for other reasons" if rest else ""
        return (
            f"{count} left alone: {reason}{tail}" if count > 1 or rest else f"left alone: {reason}"
        )


@dataclass(frozen=True)
class Context:
    """Everything a pass may know besides the model and its own options.

    Args:
        target: the machine the model will run on.
        feeds: calibration samples, or None when the recipe has no data.
        seed: seed of every random choice.
        workdir: an empty folder of this run, deleted at its end.
        log: where ``touch``, ``skip`` and ``note`` write.
        max_bytes: of activations or statistics that calibration holds at a time; a model whose
            tensors are more runs over the data several times.
        memo: what passes observed of the model as it is before them, by pass and kind: the tries of a
            step with other options find it again.
    """

    target: Target
    feeds: Feeds | None = None
    seed: int = 0
    workdir: Path = Path()
    log: PassLog = field(default_factory=PassLog)
    max_bytes: int = MAX_BYTES
    memo: dict[Any, Any] = field(default_factory=dict)

    def touch(self, node: ir.Node | str, what: str) -> None:
        """Record that ``node`` was changed (or would be, in a dry run): ``what`` in a few words."""
        self.log.touched.append((_name(node), what))

    def skip(self, node: ir.Node | str, reason: str) -> None:
        """Record that ``node`` was a candidate and why it was left alone."""
        self.log.skipped.append((_name(node), reason))

    def note(self, stat: str, value: float | str) -> None:
        """Record a figure about the whole pass, such as ``sparsity`` or ``activation_type``."""
        self.log.notes[stat] = value


def _name(node: ir.Node | str) -> str:
    return node if isinstance(node, str) else (node.name or node.op_type)


class Pass(BaseModel):
    """A graph-to-graph step of a recipe. Its fields are its options, its docstring its documentation.

    A pass edits the model in place, prints nothing, catches nothing and touches no file outside
    ``ctx.workdir``. It never edits an array in place, nor a weight that has another user.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )

    lossy: ClassVar[bool] = False
    """Whether outputs may change beyond rounding."""
    claims: ClassVar[frozenset[str]] = frozenset()
    """What the pass promises: ``latency``, ``size``. The gate takes it back where that does not come."""
    needs_data: ClassVar[bool] = False
    """Whether the pass needs calibration data in ``ctx.feeds``."""
    min_opset: ClassVar[int] = 0
    """The default-domain opset below which the pass has nothing it can do."""
    keeps_interface: ClassVar[bool] = True
    """Whether names, types and symbolic dimensions of graph inputs and outputs stay as they are."""
    not_after: ClassVar[Mapping[str, str]] = {}
    """Glob of pass names that must not come earlier in a recipe, with the reason."""

    def run(self, model: ir.Model, ctx: Context) -> int:
        """Edit ``model`` in place and return the number of changes (0: the model is untouched)."""
        raise TypeError(f"{type(self).__name__} defines no run()")

    def too_old(self, model: ir.Model) -> str:
        """Return why the opset of ``model`` is too old for this pass, empty when it is not."""
        have = opset(model)
        if not have or have >= self.min_opset:
            return ""
        return f"needs opset {self.min_opset}, the model has {have}: convert_opset before it"

    def claimed(self) -> frozenset[str]:
        """Return what the pass promises with these options; who names a form wants it, fast or not."""
        return self.claims

    def variants(self) -> Sequence[Pass]:
        """Return the forms this pass can take; with several, each is measured and the fastest kept."""
        return (self,)

    def changes_interface(self) -> bool:
        """Whether, with these options, graph inputs or outputs may change."""
        return not self.keeps_interface

    def candidates(self, model: ir.Model, ctx: Context) -> list[str] | None:
        """Names of the nodes the pass would work on, without data; None when only a run can tell."""
        return None


class NodePass(Pass):
    """A pass that works node by node and can be told which ones."""

    targets: tuple[str, ...] = ()
    """Only these nodes: globs of node names, op types, or re:REGEX on the name."""
    ignore: tuple[str, ...] = ()
    """Never these nodes: patterns as in targets."""

    def selected(self, node: ir.Node) -> bool:
        """Whether the options let this pass touch ``node``."""
        if any(matches(p, node) for p in self.ignore):
            return False
        return not self.targets or any(matches(p, node) for p in self.targets)

    def unmatched(self, models: Iterable[ir.Model]) -> list[str]:
        """Patterns of this pass that match no node in any of ``models``."""
        nodes = [n for m in models for n in all_nodes(m)]
        return [p for p in (*self.targets, *self.ignore) if not any(matches(p, n) for n in nodes)]


def matches(pattern: str, node: ir.Node) -> bool:
    """Whether ``pattern`` (a glob of the name, an op type, or ``re:REGEX``) names ``node``."""
    if pattern.startswith("re:"):
        try:
            return re.search(pattern[3:], node.name or "") is not None
        except re.error as e:
            raise RecipeError(f"bad regular expression '{pattern[3:]}': {e}") from e
    return node.op_type == pattern or fnmatchcase(node.name or "", pattern)
