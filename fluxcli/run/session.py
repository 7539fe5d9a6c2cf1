"""A session: rows are planned, grouped and drawn, by one engine that stays as long as it serves.

It never prints. It is the same in process and in the worker. Same seed, same pixels: a row's
precision and decoding are those of its own plan; only where weights are is decided for a group of
rows as a whole. Sizes are in bytes, times in seconds.
"""

import contextlib
import gc
import logging
import shlex
from collections.abc import Collection, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import fluxcli
from fluxcli import paths
from fluxcli.engine import device, modulation
from fluxcli.engine.engine import Denoised, Drawn, Engine
from fluxcli.engine.picture import Picture
from fluxcli.engine.preview import Estimated
from fluxcli.errors import DoesNotFit, NotFinite, explain_write
from fluxcli.events import (
    Done,
    Event,
    GeneratedImage,
    Kept,
    Notice,
    Phase,
    Preview,
    Saved,
    Skipped,
    explain,
    is_of_one_row,
)
from fluxcli.models import find, loras
from fluxcli.models.parts import Control, resolve_parts
from fluxcli.pictures.canvas import describe_fit, describe_mask
from fluxcli.pictures.inputs import NO_INPUTS, InputPictures, describe_remarks, load_inputs
from fluxcli.pictures.latents import Latents
from fluxcli.pictures.names import Destination, check_writable, parse_target
from fluxcli.pictures.previews import PreviewFile
from fluxcli.plan.costs import DTYPE_BYTES, make_workload
from fluxcli.plan.machine import Hardware
from fluxcli.plan.placement import FRAGMENTS_SHARE, MemoryPlan, Placement, weaker
from fluxcli.plan.planner import make_plan, suggest_options
from fluxcli.request.fields import GenerationRequest, Order, Output
from fluxcli.request.job import Job, Row
from fluxcli.request.settings import LoraRef
from fluxcli.request.target import Target
from fluxcli.run import saving
from fluxcli.run.lock import DeviceLock
from fluxcli.run.margin import grow_margin, read_margin
from quant.checkpoint import COMPONENTS, Checkpoint
from quant.errors import ExplainedError
from quant.lora import Adapter

logger = logging.getLogger(__name__)

LOCK_S = 1.0  # between two looks at whether the run is still wanted, while another has the device
LOCKED_SHARE = 0.25  # of the RAM: a run on the CPU that takes less disturbs nobody
MAX_GROUP = 16  # pictures that are encoded together, and decoded together where they have to be
TABLES_SHARE = 0.1  # of the free RAM, for the modulation tables of a group
LESS_SHARE = 0.8  # of the budget: what is suggested after memory ran out fits into so much


@dataclass(frozen=True)
class Prepared:
    """What an order is drawn with. `alternatives` are all checkpoints of its model."""

    checkpoint: Checkpoint
    plan: MemoryPlan
    hardware: Hardware
    adapters: tuple[Adapter, ...]
    alternatives: tuple[Checkpoint, ...]
    inputs: InputPictures = NO_INPUTS
    controls: tuple[Control, ...] = ()

    def make_picture(self, request: GenerationRequest, **about: Any) -> Picture:
        """Return a picture that is to be drawn with this."""
        return Picture(request, self.adapters, inputs=self.inputs, controls=self.controls, **about)

    @property
    def engine_key(self) -> tuple[object, ...]:
        """What one engine has: rows that differ in it are never drawn by the same one."""
        plan = self.plan
        return (
            self.checkpoint.fingerprint,
            self.checkpoint.components["transformer"].folder,
            plan.device,
            plan.precision,
            plan.spec,
            tuple(plan.dtypes[name] for name in COMPONENTS),
            plan.compiled,
        )

    @property
    def parts_key(self) -> tuple[object, ...]:
        """What the request adds: an engine goes from one to another, but not in a group of rows."""
        return tuple((name, part.fingerprint) for name, part in self.checkpoint.parts.items())


@dataclass
class Known:
    """What rows of a job share: plans, and adapters, whose headers are read once."""

    plans: dict[Order, Prepared] = field(default_factory=dict)
    adapters: dict[tuple[str, int, tuple[LoraRef, ...]], tuple[Adapter, ...]] = field(
        default_factory=dict
    )

    def resolve_loras(self, order: Order, checkpoint: Checkpoint) -> tuple[Adapter, ...]:
        """Return the adapters of an order; raises what `loras.resolve_loras` raises."""
        channels = loras.count_channels(order.request)
        key = (checkpoint.fingerprint, channels, order.request.lora)
        if key not in self.adapters:
            self.adapters[key] = loras.resolve_loras(
                order.request.lora, checkpoint.components, channels=channels
            )
        return self.adapters[key]


