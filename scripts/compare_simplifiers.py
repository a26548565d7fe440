"""effdl's preset lossless beside OnnxSlim, onnxsim and onnxscript's optimizer, on the same models.

    EFFDL_SHARED=... python scripts/compare_simplifiers.py [MODEL or FOLDER ...] [--latency] [--write]

Each tool handles each model in a process of its own, from file to file, with a limit of 60 s. Counted are
nodes that compute: all of the main graph, of subgraphs and of functions, but Constant nodes; a contrib
operator is a node like any other. Outputs are compared in ONNX Runtime on random feeds, one with every
dynamic dimension changed among them, and those that differ again with all optimization off. ``time`` is
without imports; effdl's first is without its verification (the peers verify nothing), ``verified`` with it.
A peer that is not installed is told as absent. --write puts the result into docs/simplifiers.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "simplifiers.md"
OURS = "effdl"
PEERS = ("onnxslim", "onnxsim", "onnxscript")
TOOLS = (OURS, *PEERS)
LIMIT = 60.0
NEAR = 0.02
"""How much above the fewest nodes is still acceptable."""


@dataclass
class Result:
    """What one tool made of one model.

    Args:
        nodes, bytes: of the file it wrote; None without one.
        seconds, verified: its time from file to file; with effdl's verification.
        peak: bytes of memory at most.
        failed: why there is no file.
        wrong: what is wrong with the outputs; None where they could not be compared.
        latency: median over the untouched model's.
    """

    nodes: int | None = None
    bytes: int | None = None
    seconds: float = 0.0
    verified: float | None = None
    peak: int = 0
    failed: str = ""
    wrong: str | None = ""
    latency: float | None = None

    @property
    def good(self) -> bool:
        """Whether there is a file, and nothing wrong is known of it."""
        return self.nodes is not None and not self.wrong


@dataclass
class Row:
    """One model and what each tool made of it."""

    name: str
    group: str
    nodes: int
    bytes: int
    results: dict[str, Result] = field(default_factory=dict)
    passes: dict[str, float] = field(default_factory=dict)

    def best(self) -> int | None:
        """Return the fewest nodes that any tool reached with nothing known to be wrong."""
        counts = [r.nodes for r in self.results.values() if r.good and r.nodes is not None]
        return min(counts, default=None)

    def excess(self, tool: str = OURS) -> float | None:
        """Return how far ``tool`` is above the fewest nodes, None where it made no good file."""
        best, own = self.best(), self.results.get(tool)
        if best is None or own is None or not own.good or own.nodes is None:
            return None
        return 0.0 if own.nodes == best else own.nodes / max(best, 1) - 1


def count_nodes(model: onnx.ModelProto) -> int:
    """Count what computes: nodes of all graphs and functions but Constants."""
    functions = sum(_count(f.node) for f in model.functions)
    return _count(model.graph.node) + functions


def _count(nodes: Iterable[onnx.NodeProto]) -> int:
    total = 0
    for node in nodes:
        total += node.op_type != "Constant" or node.domain not in ("", "ai.onnx")
        for attribute in node.attribute:
            for graph in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                total += _count(graph.node)
    return total


def file_bytes(path: Path) -> int:
    """Bytes of a model file and of the weights beside it."""
    model = onnx.load(path, load_external_data=False)
    names = {
        entry.value
        for tensor in model.graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }
    beside = (path.parent / n for n in names)
    return path.stat().st_size + sum(p.stat().st_size for p in beside if p.is_file())


@dataclass
class Totals:
    """A tool over all models."""

    models: int
    fewest: int
    near: int
    worst: float
    worst_at: str
    wrong: int
    failed: int
    total: float
    median: float
    slowest: float
    bytes: int
    peak: int


def totals(rows: Sequence[Row], tool: str) -> Totals:
    """Sum up ``tool``; its time where it failed counts, its bytes only where all tools have a file."""
    own = [(r, r.results[tool]) for r in rows if tool in r.results]
    excess = [(r.excess(tool), r.name) for r, _ in own]
    known = [(e, n) for e, n in excess if e is not None]
    worst, at = max(known, default=(0.0, ""))
    seconds = [x.seconds for _, x in own if not x.failed.startswith("refused")]
    everywhere = [r for r in rows if all(x.nodes is not None for x in r.results.values())]
    return Totals(
        models=len(own),
        fewest=sum(e == 0 for e, _ in known),
        near=sum(e <= NEAR for e, _ in known),
        worst=worst,
        worst_at=at if worst else "",
        wrong=sum(bool(x.wrong) for _, x in own),
        failed=sum(bool(x.failed) for _, x in own),
        total=sum(seconds),
        median=statistics.median(seconds) if seconds else 0.0,
        slowest=max(seconds, default=0.0),
        bytes=sum(r.results[tool].bytes or 0 for r in everywhere),
        peak=max((x.peak for _, x in own), default=0),
    )


def cell(result: Result | None, best: int | None) -> str:
    """Nodes of one result: ``=`` after the fewest, ``wrong``, ``crash``, ``slow``."""
    if result is None:
        return "-"
    if result.failed:
        kind = "slow" if result.failed.startswith("not done") else "crash"
        return "refused" if result.failed.startswith("refused") else kind
    if result.wrong:
        return f"{result.nodes} wrong"
    return f"{result.nodes}{'=' if result.nodes == best else ' '}"


def table(rows: Sequence[Row], tools: Sequence[str]) -> str:
    """Lay out nodes and times of every model for a terminal of 80 columns."""
    head = f"{'model':22} {'nodes':>5}" + "".join(f"{t[:9]:>10}" for t in tools) + "   seconds"
    lines = [head]
    for row in rows:
        best = row.best()
        cells = "".join(f"{cell(row.results.get(t), best):>10}" for t in tools)
        times = "/".join(seconds(row.results[t].seconds) for t in tools if t in row.results)
        lines.append(f"{row.name[:22]:22} {row.nodes:5}{cells} {times}")
    return "\n".join(lines)


def seconds(value: float) -> str:
    """Write a time in few characters."""
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"[1:]


def summary(rows: Sequence[Row], tools: Sequence[str], imports: dict[str, float]) -> list[str]:
    """One line a tool, as cells of a Markdown table."""
    lines = [
        "| tool | fewest nodes | at most 2 % above | worst | wrong | failed | time, sum | median "
        "| slowest | import | files | peak memory |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in tools:
        t = totals(rows, name)
        lines.append(
            f"| {name} | {t.fewest} of {t.models} | {t.near} | {t.worst:+.1%} {t.worst_at} | {t.wrong} "
            f"| {t.failed} | {t.total:.1f} s | {t.median * 1000:.0f} ms | {t.slowest:.1f} s "
            f"| {imports.get(name, 0):.1f} s | {t.bytes / 1e6:.1f} MB | {t.peak / 1e6:.0f} MB |"
        )
    checked = [r.results[OURS].verified for r in rows if OURS in r.results]
    known = [v for v in checked if v is not None]
    if known:
        lines.append("")
        lines.append(
            f"effdl with its verification: {sum(known):.1f} s, "
            f"median {statistics.median(known) * 1000:.0f} ms."
        )
    return lines


class Worker:
    """A process that runs one tool, job by job."""

    def __init__(self, tool: str) -> None:
        command = [sys.executable, str(Path(__file__).parent / "simplifier_tools.py"), tool]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.hello = self._answer()

    def ask(self, **job: Any) -> dict[str, Any]:
        """Have a job done."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"limit": LIMIT, **job}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self.process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer


