"""Nothing that a client does ends the worker or reaches another user."""

import json
import os
import socket
import time

import psutil
import pytest

from fluxcli.run import client
from tests.support.workers import (
    closes,
    eventually,
    hello,
    job,
    raw,
    serves,
)

pytestmark = [pytest.mark.serial, pytest.mark.skipif(os.name == "nt", reason="sockets of POSIX")]


NONSENSE = [
    b"",
    b"\0\xff",
    b"{",
    b"[]",
    b"null",
    b"{}",
    b'"x"',
    b"[" * 100_000,
    b" " * client.HELLO_BYTES + b'{"kind": "status"}',
]
NONSENSE += [{"kind": kind} for kind in ("", "draw", None, 5, [], {})]
WRONG_JOBS = [
    None,
    [],
    5,
    {"rows": 5},
    {"rows": [5]},
    {"rows": [[1, "", {"prompt": 5}]]},
    {"rows": [[1, "", {}]]},
]
WRONG_JOBS += [{"rows": [], "unknown": 1}, {"rows": [[1, "", {"prompt": "x", "steps": "many"}]]}]


@pytest.mark.parametrize("batch", [0, 1, 2])
def test_strangers_lose_their_connection_and_nothing_else(worker, batch):
    wrong = [hello(each) for each in WRONG_JOBS]
    wrong += [
        hello(job("draw"), umask="x"),
        hello(job("draw"), identity=[]),
        hello(job("draw"), folder="a\0b"),
    ]
    for each in (NONSENSE[:9], NONSENSE[9:], wrong)[batch]:
        try:
            connection = raw(each)
        except (BrokenPipeError, ConnectionResetError):  # before the whole of it was sent
            continue
        with connection:
            frames = []
            while connection.poll(2):
                try:
                    frames.append(json.loads(connection.recv_bytes()))
                except (EOFError, OSError):
                    break
            else:
                raise AssertionError(f"{str(each)[:80]} keeps its connection")
            assert not [frame for frame in frames if {"answer", "end"} & set(frame)]
    assert serves() and client.ask("status")["pid"] == worker.pid


def test_a_silent_client_and_half_a_frame_are_dropped(worker):
    with raw() as silent, raw() as half, raw() as more:
        os.write(half.fileno(), b"\0\0")
        os.write(more.fileno(), b"\0\0\1\0{")
        assert serves()
        assert closes(silent) and closes(half) and closes(more)
    assert serves()


def test_a_client_that_stops_reading_blocks_nobody_for_ever(worker):
    with raw(hello(job("flood"))):
        eventually(lambda: client.ask("status")["running"])
        since = time.monotonic()
        assert serves()
        assert 0.5 < time.monotonic() - since < 5


@pytest.mark.skipif(
    not hasattr(socket, "SO_PEERCRED") or os.getuid() != 0, reason="takes another user"
)
@pytest.mark.parametrize("uid", [0, 65534])
def test_another_user_is_not_served_even_where_the_folder_lets_him_in(worker, home, uid):
    address = client.locate_socket()
    for path, mode in ((home, 0o755), (address.parent, 0o755), (address, 0o777)):
        path.chmod(mode)
    child = os.fork()
    if not child:
        answered = 2  # not even connected
        try:
            os.setuid(uid)
            with socket.socket(socket.AF_UNIX) as plain:
                plain.connect(str(address))
                answered = 0
                said = json.dumps({"kind": "status"}).encode()
                plain.sendall(len(said).to_bytes(4, "big") + said)
                answered = int(bool(plain.recv(1)))
        finally:
            os._exit(answered)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (uid == 0)


@pytest.mark.parametrize("how", ["0755", "link"])
def test_a_folder_that_others_could_enter_is_used_by_neither_side(start, home, how):
    folder = client.locate_socket().parent
    if how == "link":
        (home / "elsewhere").mkdir(mode=0o700)
        folder.symlink_to(home / "elsewhere")
    else:
        folder.mkdir()
        folder.chmod(0o755)
    process = start(wait=False)
    assert process.wait(5) == 1 and "not private" in (home / "log").read_text()
    assert not client.locate_socket().exists()
    client.locate_socket().touch()
    with pytest.raises(client.Lost, match="not private"):
        list(client.run(job("draw")))


def test_the_folder_is_made_private_whatever_the_umask(start):
    before = os.umask(0)
    try:
        start()
    finally:
        os.umask(before)
    folder = client.locate_socket().parent
    assert folder.stat().st_mode & 0o777 == 0o700
    assert not any(path.stat().st_mode & 0o077 for path in folder.iterdir())


def test_a_hundred_clients_leave_descriptors_and_threads_flat(worker):
    process = psutil.Process(worker.pid)

    def after(rounds: int) -> tuple[int, int]:
        for k in range(rounds):
            raw().close()
            raw(b"{}" if k % 2 else hello(job("draw"))).close()
            assert client.ask("status")
        assert serves()
        eventually(lambda: process.num_threads() <= 2)
        return process.num_fds(), process.num_threads()

    fds, threads = after(10)
    assert after(100)[0] <= fds and threads <= 2
