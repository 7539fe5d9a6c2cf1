"""A session: rows are planned, grouped into windows and drawn, by one engine that stays as long as it serves.

It never prints. The same in process and in the worker. Same seed, same pixels: a row's precision and decoding are
those of its own plan, only where weights are is decided for a window as a whole.
"""

import contextlib
import gc
import itertools
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import fluxcli
from fluxcli import paths
from fluxcli.engine import device as hardware
from fluxcli.engine.engine import Engine
from fluxcli.engine.picture import Picture
from fluxcli.errors import DoesNotFit
from fluxcli.events import Done, Event, Notice, Phase, Saved, Skipped, failed
from fluxcli.models import find as models
from fluxcli.pictures import image, latents
from fluxcli.pictures import names as output
from fluxcli.pictures.latents import Latents
from fluxcli.plan import placement as residency
from fluxcli.plan.placement import MemoryPlan
from fluxcli.plan.planner import make_plan, suggestion
from fluxcli.request.fields import GenerationRequest
from fluxcli.request.job import Job, Row
from fluxcli.run.lock import DeviceLock
from fluxcli.run.margin import grow_margin, read_margin
from fluxcli.run.planned import Planned, window_size
from quant.checkpoint import Checkpoint
from quant.errors import ExplainedError

LOCK_S = 1.0  # between two looks at whether the run is still wanted, while another one has the device
LOCKED_SHARE = 0.25  # of the RAM: a run on the CPU that takes less disturbs nobody


class Session:
    """Draws jobs, one after the other; `close` gives memory and the device's lock back."""

    def __init__(self) -> None:
        self.engine: Engine | None = None
        self._basis: tuple = ()
        self._held = contextlib.ExitStack()
        self._locked: set[str] = set()

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def run(self, job: Job, *, resume: Latents | None = None) -> Iterator[Event]:
        """Yield the events of every row. Raises `FluxError` and `QuantError`, in a batch if they end all."""
        groups: dict[tuple, list[Planned]] = {}
        known: dict[GenerationRequest, tuple] = {}
        for row in job.rows:
            try:
                planned = yield from self._planned(row, job, known)
            except ExplainedError as error:
                if not job.batch:
                    raise
                yield failed(error, row.number)
                continue
            if job.made not in (None, planned.checkpoint.fingerprint):
                yield Notice("the model here is not the one that made the picture: expect another picture")
            tiled = planned.plan.residency.decode == "tiled"  # other pixels: decided by each row's own plan
            groups.setdefault((planned.basis, tiled, row.request.vram_limit), []).append(planned)
        for group in groups.values():
            yield from self._draw(group, job, resume)

    def prepare(
        self, request: GenerationRequest, *, lock: bool = True, no_wait: bool = False
    ) -> Generator[Event, None, tuple[Checkpoint, MemoryPlan, hardware.Hardware, tuple[Checkpoint, ...]]]:
        """Plan a request: (checkpoint, plan, machine, every checkpoint that can serve it), the device's lock held."""
        said: list[str] = []
        checkpoints = models.checkpoints_of(request, paths.config_folder(), said.append)
        yield from map(Notice, said)
        hardware.check_torch()
        machine = hardware.probe(request.device)
        if lock and machine.kind != "cpu":
            yield from self._lock(machine.identity, no_wait)
            machine = hardware.probe(request.device)  # once more: another flux may have held all of it
        if self.engine:  # what this process holds is its own to use
            machine = replace(machine, ram_free_bytes=machine.ram_free_bytes + self.engine.plan.host_bytes)
        checkpoint, plan = make_plan(request, checkpoints, machine, margin_bytes=read_margin(machine))
        if lock and machine.kind == "cpu" and max(plan.peak_bytes.values()) > machine.total_bytes * LOCKED_SHARE:
            yield from self._lock(machine.identity, no_wait)
        return checkpoint, plan, machine, tuple(checkpoints)

    def engine_for(
        self, checkpoint: Checkpoint, plan: MemoryPlan, machine: hardware.Hardware, basis: tuple, *, cache: bool
    ) -> Engine:
        """The engine that is there, where it has the same basis, else a new one."""
        if self.engine and self._basis == basis:
            self.engine.adopt(plan, machine)
            self.engine.texts.cache = cache
        else:
            self.evict()
            self.engine, self._basis = Engine(checkpoint, plan, machine, cache=cache), basis
        return self.engine

    def engine_of(self, request: GenerationRequest, *, no_wait: bool) -> Generator[Event, None, Engine]:
        """An engine for a request."""
        checkpoint, plan, machine, _ = yield from self.prepare(request, no_wait=no_wait)
        return self.engine_for(checkpoint, plan, machine, (), cache=False)

    def evict(self) -> None:
        """Drop the engine and give its memory back."""
        if self.engine:
            device, self.engine = self.engine.plan.device, None
            gc.collect()
            hardware.empty_cache(device)

    def release(self) -> None:
        """Give the device's lock back."""
        self._held.close()
        self._locked.clear()

    def status(self) -> dict:
        """What is loaded and how much it holds."""
        if not self.engine:
            return {"model": None}
        plan = self.engine.plan
        held = hardware.held_memory(plan.device)
        described = {"model": str(self.engine.checkpoint.folder), "device": plan.device, "precision": plan.precision}
        return described | {"placement": plan.residency.level("denoise"), "held_bytes": held}

    def _planned(self, row: Row, job: Job, known: dict) -> Generator[Event, None, Planned]:
        request = row.request
        target = output.parse_target(request, force=job.force)
        if job.batch and not (job.resume and target.exact):  # else the file may be the row's picture
            output.check_writable(target, request, row.number)
        same = replace(request, prompt="x", seed=0, count=1, output=None)  # plans depend on none of these
        if same not in known:
            known[same] = yield from self.prepare(request, no_wait=job.no_wait)
            checkpoint, plan, *_ = known[same]
            if not job.batch:
                (width, height), seed = request.size, f", seed {request.seed}" * (request.seed >= 0)
                what = f"{request.model} on {plan.device} in {plan.precision}"
                yield Notice(f"{width}x{height}, {request.steps} steps{seed}, {what}")
        checkpoint, plan, machine, others = known[same]
        unseeded = row.drawn and request.seed < 0  # and then goes on where a lost worker began
        request = replace(request, seed=row.drawn[0].seed) if unseeded else request.with_seed()
        return Planned(row, request, target, checkpoint, plan, machine, others, request.count, list(row.drawn))

    def _lock(self, identity: str, no_wait: bool) -> Iterator[Event]:
        if identity in self._locked:
            return
        device_lock = DeviceLock(identity)
        if not device_lock.acquire():
            if no_wait:
                why, hint = "another flux computes on it", "leave --no-wait out to wait for it"
                raise DoesNotFit("the device is busy", which=identity, why=why, hint=hint)
            yield Notice(f"{identity} is busy with another flux: waiting for it (--no-wait gives up instead)")
            while not device_lock.acquire(LOCK_S):
                yield Phase("wait", identity)
        self._locked.add(identity)
        self._held.callback(device_lock.release)

    def _draw(self, group: Sequence[Planned], job: Job, resume: Latents | None) -> Iterator[Event]:
        """Rows of one basis: their pictures in windows."""
        first, placed = group[0], group[0].plan.residency
        for planned in group[1:]:
            placed = residency.weaker(placed, planned.plan.residency)
        if job.batch:
            yield Notice(f"{first.request.model} on {first.plan.device} in {first.plan.precision}")
        plan = replace(first.plan, residency=placed)
        engine = self.engine_for(first.checkpoint, plan, first.machine, first.basis, cache=job.cache)
        missing: list[Picture] = []
        for planned in group:
            for picture, before in planned.pictures(resume):
                if found := _finished(engine, picture, before, job.resume) if job.resume else None:
                    planned.left -= 1
                    yield Skipped(picture.row, str(found))
                elif planned.was_drawn(picture):
                    continue
                elif error := planned.refused() if job.resume and planned.target.exact else None:
                    yield failed(error, picture.row)
                else:
                    missing.append(picture)
            if len(planned.images) == planned.left > 0:  # all that was lost is the word of it
                yield _done(engine, planned)
        missing.sort(key=lambda picture: picture.request.lora)  # adapters change as rarely as can be
        if job.batch:
            for k, picture in enumerate(missing, 1):
                picture.image, picture.images = k, len(missing)
        size, rows = window_size(group), {planned.row.number: planned for planned in group}
        for at in range(0, len(missing), size):
            yield from self._window(engine, missing[at : at + size], rows, isolate=job.batch)

    def _window(
        self, engine: Engine, window: Sequence[Picture], rows: dict[int, Planned], *, isolate: bool
    ) -> Iterator[Event]:  # fmt: skip
        """A window's events, the end of each row, and what went wrong."""
        known = len(engine.out_of_memory)
        try:
            for event in engine.window(window, isolate=isolate):
                yield event
                if isinstance(event, Saved):
                    planned = rows[event.row]
                    planned.images.append(event.image)
                    if len(planned.images) == planned.left:
                        yield _done(engine, planned)
        except DoesNotFit as error:
            _advise(error, rows[window[0].row], engine, window)
            raise
        finally:
            for happened in engine.out_of_memory[known:]:
                grow_margin(engine.machine, happened.missing_bytes)
        for picture in window:
            if isinstance(picture.error, DoesNotFit):
                _advise(picture.error, rows[picture.row], engine, [picture])
            if picture.error:
                yield failed(picture.error, picture.row)


