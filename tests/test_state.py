"""What is kept between runs: whole or not at all, never an error; and one run at a time on a
device.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from fluxcli import learned, paths
from fluxcli.cli import console
from fluxcli.engine import device as hardware
from fluxcli.engine import pinned
from fluxcli.errors import ExitCode
from fluxcli.events import Phase
from fluxcli.plan.machine import Hardware
from fluxcli.plan.placement import GIB
from fluxcli.run import margin, session
from fluxcli.run.lock import DeviceLock
from fluxcli.run.margin import grow_margin, read_margin
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
from fluxcli.run.margin import grow_margin
from tests.support.helpers import machine
print("ready", flush=True)
sys.stdin.readline()
for k in range(60):
    grow_margin(machine(8, identity=f"{sys.argv[1]} {k}" * 500), 1 << 29)
"""


def process(code: str, *arguments: str) -> subprocess.Popen:
    pipe = subprocess.PIPE
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    started = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=pipe,
        stdout=pipe,
        text=True,
        env=environment,
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
        monkeypatch.delenv("HOME")
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    else:
        (tmp_path / "file").write_text("kept")
        monkeypatch.setenv(
            "XDG_CACHE_HOME", request.param.replace("a file", str(tmp_path / "file"))
        )


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


# --- what the driver pins


def find_limit(device: str = "cuda:0", identity: str = CARD) -> int | None:
    return pinned.find_pin_limit(device, identity, ram_bytes=64 * GIB)


def test_what_the_driver_pins_is_known_once_it_has_refused(monkeypatch):
    monkeypatch.setattr("platform.release", lambda: "6.12.0-generic")
    assert find_limit() is None and find_limit("cpu") is None
    pinned.learn_pin_limit(card(), pinned_bytes=5 * GIB, refused=False)
    assert find_limit() is None and files(paths.cache_folder()) == {}
    pinned.learn_pin_limit(card(), pinned_bytes=3 * GIB, refused=True)
    assert (find_limit(), find_limit(identity="another")) == (3 * GIB, None)
    path = paths.cache_folder() / pinned.FILE
    then = path.stat().st_mtime - learned.FORGOTTEN_AFTER_S - 60
    os.utime(path, (then, then))
    assert find_limit() is None


def test_windows_and_wsl_have_limits_until_a_driver_has_shown_another(monkeypatch):
    monkeypatch.setattr("platform.release", lambda: "5.15.0-microsoft-standard-WSL2")
    assert find_limit() == GIB // 2
    wsl = replace(card(), pin_bytes=GIB // 2)
    pinned.learn_pin_limit(wsl, pinned_bytes=GIB // 4, refused=False)
    assert find_limit() == GIB // 2
    pinned.learn_pin_limit(wsl, pinned_bytes=GIB, refused=False)
    assert find_limit() == GIB
    monkeypatch.setattr(pinned, "os", SimpleNamespace(name="nt"))
    assert find_limit(identity="another") == int(64 * GIB * 0.4)


# --- the margin


def card(identity: str = CARD) -> Hardware:
    """A card of 8 GiB."""
    return machine(8, identity=identity)


def test_a_margin_grows_by_what_was_missing_for_this_card_alone():
    assert read_margin(card()) == 0
    grow_margin(card(), 300 << 20)
    grow_margin(card("ü"), 400 << 20)
    grow_margin(card(), 500 << 20)
    assert (read_margin(card()), read_margin(card("ü"))) == (800 << 20, 400 << 20)
    assert read_margin(card("another")) == 0 and list(files(paths.cache_folder())) == [
        "margin.json"
    ]


@pytest.mark.parametrize("missing_bytes", [-5 * GIB, 0, 1])
def test_a_margin_grows_by_a_step_where_the_plan_should_have_fitted(missing_bytes):
    grow_margin(card(), missing_bytes)
    assert read_margin(card()) == margin.LEAST_GROWTH_BYTES


def test_one_moment_teaches_no_more_than_a_share_of_the_card():
    grow_margin(card(), 100 * GIB)
    assert read_margin(card()) == GIB


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"[1]",
        b"7",
        b"\xff\xfe",
        b'{"a": 1',
        b"[" * 100_000,
        b'{"cuda GPU-1234": "x"}',
        b'{"cuda GPU-1234": -1}',
    ],
    ids=len,
)
def test_a_corrupt_file_is_an_empty_one_and_is_replaced(damage):
    grow_margin(card(), GIB)
    (paths.cache_folder() / "margin.json").write_bytes(damage)
    assert read_margin(card()) == 0
    grow_margin(card(), GIB)
    assert read_margin(card()) == GIB


