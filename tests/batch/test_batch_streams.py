"""Rows that come one by one: stdin and named pipes."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fluxcli.errors import ExitCode
from tests.support.batches import FAKE, PAINTED, failed_rows, stdin
from tests.support.invariant import assert_failed, call, files


@pytest.mark.serial
@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_a_picture_is_drawn_before_the_next_prompt_is_written_and_a_signal_ends_the_waiting(
    commands,
):
    process = commands.start(
        "-c", PAINTED, "generate", "--from", "-", *FAKE, "--seed", "1", stdin=subprocess.PIPE
    )
    watchdog = threading.Timer(60, process.kill)  # rather a failure than a hang
    watchdog.start()
    for prompt in ("a fox", "an owl", "a bee"):
        process.stdin.write(f"{prompt}\n")
        process.stdin.flush()
        assert process.stdout.readline() == f"{prompt.replace(' ', '-')}-1.png\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == -signal.SIGINT
    watchdog.cancel()
    out, err = process.communicate()
    assert out == "" and "Traceback" not in err and "error" not in err and len(files(Path())) == 3


def test_stdin_names_its_rows_and_a_terminal_or_a_closed_one_is_refused(drawn, capsys, monkeypatch):
    stdin(monkeypatch, b'{"prompt": "a", "seed": 1}\n\n[]\n')
    result = call(capsys, "generate", "--from", "-", *FAKE)
    assert failed_rows(result)[2].startswith("stdin:3: ") and result.stdout == "a-1.png\n"
    stdin(monkeypatch, b"never read", terminal=True)
    assert "--from prompts.txt" in assert_failed(
        call(capsys, "generate", "--from", "-"), ExitCode.USAGE
    )
    monkeypatch.setattr(sys, "stdin", None)
    assert "closed" in assert_failed(call(capsys, "generate", "--from", "-"), ExitCode.USAGE)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes")
def test_a_named_pipe_is_read_to_its_end(drawn, capsys, commands):
    os.mkfifo("p.txt")
    writer = commands.start("-c", "open('p.txt', 'w').write('a\\nb\\n')")
    result = call(capsys, "generate", "--from", "p.txt", *FAKE, "--seed", "1")
    assert result.stdout == "a-1.png\nb-1.png\n" and writer.wait(10) == 0
    writer.communicate()
