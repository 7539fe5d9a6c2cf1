"""Several processes share a batch."""

import os
import socket
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fluxcli.errors import ExitCode
from fluxcli.run.processes import VARIABLES, Share
from fluxcli.run.processes import count as count_processes
from tests.support.batches import SMALL, hashes, split, stdin, write
from tests.support.invariant import assert_failed, call, files
from tests.support.server import Interpreters, Server


def processes(commands: Server | Interpreters, arguments: list[str], folder: str) -> list:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = []
    for rank in ("0", "1"):
        variables = shared | {"RANK": rank, "LOCAL_RANK": rank}
        started.append(
            commands.start("-m", "fluxcli", *arguments, "-o", folder, environment=variables)
        )
    return started


@pytest.mark.skipif(os.name == "nt", reason="gloo")
def test_two_processes_draw_together_what_one_does(capsys, commands):
    rows = [{"prompt": "a red circle", "seed": seed} for seed in range(1, 6)]
    source = write(*rows[:3], "{", rows[3], rows[4])  # row 4 is the second process's
    arguments = ["generate", "--from", source, *SMALL, "--device", "cpu"]
    both = processes(commands, arguments, "both/")
    assert call(capsys, *arguments, "-o", "one/").returncode == 7
    results = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [7, 0], results
    assert [out.split() for out, _ in results] == [
        [f"both/a-red-circle-{seed}.png" for seed in seeds] for seeds in ((1, 3, 4), (2, 5))
    ]
    assert hashes("both") == hashes("one") and len(files(Path("both"))) == 5
    (main, first), (other, second) = [(split(err)[0], err) for _, err in results]
    assert not main and list(other) == [4] and other[4].startswith("p.jsonl:4: ")
    assert "1 of 6 rows failed (p.jsonl)." in first and "flux: error" not in second
    assert "6 rows: 5 done, 1 failed, 0 skipped; 5 pictures" in first and " rows: " not in second


@pytest.mark.serial
@pytest.mark.skipif(os.name == "nt", reason="gloo")
def test_a_process_whose_partner_is_killed_says_so(commands):
    source = write(
        *({"prompt": "a red circle", "seed": 1, "steps": 1 if k % 2 else 2000} for k in (1, 2))
    )
    arguments = ["generate", "--from", source, "-p", "tiny", "--size", "64", "--device", "cpu"]
    main, other = processes(commands, arguments, "both/")
    assert main.stdout.readline() == "both/a-red-circle-1.png\n"
    other.kill()
    other.communicate()
    _, said = main.communicate(timeout=60)
    assert (
        main.returncode == 7
        and "flux: error: another process has ended" in said
        and "--resume" in said
    )


def test_a_variable_that_a_scheduler_left_is_no_batch_of_many(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert count_processes() == 1 and list(Share().take(iter("abc"))) == list("abc")


def test_no_process_waits_too_short_for_the_others(monkeypatch):
    import accelerate

    asked = {}
    for name in (*VARIABLES, "WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    state = SimpleNamespace(process_index=1, num_processes=2, is_main_process=False)
    monkeypatch.setattr(
        accelerate, "PartialState", lambda **options: asked.update(options) or state
    )
    assert list(Share().take(iter("abc"))) == ["b"]
    assert asked["timeout"] >= timedelta(days=1) and asked["backend"] == "gloo" and asked["cpu"]


def test_processes_that_do_not_find_each_other_are_an_error(monkeypatch, capsys):
    import accelerate

    for name in (*VARIABLES, "WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    # a RuntimeError of torch's
    monkeypatch.setattr(accelerate, "PartialState", lambda **_: torch.tensor(1).view(5))
    result = call(capsys, "generate", "--from", write("a", name="p.txt"), *SMALL)
    assert "do not find each other" in assert_failed(result, ExitCode.DEVICE)


def test_several_processes_cannot_share_stdin(capsys, monkeypatch):
    for name in (*VARIABLES, "WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    stdin(monkeypatch, b"a\n")
    assert "cannot be shared" in assert_failed(
        call(capsys, "generate", "--from", "-"), ExitCode.USAGE
    )
    os.mkfifo("rows.jsonl")
    writing = os.open("rows.jsonl", os.O_RDWR)
    assert "cannot be shared" in assert_failed(
        call(capsys, "generate", "--from", "rows.jsonl"), ExitCode.USAGE
    )
    os.close(writing)
