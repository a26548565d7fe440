"""scripts/cuda_table.py, as far as it goes without a GPU, and the section of the page it writes."""

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import onnxruntime as ort
import pytest

from tests.support import ROOT, SAMPLES

SCRIPTS = ROOT / "scripts"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return SCRIPTS


@pytest.fixture
def table(scripts: Path) -> ModuleType:
    pytest.importorskip("PIL")
    pytest.importorskip("tokenizers")
    import cuda_table

    return cuda_table


def test_a_section_is_replaced_added_and_kept(scripts: Path) -> None:
    from sections import keeping, section, with_section

    page = with_section("# Page\n\ntext\n", "cuda", "## CUDA\n\nold \\1")
    assert page.startswith("# Page\n\ntext\n\n<!-- cuda: begin -->\n## CUDA\n\nold \\1\n")
    changed = with_section(page, "cuda", "new \\g<0>")
    assert "old" not in changed
    assert changed.count("<!-- cuda: begin -->") == 1
    assert "new \\g<0>" in section(changed, "cuda")
    assert keeping("# Other\n", changed, "cuda") == "# Other\n\n" + section(changed, "cuda") + "\n"
    assert keeping("# Other\n", "# Page\n", "cuda") == "# Other\n"


@pytest.mark.skipif(
    "CUDAExecutionProvider" in ort.get_available_providers(), reason="this machine may have CUDA"
)
def test_without_a_gpu_it_says_so_in_one_line(table: ModuleType) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "cuda_table.py")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3
    assert done.stdout == ""
    assert done.stderr == "no CUDA table: this onnxruntime has no CUDA\n"


def test_what_it_records_without_a_gpu(
    table: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "results.md"
    page.write_text("# Results\n")
    monkeypatch.setattr(table, "PAGE", page)
    monkeypatch.setattr(table, "why_not", lambda: "no GPU")
    monkeypatch.setattr(sys, "argv", ["cuda_table.py", "--write"])
    for _ in range(2):
        assert table.main() == 3
    assert page.read_text().count("Still to be run") == 1


def test_the_table_on_the_cpu(
    table: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything but the device: the float16 models run on the CPU too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = table.measure("digits", SAMPLES / "digits_mlp.onnx", tmp_path, 0.1, "cpu", 2)
    assert [v.name for v in found["good"]][:2] == ["float32", "effdl fp16-cuda"]
    text = table.markdown([found], "a GPU")
    assert "| digits, batch 2 | float32 |" in text
    assert "Machine: a GPU, ONNX Runtime" in text
    for variant in found["good"][1:]:
        assert 0 < variant.error < 0.02
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows}) == 1