def test_a_folder_in_the_place_of_the_file_is_no_error():
    (paths.cache_folder() / "margin.json").mkdir(parents=True)
    grow_margin(card(), GIB)
    assert read_margin(card()) == 0 and files(paths.cache_folder()) == {}


@pytest.mark.parametrize("owner, name", [(os, "replace"), (os, "fsync"), (Path, "mkdir")])
def test_an_update_that_fails_leaves_the_old_file_and_nothing_else(owner, name, monkeypatch):
    grow_margin(card(), GIB)
    before = files(paths.cache_folder())

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(owner, name, full)
    grow_margin(card(), GIB)
    assert files(paths.cache_folder()) == before


def test_without_a_place_nothing_is_remembered_and_nothing_said(nowhere, tmp_path, capfd):
    before = files(tmp_path)
    grow_margin(card(), GIB)
    assert read_margin(card()) == 0 and capfd.readouterr() == ("", "")
    assert files(tmp_path) == before and list(Path().iterdir()) == []


def test_two_writers_leave_whole_files_only():
    writers = [process(WRITER, name) for name in ("one", "other")]
    for each in writers:
        each.stdin.write("go\n")
        each.stdin.flush()
    path, seen = paths.cache_folder() / "margin.json", 0
    while any(each.poll() is None for each in writers):
        if path.exists():
            seen = max(seen, len(json.loads(path.read_text())))  # raises for half a file
    assert [each.wait() for each in writers] == [0, 0]
    for each in writers:
        each.communicate()
    found = json.loads(path.read_text())
    last = {"one 59" * 500 + ", 8.0 GiB", "other 59" * 500 + ", 8.0 GiB"}
    assert seen and last & set(found) and len(found) >= 60
    assert list(files(paths.cache_folder())) == ["margin.json"]


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
    assert (
        "is busy" in next(events).message
        and [next(events) for _ in range(3)] == [Phase("wait", CARD)] * 3
    )
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


@pytest.mark.serial
def test_a_killed_holder_holds_nothing(hold):
    other = hold(CARD)
    other.kill()
    other.wait()
    assert free(CARD)


def test_no_identity_leaves_the_folder_of_locks():
    for identity in ("cuda ../../x", "/etc/passwd", "a\0b", "..", "ü"):
        assert free(identity)
    folder = paths.cache_folder()
    assert (
        all(Path(name).parent == Path("locks") for name in files(folder))
        and list(Path().iterdir()) == []
    )


def test_without_a_place_for_the_lock_the_run_goes_on(nowhere):
    assert free(CARD) and free(CARD)


def test_a_run_on_a_busy_device_waits_or_is_refused_and_a_plan_does_neither(
    hold, drawn, capsys, monkeypatch
):
    here = machine(24, identity=CARD)
    probed: list[str] = []
    monkeypatch.setattr(hardware, "probe", lambda device="auto", **_: probed.append(device) or here)
    monkeypatch.setattr(hardware, "cap", lambda *_: None)
    command, other = ("generate", "a fox", "-p", "tiny", "--seed", "5"), hold(CARD)
    assert "busy" in assert_failed(call(capsys, *command, "--no-wait"), ExitCode.DOES_NOT_FIT)
    assert (
        call(capsys, *command, "--dry-run", "--no-wait").returncode == 0
        and not drawn
        and len(probed) == 2
    )
    monkeypatch.setattr(
        console,
        "say",
        lambda text: other.poll() is None and "busy" in text and other.communicate("x"),
    )
    assert call(capsys, *command).returncode == 0 and len(drawn) == 1
    assert len(probed) == 4  # and asks what is free once more after waiting


def test_what_was_learned_under_a_limit_teaches_nothing_of_the_whole():
    grow_margin(machine(4, "cpu", identity="cpu"), GIB)
    assert read_margin(machine(4, "cpu", identity="cpu")) > 0
    assert read_margin(machine(24, "cpu", identity="cpu")) == 0


def test_many_moments_teach_no_more_than_a_quarter_of_the_card_and_a_week_forgets_them():
    for _ in range(9):
        grow_margin(card(), GIB)
    assert read_margin(card()) == 2 * GIB
    path = paths.cache_folder() / "margin.json"
    then = path.stat().st_mtime - learned.FORGOTTEN_AFTER_S - 60
    os.utime(path, (then, then))
    assert read_margin(card()) == 0
    grow_margin(card("another"), GIB)  # what is forgotten does not come back
    assert read_margin(card()) == 0
    path.write_text(json.dumps({f"{CARD}, 8.0 GiB": 10**12}))  # as a version before wrote it
    assert read_margin(card()) == 2 * GIB
