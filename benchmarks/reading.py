"""How much the code asks of a reader, in figures: python -m benchmarks.reading [--root FOLDER]
[--json]

The figures say where to look; no rule is made of them. From the files of quant/ and fluxcli/ of a
checkout: tokens and code lines (lines that hold a token that is neither comment nor docstring),
conditional expressions and comprehensions for each 1,000 code lines, lines over 100 columns, the
densest files, and the import graph at file level: its arrows, and its floors, which is how many
files the longest chain of imports has. From one tiny picture that is drawn: functions
that are given the prompt, alone or inside something, and how often an adapter's header is read.
"""

import argparse
import ast
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import tokenize
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

PACKAGES = ("quant", "fluxcli")
COUNTED = (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
LONG_LINE = 100
DEPTH = 3  # how deep inside a value the prompt is looked for
HEADER_READERS = ("read_header", "read_whole_header")  # one of which may call the other
PROMPT = "a red circle on a blue background"


class FileFigures(NamedTuple):
    """What one file asks of a reader."""

    path: str
    tokens: int
    code_lines: int
    conditionals: int
    comprehensions: int
    long_lines: int

    @property
    def tokens_a_line(self) -> float:
        return self.tokens / max(1, self.code_lines)


def measure_file(path: Path, root: Path) -> FileFigures:
    """Count tokens, code lines and the two dense forms of expression of a file."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    docstring_lines = find_docstring_lines(tree)
    tokens = 0
    code_lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in COUNTED and token.start[0] not in docstring_lines:
            tokens += 1
            code_lines.update(range(token.start[0], token.end[0] + 1))
    nodes = list(ast.walk(tree))
    return FileFigures(
        path=str(path.relative_to(root)),
        tokens=tokens,
        code_lines=len(code_lines),
        conditionals=sum(isinstance(node, ast.IfExp) for node in nodes),
        comprehensions=sum(isinstance(node, COMPREHENSIONS) for node in nodes),
        long_lines=sum(len(line) > LONG_LINE for line in text.splitlines()),
    )


def find_docstring_lines(tree: ast.Module) -> set[int]:
    """Return the numbers of the lines that docstrings take."""
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        first = node.body[0] if node.body else None
        is_text = (
            isinstance(first, ast.Expr)
            and isinstance(first.value, ast.Constant)
            and isinstance(first.value.value, str)
        )
        if is_text:
            found.update(range(first.lineno, first.end_lineno + 1))
    return found


def find_sources(root: Path) -> dict[str, Path]:
    """Return the files of the packages by the names of their modules."""
    found = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def find_imports(sources: dict[str, Path]) -> dict[str, set[str]]:
    """Return the project's modules that each module imports, at its top or in a function.

    What is imported for type checkers alone does not count.
    """
    found = {}
    for module, path in sources.items():
        names = set()
        tree = ast.parse(path.read_text(encoding="utf-8"))
        unseen = find_type_checking(tree)
        for node in ast.walk(tree):
            if node in unseen:
                continue
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                taken = inner & set(sources)
                names |= taken or {node.module}
        found[module] = (names & set(sources)) - {module}
    return found


def find_type_checking(tree: ast.Module) -> set[ast.AST]:
    """Return the nodes inside `if TYPE_CHECKING:`."""
    found: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            found.update(ast.walk(node))
    return found


def count_floors(imports: dict[str, set[str]]) -> int:
    """Return how many modules the longest chain of imports has; a circle counts once."""
    heights: dict[str, int] = {}

    def height_of(module: str, above: tuple[str, ...]) -> int:
        if module in above:
            return 0
        if module not in heights:
            below = [height_of(each, (*above, module)) for each in imports[module]]
            heights[module] = 1 + max(below, default=0)
        return heights[module]

    return max(height_of(module, ()) for module in imports)


class Watch:
    """Notes, for each call of a function of the project, whether an argument holds the prompt."""

    def __init__(self, root: Path, adapter: Path) -> None:
        self.folders = tuple(str(root / package) + os.sep for package in PACKAGES)
        self.adapter = str(adapter)
        self.holders: set[tuple[str, str]] = set()  # (file, function)
        self.header_reads = 0

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(self.folders):
            return
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        arguments = [frame.f_locals.get(name) for name in names]
        caller = frame.f_back.f_code.co_name if frame.f_back else ""
        is_read = code.co_name in HEADER_READERS and caller not in HEADER_READERS
        if is_read and str(arguments[0]) == self.adapter:
            self.header_reads += 1
        if any(holds(argument, PROMPT, DEPTH) for argument in arguments):
            self.holders.add((code.co_filename, code.co_qualname))


def holds(value: Any, text: str, depth: int) -> bool:
    """Return whether a value is the text, or has it inside."""
    if isinstance(value, str):
        return value == text
    if depth == 0:
        return False
    inner: Any = ()
    if is_dataclass(value) and not isinstance(value, type):
        inner = [getattr(value, each.name, None) for each in fields(value)]
    elif isinstance(value, dict):
        inner = list(value.values())
    elif isinstance(value, list | tuple):
        inner = value
    return any(holds(each, text, depth - 1) for each in inner)


def watch_one_picture(root: Path, *, with_adapter: bool) -> dict[str, int]:
    """Draw a tiny picture in this process and count; `with_adapter` gives it a small LoRA."""
    import torch
    from safetensors.torch import save_file

    from fluxcli.cli import app

    with tempfile.TemporaryDirectory() as folder:
        adapter = Path(folder).resolve() / "x.safetensors"
        layer = "transformer.transformer_blocks.0.attn.to_q"
        save_file(
            {
                f"{layer}.lora_A.weight": torch.zeros(2, 128),
                f"{layer}.lora_B.weight": torch.zeros(128, 2),
            },
            adapter,
        )
        os.chdir(folder)
        arguments = ["generate", PROMPT, "-p", "tiny", "--size", "64", "--steps", "2", "-q"]
        arguments += ["--no-worker", "--no-cache", "--seed", "1", "-o", "out/"]
        if with_adapter:
            arguments += ["--lora", f"{adapter}:0.5"]
        watch = Watch(root, adapter)
        with contextlib.redirect_stdout(io.StringIO()):
            sys.setprofile(watch)
            try:
                app.app(args=arguments, standalone_mode=False, prog_name="flux")
            finally:
                sys.setprofile(None)
        os.chdir(root)
    return {
        "functions_given_the_prompt": len(watch.holders),
        "files_of_these": len({file for file, _ in watch.holders}),
        "reads_of_the_adapters_header": watch.header_reads,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path.cwd(), help="the checkout")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--watch", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    root = given.root.resolve()
    if given.watch:
        prompt = watch_one_picture(root, with_adapter=False)
        adapter = watch_one_picture(root, with_adapter=True)
        reads = adapter["reads_of_the_adapters_header"]
        print(json.dumps(prompt | {"reads_of_the_adapters_header": reads}))
        return
    files = [measure_file(path, root) for path in find_sources(root).values()]
    imports = find_imports(find_sources(root))
    lines = sum(each.code_lines for each in files)
    tokens = sum(each.tokens for each in files)
    # The picture is drawn in a process of its own, that imports the checkout's packages.
    command = [sys.executable, str(Path(__file__).resolve()), "--watch", "--root", str(root)]
    environment = os.environ | {"PYTHONPATH": str(root)}
    watched = subprocess.run(
        command, env=environment, cwd=root, check=True, capture_output=True, text=True
    )
    figures = {
        "files": len(files),
        "code_lines": lines,
        "tokens": tokens,
        "tokens_a_line": round(tokens / lines, 2),
        "conditionals_per_1000": round(1000 * sum(each.conditionals for each in files) / lines, 1),
        "comprehensions_per_1000": round(
            1000 * sum(each.comprehensions for each in files) / lines, 1
        ),
        "lines_over_100_columns": sum(each.long_lines for each in files),
        "import_floors": count_floors(imports),
        "import_arrows": sum(len(each) for each in imports.values()),
        "readme_lines": len((root / "README.md").read_text(encoding="utf-8").splitlines()),
        **json.loads(watched.stdout.splitlines()[-1]),
    }
    densest = sorted(files, key=lambda each: each.tokens_a_line, reverse=True)[:10]
    figures["densest"] = {each.path: round(each.tokens_a_line, 1) for each in densest}
    if given.json:
        print(json.dumps(figures, indent=1))
        return
    for name, value in figures.items():
        if name != "densest":
            print(f"{name:<30} {value}")
    for path, density in figures["densest"].items():
        print(f"{density:>6} tokens a line  {path}")


if __name__ == "__main__":
    main()
