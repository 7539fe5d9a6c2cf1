"""Where a job runs: in a live worker, or here; and here, too, what a lost worker has left of it.

Imports neither torch nor the engine unless the job runs here.
"""

import os
from collections.abc import Generator, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

from fluxcli.engine.check import check_torch
from fluxcli.errors import UsageError
from fluxcli.events import Done, Event, Failed, Notice, Preview, Saved, Skipped
from fluxcli.models import find
from fluxcli.pictures.names import STDOUT
from fluxcli.request.job import Job
from fluxcli.run import client, processes

if TYPE_CHECKING:
    from fluxcli.pictures.latents import Latents
    from fluxcli.run.session import Session

VARIABLE = "FLUX_WORKER"
CHOICES = ("on", "off", "auto")  # auto starts a worker where there is none
AUTO_IDLE_S = 600.0  # of a worker that FLUX_WORKER=auto starts


class Dispatcher:
    """Runs the jobs of one command; what it loads here stays until the end of it."""

    def __init__(self, *, alone: bool) -> None:
        """Ask no worker where `alone`. Raises `UsageError` for an unknown FLUX_WORKER."""
        self._choice = os.environ.get(VARIABLE) or "on"
        if self._choice not in CHOICES:
            why = f"{self._choice[:40]!r} is none of {', '.join(CHOICES)}"
            raise UsageError("wrong value", which=VARIABLE, why=why, hint=f"unset {VARIABLE}")
        if alone or processes.count() > 1:
            self._choice = "off"
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

    def take_untold(self) -> list[Event]:
        """Return what happened in this process after the events of a job were closed."""
        if not self._session:
            return []
        untold = self._session.untold
        self._session.untold = []
        return untold

    def run(self, job: Job, *, kept: "Latents | None" = None) -> Generator[Event, None, None]:
        """Yield the job's events; raises what ended it.

        `kept` is what there is of its only picture. A job that the worker leaves half done is
        finished here: its rows that are not over are drawn, without the pictures that lie there
        already (see `Session.run`), and what was said once is not said again. Previews that it has
        left are deleted.
        """
        over: set[int] = set()  # numbers of rows
        saved: set[str] = set()  # paths of pictures
        skipped: set[str] = set()
        previews = _Previews()
        has_begun = False
        was_up = False
        is_stranger = False
        if self._may_use_worker(job, kept=kept):
            try:
                for event in self._run_in_worker(job):
                    previews.note(event)
                    if isinstance(event, Saved):
                        saved.add(event.image.path)
                    if isinstance(event, Skipped):
                        skipped.add(event.path)
                    if isinstance(event, Done | Failed):
                        over.add(event.row)
                    if not isinstance(event, Notice):
                        has_begun = True
                    yield event
                return
            except client.Lost as lost:
                was_up = bool(str(lost))
                is_stranger = isinstance(lost, client.Misunderstood)
                previews.delete()
                if was_up:
                    hint = f" (hint: {lost.hint})" if lost.hint else ""
                    yield Notice(f"{lost}: running here{hint}")
        if not self._session:
            _check_before_torch(job)
            from fluxcli.run.session import Session

            if not is_stranger:
                yield from _evict_worker(job, always=was_up)
            self._session = self._held.enter_context(Session())
        left = tuple(row for row in job.rows if row.number not in over)
        job = replace(job, rows=left)
        after_loss = saved if has_begun else None
        for event in self._session.run(job, kept=kept, after_loss=after_loss):
            if not (isinstance(event, Skipped) and event.path in skipped):
                yield event

    def _may_use_worker(self, job: Job, *, kept: "Latents | None") -> bool:
        """Return whether a worker can run a job: it has neither this stdout nor half a picture."""
        if self._choice == "off" or kept or self._session:
            return False
        return not any(row.order and row.order.output.output == STDOUT for row in job.rows)

    def _run_in_worker(self, job: Job) -> Iterator[Event]:
        """Yield the job's events.

        Raises `client.RemoteError` where the job failed, `client.Lost` where the worker did.
        """
        if not client.AVAILABLE and VARIABLE in os.environ:
            what = "the worker is not available on Windows yet"
            raise client.Lost(what, hint="--no-worker")
        if self._choice == "auto":
            try:
                status = client.start(AUTO_IDLE_S)
            except client.RemoteError as error:
                raise client.Lost(str(error), hint=error.hint) from error
            if status["started"]:
                end = f"it ends after {AUTO_IDLE_S / 60:g} min without a job, or by"
                yield Notice(f"worker {status['pid']} is up; {end}: flux worker stop")
        yield from client.run(job)


class _Previews:
    """The files that show what pictures under way will be, as a worker says."""

    def __init__(self) -> None:
        self._paths: dict[tuple[int, int], str] = {}  # by row and seed

    def note(self, event: Event) -> None:
        """Take what an event says of them: the worker deletes that of a picture it has saved."""
        if isinstance(event, Preview):
            self._paths[event.row, event.seed] = event.path
        if isinstance(event, Saved):
            self._paths.pop((event.row, event.image.seed), None)

    def delete(self) -> None:
        """Delete those that a lost worker has left."""
        for path in self._paths.values():
            with suppress(OSError):
                Path(path).unlink()


def _check_before_torch(job: Job) -> None:
    """Raise what the session would raise after seconds of imports: no model, a broken torch."""
    order = job.rows[0].order
    if order and not job.batch:
        find.list_folders(order.request.model)
    check_torch()


def _evict_worker(job: Job, *, always: bool) -> Iterator[Event]:
    """Let a worker give back the memory that this run needs; on the CPU only if it could not serve.

    A job that would rather not wait takes nothing from a worker that is at work.
    """
    with suppress(client.Lost):
        status = client.ask("status")
        if not status or not status.get("model"):
            return
        if status.get("device") == "cpu" and not always:
            return
        if status.get("running"):
            if job.no_wait:
                return
            yield Notice(
                f"worker {status['pid']} makes room after its job: waiting (--no-wait does not)"
            )
        client.ask("evict")