@dataclass
class PlannedRow:
    """A row with its plan, and its pictures as they come."""

    row: Row
    order: Order  # with a seed
    target: Target
    prepared: Prepared
    missing: int  # pictures that are still to come
    is_checked: bool = True  # that its files can be written
    images: list[GeneratedImage] = field(default_factory=list)

    @property
    def group_key(self) -> tuple[object, ...]:
        """What rows that are drawn together have in common.

        Tiles give other pixels: whether there are some is decided by each row's own plan.
        """
        tiles = self.prepared.plan.placement.tiles
        prepared = self.prepared
        return *prepared.engine_key, prepared.parts_key, tiles, self.order.resources.vram_limit

    def list_destinations(self) -> list[Destination]:
        """Return where each of the row's pictures goes."""
        assert self.row.order
        seeded = self.row.order.request.seed >= 0
        return [
            Destination(
                self.target, self.order.picture(k), n=k + 1, row=self.row.number, seeded=seeded
            )
            for k in range(self.order.output.count)
        ]

    def add(self, image: GeneratedImage) -> None:
        """Take a picture of the row that is there now."""
        self.images.append(image)
        self.missing -= 1


@dataclass
class Pending:
    """A picture that is to be drawn, where it goes, and the row that it is of.

    `latents` is the file in which what there is of it is kept; where that is `ours`, it is deleted
    when the picture is written.
    """

    picture: Picture
    destination: Destination
    row: PlannedRow
    latents: Path | None = None
    ours: bool = True
    preview: PreviewFile = field(default_factory=PreviewFile)
    cannot_preview: bool = False

    def begin_with(self, kept: Latents) -> None:
        """Go on from kept latents; a picture without a seed gets theirs."""
        order = self.destination.order
        request = replace(order.request, seed=kept.order.request.seed)
        self.destination = replace(self.destination, order=replace(order, request=request))
        self.picture.request = request
        self.picture.tokens = kept.tokens
        self.picture.step = kept.step
        self.latents = kept.path


