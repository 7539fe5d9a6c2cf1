"""What listens at the socket may say anything: the command runs here then, at once."""

import os
import shutil
import signal
import time

import pytest

from fluxcli.events import Notice
from fluxcli.run import client
from fluxcli.run.dispatch import Dispatcher
from tests.support.liars import ACCEPTED, LIES, PROTOCOL, WRONG_ANSWERS, listening
from tests.support.workers import eventually, job, notes

pytestmark = [pytest.mark.serial, pytest.mark.skipif(os.name == "nt", reason="sockets of POSIX")]


def test_the_liars_speak_of_this_protocol():
    assert PROTOCOL == client.PROTOCOL


@pytest.mark.parametrize("name", LIES)
def test_a_job_is_lost_at_once_whatever_is_answered(name, home, monkeypatch):
    monkeypatch.setattr(client, "ANSWER_S", 0.5)
    with listening(client.locate_socket(), LIES[name]), pytest.raises(client.Lost) as lost:
        list(client.run(job("draw")))
    assert str(lost.value)
    if name != "half-a-frame":
        assert isinstance(lost.value, client.Misunderstood)


@pytest.mark.parametrize("answer", WRONG_ANSWERS, ids=repr)
@pytest.mark.parametrize("kind", ["status", "evict", "stop"])
def test_a_question_is_lost_at_once_whatever_is_answered(kind, answer, home):
    frames = [ACCEPTED, {"answer": answer}]
    with listening(client.locate_socket(), frames), pytest.raises(client.Misunderstood):
        client.ask(kind)


def test_a_stranger_is_not_asked_for_its_memory(home, monkeypatch):
    from fluxcli.run import session

    class Session:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def run(self, job, **_):
            yield Notice("drawn here")

    monkeypatch.setattr(session, "Session", Session)
    monkeypatch.setattr("fluxcli.run.dispatch._check_before_torch", lambda _: None)
    with listening(client.locate_socket(), LIES["says-nothing"]) as said:
        with Dispatcher(alone=False) as dispatcher:
            events = list(dispatcher.run(job("draw")))
    assert [event.message for event in events][-1] == "drawn here"
    assert [hello["kind"] for hello in said] == ["generate"]


def test_a_worker_whose_folder_is_gone_gets_no_twin_and_ends(start, home, monkeypatch):
    first = start()
    # The first one would see that its folder is gone, and end, before the second one has begun.
    first.send_signal(signal.SIGSTOP)
    shutil.rmtree(client.locate_socket().parent)
    second = start(wait=False)
    assert second.wait(10) == 0  # it met the first one's other lock
    first.send_signal(signal.SIGCONT)
    assert first.wait(10) == 0
    third = start()
    assert client.ask("status")["pid"] == third.pid


def test_a_folder_that_is_gone_in_mid_job_costs_no_job(start, home):
    worker = start()
    events = client.run(job("gate"))
    eventually(lambda: next(events))
    shutil.rmtree(client.locate_socket().parent)
    (home / "go").touch()
    list(events)
    assert worker.wait(10) == 0 and notes(home)[-2:] == ["closed", "released"]


@pytest.mark.parametrize("kind", ["fifo", "file", "folder", "link"])
def test_what_lies_at_the_sockets_place_is_no_worker(kind, home):
    path = client.locate_socket()
    path.parent.mkdir(mode=0o700)
    {
        "fifo": lambda: os.mkfifo(path),
        "file": lambda: path.write_text("x"),
        "folder": path.mkdir,
        "link": lambda: path.symlink_to("nowhere"),
    }[kind]()
    began = time.monotonic()
    assert client.ask("status") is None
    with pytest.raises(client.Lost):
        list(client.run(job("draw")))
    assert time.monotonic() - began < 5


def test_a_log_that_is_a_fifo_is_an_error_and_no_wait(home):
    from fluxcli import paths

    log = paths.cache_folder() / "worker.log"
    log.parent.mkdir(parents=True)
    os.mkfifo(log)
    with pytest.raises(client.RemoteError, match="did not start"):
        client.start(60)
