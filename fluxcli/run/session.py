"""A session: rows are planned, grouped into windows and drawn, by one engine that stays as long as it serves.

It never prints. The same in process and in the worker. Same seed, same pixels: a row's precision and decoding are
those of its own plan, only where weights are is decided for a window as a whole.
"""

import contextlib
import gc
import hashlib
import os
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from itertools import islice, repeat
from pathlib import Path

import fluxcli
from fluxcli import paths
from fluxcli.engine import device as hardware
from fluxcli.engine.engine import Drawn, Engine
from fluxcli.engine.picture import Picture
from fluxcli.errors import DoesNotFit
from fluxcli.events import Done, Event, GeneratedImage, Notice, Phase, Saved, Skipped, explain
from fluxcli.models import find as models
from fluxcli.models import loras as lora
from fluxcli.pictures import image, latents
from fluxcli.pictures import names as output
from fluxcli.pictures.latents import Latents
from fluxcli.plan.costs import make_workload
from fluxcli.plan.machine import Hardware
from fluxcli.plan.placement import MemoryPlan, weaker
from fluxcli.plan.planner import make_plan, suggest_options
from fluxcli.request.fields import Order
from fluxcli.request.job import Job, Row
from fluxcli.run.lock import DeviceLock
from fluxcli.run.margin import grow_margin, read_margin
from fluxcli.run.planned import Planned, Prepared, window_size
from fluxcli.run.saving import Destination, make_metadata, save
from quant.checkpoint import Checkpoint
from quant.errors import ExplainedError
from quant.lora import Adapter

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

    def run(self, job: Job, *, kept: Latents | None = None, after_loss: bool = False) -> Iterator[Event]:
        """Yield the events of every row. Raises `FluxError` and `QuantError`, in a batch if they end all.

        `kept` is what there is of the only picture. With `after_loss` a worker was lost that may have
        drawn some of it: pictures of rows with a seed that are there count as saved.
        """
        groups: dict[tuple, list[Planned]] = {}
        known: dict[Order, Prepared] = {}
        for row in job.rows:
            try:
                planned = yield from self._planned(row, job, known, after_loss)
            except ExplainedError as error:
                if not job.batch:
                    raise
                yield explain(error, row.number)
                continue
            if job.expected_model not in (None, planned.checkpoint.fingerprint):
                yield Notice("the model here is not the one that made the picture: expect another picture")
            tiled = planned.plan.placement.decode == "tiled"  # other pixels: decided by each row's own plan
            groups.setdefault((planned.basis, tiled, row.order.resources.vram_limit), []).append(planned)
        for group in groups.values():
            yield from self._draw(group, job, kept, after_loss)

    def prepare(
        self, order: Order, *, lock: bool = True, no_wait: bool = False
    ) -> Generator[Event, None, Prepared]:
        """Plan an order, the device's lock held; an adapter's header is read here and nowhere else."""
        said: list[str] = []
        checkpoints = models.list_checkpoints(order, paths.config_folder(), said.append)
        yield from map(Notice, said)
        adapters = lora.resolve_loras(order.request.lora, checkpoints[-1].components)
        hardware.check_torch()
        machine = hardware.probe(order.resources.device)
        if lock and machine.kind != "cpu":
            yield from self._lock(machine.identity, no_wait)
            machine = hardware.probe(order.resources.device)  # once more: another flux may have held all of it
        if self.engine:  # what this process holds is its own to use
            machine = replace(machine, ram_free_bytes=machine.ram_free_bytes + self.engine.plan.host_bytes)
        try:
            checkpoint, plan = make_plan(
                make_workload(order.request, adapters),
                order.resources,
                checkpoints,
                machine,
                margin_bytes=read_margin(machine),
                model=order.request.model,
            )
        except DoesNotFit as error:
            found = suggest_options(order.request, order.resources, checkpoints, machine, adapters=adapters)
            error.hint = found or error.hint
            raise
        if lock and machine.kind == "cpu" and max(plan.peak_bytes.values()) > machine.total_bytes * LOCKED_SHARE:
            yield from self._lock(machine.identity, no_wait)
        return Prepared(checkpoint, plan, machine, adapters, tuple(checkpoints))

    def engine_for(
        self, checkpoint: Checkpoint, plan: MemoryPlan, machine: Hardware, basis: tuple, *, cache: bool
    ) -> Engine:
        """The engine that is there, where it has the same basis, else a new one."""
        if self.engine and self._basis == basis:
            self.engine.adopt(plan, machine, prompt_cache=cache)
        else:
            self.evict()
            self.engine, self._basis = Engine(checkpoint, plan, machine, prompt_cache=cache), basis
        return self.engine

    def engine_of(
        self, order: Order, *, no_wait: bool
    ) -> Generator[Event, None, tuple[Engine, tuple[Adapter, ...]]]:
        """An engine for a request, and the request's adapters."""
        found = yield from self.prepare(order, no_wait=no_wait)
        yield from map(Notice, lora.describe_unmatched(found.adapters))
        return self.engine_for(found.checkpoint, found.plan, found.hardware, (), cache=False), found.adapters

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
        return described | {"placement": plan.placement.level("denoise"), "held_bytes": held}

    def _planned(
        self, row: Row, job: Job, known: dict[Order, Prepared], after_loss: bool
    ) -> Generator[Event, None, Planned]:
        order = row.order
        target = output.parse_target(order, force=job.force)
        if job.batch and not ((job.resume or after_loss) and target.exact):  # else the file may be the row's picture
            output.check_writable(target, order, row.number)
        same = replace(
            order,
            request=replace(order.request, prompt="x", seed=0),
            output=replace(order.output, count=1, output=None),
        )  # plans depend on none of these
        if same not in known:
            prepared = yield from self.prepare(order, no_wait=job.no_wait)
            if not any(prepared.adapters == before.adapters for before in known.values()):
                yield from map(Notice, lora.describe_unmatched(prepared.adapters))
            known[same] = prepared
            if not job.batch:
                request, plan = order.request, prepared.plan
                (width, height), seed = request.size, f", seed {request.seed}" * (request.seed >= 0)
                what = f"{request.model} on {plan.device} in {plan.precision}"
                yield Notice(f"{width}x{height}, {request.steps} steps{seed}, {what}")
        order = order.with_seed()
        return Planned(row, order, target, known[same], order.output.count)

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

    def _draw(self, group: Sequence[Planned], job: Job, resume: Latents | None, after_loss: bool) -> Iterator[Event]:
        """Rows of one basis: their pictures in windows."""
        first, placed = group[0], group[0].plan.placement
        for planned in group[1:]:
            placed = weaker(placed, planned.plan.placement)
        if job.batch:
            yield Notice(f"{first.order.request.model} on {first.plan.device} in {first.plan.precision}")
        plan = replace(first.plan, placement=placed)
        engine = self.engine_for(first.checkpoint, plan, first.machine, first.basis, cache=job.prompt_cache)
        missing: dict[Picture, Destination] = {}
        for planned in group:
            yield from self._take_stock(engine, planned, job, missing=missing, resume=resume, lost=after_loss)
        # Adapters change as rarely as can be.
        pictures = sorted(missing, key=lambda picture: [str(ref) for ref in picture.request.lora])
        if job.batch:
            for k, picture in enumerate(pictures, 1):
                picture.position, picture.total = k, len(pictures)
        size, rows = window_size(group), {planned.row.number: planned for planned in group}
        for at in range(0, len(pictures), size):
            group_pictures = {picture: missing[picture] for picture in pictures[at : at + size]}
            yield from self._draw_group(engine, group_pictures, rows, isolate=job.batch)

    def _take_stock(
        self, engine: Engine, planned: Planned, job: Job, *,
        missing: dict[Picture, Destination], resume: Latents | None, lost: bool,
    ) -> Iterator[Event]:  # fmt: skip
        """Say which pictures of a row are there already, and add the others to `missing`."""
        done: list[Path | None] = [None] * planned.order.output.count
        if planned.order.output.metadata and (job.resume or (lost and planned.row.order.request.seed >= 0)):
            done = _find_done(engine, planned)
        for (picture, place), path in zip(planned.pictures(resume), done, strict=True):
            if path is None:
                error = planned.refused() if planned.target.exact and (job.resume or lost) else None
                if error:
                    yield explain(error, place.row)
                    return
                if job.resume and place.seeded:
                    kept = _find_kept(engine, picture, place)
                    if kept:
                        picture.tokens, picture.step = kept.tokens, kept.step
                missing[picture] = place
            elif lost:
                planned.images.append(_describe_file(path, place.order))
                yield Saved(planned.images[-1], place.row)
            else:
                planned.left -= 1
                yield Skipped(place.row, str(path))
        if len(planned.images) == planned.left > 0:  # all that was lost is the word of it
            yield _done(engine, planned)

    def _draw_group(
        self, engine: Engine, places: dict[Picture, Destination], rows: dict[int, Planned], *, isolate: bool
    ) -> Iterator[Event]:
        """A group's events, the end of each row, and what went wrong."""
        left = dict(places)  # without those that are saved
        known = len(engine.out_of_memory)
        try:
            for event in engine.draw(list(places), isolate=isolate):
                if not isinstance(event, Drawn):
                    yield event
                    continue
                picture, place = event.picture, places[event.picture]
                yield Phase("save")
                try:
                    saved = save(picture, place, engine)
                except ExplainedError as error:
                    if not isolate:
                        raise
                    picture.error = error
                    continue
                finally:
                    picture.pixels = None
                del left[picture]
                yield Saved(saved, place.row)
                planned = rows[place.row]
                planned.images.append(saved)
                if len(planned.images) == planned.left:
                    yield _done(engine, planned)
        except DoesNotFit as error:
            _advise(error, rows, engine, left)
            raise
        finally:
            for happened in engine.out_of_memory[known:]:
                grow_margin(engine.hardware, happened.missing_bytes)
        for picture, place in left.items():
            if isinstance(picture.error, DoesNotFit):
                _advise(picture.error, rows, engine, {picture: place})
            if picture.error:
                yield explain(picture.error, place.row)


