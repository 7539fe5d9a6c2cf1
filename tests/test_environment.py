"""Around the command line: settings files, variables, terminals, streams, broken and absent
dependencies.
"""

import io
import os
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fluxcli.cli import console
from fluxcli.errors import ExitCode
from fluxcli.events import GeneratedImage, Notice, Phase, Saved, Step
from tests.support.helpers import ROOT
from tests.support.invariant import assert_failed, call, paint_instead
from tests.support.terminals import read_until

HEAVY = (
    "torch",
    "diffusers",
    "transformers",
    "numpy",
    "PIL",
    "safetensors",
    "huggingface_hub",
    "psutil",
)
IMAGE = GeneratedImage("x.png", 5, 64, 64, "png", 9, "", "")
posix = pytest.mark.skipif(os.name == "nt", reason="POSIX terminals and shells")


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
    )


def test_help_settings_and_usage_errors_import_nothing_heavy():
    commands = [
        ["--help"],
        ["generate", "--help"],
        ["replay", "-h"],
        ["--version"],
        ["presets"],
        ["presets", "dev"],
        ["generate", "x", "--ar", "0:9"],
        ["generate", "x"],
        ["models", "download", "tiny"],
    ]
    code = f"import sys\nfrom fluxcli.cli.app import run\nfor c in {commands}: run(c)\n"
    code += "print(*sys.modules, sep=chr(10))"
    result = python(code)
    imported = {line.partition(".")[0] for line in result.stdout.splitlines()}
    assert "typer" in imported and "Usage: flux generate" in result.stdout
    assert imported.isdisjoint(HEAVY)


@pytest.fixture(params=["ImportError", "OSError", "RuntimeError"])
def broken_torch(request, tmp_path) -> dict[str, str]:
    """An environment in which `import torch` fails."""
    package = tmp_path / "broken" / "torch"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        f"raise {request.param}('libtorch.so: cannot open shared object file')"
    )
    return {"PYTHONPATH": f"{package.parent}{os.pathsep}{ROOT}"}


def test_with_a_broken_torch_generate_is_exit_8_and_help_works(broken_torch, flux_cold):
    message = assert_failed(
        flux_cold("generate", "a fox", "-p", "tiny", **broken_torch), ExitCode.DEVICE
    )
    assert "torch" in message and "pip install" in message and not list(Path().iterdir())
    if "ImportError" in message:
        completion = {
            "COMP_WORDS": "flux generate --gui",
            "COMP_CWORD": "2",
            "_FLUX_COMPLETE": "complete_bash",
        }
        assert flux_cold(**completion, **broken_torch).stdout.split() == ["--guidance"]
        assert "--guidance" in flux_cold("generate", "--help", **broken_torch).stdout
        assert "\x1b" not in flux_cold("--help", **broken_torch).stdout


def test_malformed_settings_are_exit_2_with_file_and_line(config_folder, capsys):
    config_folder.mkdir(parents=True)
    (config_folder / "config.toml").write_text("steps = 3\nguidance == 4\n")
    message = assert_failed(call(capsys, "generate", "a fox"), ExitCode.USAGE)
    assert str(config_folder / "config.toml") in message and "line 2" in message
    (config_folder / "config.toml").write_text("stepz = 3\n")
    assert "did you mean 'steps'" in assert_failed(call(capsys, "presets", "dev"), ExitCode.USAGE)


def test_a_wrong_variable_is_exit_2_and_named(capsys, monkeypatch):
    monkeypatch.setenv("FLUX_STEPS", "many")
    assert "FLUX_STEPS" in assert_failed(
        call(capsys, "generate", "a fox", "-p", "tiny"), ExitCode.USAGE
    )
    assert call(capsys, "--help").returncode == 0


