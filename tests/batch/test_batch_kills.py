"""A batch that is killed at any moment goes on and has every picture once."""

import io
import os
import random
import signal
import sys
import time
from itertools import count
from pathlib import Path

import pytest

from tests.support.batches import (
    FAKE,
    PAINTED,
    SMALL,
    hashes,
    leftovers,
    write,
)
from tests.support.invariant import Fault, call, files, paint_instead

pytestmark = pytest.mark.serial


def write_batch(rows: int, *, seeded: bool = True) -> list[str]:
    """A batch of so many rows and its arguments."""
    write(*({"prompt": f"p{k % 5}"} | ({"seed": k} if seeded else {}) for k in range(rows)))
    return ["generate", "--from", "p.jsonl", *FAKE, "-o", "o/", "--resume"]


def check_complete(rows: int, left: set[str], *, expected: list[str] | None = None) -> None:
    """Every picture is there once and whole, and of temporary files only what the kill left."""
    assert leftovers("o") == left and len(left) <= 1
    assert len(files(Path("o"))) - len(left) == rows
    found = hashes("o")
    assert len(set(found)) == rows and expected in (None, found)


def _killed_at(k: int, arguments: list[str]) -> bool:
    """Run in a child that is killed at the k-th call that writes; whether that call came."""
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.stdout = sys.stderr = io.StringIO()
        with pytest.MonkeyPatch.context() as patch:
            Fault(k, lambda _: os.kill(os.getpid(), signal.SIGKILL)).install(patch)
            from fluxcli.cli import app

            app.run(arguments)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_killed_at_any_write_a_batch_goes_on_and_has_every_picture_once(drawn, capsys):
    kept = set()
    for k in count(1, 7):
        arguments = write_batch(3, seeded=k % 2 == 0)
        for path in Path("o").glob("*"):
            path.unlink()
        killed = _killed_at(k, arguments)
        left = leftovers("o")
        kept.add((len(left), len(files(Path("o"))) - len(left)))
        assert call(capsys, *arguments).returncode == 0
        check_complete(3, left)
        if not killed:
            break
    assert (
        k > 30
        and {done for _, done in kept} == {0, 1, 2, 3}
        and {some for some, _ in kept} == {0, 1}
    )


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_killed_at_any_moment_a_batch_goes_on(capsys, monkeypatch, commands):
    arguments, after, pause_s = write_batch(40), random.randrange(1, 36), random.random() / 50
    process = commands.start("-c", PAINTED, *arguments)
    told = [process.stdout.readline().rstrip() for _ in range(after)]
    time.sleep(pause_s)
    process.kill()
    told += process.communicate()[0].split()
    paint_instead(monkeypatch)
    left, done = leftovers("o"), len(hashes("o"))
    assert after <= len(told) <= done <= 40 and all(Path(path).exists() for path in told), (
        after,
        pause_s,
    )
    result = call(capsys, *arguments)
    assert result.returncode == 0 and len(result.stdout.split()) == 40 - done, (after, pause_s)
    assert call(capsys, *arguments, "-o", "whole/").returncode == 0
    check_complete(40, left, expected=hashes("whole"))


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_killed_a_real_batch_goes_on_with_the_same_pixels(capsys, commands):
    source = write(*({"prompt": "a red circle", "seed": seed} for seed in range(1, 7)))
    arguments = ("generate", "--from", source, *SMALL, "--resume", "--device", "cpu")
    process = commands.start("-m", "fluxcli", *arguments, "-o", "o/")
    assert process.stdout.readline() == "o/a-red-circle-1.png\n"
    process.kill()
    process.communicate()
    left, done = leftovers("o"), len(hashes("o"))
    assert 0 < done < 6
    result = call(capsys, *arguments, "-o", "o/")
    assert result.returncode == 0 and result.stderr.count("is there") == done
    assert call(capsys, *arguments, "-o", "whole/").returncode == 0
    assert hashes("o") == hashes("whole") and len(set(hashes("o"))) == 6 and leftovers("o") == left
