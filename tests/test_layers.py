"""The rooms of the house: imports go downward only, without cycles; only render/ prints."""

import ast
from functools import cache
from pathlib import Path

import pytest

from tests.support import ROOT

PACKAGE = ROOT / "effdl"
ORDER = (
    "__main__",
    "api",
    "cli",
    "render",
    "search",
    "opportunities",
    "layerwise",
    "pipeline",
    "forms",
    "workpiece",
    "gate",
    "run_options",
    "recipe",
    "passes",
    "train",
    "observe",
    "measure",
    "data",
    "runtime",
    "solve",
    "graph",
    "upstream",
    "report",
    "errors",
)
FILES = sorted(PACKAGE.rglob("*.py"))


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(f): f for f in FILES}


@cache
def imports(module: str) -> frozenset[str]:
    """Modules of effdl that ``module`` imports, inside functions and for type checking too."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.split(".")[0] == "effdl"}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            if node.module is not None and node.module.split(".")[0] == "effdl":
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    found.add(inner if inner in MODULES else node.module)
    return frozenset(found)


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_every_module_is_in_a_known_room() -> None:
    assert {room(m) for m in MODULES} - {""} <= set(ORDER)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_down(module: str) -> None:
    """``effdl`` itself (the version, the lazy verbs) is above all; its version is for everyone."""
    if module == "effdl":
        return
    # api is called by cli, yet it is the top for whoever scripts: cli and api are one height.
    height = {name: i for i, name in enumerate(ORDER)} | {"api": ORDER.index("cli")}
    mine = height[room(module)]
    for other in imports(module):
        assert other in MODULES, f"{module} imports {other}, which is not there"
        if other == "effdl":
            assert _only_the_version(module), f"{module} imports more than the version from effdl"
            continue
        assert height[room(other)] >= mine, f"{module} imports {other}, which is above it"


def _only_the_version(module: str) -> bool:
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    names = [
        a.name
        for n in ast.walk(tree)
        if isinstance(n, ast.ImportFrom) and n.module == "effdl"
        for a in n.names
        if f"effdl.{a.name}" not in MODULES
    ]
    plain = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    return names == ["__version__"] and "effdl" not in plain


def test_no_cycles() -> None:
    """No module imports itself by way of others."""
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join((*way[way.index(module) :], module))
        if module in done:
            return
        for other in sorted(imports(module) & set(MODULES) - {"effdl"}):
            visit(other, (*way, module))
        done.add(module)

    for module in sorted(MODULES.keys() - {"effdl"}):
        visit(module, ())


def is_pass(module: str) -> bool:
    parts = module.split(".")[2:]
    file = MODULES[module]
    plain = bool(parts) and file.name != "__init__.py" and parts != ["base"]
    return (
        module.startswith("effdl.passes.") and plain and not any(p.startswith("_") for p in parts)
    )


@pytest.mark.parametrize("module", sorted(m for m in MODULES if is_pass(m)))
def test_passes_import_no_other_pass(module: str) -> None:
    folder = module.rpartition(".")[0]
    for other in imports(module):
        assert not is_pass(other), f"{module} imports the pass {other}"
        assert other != "effdl.passes", f"{module} imports the registry"
        if room(other) == "passes" and other != "effdl.passes.base":
            assert other.rpartition(".")[0] == folder, f"{module} imports {other} of another folder"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_only_render_and_cli_print(module: str) -> None:
    if room(module) in ("render", "cli"):
        return
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"{module}:{node.lineno} prints"
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = (
                [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            )
            assert "rich" not in {str(n).split(".")[0] for n in names}, f"{module} imports rich"


@pytest.mark.parametrize("module", sorted(m for m in MODULES if is_pass(m)))
def test_passes_catch_nothing_silently(module: str) -> None:
    """No bare ``except`` and none for everything: a bug must show."""
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type is not None else "everything"
            assert caught not in ("everything", "Exception", "BaseException"), (
                f"{module}:{node.lineno}"
            )


def test_upstream_private_names_stay_in_one_file() -> None:
    """``from onnxscript.x._y import z`` breaks with the next release: only upstream.py may."""
    for module, file in MODULES.items():
        if room(module) == "upstream":
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or node.module is None:
                continue
            if node.module.split(".")[0] in ("onnx", "onnx_ir", "onnxscript", "onnxruntime"):
                names = [*node.module.split("."), *(a.name for a in node.names)]
                private = [n for n in names if n.startswith("_")]
                assert not private, f"{module} imports the private {private[0]} of {node.module}"
