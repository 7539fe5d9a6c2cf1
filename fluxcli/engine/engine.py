"""The engine: requests become pixels.

Its phases are encode -> prepare -> condition -> denoise -> decode.

Each phase is a module with a function `run(components, pictures)`, a generator of events that gives
the pictures what the phase makes. A phase can be begun again: it goes on with what the pictures
lack. That is how the engine survives where memory runs out: it lets `Components` step down to a
placement that takes less memory, and runs the phase again with the same latents.

A group of pictures is encoded and conditioned together, so that every component is loaded once for
all of them; each is computed by itself, so that its pixels are those of a run of its own. Then one
picture after the other is denoised, and decoded at once where the VAE may stay beside the
transformer or where loading both again takes little of a picture's time; else all are decoded at
the end, and a `Denoised` says that there are latents to keep meanwhile.

The engine neither prints nor names or writes files, and owns neither progress nor cancellation:
`draw` is a generator, and closing it stops after the current step. Model, scheduler and tokenizer
classes are diffusers' and transformers' own; the loop equals diffusers' FluxPipeline on the same
folder and seed.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from fluxcli.engine import blocks, condition, decode, denoise, device, encode, prepare
from fluxcli.engine.components import Components
from fluxcli.engine.picture import Picture
from fluxcli.engine.preview import Estimated
from fluxcli.events import Event, Notice, is_of_one_row
from fluxcli.plan.costs import make_workload
from fluxcli.plan.machine import CONTEXT_BYTES, Hardware
from fluxcli.plan.placement import MemoryPlan
from quant import kernels
from quant.checkpoint import Checkpoint
from quant.errors import NO_ENGINE, is_out_of_memory
from quant.linear import find_multiply
from quant.spec import SCHEMES

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EnginePhase:
    """A phase by its name in plans and messages, and what it does.

    `run` yields events while it gives each picture what the phase makes; pictures that have it are
    left alone. It may raise `FluxError`, `QuantError` and whatever an allocator raises.
    """

    name: str
    run: Callable[[Components, Sequence[Picture]], Iterator[Event | Estimated]]
    one_by_one: bool = False  # takes picture by picture, as the last phase always does


PHASES = (
    EnginePhase("encode", encode.run),
    EnginePhase("prepare", prepare.run),
    EnginePhase("condition", condition.run),
    EnginePhase("denoise", denoise.run, one_by_one=True),
    EnginePhase("decode", decode.run, one_by_one=True),
)
SHORT_BYTES = 256 << 20  # free on a device: less is too little for a library's own memory
RELOAD_SHARE = 0.1  # of a picture's denoising: what loading again may take of it


@dataclass(frozen=True)
class Denoised:
    """A picture has its last latents; unless it is `decoded_next`, others are denoised before."""

    picture: Picture
    decoded_next: bool


@dataclass(frozen=True)
class Drawn:
    """A picture has its `pixels`. Who has used them may set them to None, to free memory."""

    picture: Picture


@dataclass(frozen=True)
class OutOfMemory:
    """A phase ran out of memory.

    `missing_bytes` is by how much it needed more than there was, by its plan or by what was live
    when it ended; 0 or less means that it should have fitted.
    """

    phase: str
    missing_bytes: int


class Engine:
    """Draws pictures of one checkpoint, and keeps loaded between them what the plan says."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: MemoryPlan,
        hardware: Hardware,
        *,
        phases: Sequence[EnginePhase] = PHASES,
        prompt_cache: bool = False,
    ) -> None:
        """With `prompt_cache` embeddings are kept on disk. The last of `phases` makes pixels."""
        self.components = Components(checkpoint, plan, hardware, prompt_cache=prompt_cache)
        self.out_of_memory: list[OutOfMemory] = []  # what has happened so far, for who remembers it
        *self._before, self._last = phases
        self._under_way: Sequence[Picture] = ()

    @property
    def plan(self) -> MemoryPlan:
        """The plan now: of the last `adopt`, or with less memory, where that ran out."""
        return self.components.plan

    @property
    def hardware(self) -> Hardware:
        """The device that the plan is for."""
        return self.components.hardware

    @property
    def multiply(self) -> str:
        """How the transformer's blocks multiply here.

        "bf16", "fp16" or "fp32" where their weights are values, else by "scaled_mm", "int_mm",
        "dequantize" and others, see `quant.linear.find_multiply`.
        """
        precision = self.plan.precision
        if precision in SCHEMES:
            return find_multiply(precision, self.plan.device)
        return precision

    @property
    def kernels(self) -> str:
        """Whose kernels compute what is between the blocks' products; "" for torch's."""
        dtype = self.components.dtype("transformer")
        choice = blocks.choose_backend(self.multiply, self.plan.device, dtype=dtype)
        return kernels.PREFIX + choice.backend if choice.backend else ""

    @property
    def is_compiled(self) -> bool:
        """Whether the transformer's blocks are compiled: the plan wants it, and nothing failed."""
        compiler = self.components.compiler
        return compiler is not None and not compiler.failure

    @property
    def checkpoint(self) -> Checkpoint:
        """The model, with what the requests of the last `adopt` add to it."""
        return self.components.checkpoint

    def adopt(
        self,
        plan: MemoryPlan,
        hardware: Hardware,
        *,
        checkpoint: Checkpoint | None = None,
        prompt_cache: bool = False,
    ) -> None:
        """Go on under another plan of the same precision, see `Components.adopt`."""
        self.components.adopt(plan, hardware, checkpoint=checkpoint, prompt_cache=prompt_cache)

    def draw(
        self, pictures: Sequence[Picture], *, isolate: bool = False
    ) -> Iterator[Event | Estimated | Denoised | Drawn]:
        """Yield the events of all phases, a `Denoised` and a `Drawn` as soon as a picture is so.

        Where a picture is watched, an `Estimated` comes between its steps.

        With `isolate` an error ends only the picture that has it, as its `error`, unless no picture
        could be drawn after it (see `is_of_one_row`); else raises whatever a phase raises.
        """
        self._under_way = pictures
        was_whole = self.plan.placement.prepare != "tiled"
        try:
            yield from self._draw(pictures, isolate=isolate)
        finally:
            if was_whole and self.plan.placement.prepare == "tiled":
                self.components.prepare_whole()

    def _draw(
        self, pictures: Sequence[Picture], *, isolate: bool
    ) -> Iterator[Event | Estimated | Denoised | Drawn]:
        """All phases, see `draw`."""
        for phase in self._before:
            if not phase.one_by_one:
                started_s = time.perf_counter()
                yield from self._run(phase, _without_errors(pictures), isolate=isolate)
                for picture in pictures:
                    picture.taken_s += (time.perf_counter() - started_s) / len(pictures)
        waiting = []
        for picture in _without_errors(pictures):
            was_denoised = picture.denoised
            yield from self._denoise(picture, isolate=isolate)
            if picture.error:
                continue
            is_next = self._decodes_at_once()
            if not was_denoised:
                yield Denoised(picture, is_next)
            if is_next:
                yield from self._decode(picture, isolate=isolate)
            else:
                waiting.append(picture)
        for picture in waiting:
            yield from self._decode(picture, isolate=isolate)

    def _decodes_at_once(self) -> bool:
        """Return whether a picture is decoded before the next one is denoised.

        The plan's seconds of loading are of all components: to load two of them again takes less.
        """
        plan = self.plan
        if {"transformer", "vae"}.issubset(plan.placement.keep):
            return True
        return plan.seconds["load"] < RELOAD_SHARE * plan.seconds["denoise"]

    def _denoise(self, picture: Picture, *, isolate: bool) -> Iterator[Event | Estimated]:
        """The phases that take picture by picture, but for the last."""
        started_s = time.perf_counter()
        for phase in self._before:
            if phase.one_by_one:
                yield from self._run(phase, _without_errors([picture]), isolate=isolate)
        picture.taken_s += time.perf_counter() - started_s

    def _decode(self, picture: Picture, *, isolate: bool) -> Iterator[Event | Estimated | Drawn]:
        """The last phase; tiles are for the picture alone that they were needed for."""
        started_s = time.perf_counter()
        was_whole = self.plan.placement.decode != "tiled"
        yield from self._run(self._last, [picture], isolate=isolate)
        picture.taken_s += time.perf_counter() - started_s
        if not picture.error:
            yield Drawn(picture)  # while the plan still tells how it was decoded
        if was_whole and self.plan.placement.decode == "tiled":
            self.components.decode_whole()

    def _run(
        self, phase: EnginePhase, pictures: Sequence[Picture], *, isolate: bool
    ) -> Iterator[Event | Estimated]:
        """A phase for all pictures; to `isolate` an error, for each of them alone."""
        try:
            yield from self._survive(phase, pictures)
        except Exception as error:
            if not isolate or not is_of_one_row(error):
                raise
            if len(pictures) == 1:
                logger.debug("what ended a picture", exc_info=error)
                pictures[0].error = error.with_traceback(None)  # whose frames hold tensors
                return
            for picture in pictures:
                yield from self._run(phase, [picture], isolate=True)

    def _survive(
        self, phase: EnginePhase, pictures: Sequence[Picture]
    ) -> Iterator[Event | Estimated]:
        """The phase; where memory runs out, again with less of it, until `DoesNotFit`."""
        while pictures:
            device.begin_phase(self.plan.device)
            level = self.plan.placement.level(phase.name) or "as planned"
            refusals = device.count_refusals(self.plan.device)
            try:
                yield from phase.run(self.components, pictures)
                return
            except Exception as error:
                if not is_out_of_memory(error) and not self._lacked_room(error, refusals):
                    raise
                said = str(error).strip() or type(error).__name__
                failed = said.splitlines()[0][:100].strip()
            # Only here has the error gone, and with its frames the tensors that they hold.
            needed_bytes = CONTEXT_BYTES + device.peak_live_memory(self.plan.device)
            needed_bytes = max(needed_bytes, self.plan.peak_bytes.get(phase.name, 0))
            missing_bytes = needed_bytes - self._available_bytes()
            self.out_of_memory.append(OutOfMemory(phase.name, missing_bytes))
            largest = max(self._under_way, key=lambda picture: math.prod(picture.request.size))
            workload = make_workload(
                largest.request,
                largest.adapters,
                references=largest.inputs.references,
                controls=largest.controls,
            )
            change = self.components.step_down(phase.name, workload, failed=failed)
            yield Notice(f"out of memory in {phase.name} ({level}): once more, {change}")

    def _lacked_room(self, error: Exception, refusals: int) -> bool:
        """Whether cuDNN found no engine because none had room for its workspace.

        It says the same where it has none at all. `refusals` are the allocator's before the phase.
        """
        if NO_ENGINE not in str(error):
            return False
        now = self.plan.device
        return device.count_refusals(now) > refusals or device.free_memory(now) < SHORT_BYTES

    def _available_bytes(self) -> int:
        """What this process may take of the device: within its budget, what it holds or is free."""
        held = device.held_memory(self.plan.device)
        free = device.free_memory(self.plan.device)
        return min(self.plan.budget_bytes, CONTEXT_BYTES + held + free)


def _without_errors(pictures: Sequence[Picture]) -> list[Picture]:
    return [picture for picture in pictures if not picture.error]
