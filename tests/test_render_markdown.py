"""The Markdown report: tables that stay tables, names that stay names, the report's numbers."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from markdown_it import MarkdownIt

from effdl.render.markdown import run_markdown
from effdl.render.numbers import milliseconds, size
from effdl.report import RunReport
from tests.run_reports import (
    AT_FAULT,
    EVIL,
    EXAMPLES,
    GAINS,
    PASSES,
    dry_run,
    evil_run,
    gate,
    lost_run,
    plain_run,
    rich_run,
    step,
    unverified_run,
)


def rendered(report: RunReport) -> str:
    """As HTML, raw HTML let through as GitHub does before it sanitizes."""
    return MarkdownIt("commonmark", {"html": True}).enable("table").render(run_markdown(report))


def tables(markup: str) -> list[list[list[str]]]:
    return [
        [
            [re.sub("<.*?>", "", c) for c in re.findall("<t[hd].*?>(.*?)</t[hd]>", row, re.DOTALL)]
            for row in re.findall("<tr>(.*?)</tr>", table, re.DOTALL)
        ]
        for table in re.findall("<table>(.*?)</table>", markup, re.DOTALL)
    ]


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_table_is_one_and_every_row_is_full(name: str) -> None:
    source = run_markdown(EXAMPLES[name]())
    found = tables(rendered(EXAMPLES[name]()))
    assert len(found) == len(re.findall(r"^\| -", source, re.MULTILINE))
    for table in found:
        assert len({len(row) for row in table}) == 1
    assert source.startswith("### ")
    assert source.endswith("\n")


def test_every_pass_is_a_row_with_its_result_and_reason() -> None:
    table = tables(rendered(rich_run()))[0]
    assert table[0] == ["", "pass", "result", "speed", "error", "file", "why"]
    rows = {row[1]: row for row in table[1:]}
    assert list(rows) == [p.name for p in PASSES]
    assert rows["quantize_static"][2:] == [
        "dropped",
        "0.84x [0.82, 0.87]",
        "2.1e-02",
        "1.01 MB",
        "slower: 74 QuantizeLinear, DequantizeLinear added 3.31 ms; Conv saved 1.6 ms",
    ]
    assert rows["prune_channels"][2:4] == ["kept, 31 changes", "1.42x [1.38, 1.46]"]
    assert rows["cluster_weights"][2] == "rolled back"
    assert rows["cluster_weights"][6] == "output has NaN"
    assert rows["fuse_gelu"][2] == "nothing to do"
    assert rows["strip_metadata"][2] == "not run"


def test_the_numbers_are_those_of_the_report() -> None:
    report = rich_run()
    facts, operators = tables(rendered(report))[1:]
    rows = {row[0]: row[1:] for row in facts[1:]}
    assert rows["file"] == [size(3_660_000), size(2_420_000), "-34%"]
    assert rows["map"] == ["0.4129", "0.4099", "-0.0030 [-0.0064, +0.0004]"]
    assert report.bench is not None
    old, new = report.bench.models
    assert rows["latency"] == [
        f"{milliseconds(old.latency.median)} ±3%",
        f"{milliseconds(new.latency.median)} ±3%",
        f"{new.ratio:.2f}x [{new.ci[0]:.2f}, {new.ci[1]:.2f}]",
    ]
    assert [row[0] for row in operators[1:]][:2] == ["Conv", "QuantizeLinear, DequantizeLinear"]
    assert operators[1][1:] == ["66", "14.2 ms", "6.1 ms", "-8.1 ms"]
    assert len(operators) == len(GAINS) + 1


def test_many_operators_are_summed_up() -> None:
    many = tuple(replace(GAINS[0], kind=f"Op{k}", before_ms=10.0 + k) for k in range(20))
    operators = tables(rendered(rich_run(changes=many)))[2]
    assert len(operators) == 9
    assert operators[-1][0] == "13 other kinds"
    assert operators[-1][2] == f"{sum(10.0 + k for k in range(13)):.3g} ms"


def test_hostile_names_stay_names() -> None:
    markup = rendered(evil_run())
    assert "<script" not in markup
    assert "<em>" not in markup
    shown = " ".join(EVIL.replace("\x00", " ").split())
    named = tables(markup)[0][1][1]
    assert named.replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", '"').replace(
        "&amp;", "&"
    ) == shown.replace("\n", " ")
    outside = re.sub("(`+)(?!`).*?(?<!`)\\1(?!`)", "", run_markdown(evil_run()))
    assert "@you" not in outside
    assert "#1" not in outside


def test_skipped_nodes_are_folded_away_and_limited() -> None:
    source = run_markdown(rich_run())
    assert (
        "<details><summary>1 node left alone</summary>\n\n- `fold_batchnorm` `/head/bn`" in source
    )
    many = replace(PASSES[0], skipped=tuple((f"n{k}", "no") for k in range(100)))
    source = run_markdown(rich_run(passes=(many,)))
    assert "100 nodes left alone" in source
    assert source.count("no\n") == 30
    assert "- and 70 more" in source


def test_nodes_at_fault_are_named() -> None:
    names = tuple(f"/b/conv{k}" for k in range(5))
    blamed = gate(
        0.9, 0.88, 0.92, 5.0, kept=False, reason="slower", changes=AT_FAULT, culprits=names
    )
    row = tables(rendered(rich_run(passes=(step("q", "dropped", gate=blamed),))))[0][1]
    assert row[-1] == "slower; at fault: /b/conv0, /b/conv1, /b/conv2 and 2 more"


def test_where_it_was_measured_is_the_last_line() -> None:
    last = run_markdown(rich_run()).strip().splitlines()[-1]
    for part in ("AMD EPYC 9654", "ONNX Runtime 1.32.0", "1 thread", "seed 0", "cnn-int8-prune"):
        assert part in last


def test_what_is_not_known_is_said() -> None:
    assert "latency not measured (switched off)" in run_markdown(plain_run())
    assert "8 random feeds, weak evidence" in run_markdown(plain_run())
    assert "**Outputs not verified**: no kernel for MyOp." in run_markdown(unverified_run())
    assert run_markdown(lost_run()).startswith(
        "### Nothing helped: the output is the input, unchanged\n"
    )
    planned = run_markdown(dry_run())
    assert "would make 12 changes" in planned
    assert "nothing was checked, measured or written" in planned
    assert "zstd" not in planned