def _finished(engine: Engine, picture: Picture, before: int, until: int) -> Path | None:
    """The file of a picture that was there: it decodes, and carries the hash; `before` such are others'."""
    seeded = picture.seeded
    paths = output.existing(picture.target, picture.request, picture.number * seeded, picture.row)
    planned = engine.metadata(picture.request, seeded=seeded)
    tiled = planned | {"compute": planned["compute"] | {"tiled": True}}  # where memory ran out
    wanted = {image.request_hash(each, seeded=seeded) for each in (planned, tiled)}
    return next(itertools.islice(image.made_as(wanted, paths, seeded=seeded, until=until), before, None), None)


def _done(engine: Engine, planned: Planned) -> Done:
    now, peaks = engine.plan, hardware.peak_memory(engine.plan.device)
    plan = replace(planned.plan, residency=now.residency, device=now.device)
    described = plan.to_json() | {"multiply": engine.multiply}
    images, request, row = tuple(planned.images), planned.request.to_json(), planned.row.number
    return Done(images, request, described, {}, peaks, fluxcli.versions(), row)


def _advise(error: DoesNotFit, planned: Planned, engine: Engine, window: Sequence[Picture]) -> None:
    """Say what would fit, and keep what is left of the pictures."""
    less = replace(planned.request, vram_limit=int(engine.plan.budget_bytes * 0.8))
    tried = suggestion(less, planned.others, planned.machine)
    error.hint = " or ".join(filter(None, (error.hint, tried and f"again with {tried}")))
    for picture in window:
        if picture.latents and picture.latents.step and not picture.saved:
            with contextlib.suppress(OSError):  # what went wrong first is what must be said
                place = latents.save(picture.latents, picture.target, picture.number, picture.row)
                error.why, error.hint = f"{error.why}; the latents are kept in {place}", f"flux decode {place}"
