"""Fault rows of the worker: what lies, listens or lies about itself at its socket's place."""

import contextlib
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.faults.case import Case, fault
from tests.support.liars import ACCEPTED, LIES, WRONG_ANSWERS, listening


@contextlib.contextmanager
def socket_place(case: Case) -> Iterator[tuple[Path, dict[str, str]]]:
    """Where the case's worker listens (a short path), and the variables that make it so."""
    from fluxcli.run import client

    with tempfile.TemporaryDirectory(prefix="fw", dir="/tmp") as folder:
        cache = case.home / "XDG_CACHE_HOME"
        variables = {"TMPDIR": folder, "XDG_CACHE_HOME": str(cache), "FLUX_WORKER": "on"}
        name = client.name_socket(cache / "flux")
        yield Path(folder, f"flux-{os.getuid()}", name), variables


for lie, frames in LIES.items():

    @fault(f"worker-{lie}", f"what listens at the socket answers {frames[-1]!r:.60}", codes=[0])
    def answer_a_job(case: Case, frames: list[object] = frames) -> None:
        with socket_place(case) as (path, variables), listening(path, frames):
            ended = case.draw("-o", "x.png", environment=variables, timeout_s=30)
        assert (case.folder / "x.png").stat().st_size > 100 and ended.stdout == "x.png\n"


for k, answer in enumerate(WRONG_ANSWERS):
    for question in ("status", "stop", "evict"):

        @fault(
            f"worker-{question}-{k}", f"flux worker {question} is answered {answer!r}", codes=[8]
        )
        def answer_a_question(
            case: Case, answer: object = answer, question: str = question
        ) -> None:
            frames = [ACCEPTED, {"answer": answer}]
            with socket_place(case) as (path, variables), listening(path, frames):
                case.flux("worker", question, environment=variables, timeout_s=30)


PLACES = {
    "fifo": os.mkfifo,
    "file": lambda path: path.write_text("x"),
    "folder": lambda path: path.mkdir(),
    "dangling-link": lambda path: path.symlink_to("nowhere"),
}
for kind, put in PLACES.items():

    @fault(f"worker-socket-{kind}", f"the worker's socket is a {kind}", codes=[0])
    def wrong_socket(case: Case, put: object = put) -> None:
        with socket_place(case) as (path, variables):
            path.parent.mkdir(mode=0o700)
            put(path)
            case.draw(environment=variables)


@fault("worker-folder-open", "the worker's folder is open to others", codes=[0], says="private")
def open_folder(case: Case) -> None:
    with socket_place(case) as (path, variables):
        path.parent.mkdir()
        path.parent.chmod(0o777)
        path.touch()
        case.draw(environment=variables)


@fault("worker-log-fifo", "worker.log is a FIFO", codes=[6])
def log_fifo(case: Case) -> None:
    with socket_place(case) as (_, variables):
        log = case.home / "XDG_CACHE_HOME/flux/worker.log"
        log.parent.mkdir(parents=True)
        os.mkfifo(log)
        case.flux("worker", "start", environment=variables)


@fault(
    "worker-no-tmp", "TMPDIR is too long for a socket", codes=[6], says="TMPDIR", exhaustive=True
)
def long_path(case: Case) -> None:
    folder = case.folder / ("x" * 120)
    folder.mkdir()
    case.flux("worker", "start", environment={"TMPDIR": str(folder), "FLUX_WORKER": "on"})


@fault("worker-variable", "FLUX_WORKER=maybe", codes=[2], says="FLUX_WORKER")
def wrong_variable(case: Case) -> None:
    case.draw(environment={"FLUX_WORKER": "maybe"})


def end_in_mid_job(case: Case, how: str) -> None:
    """Start a worker, and end it while it draws the second of three pictures."""
    with socket_place(case) as (path, variables):
        case.flux("worker", "start", environment=variables)
        process = case.start(
            "generate", "x", "-p", "tiny", "-n", "3", "--size", "256", "--steps", "60",
            "--seed", "1", "--events", "-o", "out/", environment=variables,
        )  # fmt: skip
        for line in process.stdout:
            if '"image": 2' in line:
                break
        if how == "stop":
            case.flux("worker", "stop", environment=variables)
        elif how == "rm":
            shutil.rmtree(path.parent)
        else:
            pid = next(int(word) for word in case.ended[0].stderr.split() if word.isdigit())
            os.kill(pid, signal.SIGKILL)
        with case.watch(process, ("generate",)) as watched:
            watched.end(timeout_s=120)
        case.flux("worker", "stop", environment=variables)
        case.ended.append(case.ended.pop(-2))  # the command itself is what the row is about
        assert len(list((case.folder / "out").iterdir())) == 3
        time.sleep(0)


for how, title in {
    "stop": "flux worker stop",
    "kill": "kill -9 of the worker",
    "rm": "the worker's folder is deleted",
}.items():

    @fault(f"worker-mid-job-{how}", f"{title} in the middle of a job", codes=[0], exhaustive=True)
    def mid_job(case: Case, how: str = how) -> None:
        end_in_mid_job(case, how)