def _find_done(engine: Engine, planned: Planned) -> list[Path | None]:
    """Return the file that each picture of a row is done with, None for those that are to be drawn.

    Names that hold other pictures do not count. Of the rest, the k-th of equal pictures is done if
    the k-th name carries its hash: a whole picture, made by the same request with the same model.
    """
    pictures, nth = list(planned.pictures(None)), planned.row.nth
    if planned.target.exact or planned.target.has_field("row"):
        nth = 1  # these names are no other row's
    if pictures[0][1].seeded:
        return [next(islice(_list_done(engine, *picture), nth - 1, None)) for picture in pictures]
    return list(islice(_list_done(engine, *pictures[0]), nth - 1, nth - 1 + len(pictures)))


def _list_done(engine: Engine, picture: Picture, place: Destination) -> Iterator[Path | None]:
    """Yield a picture's names that carry its hash, and None for each that is free; without end."""
    seeded = place.seeded
    wanted = _hashes_of(engine, picture, place)
    for path in output.list_names(place.target, place.order, place.n, place.row, seeded=seeded):
        if image.carries_hash(path, wanted, seeded=seeded):
            yield path
        elif not os.path.lexists(path):
            yield None
    yield from repeat(None)


def _hashes_of(engine: Engine, picture: Picture, place: Destination) -> set[str]:
    """Return the hashes that a picture may carry: decoded in tiles, too, as it is where memory runs out."""
    planned = make_metadata(engine, place.order, picture.adapters, seeded=place.seeded)
    tiled = planned | {"compute": planned["compute"] | {"tiled": True}}
    return {image.hash_request(each, seeded=place.seeded) for each in (planned, tiled)}


