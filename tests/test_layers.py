"""Imports go down only, heavy libraries are imported where they may be, every module says what it
is.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {"torch", "diffusers", "transformers", "bitsandbytes", "optimum", "numpy"}
HEAVY |= {"PIL", "safetensors", "numba"}
# The torch line: these may import torch at the top; nothing else does, nor imports one of these
# there.
TORCH = ("fluxcli.engine", "fluxcli.run.session", "fluxcli.run.saving")
TORCH += (
    "quant.linear",
    "quant.codecs",
    "quant.block_scaled",
    "quant.codes",
    "quant.gguf_blocks",
    "quant.int8_products",
    "quant.kernels",
    "quant.nf4",
    "quant.bake",
    "quant.deltas",
    "quant.merging",
    "quant.rotated",
    "quant.scales",
)
# Of the heavy ones; the others are slow, and not always needed.
AT_THE_TOP = {"torch", "numpy", "safetensors"}

# Packages and lone modules from the ground up; what shares a floor does not import each other.
FLOORS = [
    ["quant"],
    ["fluxcli.errors", "fluxcli.events", "fluxcli.signals", "fluxcli.paths"],
    ["fluxcli.kept_files", "fluxcli.learned", "fluxcli.request"],
    ["fluxcli.pictures", "fluxcli.plan", "fluxcli.models"],
    ["fluxcli.resolve"],
    ["fluxcli.engine"],
    ["fluxcli.run"],
    ["fluxcli.api", "fluxcli.cli"],
    ["fluxcli.__main__"],
]
LEVEL = {place: level for level, places in enumerate(FLOORS) for place in places}
NEIGHBOURS = {"fluxcli.errors", "fluxcli.events", "fluxcli.signals", "fluxcli.paths"}
STDLIB_ONLY = (
    "fluxcli.request",
    "fluxcli.plan",
    "fluxcli.errors",
    "fluxcli.events",
    "fluxcli.signals",
    "fluxcli.paths",
    "fluxcli.kept_files",
    "fluxcli.learned",
)


def sources() -> dict[str, Path]:
    paths = [path for package in ("quant", "fluxcli") for path in (ROOT / package).rglob("*.py")]
    names = {
        ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p
        for p in paths
    }
    return dict(sorted(names.items()))


def place_of(module: str) -> str:
    """The package or lone module of the table that a module belongs to."""
    return next((place for place in LEVEL if module == place or module.startswith(place + ".")), "")


def imports(path: Path, *, top_level: bool) -> set[str]:
    """Modules that a file imports (all of them, or those at module level outside TYPE_CHECKING)."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level else ast.walk(tree)
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and getattr(block.test, "id", "") == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    found = set()
    for node in nodes:
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_the_table_has_a_place_for_every_module():
    assert [module for module in sources() if not place_of(module)] == ["fluxcli"]


@pytest.mark.parametrize(("module", "path"), sources().items())
def test_imports_go_down(module, path):
    here = place_of(module)
    found = imports(path, top_level=False)
    for imported in found & set(sources()) - set(LEVEL) | found & NEIGHBOURS:
        there = place_of(imported)
        if not there or there == here or {here, there} <= NEIGHBOURS:
            continue
        assert LEVEL[there] < LEVEL[here], f"{module} imports {imported}"


@pytest.mark.parametrize(("module", "path"), sources().items())
def test_nothing_heavy_at_module_level_above_the_torch_line(module, path):
    tops = {name.partition(".")[0] for name in imports(path, top_level=True)}
    assert tops & HEAVY <= (AT_THE_TOP if module.startswith(TORCH) else set())
    if module.startswith(STDLIB_ONLY):
        assert tops <= set(sys.stdlib_module_names) | {"quant", "fluxcli"}


def loaded_by(code: str) -> set[str]:
    """The top-level names of the modules that this code loads in a new interpreter.

    What the interpreter itself loads at its start, for editable installs say, does not count.
    """
    code = f"import sys; before = set(sys.modules)\n{code}\n"
    code += "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    command = [sys.executable, "-c", code]
    run = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    return set(run.stdout.splitlines()[-1].split())


def test_importing_every_module_above_the_torch_line_loads_nothing_heavy():
    modules = [
        module for module in sources() if not module.startswith((*TORCH, "fluxcli.__main__"))
    ]
    assert "fluxcli.cli.app" in modules and "fluxcli.run.dispatch" in modules
    code = f"import importlib\nfor module in {modules}: importlib.import_module(module)"
    assert not loaded_by(code) & HEAVY


TYPER = {  # and what it stands on
    "typer",
    "rich",
    "click",
    "annotated_doc",
    "shellingham",
    "pygments",
    "markdown_it",
    "mdurl",
    "typing_extensions",
}


def test_help_loads_the_standard_library_and_typer_alone():
    found = loaded_by("from fluxcli.cli.app import run; run(['--help'])")
    assert found <= set(sys.stdlib_module_names) | TYPER | {"quant", "fluxcli", "__main__"}
    assert {"typer", "fluxcli"} <= found


def test_a_plan_for_another_card_loads_no_torch():
    found = loaded_by(
        "from fluxcli.cli.app import run; assert run(['plan', '--card', '12GiB:sm89']) == 0"
    )
    assert not found & HEAVY and "fluxcli" in found


def test_every_module_says_what_it_is():
    assert not [
        module
        for module, path in sources().items()
        if not ast.get_docstring(ast.parse(path.read_text()))
    ]
