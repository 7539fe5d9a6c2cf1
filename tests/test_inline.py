"""`--show`: what a terminal can show, or a word on why nothing is shown."""

import fcntl
import os
import pty
import struct
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fluxcli.cli import inline
from fluxcli.pictures.image import encode
from quant.errors import MissingLibrary
from tests.support.invariant import assert_failed, call
from tests.support.server import Interpreters, Server
from tests.support.terminals import read_until

pytestmark = pytest.mark.skipif(os.name == "nt", reason="terminals of POSIX")
SMALL = ("generate", "a red circle", "-p", "tiny", "--steps", "1", "--size", "64", "--seed", "1")
OPTIONS = {"show": True, "json_output": False, "events": False, "quiet": False}
ASKS_KIND = b"\x1b[c"  # DA1: what kind of terminal is it?
ASKS_KITTY = b"\x1b_G"


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """Both ends of a terminal of 80 by 24 cells, each of 8 by 16 pixels."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 640, 384))
    yield ours, theirs
    for end in (ours, theirs):
        os.close(end)


def run(
    commands: Server | Interpreters, terminal: tuple[int, int], *more: str, answers: dict
) -> bytes:
    """What a terminal is sent; it answers questions as it is told."""
    ours, theirs = terminal
    process = commands.start(
        "-m", "fluxcli", *SMALL, "--show", "-o", "x.png", *more,
        stdin=theirs, stdout=theirs, stderr=theirs,
        environment={"TERM": "xterm-256color", "COLORTERM": "truecolor", "FLUX_WORKER": "off"},
    )  # fmt: skip
    seen = b""
    for question, answer in answers.items():
        seen += read_until(ours, question, within_s=60)
        assert question in seen
        os.write(ours, answer)
    end = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < end:  # who writes waits for who reads
        seen += read_until(ours, b"\n", within_s=0.2)
    assert process.wait(1) == 0
    while found := read_until(ours, b"\0", within_s=0.1):
        seen += found
    return seen


def test_two_colours_a_cell_where_the_terminal_says_nothing(commands, terminal):
    seen = run(commands, terminal, "-q", answers={ASKS_KIND: b"\x1b[?62c", ASKS_KITTY: b"?"})
    assert b"x.png" in seen and seen.count("\u2580".encode()) > 100
    assert seen.count(b"\n") <= 26 and b"\x1bP" not in seen


def test_sixel_where_the_terminal_knows_it(commands, terminal):
    seen = run(commands, terminal, answers={ASKS_KIND: b"\x1b[?62;4c"})
    assert b"\x1bP" in seen and "\u2580".encode() not in seen


def test_where_nothing_can_be_shown_that_is_said(capsys):
    made = call(capsys, *SMALL, "--show", "-o", "x.png")
    assert made.stdout == "x.png\n" and "--show does nothing here" in made.stderr
    made = call(capsys, *SMALL, "--show", "-q", "-o", "y.png")
    assert made.stdout == "y.png\n" and not made.stderr


@pytest.mark.parametrize("other", ["--json", "--events"])
def test_it_excludes_what_is_for_programs(capsys, other):
    assert other in assert_failed(call(capsys, *SMALL, "--show", other), 2)


@pytest.fixture
def on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inline.console, "is_terminal", lambda stream: stream is not sys.__stdin__)
    monkeypatch.setenv("TERM", "xterm")


def test_without_the_extra_it_is_exit_8_before_anything_is_drawn(
    capsys, monkeypatch, on_a_terminal
):
    for name in ("textual_image", "textual_image.renderable"):
        monkeypatch.setitem(sys.modules, name, None)
    said = assert_failed(call(capsys, *SMALL, "--show", "-o", "x.png"), 8)
    assert "pip install 'fluxcli[show]'" in said and not Path("x.png").exists()
    with pytest.raises(MissingLibrary):
        inline.choose_show(OPTIONS)


def test_a_dumb_terminal_shows_nothing(capsys, monkeypatch, on_a_terminal):
    monkeypatch.setenv("TERM", "dumb")
    assert inline.choose_show(OPTIONS) is None
    assert "does nothing here" in capsys.readouterr().err


def test_a_picture_that_cannot_be_shown_ends_nothing(capsys, on_a_terminal):
    show = inline.choose_show(OPTIONS)
    stdin = sys.__stdin__
    show("missing.png")
    assert "missing.png cannot be shown" in capsys.readouterr().err
    pixels = np.full((64, 64, 3), 200, np.uint8)
    Path("x.png").write_bytes(encode(pixels, "png", quality=1, metadata=None))
    show("x.png")
    shown = capsys.readouterr()
    assert shown.out and not shown.err and sys.__stdin__ is stdin
