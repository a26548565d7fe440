"""Write docs/passes.md and the table of configs/README.md from the passes and presets themselves.

python scripts/make_docs.py            # write
python scripts/make_docs.py --check    # exit 1 when a file differs from what would be written
"""

from __future__ import annotations

import sys
from pathlib import Path

from effdl.passes import get
from effdl.recipe import PassInfo, describe_passes, presets

ROOT = Path(__file__).parent.parent
PASSES = ROOT / "docs" / "passes.md"
PRESETS = ROOT / "configs" / "README.md"
BEGIN = "<!-- The table is written by scripts/make_docs.py. -->\n"
END = "<!-- End of the table. -->\n"

INTRO = """\
# Passes

This file is written by `scripts/make_docs.py` from the passes themselves; `effdl passes NAME` shows
the same on a terminal. A recipe lists passes in the order in which they run:

```yaml
passes:
  - simplify                       # a name, or
  - low_rank: {energy: 0.95}       # a name with options
```

Outputs are *equal* (up to rounding) for a lossless pass; a *lossy* one changes them, and the report
says by how much. *Opset* is the least version of ONNX's operators at which a pass does something.

"""


def main(check: bool) -> int:
    """Write both files, or compare them; returns the exit code."""
    texts = {PASSES: passes_text(), PRESETS: presets_text(PRESETS.read_text(encoding="utf-8"))}
    stale = [p for p, t in texts.items() if not p.exists() or p.read_text(encoding="utf-8") != t]
    for path in stale:
        name = path.relative_to(ROOT)
        if check:
            sys.stderr.write(f"{name} is not current: run python scripts/make_docs.py\n")
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(texts[path], encoding="utf-8")
            sys.stdout.write(f"{name}\n")
    return 1 if check and stale else 0


def passes_text() -> str:
    """Return the text of docs/passes.md."""
    infos = describe_passes()
    rows = [
        [
            f"[{i.name}](#{i.name})",
            "lossy" if i.lossy else "equal",
            "yes" if i.needs_data else "",
            opset(i),
            i.summary.rstrip("."),
        ]
        for i in infos
    ]
    head = ["Pass", "Outputs", "Needs data", "Opset", "What it does"]
    return INTRO + table(head, rows) + "".join(section(i) for i in infos)


def section(info: PassInfo) -> str:
    """Return the section of one pass."""
    text = f"\n## {info.name}\n\n{info.summary}\n"
    for heading, body in info.sections.items():
        if heading != "Example":
            text += f"\n**{heading}:** {body}\n"
    for glob, reason in info.not_after.items():
        text += f"\n**Not after** `{glob}`: {reason}.\n"
    if info.options:
        rows = [
            [
                f"`{o.name}`",
                o.type,
                "required" if o.default is None else f"`{o.default}`",
                o.description,
            ]
            for o in info.options
        ]
        text += "\n" + table(["Option", "Type", "Default", "Description"], rows)
    else:
        text += "\nNo options.\n"
    return text + f"\n```yaml\n{info.sections.get('Example', '')}\n```\n"


def presets_text(current: str) -> str:
    """Return configs/README.md with a fresh table; the text around it stays."""
    before, _, rest = current.partition(BEGIN)
    _, _, after = rest.partition(END)
    rows = []
    for preset in presets():
        needs = [] if preset.target == "cpu" else [f"target {preset.target}"]
        if any(get(name).needs_data for name in preset.passes):
            needs.insert(0, "calibration data (`--data`)")
        steps = " · ".join(preset.passes)
        rows.append([f"`{preset.name}`", preset.description, ", ".join(needs) or "nothing", steps])
    return before + BEGIN + table(["Preset", "What it does", "Needs", "Passes"], rows) + END + after


def opset(info: PassInfo) -> str:
    """Return the least opset of a pass, empty when there is none."""
    return str(info.min_opset) if info.min_opset else ""


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(
        f"| {' | '.join(c.replace('|', chr(92) + '|') for c in line)} |\n" for line in lines
    )


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