@pytest.mark.parametrize("home", [None, "", "/proc/none", "a file"])
def test_without_a_usable_home_defaults_hold(home, capsys, monkeypatch, tmp_path):
    paint_instead(monkeypatch)
    for name in ("HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "HF_HOME"):
        monkeypatch.delenv(name)
    if home is not None:
        Path(tmp_path / "file").write_text("")
        monkeypatch.setenv("HOME", home.replace("a file", str(tmp_path / "file")))
    assert "28" in call(capsys, "presets", "dev").stdout
    assert call(capsys, "generate", "a fox", "-p", "tiny", "--seed", "5").stdout == "a-fox-5.png\n"
    assert_failed(call(capsys, "generate", "a fox"), ExitCode.WEIGHTS)


@pytest.mark.parametrize("visible", ["", "9", "nonsense"])
def test_a_device_that_is_not_there_is_exit_8_naming_those_that_are(visible, capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    message = assert_failed(
        call(capsys, "generate", "a fox", "-p", "tiny", "--device", "cuda:63"), ExitCode.DEVICE
    )
    assert "cuda:63" in message and "usable are cpu" in message


def test_offline_no_socket_is_opened_and_a_download_says_so():
    code = """
import socket, sys
from fluxcli.cli.app import run
def refused(*arguments, **options): raise AssertionError("opened a socket")
socket.socket.connect = socket.socket.connect_ex = refused
socket.getaddrinfo = socket.create_connection = refused
small = ["-p", "tiny", "--steps", "1", "--size", "64", "--seed", "1", "-q"]
codes = [run(["generate", "a fox", *small]),
         run(["generate", "a fox", "-q"]), run(["models", "download", "schnell"])]
print(*map(int, codes))
"""
    result = python(code, HF_HUB_OFFLINE="1")
    assert result.stdout.splitlines() == ["a-fox-1.png", "0 3 3"], result.stderr
    assert "opened a socket" not in result.stderr and "offline" in result.stderr.lower()


def _on_a_terminal(monkeypatch: pytest.MonkeyPatch, **environment: str) -> str:
    """What a run's events show on a terminal."""
    import pty

    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    terminal, ours = pty.openpty()
    with open(ours, "w", encoding="utf-8") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        patch.setattr(sys, "stdout", io.StringIO())
        with console.Reporter(started=0.0) as reporter:
            for event in (
                Phase("encode"),
                Notice("lost: x"),
                Phase("denoise"),
                Step(1, 2),
                Step(2, 2),
                Saved(IMAGE),
            ):
                reporter.show(event)
        stream.flush()
        shown = b""
        while select.select([terminal], [], [], 0.3)[0]:
            shown += os.read(terminal, 1 << 16)
    os.close(terminal)
    return shown.decode()


@posix
def test_a_terminal_shows_phase_step_speed_and_time_left(monkeypatch):
    shown = _on_a_terminal(monkeypatch, TERM="xterm-256color")
    assert all(
        word in shown
        for word in ("\x1b[", "step 2 of 2", "s/it", "s left", "flux: x.png: 64x64, seed 5")
    )


@posix
@pytest.mark.parametrize(
    "environment",
    [{"TERM": "dumb"}, {"TERM": "unknown"}, {"TERM": "dumb", "FORCE_COLOR": "1"}],
    ids=str,
)
def test_a_plain_terminal_gets_plain_text(environment, monkeypatch):
    shown = _on_a_terminal(monkeypatch, **environment)
    assert (
        "\x1b" not in shown and "flux: x.png: 64x64, seed 5" in shown and "flux: lost: x" in shown
    )


@posix
def test_no_color_is_a_bar_without_colours(monkeypatch):
    coloured = re.compile(r"\x1b\[[0-9;]*(3[0-7]|38;5;[0-9]+|9[0-7])m")
    assert coloured.search(_on_a_terminal(monkeypatch, TERM="xterm-256color"))
    shown = _on_a_terminal(monkeypatch, TERM="xterm-256color", NO_COLOR="1")
    assert "step 2 of 2" in shown and "\x1b[" in shown and not coloured.search(shown)


def test_off_a_terminal_a_line_now_and_then_says_how_far_it_is(capsys, monkeypatch):
    events = [Phase("load", "transformer"), Phase("denoise"), Step(1, 2), Step(2, 2, 2, 4)]
    with console.Reporter(started=time.perf_counter()) as reporter:
        for event in events:
            reporter.show(event)
    assert capsys.readouterr().err == ""  # it was quick
    monkeypatch.setattr(console, "LINE_EVERY_S", 0)
    for quiet in (False, True):
        with console.Reporter(started=time.perf_counter(), quiet=quiet) as reporter:
            for event in events:
                reporter.show(event)
            reporter.show_bytes(0, 3_000_000_000, "quantize")
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == (0 if quiet else 5)
        if lines:
            assert lines[0] == "flux: load transformer, 0 s so far"
            assert re.fullmatch(r"flux: picture 2 of 4, step 2 of 2, \d+ s left", lines[3])
            assert lines[4].startswith("flux: quantize: 0.0/3.0 GB, ")


@pytest.mark.parametrize(
    "seconds, text",
    [(0.4, "0 s"), (59.6, "1 min"), (200, "3 min 20 s"), (7501, "2 h 5 min"), (7200, "2 h")],
)
def test_times_are_said_as_people_say_them(seconds, text):
    assert console.describe_seconds(seconds) == text


@posix
@pytest.mark.parametrize(
    "environment, code", [({"TERM": "xterm"}, "\x1b[1;31merror:\x1b[0m"), ({"NO_COLOR": "1"}, "")]
)
def test_errors_and_verdicts_are_coloured_on_a_terminal_alone(environment, code, monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"TERM": "xterm"} | environment).items():
        monkeypatch.setenv(name, value)
    terminal, ours = os.openpty()
    with open(ours, "w", encoding="utf-8") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        patch.setattr(sys, "stdout", stream)
        console.error("no such model", "flux models list")
        console.table([("ok", "bad news"), ("broken", "x")], None, as_json=False)
        stream.flush()
        shown = read_until(terminal, b"broken", 10).decode()
    os.close(terminal)
    assert ("\x1b" in shown) == bool(code) and code in shown
    assert ("\x1b[32mok\x1b[0m      bad news" in shown) == bool(code)


def test_off_a_terminal_there_is_text_only_even_when_colour_is_forced(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with console.Reporter(started=0.0) as reporter:
        for event in (Phase("denoise"), Step(1, 2), Saved(IMAGE)):
            reporter.show(event)
    assert "\x1b" not in capsys.readouterr().err
    assert "\\x1b[31m" in assert_failed(
        call(capsys, "generate", "x", "-o", "\x1b[31m.gif"), ExitCode.USAGE
    )


@pytest.mark.parametrize(
    "path, expected", [("ü 🦊.png", "ü 🦊.png".encode()), ("\udcff.png", b"\xff.png")]
)
@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_a_path_that_stdout_cannot_encode_is_its_bytes(path, expected, encoding, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="\n")
    monkeypatch.setattr(sys, "stdout", stream)
    console.data("before")
    console.data(path)
    assert stream.buffer.getvalue() == b"before\n" + expected + b"\n"


@posix
@pytest.mark.parametrize(
    "command, code, word",
    [
        ("presets >&-", 6, "closed"),
        ("presets >/dev/full", 6, "full"),
        ("generate '' --events >&-", 2, "empty"),
        ("generate '' --events >/dev/full", 2, "empty"),
        ("presets nope 2>&-", 2, None),
        ("generate - <&-", 2, "closed"),
    ],
)
def test_streams_that_are_closed_or_full_are_an_exit_code_not_a_crash(command, code, word):
    result = subprocess.run(
        ["sh", "-c", f'exec "$0" -m fluxcli {command}', sys.executable],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    if word is None:
        assert (result.returncode, result.stdout, result.stderr) == (code, "", "")
    else:
        assert word in assert_failed(result, code)