def run_tool(worker: Worker, model: Path, out: Path) -> Result:
    """Let one tool handle one model."""
    answer = worker.ask(model=str(model), out=str(out))
    if "refused" in answer:
        answer["failed"] = f"refused: {answer['refused']}"
    failed = answer.get("failed", "")
    if not failed and not out.is_file():
        failed = "wrote no file"
    result = Result(seconds=answer["seconds"], peak=answer.get("peak", 0), failed=failed)
    if not failed:
        result.nodes = count_nodes(onnx.load(out, load_external_data=False))
        result.bytes = file_bytes(out)
    return result


def run_model(model: Path, workers: dict[str, Worker], judge: Worker, *, latency: bool) -> Row:
    """Let all tools handle one model, then compare outputs."""
    proto = onnx.load(model, load_external_data=False)
    row = Row(model.stem, model.parent.name, count_nodes(proto), file_bytes(model))
    with tempfile.TemporaryDirectory() as folder:
        files = {t: Path(folder) / f"{t}.onnx" for t in (*TOOLS, "effdl-verified")}
        for name in (t for t in TOOLS if t in workers):
            row.results[name] = run_tool(workers[name], model, files[name])
        ours = row.results[OURS]
        verified = run_tool(workers["effdl-verified"], model, files["effdl-verified"])
        ours.verified = verified.seconds
        results = {t: str(files[t]) for t, r in row.results.items() if r.nodes is not None}
        if not verified.failed.startswith("not done"):
            # What counts is what the user gets: the verified file, though the time is without.
            ours.nodes, ours.bytes = verified.nodes, verified.bytes
            ours.failed = verified.failed or ours.failed
            results.pop(OURS, None)
            if ours.nodes is not None:
                results[OURS] = str(files["effdl-verified"])
        verdict = judge.ask(model=str(model), results=results, latency=latency, limit=4 * LIMIT)
        for name, result in row.results.items():
            result.wrong = verdict.get("verdicts", {}).get(name)
            result.latency = verdict.get("latency", {}).get(name)
    return row


