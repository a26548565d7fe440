"""What ``effdl optimize`` and ``effdl report`` print."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from effdl.cli.app import app
from effdl.errors import OutputError, UsageError
from effdl.render import run as render
from effdl.report import RunReport, to_json
from tests.run_reports import (
    EXAMPLES,
    PASSES,
    dry_run,
    gate,
    lost_run,
    plain_run,
    rich_run,
    step,
    unverified_run,
)


def printed(
    monkeypatch: pytest.MonkeyPatch, report: RunReport, *, width: int = 80, verbose: bool = False
) -> list[str]:
    stream = io.StringIO()
    console = Console(file=stream, width=width, highlight=False, emoji=False, markup=False)
    monkeypatch.setattr(render, "out", lambda: console)
    render.print_run(report, verbose=verbose)
    return stream.getvalue().splitlines()


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("width", [40, 80, 140])
def test_no_line_is_wider_than_the_terminal(
    monkeypatch: pytest.MonkeyPatch, name: str, width: int
) -> None:
    lines = printed(monkeypatch, EXAMPLES[name](), width=width, verbose=True)
    assert max(len(line.rstrip()) for line in lines) <= width


def test_the_table_of_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = printed(monkeypatch, rich_run())
    begin = next(k for k, line in enumerate(lines) if line.startswith(" pass "))
    assert lines[begin].split() == ["pass", "result", "speed", "error", "time"]
    body = [line for line in lines[begin + 2 :] if line[1:2].strip()]
    at = {line.split()[0]: lines.index(line) for line in body[: len(PASSES)]}
    assert list(at) == [p.name for p in PASSES]
    dropped = lines[at["quantize_static"]]
    assert dropped.split(maxsplit=2)[1] == "DROPPED"
    assert "0.84x [0.82, 0.87]  2.1e-02  8.20 s" in dropped
    reason = " ".join(lines[at["quantize_static"] + k].strip() for k in (1, 2))
    assert reason == "slower: 74 QuantizeLinear, DequantizeLinear added 3.31 ms; Conv saved 1.6 ms"
    assert "map fell by 0.0610" in lines[at["low_rank"] + 1]
    assert "rolled back" in lines[at["cluster_weights"]]
    assert lines[at["cluster_weights"] + 1].strip() == "output has NaN"
    assert "not run: --stop-after 8" in lines[at["strip_metadata"]]
    assert any("[95% interval]" in line for line in lines)


def test_without_a_gate_there_is_no_speed_column(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = printed(monkeypatch, plain_run())
    head = next(line for line in lines if line.startswith(" pass "))
    assert head.split() == ["pass", "result", "error", "time"]
    assert any("changed 12; folded 9; identities 3" in line for line in lines)
    assert any("nothing to do: no Erf in the model" in line for line in lines)


def test_a_pass_that_is_kept_for_its_speed_needs_no_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = step("prune_channels", gate=gate(1.42, 1.38, 1.46, 18.9, reason="faster than before"))
    text = " ".join(printed(monkeypatch, rich_run(passes=(kept,))))
    assert "1.42x [1.38, 1.46]" in text
    assert "faster than before" not in text


def test_nodes_at_fault_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    names = tuple(f"/backbone/conv{k}" for k in range(9))
    blamed = gate(0.9, 0.88, 0.92, 5.0, kept=False, reason="slower", culprits=names)
    lines = printed(monkeypatch, rich_run(passes=(step("q", "dropped", gate=blamed),)))
    text = " ".join(" ".join(lines).split())
    assert "slower; at fault: /backbone/conv0, /backbone/conv1, /backbone/conv2 and 6 more" in text


def test_the_end_tells_the_verdict_and_where_the_time_went(monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join(" ".join(printed(monkeypatch, rich_run())).split())
    assert "yolox_nano.fast.onnx: faster 1.43x" in text
    assert "by operator: Conv 14.2 -> 6.1 ms; QuantizeLinear, DequantizeLinear 0 -> 0.61 ms" in text
    assert "5 other kinds 4.39 -> 4.18 ms" in text
    assert "verified: output error 1.9e-02 relative" in text
    assert "map 0.4129 0.4099 -0.0030" in text


def test_when_nothing_helped_it_says_so_after_what_was_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = printed(monkeypatch, lost_run())
    assert lines[-2] == "nothing helped: out/yolox_nano.fast.onnx is the input, unchanged"
    assert lines[-1].startswith("tried 6 passes: 5 dropped, 1 with nothing to do")
    assert sum("DROPPED" in line for line in lines) == 5
    assert not any("before" in line and "after" in line for line in lines)


def test_a_dry_run_lists_what_would_be_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = printed(monkeypatch, dry_run())
    assert lines[0] == "simplify: changed 12; folded 9; identities 3"
    assert "  Identity_0  does nothing, removed" in lines
    assert lines[-1] == "dry run: nothing was checked, measured or written"


def test_what_is_not_verified_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "NOT VERIFIED: no kernel for MyOp" in printed(monkeypatch, unverified_run())


@pytest.fixture
def run_json(tmp_path: Path) -> Path:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(to_json(rich_run())), encoding="utf-8")
    return path


def call(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def test_the_verb_shows_a_report_again(run_json: Path) -> None:
    done = call(run_json)
    assert done.exit_code == 0
    assert "quantize_static   DROPPED" in done.output


@pytest.mark.parametrize("name", ["o.pdf", "o", "o.htm"])
def test_an_unknown_suffix_is_refused_before_anything_is_read(name: str, tmp_path: Path) -> None:
    done = call(tmp_path / "missing.json", "-o", tmp_path / name)
    assert isinstance(done.exception, UsageError)
    assert ".json, .md, .html" in done.exception.hint
    again = CliRunner().invoke(app, ["optimize", "missing.onnx", "-o", "x", "--report", name])
    assert isinstance(again.exception, UsageError)
    assert again.exception.message.startswith(f"--report {name}")


@pytest.mark.parametrize("text", ["{", "\xff\xfe", "[]", '{"schema": 1}', '{"schema": 2}', ""])
def test_a_file_that_is_no_report_is_one_clear_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_bytes(text.encode("latin-1"))
    done = call(path)
    assert isinstance(done.exception, UsageError)
    assert done.exception.where == str(path)
    assert done.exception.hint


def test_a_missing_file_and_a_missing_folder(run_json: Path, tmp_path: Path) -> None:
    missing = call(tmp_path / "no.json")
    assert isinstance(missing.exception, UsageError)
    assert "No such file" in missing.exception.message
    assert isinstance(call(run_json, "-o", tmp_path / "no" / "x.md").exception, OutputError)
