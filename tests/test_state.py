"""What is kept between runs: whole or not at all, never an error; and one run at a time on a device."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from fluxcli import paths
from fluxcli.cli import console
from fluxcli.engine import device as hardware
from fluxcli.errors import ExitCode
from fluxcli.events import Phase
from fluxcli.run import lock, session
from fluxcli.run.lock import DeviceLock
from tests.support.helpers import ROOT, machine
from tests.support.invariant import assert_failed, call, files

CARD = "cuda GPU-1234"
HOLDER = """
import sys
from fluxcli.run.lock import DeviceLock
lock = DeviceLock(sys.argv[1])
assert lock.acquire()
print("held", flush=True)
sys.stdin.readline()
lock.release()
"""
WRITER = """
import sys
from fluxcli.run.lock import update
print("ready", flush=True)
sys.stdin.readline()
for k in range(60):
    update("peaks", {f"{sys.argv[1]} {k}": "x" * 5000})
"""


def process(code: str, *arguments: str) -> subprocess.Popen:
    pipe = subprocess.PIPE
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    started = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdin=pipe, stdout=pipe, text=True, env=environment
    )
    assert started.stdout.readline() in ("held\n", "ready\n")
    return started


@pytest.fixture
def hold() -> Iterator[Callable[[str], subprocess.Popen]]:
    """Another process that holds a device until it is told otherwise."""
    started: list[subprocess.Popen] = []

    def holder(identity: str) -> subprocess.Popen:
        started.append(process(HOLDER, identity))
        return started[-1]

    yield holder
    for each in started:
        each.kill()
        each.communicate()


@pytest.fixture(params=["/proc/none", "a file", "no home"])
def nowhere(request, monkeypatch, tmp_path) -> None:
    """A cache folder that cannot be made."""
    if request.param == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    else:
        (tmp_path / "file").write_text("kept")
        monkeypatch.setenv("XDG_CACHE_HOME", request.param.replace("a file", str(tmp_path / "file")))


# --- the folder


@pytest.mark.skipif(os.name == "nt", reason="POSIX homes")
@pytest.mark.parametrize(
    ("system", "platform", "environment", "expected"),
    [
        ("posix", "linux", {"XDG_CACHE_HOME": "/x"}, "/x/flux"),
        ("posix", "linux", {}, "/home/me/.cache/flux"),
        ("posix", "linux", {"XDG_CACHE_HOME": ""}, "/home/me/.cache/flux"),
        ("posix", "darwin", {}, "/home/me/Library/Caches/flux"),
        ("nt", "win32", {"LOCALAPPDATA": "/c/local"}, "/c/local/flux"),
        ("nt", "win32", {}, "/home/me/AppData/Local/flux"),
    ],
)
def test_the_folder_is_the_platforms(system, platform, environment, expected, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setattr(paths, "os", SimpleNamespace(name=system, path=os.path, devnull=os.devnull))
    monkeypatch.setattr(paths, "sys", SimpleNamespace(platform=platform))
    assert paths.cache_folder(environment) == Path(expected)


# --- what is remembered


def test_what_was_written_is_read_and_other_entries_stay():
    assert lock.read("speeds") == {}
    lock.update("speeds", {"a": 1, "b": [1, 2]})
    lock.update("speeds", {"b": {"ü": 2.5}})
    assert lock.read("speeds") == {"a": 1, "b": {"ü": 2.5}} and lock.read("peaks") == {}
    assert list(files(paths.cache_folder())) == ["speeds.json"]


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b"7", b"\xff\xfe", b'{"a": 1', b"[" * 100_000], ids=len)
def test_a_corrupt_file_is_an_empty_one_and_is_replaced(damage):
    lock.update("peaks", {"a": 1})
    (paths.cache_folder() / "peaks.json").write_bytes(damage)
    assert lock.read("peaks") == {}
    lock.update("peaks", {"b": 2})
    assert lock.read("peaks") == {"b": 2}


def test_a_folder_in_the_place_of_the_file_is_no_error():
    (paths.cache_folder() / "peaks.json").mkdir(parents=True)
    lock.update("peaks", {"a": 1})
    assert lock.read("peaks") == {} and files(paths.cache_folder()) == {}


@pytest.mark.parametrize("owner, name", [(os, "replace"), (os, "fsync"), (Path, "mkdir")])
def test_an_update_that_fails_leaves_the_old_file_and_nothing_else(owner, name, monkeypatch):
    lock.update("peaks", {"a": 1})
    before = files(paths.cache_folder())

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(owner, name, full)
    lock.update("peaks", {"b": 2})
    assert files(paths.cache_folder()) == before


def test_without_a_place_nothing_is_remembered_and_nothing_said(nowhere, tmp_path, capfd):
    before = files(tmp_path)
    lock.update("peaks", {"a": 1})
    assert lock.read("peaks") == {} and capfd.readouterr() == ("", "")
    assert files(tmp_path) == before and list(Path().iterdir()) == []


def test_two_writers_leave_whole_files_only():
    writers = [process(WRITER, name) for name in ("one", "other")]
    for each in writers:
        each.stdin.write("go\n")
        each.stdin.flush()
    path, seen = paths.cache_folder() / "peaks.json", 0
    while any(each.poll() is None for each in writers):
        if path.exists():
            seen = max(seen, len(json.loads(path.read_text())))  # raises for half a file
    assert [each.wait() for each in writers] == [0, 0]
    for each in writers:
        each.communicate()
    found = lock.read("peaks")
    assert seen and {"one 59", "other 59"} & set(found) and len(found) >= 60
    assert list(files(paths.cache_folder())) == ["peaks.json"]


# --- the lock


def free(identity: str) -> bool:
    """Whether the lock can be had at once; it is given back."""
    lock = DeviceLock(identity)
    found = lock.acquire()
    lock.release()
    return found


def test_a_free_device_is_taken_and_given_back():
    lock = DeviceLock(CARD)
    for _ in range(2):
        assert lock.acquire()
        assert not DeviceLock(CARD).acquire()
        lock.release()
    assert free(CARD)


def test_the_second_waits_and_gets_it(hold):
    other, lock = hold(CARD), DeviceLock(CARD)
    assert not lock.acquire()
    threading.Timer(0.2, lambda: print("enough", file=other.stdin, flush=True)).start()
    assert lock.acquire(-1) and other.wait() == 0
    lock.release()


def test_a_session_that_waits_for_a_device_gives_signs_and_can_be_given_up(hold, monkeypatch):
    monkeypatch.setattr(session, "LOCK_S", 0.05)
    other, waiting = hold(CARD), session.Session()
    events = waiting._lock(CARD, no_wait=False)
    assert "is busy" in next(events).message and [next(events) for _ in range(3)] == [Phase("wait", CARD)] * 3
    events.close()
    events = waiting._lock(CARD, no_wait=False)
    next(events)
    other.communicate("enough\n")
    assert list(events) == [] and not free(CARD)
    waiting.release()
    assert free(CARD)


def test_another_device_is_free(hold):
    hold(CARD)
    assert not free(CARD) and free("cuda GPU-5678")


def test_a_killed_holder_holds_nothing(hold):
    other = hold(CARD)
    other.kill()
    other.wait()
    assert free(CARD)


def test_no_identity_leaves_the_folder_of_locks():
    for identity in ("cuda ../../x", "/etc/passwd", "a\0b", "..", "ü"):
        assert free(identity)
    folder = paths.cache_folder()
    assert all(Path(name).parent == Path("locks") for name in files(folder)) and list(Path().iterdir()) == []


def test_without_a_place_for_the_lock_the_run_goes_on(nowhere):
    assert free(CARD) and free(CARD)


def test_a_run_on_a_busy_device_waits_or_is_refused_and_a_plan_does_neither(hold, drawn, capsys, monkeypatch):
    here = machine(24, identity=CARD)
    probed: list[str] = []
    monkeypatch.setattr(hardware, "probe", lambda device="auto", **_: probed.append(device) or here)
    monkeypatch.setattr(hardware, "cap", lambda *_: None)
    command, other = ("generate", "a fox", "-p", "tiny", "--seed", "5"), hold(CARD)
    assert "busy" in assert_failed(call(capsys, *command, "--no-wait"), ExitCode.DOES_NOT_FIT)
    assert call(capsys, *command, "--dry-run", "--no-wait").returncode == 0 and not drawn and len(probed) == 2
    monkeypatch.setattr(console, "say", lambda text: other.poll() is None and "busy" in text and other.communicate("x"))
    assert call(capsys, *command).returncode == 0 and len(drawn) == 1
    assert len(probed) == 4  # and asks what is free once more after waiting