class Session:
    """Plans rows, groups them, takes the device's lock and draws; one job after the other.

    Leaving the `with` block gives the lock back, `evict` the memory.
    """

    def __init__(self) -> None:
        self.engine: Engine | None = None
        self._engine_key: tuple[object, ...] = ()
        self._held = contextlib.ExitStack()
        self._locked: set[str] = set()  # identities of devices
        self._told_of_segments = False
        self.untold: list[Event] = []  # latents that were kept when nobody listened any more

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def run(
        self,
        job: Job,
        *,
        kept: Latents | None = None,
        after_loss: Collection[str] | None = None,
    ) -> Generator[Event, None, None]:
        """Yield the events of every row.

        `kept` is what there is of the only picture. `after_loss` has the paths of the pictures that
        a lost worker said it saved, None where none was lost; after a loss, pictures of rows with a
        seed that are there count as saved. Raises `FluxError` and `QuantError`; in a batch they are
        events of their rows.
        """
        self.untold = []
        groups: dict[tuple[object, ...], list[PlannedRow]] = {}
        known = Known()
        for row in job.rows:
            try:
                planned = yield from self._plan_row(row, job, known=known, after_loss=after_loss)
            except Exception as error:
                if not job.batch or not is_of_one_row(error):
                    raise
                logger.debug("what ended row %d", row.number, exc_info=error)
                yield explain(error, row.number)
                continue
            fingerprint = planned.prepared.checkpoint.fingerprint
            if job.expected_model not in (None, fingerprint):
                what = "the model here is not the one that made the picture"
                yield Notice(f"{what}: expect another picture")
            groups.setdefault(planned.group_key, []).append(planned)
        for rows in groups.values():
            yield from self._draw_rows(rows, job, kept=kept, after_loss=after_loss)

    # --- planning

    def prepare(
        self,
        order: Order,
        *,
        lock: bool = True,
        no_wait: bool = False,
        known: Known | None = None,
    ) -> Generator[Event, None, Prepared]:
        """Plan an order, and take the device's lock for it unless `lock` is off.

        Adapters are resolved here and nowhere else, and only if `known` has them not. Raises
        `DoesNotFit` with options that would fit, and what looking for models, adapters and devices
        raises.
        """
        resources = order.resources
        said: list[str] = []
        inputs = load_inputs(order.request)
        yield from map(Notice, describe_remarks(inputs))
        checkpoints = find.list_checkpoints(order, paths.config_folder(), said.append)
        yield from map(Notice, said)
        adapters = (known or Known()).resolve_loras(order, checkpoints[-1])
        parts = resolve_parts(order.request, checkpoints[-1], adapters)
        checkpoints = [parts.add_to(checkpoint) for checkpoint in checkpoints]
        about_mask = describe_mask(inputs, order.request)
        yield from map(Notice, [*describe_fit(inputs, order.request), *about_mask])
        yield from map(Notice, loras.describe_unmatched(adapters))
        hardware = device.probe(resources.device)
        if lock and hardware.kind != "cpu":
            yield from self._lock(hardware.identity, no_wait=no_wait)
            hardware = device.probe(resources.device)  # again: another flux may have held all of it
        if hardware.fixed_segments == device.USED_BEFORE and not self._told_of_segments:
            self._told_of_segments = True
            what = f"{device.USED_BEFORE}: {FRAGMENTS_SHARE:.0%} of memory are left for gaps"
            yield Notice(f"{what} (import flux before CUDA is used, and they are not)")
        if self.engine:  # what this process holds is its own to use
            ram_free_bytes = hardware.ram_free_bytes + self.engine.plan.host_bytes
            hardware = replace(hardware, ram_free_bytes=ram_free_bytes)
        try:
            checkpoint, plan = make_plan(
                make_workload(
                    order.request,
                    adapters,
                    references=inputs.references,
                    controls=parts.controls,
                ),
                resources,
                checkpoints,
                hardware=hardware,
                margin_bytes=read_margin(hardware),
                model=order.request.model,
            )
        except DoesNotFit as error:
            options = suggest_options(
                order.request,
                resources,
                checkpoints,
                hardware=hardware,
                adapters=adapters,
                references=inputs.references,
                controls=parts.controls,
            )
            error.hint = options or error.hint
            raise
        most_bytes = max(plan.peak_bytes.values())
        is_large = most_bytes > hardware.total_bytes * LOCKED_SHARE
        if lock and hardware.kind == "cpu" and is_large:
            yield from self._lock(hardware.identity, no_wait=no_wait)
        return Prepared(
            checkpoint,
            plan,
            hardware,
            adapters=adapters,
            alternatives=tuple(checkpoints),
            inputs=inputs,
            controls=parts.controls,
        )

    def _plan_row(
        self, row: Row, job: Job, *, known: Known, after_loss: Collection[str] | None
    ) -> Generator[Event, None, PlannedRow]:
        """Plan a row of the job; rows that need the same plan share one."""
        assert row.order
        order = row.order
        target = row.target or parse_target(order.output, force=job.force)
        # What stands at an exact name may be the row's picture: that is looked at first.
        may_be_done = job.resume or after_loss is not None
        is_checked = not (target.exact and may_be_done)
        if job.batch and is_checked:
            check_writable(target, order, row=row.number)
        alike = _without_content(order)
        if alike not in known.plans:
            prepared = yield from self.prepare(order, no_wait=job.no_wait, known=known)
            known.plans[alike] = prepared
            if not job.batch:
                yield _announce(order, prepared.plan)
        return PlannedRow(
            row,
            order.with_seed(),
            target,
            prepared=known.plans[alike],
            missing=order.output.count,
            is_checked=is_checked,
        )

    def _lock(self, identity: str, *, no_wait: bool) -> Iterator[Event]:
        """Take a device's lock, and keep it until `release`.

        Waits as long as another flux computes on it; with `no_wait` raises `DoesNotFit` instead.
        """
        if identity in self._locked:
            return
        lock = DeviceLock(identity)
        if not lock.acquire():
            if no_wait:
                raise DoesNotFit(
                    "the device is busy",
                    which=identity,
                    why="another flux computes on it",
                    hint="leave --no-wait out to wait for it",
                )
            what = f"{identity} is busy with another flux: waiting for it"
            yield Notice(f"{what} (--no-wait gives up instead)")
            while not lock.acquire(LOCK_S):
                yield Phase("wait", identity)
        self._locked.add(identity)
        self._held.callback(lock.release)

    # --- the engine

    def open_engine(self, prepared: Prepared, *, prompt_cache: bool = False) -> Engine:
        """Return the engine that is there, where it can draw this, else a new one."""
        plan = prepared.plan
        hardware = prepared.hardware
        if self.engine and self._engine_key == prepared.engine_key:
            self.engine.adopt(
                plan, hardware, checkpoint=prepared.checkpoint, prompt_cache=prompt_cache
            )
            return self.engine
        self.evict()
        self.engine = Engine(prepared.checkpoint, plan, hardware, prompt_cache=prompt_cache)
        self._engine_key = prepared.engine_key
        return self.engine

    def evict(self) -> None:
        """Drop the engine and give its memory back."""
        if self.engine:
            name = self.engine.plan.device
            self.engine = None
            gc.collect()
            device.empty_cache(name)

    def release(self) -> None:
        """Give the device's lock back."""
        self._held.close()
        self._locked.clear()

    def status(self) -> dict[str, Any]:
        """Return what is loaded and how much it holds."""
        if not self.engine:
            return {"model": None}
        plan = self.engine.plan
        return {
            "model": str(self.engine.checkpoint.folder),
            "device": plan.device,
            "precision": plan.precision,
            "placement": plan.placement.level("denoise"),
            "held_bytes": self.engine.components.count_bytes(),
        }

    # --- drawing

    def _draw_rows(
        self,
        rows: Sequence[PlannedRow],
        job: Job,
        *,
        kept: Latents | None,
        after_loss: Collection[str] | None,
    ) -> Iterator[Event]:
        """Draw rows that one engine can draw: what is missing of them, group by group."""
        prepared = _plan_together(rows)
        if job.batch:
            model = rows[0].order.request.model
            yield Notice(f"{model} on {prepared.plan.device} in {prepared.plan.precision}")
        engine = self.open_engine(prepared, prompt_cache=job.prompt_cache)
        pending: list[Pending] = []
        for row in rows:
            try:
                pending += yield from _take_stock(
                    engine, row, job, after_loss=after_loss, begun=pending
                )
            except Exception as error:
                if not job.batch or not is_of_one_row(error):
                    raise
                logger.debug("what ended row %d", row.row.number, exc_info=error)
                yield explain(error, row.row.number)
        if kept:
            pending[0].begin_with(kept)
            pending[0].ours = False  # the user named it
        # Adapters change as rarely as can be.
        pending.sort(key=lambda each: [str(ref) for ref in each.picture.request.lora])
        if job.batch:
            for position, each in enumerate(pending, 1):
                each.picture.position = position
                each.picture.total = len(pending)
        size = _choose_group_size(rows)
        for at in range(0, len(pending), size):
            group = pending[at : at + size]
            yield from _draw_group(engine, group, isolate=job.batch, untold=self.untold)