def find_models(places: Sequence[Path]) -> list[Path]:
    """Model files in the order given; those of a folder by name, each content once."""
    found: dict[str, Path] = {}
    for place in places:
        for path in sorted(place.rglob("*.onnx")) if place.is_dir() else [place]:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            found.setdefault(digest, path)
    return list(found.values())


def page(rows: Sequence[Row], tools: Sequence[str], head: str, sums: Sequence[str]) -> str:
    """Return docs/simplifiers.md: sums, then each model where the tools differ."""
    lines = [
        "# Simplifiers side by side",
        "",
        (__doc__ or "").split("\n\n")[2].strip(),
        "",
        head,
        "",
    ]
    lines += [*sums, "", "Nodes after each tool; `=` marks the fewest.", ""]
    lines += [f"| model | before | {' | '.join(tools)} |", "|---|---" + "|---" * len(tools) + "|"]
    for row in rows:
        cells = [cell(row.results.get(t), row.best()).strip() for t in tools]
        if len(set(cells)) > 1 or row.nodes > 20:
            lines.append(f"| {row.name} | {row.nodes} | {' | '.join(cells)} |")
    lines += ["", "Models of at most 20 nodes on which all tools agree are left out of the list."]
    wrong = [
        f"- {t} on {r.name}: {x.wrong or x.failed}"
        for r in rows
        for t, x in r.results.items()
        if x.wrong or x.failed
    ]
    return "\n".join([*lines, "", "What went wrong:", "", *(wrong or ["- nothing"]), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--latency", action="store_true", help="time the results as well")
    parser.add_argument("--only", nargs="*", default=TOOLS, choices=TOOLS, help="these tools")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    args = parser.parse_args()
    shared = os.environ.get("EFFDL_SHARED")
    places = args.models or [ROOT / "sample_models", *([Path(shared, "models")] if shared else [])]
    workers = {t: Worker(t) for t in (*args.only, "effdl-verified")}
    for name in [t for t, w in workers.items() if "absent" in w.hello]:
        print(f"absent: {name} ({workers.pop(name).hello['absent']})")
    judge = Worker("judge")
    tools = [t for t in TOOLS if t in workers]
    rows: list[Row] = []
    models = find_models([p.absolute() for p in places])
    for model in models:
        rows.append(run_model(model, workers, judge, latency=args.latency))
        print(f"\r{len(rows)}/{len(models)} {model.stem[:60]:60}", end="", file=sys.stderr)
    print(file=sys.stderr)
    imports = {t: workers[t].hello["import"] for t in tools}
    sums = summary(rows, tools, imports)
    print(table(rows, tools), "", *sums, sep="\n")
    for row in rows:
        for name, result in row.results.items():
            if result.wrong or result.failed:
                print(f"{row.name}: {name}: {(result.wrong or result.failed)[:150]}")
    if args.latency:
        for name in tools:
            ratios = [x for r in rows if (x := r.results[name].latency) is not None]
            if ratios:
                print(f"latency after / before, {name}: median {statistics.median(ratios):.3f}")
    versions = ", ".join(f"{t} {workers[t].hello['version']}" for t in tools)
    head = f"{len(rows)} models; {versions}; ONNX Runtime is the judge."
    if args.json:
        args.json.write_text(json.dumps([_plain(r) for r in rows], indent=1))
    if args.write:
        PAGE.write_text(page(rows, tools, head, sums))
    for worker in (*workers.values(), judge):
        worker.close()


def _plain(row: Row) -> dict[str, Any]:
    return {**vars(row), "results": {t: vars(r) for t, r in row.results.items()}}


if __name__ == "__main__":
    main()