def _find_kept(engine: Engine, picture: Picture, where: Destination) -> Latents | None:
    """Return the latents that a run before has kept of a picture; None where there are none of its hash."""
    wanted = _hashes_of(engine, picture, where)
    for path in output.candidates(where.target, where.order, where.n, where.row):
        place = path.with_name(path.stem + latents.SUFFIX)
        if not place.exists():
            return None
        with contextlib.suppress(ExplainedError):  # of somebody else, or damaged
            kept = latents.load(place)
            if kept.request_hash in wanted:
                return replace(kept, order=where.order)
    return None


def _describe_file(path: Path, order: Order) -> GeneratedImage:
    """Return what identifies a picture that lies there."""
    data = path.read_bytes()
    metadata = image.read_metadata(path)
    seed, digest = metadata["request"]["seed"], metadata["pixels_sha256"]
    sha256 = hashlib.sha256(data).hexdigest()
    return GeneratedImage(str(path), seed, *order.request.size, order.output.format, len(data), sha256, digest)


def _done(engine: Engine, planned: Planned) -> Done:
    now, peaks = engine.plan, hardware.peak_memory(engine.plan.device)
    plan = replace(planned.plan, placement=now.placement, device=now.device)
    described = plan.to_json() | {"multiply": engine.multiply}
    images, request, row = tuple(planned.images), planned.order.to_json(), planned.row.number
    return Done(images, request, described, {}, peaks, fluxcli.versions(), row)


def _advise(
    error: DoesNotFit, rows: dict[int, Planned], engine: Engine, left: dict[Picture, Destination]
) -> None:
    """Say what would fit, and keep what is left of the pictures."""
    planned = rows[next(iter(left.values())).row]
    less = replace(planned.order.resources, vram_limit=int(engine.plan.budget_bytes * 0.8))
    tried = suggest_options(
        planned.order.request, less, planned.others, planned.machine, adapters=planned.prepared.adapters
    )
    error.hint = " or ".join(filter(None, (error.hint, tried and f"again with {tried}")))
    for picture, where in left.items():
        if picture.step:
            with contextlib.suppress(OSError):  # what went wrong first is what must be said
                made = image.hash_request(make_metadata(engine, where.order, picture.adapters))
                fingerprint = engine.checkpoint.fingerprint
                kept = Latents(where.order, picture.tokens, picture.step, fingerprint, made)
                place = latents.save(kept, where.target, where.n, where.row)
                error.why, error.hint = f"{error.why}; the latents are kept in {place}", f"flux decode {place}"