def _without_content(order: Order) -> Order:
    """Return an order without what no plan depends on: the prompt, the seed and the output."""
    return replace(order, request=replace(order.request, prompt="x", seed=0), output=Output())


def _announce(order: Order, plan: MemoryPlan) -> Notice:
    """Return what is said of a single order before it is drawn."""
    request = order.request
    width, height = request.size
    parts = [f"{width}x{height}", request.describe_steps()]
    if request.seed >= 0:
        parts.append(f"seed {request.seed}")
    parts.append(f"{request.model} on {plan.device} in {plan.precision}")
    return Notice(", ".join(parts))


def _plan_together(rows: Sequence[PlannedRow]) -> Prepared:
    """Return what the rows are drawn with: the first one's, under a placement that does for all."""
    first = rows[0].prepared
    placement: Placement = first.plan.placement
    for row in rows[1:]:
        placement = weaker(placement, row.prepared.plan.placement)
    return replace(first, plan=replace(first.plan, placement=placement))


def _choose_group_size(rows: Sequence[PlannedRow]) -> int:
    """Return how many pictures go through a phase together: by the RAM that their tables take."""
    prepared = rows[0].prepared
    width = modulation.row_width(prepared.checkpoint.components["transformer"])
    steps = max(row.order.request.steps_taken for row in rows)
    table_bytes = steps * width * DTYPE_BYTES[prepared.plan.dtypes["transformer"]]
    fitting = int(prepared.hardware.ram_free_bytes * TABLES_SHARE) // table_bytes
    return max(1, min(MAX_GROUP, fitting))


