"""Standard streams that are full, closed or nobody's, and folders that are not to be imported from,
in new interpreters.
"""

import functools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fluxcli.errors import ExitCode
from tests.support.helpers import ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/dev/full")
rarely = functools.partial(pytest.param, marks=pytest.mark.exhaustive)
QUICK = "generate x -p tiny --size 64 --steps 1 --seed 1 --no-cache"


def shell(text: str, **environment: str) -> subprocess.CompletedProcess:
    """What bash does with a command line; FLUX in it is the command."""
    command = f"{sys.executable} -m fluxcli"
    return subprocess.run(
        ["bash", "-c", text.replace("FLUX", command)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
    )


@pytest.mark.parametrize(
    "arguments",
    [
        "presets",
        "--version",
        "plan -p tiny",
        *map(rarely, ["--help", "generate --help", "presets dev --json"]),
    ],
)
def test_a_full_stdout_is_exit_6_and_one_error_line(arguments):
    result = shell(f"FLUX {arguments} >/dev/full")
    assert result.returncode == ExitCode.OUTPUT
    error, hint = result.stderr.splitlines()
    assert error == "flux: error: cannot write to stdout: the disk is full."
    assert hint.startswith("hint: ")


@pytest.mark.parametrize("script", ["source_bash", "complete_bash", "source_zsh", "source_fish"])
def test_so_it_is_for_a_shells_completion(script):
    words = {"COMP_WORDS": "flux pre", "COMP_CWORD": "1", "_FLUX_COMPLETE": script}
    result = shell("FLUX >/dev/full", **words)
    assert result.returncode == ExitCode.OUTPUT
    assert result.stderr.startswith("flux: error: cannot write to stdout")


@pytest.mark.parametrize("options", [rarely("-q -o x.png"), "-q -o -", "-q --json -o x.png"])
def test_a_picture_is_kept_where_its_path_cannot_be_told(options):
    result = shell(f"FLUX {QUICK} {options} >/dev/full")
    assert result.returncode == ExitCode.OUTPUT
    assert result.stderr.count("flux: error: ") == 1 and "Traceback" not in result.stderr
    assert Path("x.png").exists() == ("x.png" in options)


@pytest.mark.parametrize("redirected", ["2>/dev/full", rarely("2>&-"), rarely("2> >(true)")])
def test_a_stderr_that_takes_nothing_changes_nothing_else(redirected):
    result = shell(f"FLUX {QUICK} -o x.png {redirected}")
    assert (result.returncode, result.stdout) == (0, "x.png\n")
    assert Path("x.png").stat().st_size > 100
    assert shell(f"FLUX generate {redirected}").returncode == ExitCode.USAGE


@pytest.mark.parametrize(
    "command, code",
    [
        ("FLUX presets >&-", 6),
        ("FLUX generate x -p tiny -o - >&-", 6),
        ("FLUX presets >&- 2>&-", 6),
        ("FLUX generate - -p tiny <&-", 2),
        ("FLUX generate --from - -p tiny <&-", 2),
        ("FLUX --version <&-", 0),
        ("FLUX presets <&- >&- 2>&-", 6),
    ],
)
def test_closed_streams_end_in_a_documented_code(command, code):
    result = shell(command)
    assert result.returncode == code and "Traceback" not in result.stderr


def test_no_file_takes_the_number_of_a_stream_that_is_closed():
    result = shell(f"FLUX {QUICK} -q -o x.png <&- >&- 2>&-")
    assert result.returncode == ExitCode.OUTPUT
    assert Path("x.png").read_bytes().startswith(b"\x89PNG")


def test_a_stdout_that_does_not_block_is_waited_for():
    code = "import os, sys; os.set_blocking(1, False); os.execv(sys.argv[1], sys.argv[1:])"
    helped = shell(f"{sys.executable} -c '{code}' FLUX generate --help | (sleep 1; cat)")
    assert helped.stdout == shell("FLUX generate --help").stdout


def test_nothing_is_imported_from_the_current_folder():
    for module in ("torch", "json", "typing", "signal", "typer", "PIL", "quant"):
        Path(f"{module}.py").write_text("raise SystemExit('the wrong file')")
    assert shell("FLUX --version").returncode == 0
    assert shell(f"FLUX {QUICK} -q").returncode == 0


def test_a_current_folder_that_is_gone_is_said():
    result = shell("mkdir gone; cd gone; rmdir ../gone; FLUX presets")
    assert result.returncode == ExitCode.USAGE and "the current folder is gone" in result.stderr
    assert shell("mkdir gone; cd gone; rmdir ../gone; FLUX --version").returncode == 0


def test_a_pipe_that_is_closed_dies_quietly():
    result = shell("FLUX presets | true; echo ${PIPESTATUS[0]}")
    assert (result.stdout, result.stderr) == (f"{128 + signal.SIGPIPE}\n", "")
