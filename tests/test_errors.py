"""Exit codes: every error has one, every code has one meaning, and the documents say which."""

import re

import pytest

from fluxcli import errors
from fluxcli.cli.app import explain_end
from fluxcli.errors import ExitCode, FluxError
from quant.errors import CheckpointError
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