def _take_stock(
    engine: Engine,
    row: PlannedRow,
    job: Job,
    *,
    after_loss: Collection[str] | None,
    begun: Sequence[Pending],
) -> Generator[Event, None, list[Pending]]:
    """Say which pictures of a row are there already, and return the others.

    Of what a lost worker said already nothing is said again; see `Session.run`. Latents that
    `begun` pictures go on from are no other's.
    """
    destinations = row.list_destinations()
    done: list[Path | None] = [None] * len(destinations)
    is_lost = after_loss is not None
    may_be_done = job.resume or (is_lost and destinations[0].seeded)
    if may_be_done and row.order.output.metadata:
        done = saving.find_done(engine, destinations, row.prepared, nth=row.row.nth)
    taken = {each.latents for each in begun}
    pending = []
    for destination, path in zip(destinations, done, strict=True):
        if path is None:
            picture = row.prepared.make_picture(
                destination.order.request, position=destination.n, total=len(destinations)
            )
            picture.preview_every = row.order.output.preview_every
            waiting = Pending(picture, destination, row)
            if may_be_done:
                found = saving.find_latents(engine, destination, row.prepared, taken=taken)
                if found:
                    waiting.begin_with(found)
                    taken.add(found.path)
            pending.append(waiting)
        elif after_loss and str(path) in after_loss:
            row.add(saving.describe_file(path, destination.order))
        elif job.resume:
            row.missing -= 1
            yield Skipped(row.row.number, str(path))
        else:
            row.add(saving.describe_file(path, destination.order))
            yield Saved(row.images[-1], row.row.number)
    # A lost worker had saved all pictures of the row, but not said that the row is done.
    if row.images and not row.missing:
        yield _finish(engine, row)
    if pending:
        saving.check_metadata(engine, pending[-1].destination, row.prepared)
    if pending and not row.is_checked:
        check_writable(row.target, row.order, row=row.row.number)
    return pending


def draw_pictures(
    engine: Engine, pictures: Sequence[Picture], *, isolate: bool = False
) -> Generator[Event | Estimated | Denoised | Drawn, None, None]:
    """Draw pictures as `Engine.draw` does; memory that ran out is remembered for later plans."""
    known = len(engine.out_of_memory)
    try:
        yield from engine.draw(pictures, isolate=isolate)
    finally:
        for happened in engine.out_of_memory[known:]:
            grow_margin(engine.hardware, happened.missing_bytes)


def _draw_group(
    engine: Engine, group: Sequence[Pending], *, isolate: bool, untold: list[Event]
) -> Iterator[Event]:
    """Draw the pictures of a group, see `_draw_and_save`; no preview of them is left."""
    try:
        yield from _draw_and_save(engine, group, isolate=isolate, untold=untold)
    finally:
        for pending in group:
            pending.preview.remove()


def _draw_and_save(
    engine: Engine, group: Sequence[Pending], *, isolate: bool, untold: list[Event]
) -> Iterator[Event]:
    """Draw the pictures of a group, each a file as soon as it can be; yields the ends of rows, too.

    Where a picture has to wait for its decoder, or cannot be written, its latents are kept in a
    file; `untold` gets the events of that after nobody listens any more. With `isolate` an error
    ends only the pictures that have it.
    """
    left = {each.picture: each for each in group}  # that are not saved
    try:
        for event in draw_pictures(engine, list(left), isolate=isolate):
            if isinstance(event, Denoised):
                if not event.decoded_next:
                    yield from _keep(engine, left[event.picture])
            elif isinstance(event, Drawn):
                yield from _save(engine, left[event.picture], isolate=isolate)
                if not event.picture.error:
                    del left[event.picture]
            elif isinstance(event, Estimated):
                yield from _show_estimate(left[event.picture], event)
            else:
                yield event
    except GeneratorExit as end:
        untold += _keep_what_is_left(end, engine, list(left.values()))
        raise
    except BaseException as error:
        yield from _keep_what_is_left(error, engine, list(left.values()))
        raise
    for pending in left.values():
        ended_by = pending.picture.error
        if ended_by:
            yield from _keep_what_is_left(ended_by, engine, [pending])
            yield explain(ended_by, pending.destination.row)


