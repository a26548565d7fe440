"""``effdl bench`` on the command line: options, tables, files, exit codes."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

import effdl
from effdl import api
from effdl.cli import app as cli
from effdl.cli.bench_options import parse_counts, parse_limits, parse_scan, parse_share
from effdl.errors import UsageError
from effdl.measure import scan as scan_module
from effdl.render import bench as render
from effdl.render.bench_markdown import bench_markdown
from effdl.render.bench_rows import order, speed
from effdl.report import BenchReport, BenchScan, to_json
from tests.support import SAMPLES
from tests.test_bench_baseline import BASE, model, report

CNN = SAMPLES / "digits_cnn.onnx"
QUICK = ["--seconds", "0.2", "--no-peaks"]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["effdl", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as e:
        return int(e.code or 0)
    return 0


@pytest.mark.parametrize(
    ("text", "value"), [("5%", 0.05), ("0.05", 0.05), (" 2.5 %", 0.025), ("12%", 0.12)]
)
def test_shares(text: str, value: float) -> None:
    assert parse_share("--min-effect", text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "five", "5", "-1%", "0", "0%", "100%", "nan", "5%%", "5%x"])
def test_what_is_no_share(text: str) -> None:
    with pytest.raises(UsageError, match="--min-effect") as e:
        parse_share("--min-effect", text)
    assert "5%" in e.value.hint


def test_lists_of_numbers() -> None:
    assert parse_counts("--threads", "1, 2,4") == [1, 2, 4]
    assert parse_counts("--threads", "0", least=0) == [0]
    assert parse_scan(["batch=1,8", "input:1=16"]) == {"batch": [1, 8], "input:1": [16]}
    assert parse_scan(None) == {}
    for text in ("", "1,,2", "two", "-1", "1.5", "1;2"):
        with pytest.raises(UsageError, match="--threads"):
            parse_counts("--threads", text)
    with pytest.raises(UsageError, match="twice"):
        parse_counts("--threads", "2,2")
    for scan in (["batch"], ["=1"], ["batch=0"], ["batch=1", "batch=2"]):
        with pytest.raises(UsageError, match="--scan"):
            parse_scan(scan)


def test_the_smallest_effect_follows_the_limit() -> None:
    assert parse_limits(None, None) == (None, 0.02)
    assert parse_limits("5%", None) == (0.05, 0.02)
    assert parse_limits("1%", None) == (0.01, 0.01)
    assert parse_limits("3%", "0.5%") == (0.03, 0.005)
    with pytest.raises(UsageError, match="below --min-effect"):
        parse_limits("1%", "2%")


def test_tables_files_and_baseline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, text = tmp_path / "r.json", tmp_path / "r.md"
    files = ["--export-json", data, "--export-markdown", text]
    assert run(monkeypatch, "bench", CNN, CNN, *QUICK, *files) == 0
    printed = capsys.readouterr()
    assert "median" in printed.out
    assert "control: the base against itself" in printed.out
    written = json.loads(data.read_text())
    assert written["yardstick"]["ms"] > 0
    assert written["models"][1]["verdict"] in ("faster", "slower", "same", "noisy")
    assert {"ratio", "ci", "verdict", "noise_floor"} <= set(written["models"][1])
    assert len(written["control"]) == 3
    assert "| model |" in text.read_text()

    assert run(monkeypatch, "bench", CNN, CNN, *QUICK, "--baseline", data, "--json") == 0
    again = json.loads(capsys.readouterr().out)
    assert again["baseline"]["by"] == "ratio"
    assert len(again["baseline"]["changes"]) == 1
    assert run(monkeypatch, "bench", CNN, CNN, *QUICK, "--threads", "2", "--baseline", data) == 2
    assert "1 thread, now 2 threads" in capsys.readouterr().err


def test_a_scan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--threads", "1,2", "--scan", "batch=1,4", "--seconds", "0.1", "--no-peaks"]
    assert run(monkeypatch, "bench", CNN, CNN, *options, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["axes"] == {"threads": [1, 2], "batch": [1, 4]}
    cells = [(c["threads"], c["dims"]["batch"]) for c in found["cells"]]
    assert cells == [(1, 1), (1, 4), (2, 1), (2, 4)]
    assert [c["feeds"]["image"] for c in found["cells"][:2]] == [
        "float32[1,1,8,8]",
        "float32[4,1,8,8]",
    ]
    assert [c["models"][0]["batch"] for c in found["cells"]] == [1, 4, 1, 4]


def test_real_inputs_can_be_scanned_by_batch_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data", SAMPLES / "digits_cnn.calib.npz", "--seconds", "0.1", "--no-peaks"]
    assert run(monkeypatch, "bench", CNN, *data, "--scan", "batch=2", "--json") == 0
    assert json.loads(capsys.readouterr().out)["cells"][0]["feeds"] == {"image": "float32[2,1,8,8]"}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--fail-if-slower", "5"], "--fail-if-slower 5%"),
        (["--min-effect", "tiny"], "such as 5%"),
        (["--threads", "one"], "whole numbers"),
        (["--scan", "batch"], "NAME=N,N"),
        (["--scan", "nothing=1,2"], "nothing"),
        (["--baseline", "missing.json"], "cannot be read"),
        (["--export-json", "no/such/folder.json"], "folder does not exist"),
        (["--export-markdown", "."], "this is a folder"),
        (["--fail-if-slower", "1%", "--min-effect", "5%"], "below --min-effect"),
    ],
)
def test_mistakes(
    options: list[str],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, "bench", CNN, *QUICK, *options) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert says in said.err
    assert "Traceback" not in said.err


def fake(monkeypatch: pytest.MonkeyPatch, found: BenchReport) -> None:
    monkeypatch.setattr(api, "bench_scan", lambda *a, **k: BenchScan({}, (found,)))


def test_exit_codes_of_fail_if_slower(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slow = report(BASE, model("cand.onnx", 0.8, verdict="slower"), verdict=("slower 0.80x",))
    fake(monkeypatch, slow)
    assert run(monkeypatch, "bench", CNN, CNN) == 0
    assert run(monkeypatch, "bench", CNN, CNN, "--fail-if-slower", "5%") == 1
    printed = capsys.readouterr()
    assert "cand.onnx is 25.0% slower than base.onnx" in printed.err
    assert "median" in printed.out  # the table comes all the same
    assert run(monkeypatch, "bench", CNN, CNN, "--fail-if-slower", "5%", "--json") == 1
    assert json.loads(capsys.readouterr().out)["models"][1]["verdict"] == "slower"
    assert run(monkeypatch, "bench", CNN, CNN, "--fail-if-slower", "30%", "-q") == 0
    noisy = report(BASE, model("cand.onnx", 0.9, 0.1, "noisy"), verdict=("too noisy to say",))
    fake(monkeypatch, noisy)
    assert run(monkeypatch, "bench", CNN, CNN, "--fail-if-slower", "5%") == 0
    assert "too noisy to say, so it does not fail" in capsys.readouterr().err


RANKED = report(
    BASE,
    model("slow.onnx", 0.7, verdict="slower"),
    model("quick.onnx", 2.5, verdict="faster"),
    verdict=("slower 0.70x [0.69, 0.71]", "faster 2.50x [2.48, 2.52]"),
    control=(1.0, 0.99, 1.01),
    generations=3,
)


def lines(found: BenchReport | BenchScan, width: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    console = Console(width=width, record=True, highlight=False, emoji=False, markup=False)
    monkeypatch.setattr(render, "out", lambda: console)
    render.print_report(found)
    return console.export_text().splitlines()


def test_three_models_are_ranked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert order(RANKED) == [2, 0, 1]
    shown = lines(RANKED, 80, monkeypatch)
    assert max(map(len, shown)) <= 80
    text = "\n".join(shown)
    rows = re.findall(r"^ (\d) +(\S+)", text, re.MULTILINE)
    assert rows == [("1", "quick.onnx"), ("2", "base.onnx"), ("3", "slow.onnx")]
    assert "(base)" in text
    assert text.index("quick.onnx: faster 2.50x") < text.index("slow.onnx: slower 0.70x")
    assert "control: the base against itself 1.00x [0.99, 1.01]" in text


def test_a_wide_terminal_shows_more(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow, wide = ("\n".join(lines(RANKED, w, monkeypatch)) for w in (80, 140))
    for column in ("median", "p90", "ratio", "95% interval", "load", "memory", "MACs"):
        assert column in narrow
    for column in ("p99", "runs", "params"):
        assert column in wide
        assert column not in narrow


def grid() -> BenchScan:
    cells = []
    for threads in (1, 2):
        for batch in (1, 16):
            models = [
                replace(m, batch=batch, throughput=1000.0 * threads * batch**0.5)
                for m in (BASE, model("cand.onnx", 1.1, verdict="faster"))
            ]
            cells.append(
                report(*models, threads=threads, dims={"batch": batch}, warnings=("careful",))
            )
    return BenchScan({"threads": (1, 2), "batch": (1, 16)}, tuple(cells))


def test_a_scan_is_shown_with_its_gain(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = lines(grid(), 80, monkeypatch)
    assert max(map(len, shown)) <= 80
    rows = [line.split() for line in shown if re.match(r" +[12] +(1|16) ", line)]
    assert len(rows) == 8
    assert [r[-1] for r in rows[:4]] == ["1.00x", "4.00x", "2.00x", "8.00x"]
    assert [r[-1] for r in rows[4:]] == ["faster"] * 4
    assert "1 thread, batch=16: careful" in capsys.readouterr().err
    assert "1 thread" not in shown[0]


def test_markdown() -> None:
    text = bench_markdown(replace(RANKED, warnings=("a|b <c>",)))
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.count("|") == table[0].count("|") for line in table[:5])
    assert "**quick.onnx**: faster 2.50x [2.48, 2.52]" in text
    assert "a\\|b \\<c\\>" in text
    scanned = bench_markdown(grid())
    assert scanned.count("| threads | batch |") == 2
    assert "> - 2 threads, batch=16: careful" in scanned
    assert speed(RANKED, wide=True).rows[0][1] == "quick.onnx"


def test_public_functions() -> None:
    found = effdl.bench(CNN, CNN, seconds=0.1, control=False)
    assert isinstance(found, BenchReport)
    assert found.control is None
    scanned = api.bench_scan(CNN, threads=[1], scan={"batch": [2]}, seconds=0.05)
    assert scanned.axes == {"batch": (2,)}
    assert to_json(scanned)["cells"][0]["dims"] == {"batch": 2}
    with pytest.raises(UsageError):
        effdl.bench()


def test_scan_order() -> None:
    seen: list[tuple[int, dict[str, int]]] = []

    def measure(threads: int, dims: dict[str, int]) -> BenchReport:
        seen.append((threads, dims))
        return RANKED

    found = scan_module.scan(measure, [4], {"a": [1, 2], "b": [3]})
    assert seen == [(4, {"a": 1, "b": 3}), (4, {"a": 2, "b": 3})]
    assert found.axes == {"a": (1, 2), "b": (3,)}
