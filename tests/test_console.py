"""What is printed where: data on stdout only, the rest on stderr, terminal or not."""

import io
import json
import os
import select
import sys
import time

import pytest

from fluxcli.cli import console
from fluxcli.events import Done, GeneratedImage, Notice, Phase, Saved, Step, Summary

pty = pytest.importorskip("pty")
IMAGE = GeneratedImage("a.png", 1, 64, 64, "png", 10, "0" * 64, "1" * 64)
RUN = [
    Phase("encode"),
    Phase("denoise"),
    Step(1, 2),
    Step(2, 2),
    Notice("a word"),
    Phase("save"),
    Saved(IMAGE),
]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch):
    """A function that makes stderr a terminal and stdout a buffer, and returns what reads that
    terminal.
    """
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    ours, theirs = pty.openpty()
    stream = os.fdopen(theirs, "w", buffering=1)

    def shown() -> str:
        stream.flush()
        text = b""
        while select.select([ours], [], [], 0.3)[0]:
            text += os.read(ours, 65536)
        return text.decode()

    def install():
        # not in the set-up: pytest sets it again before the test
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr(sys, "stdout", io.StringIO())
        return shown

    yield install
    monkeypatch.undo()
    stream.close()
    os.close(ours)


def report(**options: object) -> console.Reporter:
    with console.Reporter(started=time.perf_counter(), **options) as reporter:
        for event in RUN:
            reporter.show(event)
            if isinstance(event, Step) and sys.stderr.isatty():
                time.sleep(0.2)  # the bar is drawn ten times a second
    return reporter


def test_paths_go_to_stdout_while_the_bar_is_on_a_terminal(terminal):
    shown = terminal()
    report()
    assert sys.stdout.getvalue() == "a.png\n"
    text = shown()
    assert "step 2 of 2" in text and "s/it" in text and "s left" in text
    assert "a word" in text and "64x64, seed 1" in text


def test_every_event_goes_to_stdout_while_the_bar_is_on_a_terminal(terminal):
    shown = terminal()
    report(events=True)
    kinds = [json.loads(line)["event"] for line in sys.stdout.getvalue().splitlines()]
    assert kinds == ["phase", "phase", "step", "step", "notice", "phase", "saved"]
    assert '"event"' not in shown()


@pytest.mark.parametrize("kind", ["dumb", "unknown"])
def test_a_plain_terminal_gets_plain_text(terminal, monkeypatch, kind):
    monkeypatch.setenv("TERM", kind)
    shown = terminal()
    report()
    text = shown()
    assert "a word" in text and "\x1b" not in text


def test_seconds_add_up_per_phase():
    reporter = report(quiet=True)
    phases = ("load", "encode", "denoise", "save")
    assert set(reporter.timings_s) == {*phases, "total"}
    assert sum(reporter.timings_s[name] for name in phases) == pytest.approx(
        reporter.timings_s["total"], abs=0.01
    )


def test_control_characters_of_a_stranger_reach_no_terminal(capsys):
    console.data_json({"prompt": "\x9b31m\x7f\x1b[2J"}, indent=2)
    console.error("bad \x1b[2J name\n second line", "\x9b31m")
    captured = capsys.readouterr()
    assert not set("\x9b\x7f\x1b") & set(captured.out + captured.err)
    assert json.loads(captured.out) == {"prompt": "\x9b31m\x7f\x1b[2J"}
    assert captured.err.count("\n") == 2


def test_a_terminal_shows_a_path_once(terminal, monkeypatch, capsys):
    shown = terminal()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    report()
    text = shown()
    assert "64x64, seed 1" in text and "a.png" not in text
    assert sys.stdout.getvalue() == "a.png\n"


def test_the_seconds_of_a_picture_are_its_own_and_the_total_comes_once_at_the_end(capsys):
    images = (IMAGE, IMAGE)
    done = Done(images, request={}, plan={}, timings_s={}, peak_memory={}, versions={})
    with console.Reporter(started=time.perf_counter() - 100) as reporter:
        for event in (Saved(IMAGE, seconds=22.0), Saved(IMAGE, seconds=21.5), done):
            reporter.show(event)
    assert capsys.readouterr().err.splitlines() == [
        "flux: a.png: 64x64, seed 1, 22.0 s",
        "flux: a.png: 64x64, seed 1, 21.5 s",
        "flux: 2 pictures in 100.0 s",
    ]


def test_one_is_no_plural(capsys):
    summary = Summary(rows=1, done=1, failed=0, skipped=0, pictures=1, seconds=1.0)
    with console.Reporter(started=time.perf_counter()) as reporter:
        reporter.show(summary)
    assert "1 row: 1 done, 0 failed, 0 skipped; 1 picture in 1.0 s" in capsys.readouterr().err
