"""Exit codes: every error has one, every code has one meaning, and the documents say which."""

import ast
import importlib
import re
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest

from fluxcli import errors
from fluxcli.cli.app import explain_end
from fluxcli.errors import ExitCode, FluxError
from quant.errors import CheckpointError, ExplainedError
from tests.support.helpers import ROOT

KINDS = FluxError.__subclasses__()


def test_every_error_has_a_code_of_its_own_and_every_code_an_error():
    codes = [kind.exit_code for kind in KINDS]
    assert len(set(codes)) == len(codes)
    assert set(codes) == set(ExitCode) - {ExitCode.OK, ExitCode.BUG}


def test_the_tree_in_the_docstring_is_the_tree():
    drawn = dict(re.findall(r"[├└]── (\w+) +(\d)", errors.__doc__))
    assert drawn == {kind.__name__: str(int(kind.exit_code)) for kind in KINDS}


def test_the_documents_name_each_code_and_no_other():
    text = (ROOT / "docs" / "batch-and-worker.md").read_text("utf-8")
    table = {int(code) for code in re.findall(r"^\| *`?(\d+)`? *\|", text, re.MULTILINE)}
    assert {int(code) for code in ExitCode} <= table
    assert table <= {int(code) for code in ExitCode} | {130, 143, 141}


@pytest.mark.parametrize("kind", [*KINDS, CheckpointError])
def test_an_error_is_what_which_and_why(kind):
    error = kind("it broke", which="x.png", why="no reason", hint="do y")
    ended = explain_end(error)
    assert (ended.message, ended.hint) == ("it broke (x.png): no reason", "do y")
    assert ended.exit_code == getattr(kind, "exit_code", ExitCode.INPUT_FILE)
    assert (
        str(kind("it broke")) == "it broke"
        and str(kind("it broke", why="no reason")) == "it broke: no reason"
    )


@pytest.mark.parametrize(
    "error, code",
    [
        (MemoryError(), ExitCode.DOES_NOT_FIT),
        (
            type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory"),
            ExitCode.DOES_NOT_FIT,
        ),
        (OSError(28, "No space left on device"), ExitCode.OUTPUT),
        (ModuleNotFoundError("No module named 'torch'"), ExitCode.DEVICE),
        (ZeroDivisionError("division by zero\nsecond line"), ExitCode.BUG),
    ],
)
def test_what_libraries_raise_has_a_code_and_one_line(error, code):
    ended = explain_end(error)
    assert ended.exit_code == code and "\n" not in ended.message and ended.hint


# An error says by itself what to do where its words name what is allowed.
NAMES_THE_ALLOWED = re.compile(
    r"known are | is not | is none of |the nearest are |exclude each other"
)
# Errors whose class knows a hint, or must be given one.
HAVE_USUAL_HINTS = ("CheckpointError", "ForeignFile", "Misunderstood", "RemoteError")


def find_subclasses(kind: type[ExplainedError]) -> Iterator[type[ExplainedError]]:
    for each in kind.__subclasses__():
        yield each
        yield from find_subclasses(each)


def find_errors_without_hint(file: Path, names: Collection[str]) -> Iterator[str]:
    """Yield where a file makes an error of these classes without a hint, nor words that do."""
    tree = ast.parse(file.read_text("utf-8"))
    assigned = {}  # the texts called "why", by their lines
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "why":
            assigned[node.lineno] = ast.unparse(node.value)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or ast.unparse(node.func) not in names:
            continue
        given = {each.arg for each in node.keywords}
        nearest = max((line for line in assigned if line < node.lineno), default=0)
        words = ast.unparse(node) + assigned.get(nearest, "")
        is_silent = ast.unparse(node.args[0]) == "''"  # where there simply is no worker
        if not ("hint" in given or is_silent or NAMES_THE_ALLOWED.search(words)):
            yield f"{file.relative_to(ROOT)}:{node.lineno}"


def test_every_error_has_a_hint_or_names_what_is_allowed():
    importlib.import_module("fluxcli.run.client")  # it has errors of its own
    names = {kind.__name__ for kind in find_subclasses(ExplainedError)} - {*HAVE_USUAL_HINTS}
    sources = [file for top in ("fluxcli", "quant") for file in (ROOT / top).rglob("*.py")]
    found = [place for file in sources for place in find_errors_without_hint(file, names)]
    assert len(sources) > 100 and found == []
