"""Where a job runs: in a live worker, or here; and here, too, what a worker that failed has left of it.

Imports neither torch nor the engine unless the job runs here.
"""

import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Self

from fluxcli.errors import UsageError
from fluxcli.events import Done, Event, Failed, GeneratedImage, Notice, Saved
from fluxcli.request.job import Job
from fluxcli.run import client, processes

if TYPE_CHECKING:
    from fluxcli.pictures.latents import Latents
    from fluxcli.run.session import Session

VARIABLE, WISHES = "FLUX_WORKER", ("on", "off", "auto")
AUTO_IDLE_S = 600.0  # of a worker that FLUX_WORKER=auto starts


class Runner:
    """Runs the jobs of one command; what it loads here stays until the end of it."""

    def __init__(self, *, alone: bool) -> None:
        """`alone` asks no worker. Raises `UsageError` for a FLUX_WORKER that is none of `WISHES`."""
        wish = os.environ.get(VARIABLE) or "on"
        if wish not in WISHES:
            raise UsageError("wrong value", which=VARIABLE, why=f"{wish[:40]!r} is none of {', '.join(WISHES)}")
        self._wish = "off" if alone or processes.count() > 1 else wish
        self._held = ExitStack()
        self._session: Session | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def pause(self) -> None:
        """Let others have the device until the next job."""
        if self._session:
            self._session.release()

    def run(self, job: Job, *, resume: "Latents | None" = None) -> Iterator[Event]:
        """Yield the job's events; raises what ended it. `resume` is what there is of its only picture."""
        saved: dict[int, list[GeneratedImage]] = defaultdict(list)  # by row
        over: set[int] = set()  # rows
        lost = None
        if self._wish != "off" and not resume and not self._session:
            try:
                if self._wish == "auto":
                    _started()
                for event in client.run(job):
                    if isinstance(event, Saved):
                        saved[event.row].append(event.image)
                    if isinstance(event, Done | Failed):
                        over.add(event.row)
                    yield event
                return
            except client.Lost as error:
                lost = error if str(error) else None
        if lost:
            yield Notice(f"{lost}: running here" + f" (hint: {lost.hint})" * bool(lost.hint))
        if not self._session:
            from fluxcli.run.session import Session

            yield from _evict_worker(job, always=bool(lost))
            self._session = self._held.enter_context(Session())
        left = (replace(row, drawn=tuple(saved[row.number])) for row in job.rows if row.number not in over)
        yield from self._session.run(replace(job, rows=tuple(left)), resume=resume)


def _started() -> None:
    try:
        client.start(AUTO_IDLE_S)
    except client.RemoteError as error:
        raise client.Lost(str(error)) from error


def _evict_worker(job: Job, *, always: bool) -> Iterator[Event]:
    """Let a worker give back the memory that this run needs; that of a CPU's only if it could not serve."""
    with suppress(client.Lost):
        status = client.ask("status")
        loaded = status and status.get("model") and (always or status.get("device") != "cpu")
        if loaded and not (job.no_wait and status.get("running")):
            if status.get("running"):
                yield Notice(f"worker {status['pid']} makes room after its job: waiting (--no-wait does not)")
            client.ask("evict")