def _show_estimate(pending: Pending, estimated: Estimated) -> Iterator[Event]:
    """Write the preview of a picture, and say where; a preview that fails ends no picture."""
    if pending.cannot_preview:
        return
    picture = estimated.picture
    try:
        path = pending.preview.write(estimated.pixels, pending.destination)
    except OSError as error:
        pending.cannot_preview = True
        yield Notice(f"no preview can be written: {explain_write(error)}")
        return
    request = picture.request
    row = pending.destination.row
    yield Preview(str(path), picture.taken, request.steps_taken, seed=request.seed, row=row)


def _save(engine: Engine, pending: Pending, *, isolate: bool) -> Iterator[Event]:
    """Write a picture to its file, and say so, and whether its row is over."""
    picture = pending.picture
    yield Phase("save")
    try:
        image = saving.save_picture(picture, pending.destination, engine)
    except Exception as error:
        if not isolate or not is_of_one_row(error):
            raise
        logger.debug("what ended a picture", exc_info=error)
        picture.error = error
        return
    finally:
        picture.pixels = None
    if pending.latents and pending.ours:
        with contextlib.suppress(OSError):
            pending.latents.unlink()
    pending.preview.remove()
    picture.tokens = None  # from here on there is nothing of it to keep
    pending.row.add(image)
    yield Saved(image, pending.destination.row, round(picture.taken_s, 3))
    if not pending.row.missing:
        yield _finish(engine, pending.row)


def _keep(engine: Engine, pending: Pending) -> Iterator[Event]:
    """Write the latents of a picture to a file, where that is possible and they are in none yet."""
    if pending.latents or pending.picture.tokens is None:
        return
    with contextlib.suppress(OSError):
        pending.latents = saving.keep_latents(engine, pending.picture, pending.destination)
        seed = pending.destination.order.request.seed
        yield Kept(str(pending.latents), seed, pending.destination.row)


def _keep_what_is_left(
    error: BaseException, engine: Engine, left: Sequence[Pending]
) -> Iterator[Event]:
    """Keep what there is of pictures that an error has ended; the error says where, if it can.

    That is the latents after the last step; where memory ran out, after any.
    """
    if isinstance(error, DoesNotFit):
        _advise(error, engine, left[0])
    for pending in left:
        is_worth_it = pending.picture.denoised and not isinstance(error, NotFinite)
        if is_worth_it or (pending.picture.step and isinstance(error, DoesNotFit)):
            yield from _keep(engine, pending)
    kept = {
        each.latents: each.destination
        for each in left
        if each.latents and each.picture.tokens is not None
    }
    if kept and isinstance(error, ExplainedError) and not isinstance(error, NotFinite):
        files = [str(path) for path in kept]
        error.why = f"{error.why}; the latents are kept in {', '.join(files)}".removeprefix("; ")
        error.hint = shlex.join(["flux", "decode", *files])
        if not all(saving.is_beside(path, destination) for path, destination in kept.items()):
            error.hint += " -o FOLDER/"


def _finish(engine: Engine, row: PlannedRow) -> Done:
    """Return the end of a row; placement and device are those that the engine came to."""
    now = engine.plan
    plan = replace(row.prepared.plan, placement=now.placement, device=now.device)
    return Done(
        images=tuple(row.images),
        request=row.order.to_json(),
        plan=plan.to_json() | {"multiply": engine.multiply, "kernels": engine.kernels},
        timings_s={},  # filled in by the reporter, which sees when each phase begins
        peak_memory=device.peak_memory(now.device),
        versions=fluxcli.versions(),
        row=row.row.number,
    )


def _advise(error: DoesNotFit, engine: Engine, pending: Pending) -> None:
    """Add to an error of a picture what would fit."""
    prepared = pending.row.prepared
    order = pending.row.order
    less = replace(order.resources, vram_limit=int(engine.plan.budget_bytes * LESS_SHARE))
    options = suggest_options(
        order.request,
        less,
        prepared.alternatives,
        hardware=prepared.hardware,
        adapters=prepared.adapters,
        references=prepared.inputs.references,
        controls=prepared.controls,
    )
    hints = [error.hint] if error.hint else []
    if options:
        hints.append(f"again with {options}")
    error.hint = " or ".join(hints)
