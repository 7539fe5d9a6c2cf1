"""The engine: requests become pixels, in phases encode -> condition -> denoise -> decode.

Each phase is a module with a function `run(components, pictures)`, a generator of events that gives
the pictures what the phase makes. A phase can be begun again: it goes on with what the pictures
lack. That is how the engine survives where memory runs out: it lets `Components` step down to a
placement that takes less memory, and runs the phase again with the same latents.

A group of pictures goes through each phase together, so that every component is loaded once for
all of them; each is computed by itself, so that its pixels are those of a run of its own.

The engine neither prints nor names or writes files, and owns neither progress nor cancellation:
`draw` is a generator, and closing it stops after the current step. Model, scheduler and tokenizer
classes are diffusers' and transformers' own; the loop equals diffusers' FluxPipeline on the same
folder and seed.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from fluxcli.engine import condition, decode, denoise, device, encode
from fluxcli.engine.components import Components
from fluxcli.engine.picture import Picture
from fluxcli.errors import is_out_of_memory
from fluxcli.events import Event, Notice
from fluxcli.plan.costs import make_workload
from fluxcli.plan.machine import CONTEXT_BYTES, Hardware
from fluxcli.plan.placement import MemoryPlan
from quant.checkpoint import Checkpoint
from quant.errors import ExplainedError
from quant.linear import find_multiply
from quant.spec import SCHEMES


@dataclass(frozen=True)
class EnginePhase:
    """A phase by its name in plans and messages, and what it does.

    `run` yields events while it gives each picture what the phase makes; pictures that have it are
    left alone. It may raise `FluxError`, `QuantError` and whatever an allocator raises.
    """

    name: str
    run: Callable[[Components, Sequence[Picture]], Iterator[Event]]


PHASES = (
    EnginePhase("encode", encode.run),
    EnginePhase("condition", condition.run),
    EnginePhase("denoise", denoise.run),
    EnginePhase("decode", decode.run),
)


@dataclass(frozen=True)
class Drawn:
    """A picture has its `pixels`. Who has used them may set them to None, to free memory."""

    picture: Picture


@dataclass(frozen=True)
class OutOfMemory:
    """A phase ran out of memory.

    `missing_bytes` is by how much it was planned to need more than there was; 0 or less means that
    the plan should have fitted.
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
        self.checkpoint = checkpoint
        self.components = Components(checkpoint, plan, hardware, prompt_cache=prompt_cache)
        self.out_of_memory: list[OutOfMemory] = []  # what has happened so far, for who remembers it
        self._phases = tuple(phases)

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

        "bf16", "fp16" or "fp32" where their weights are values, else by "scaled_mm", "int_mm" or
        "dequantize", see `quant.linear.find_multiply`.
        """
        precision = self.plan.precision
        if precision in SCHEMES:
            return find_multiply(precision, self.plan.device)
        return precision

    def adopt(self, plan: MemoryPlan, hardware: Hardware, *, prompt_cache: bool = False) -> None:
        """Go on under another plan of the same precision, see `Components.adopt`."""
        self.components.adopt(plan, hardware, prompt_cache=prompt_cache)

    def draw(
        self, pictures: Sequence[Picture], *, isolate: bool = False
    ) -> Iterator[Event | Drawn]:
        """Yield the events of all phases, and a `Drawn` as soon as a picture has its pixels.

        The last phase takes picture by picture, the others take all together. With `isolate` an
        error ends only the picture that has it, as its `error`; else raises `FluxError` and
        `QuantError`.
        """
        *together, last = self._phases
        for phase in together:
            yield from self._run(phase, _without_errors(pictures), isolate=isolate)
        for picture in _without_errors(pictures):
            was_whole = self.plan.placement.decode != "tiled"
            yield from self._run(last, [picture], isolate=isolate)
            if not picture.error:
                yield Drawn(picture)  # while the plan still tells how it was decoded
            if was_whole and self.plan.placement.decode == "tiled":
                self.components.decode_whole()

    def _run(
        self, phase: EnginePhase, pictures: Sequence[Picture], *, isolate: bool
    ) -> Iterator[Event]:
        """A phase for all pictures; to `isolate` an error, for each of them alone."""
        try:
            yield from self._survive(phase, pictures)
        except ExplainedError as error:
            if not isolate:
                raise
            if len(pictures) == 1:
                pictures[0].error = error
                return
            for picture in pictures:
                yield from self._run(phase, [picture], isolate=True)

    def _survive(self, phase: EnginePhase, pictures: Sequence[Picture]) -> Iterator[Event]:
        """The phase; where memory runs out, again with less of it, until `DoesNotFit`."""
        while pictures:
            level = self.plan.placement.level(phase.name) or "as planned"
            try:
                yield from phase.run(self.components, pictures)
                return
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                failed = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
            # Only here has the error gone, and with its frames the tensors that they hold.
            missing_bytes = self.plan.peak_bytes[phase.name] - self._available_bytes()
            self.out_of_memory.append(OutOfMemory(phase.name, missing_bytes))
            largest = max(pictures, key=lambda picture: math.prod(picture.request.size))
            workload = make_workload(largest.request, largest.adapters)
            change = self.components.step_down(phase.name, workload, failed=failed)
            yield Notice(f"out of memory in {phase.name} ({level}): once more, {change}")

    def _available_bytes(self) -> int:
        """What this process may take of the device: within its budget, what it holds or is free."""
        held = device.held_memory(self.plan.device)
        free = device.free_memory(self.plan.device)
        return min(self.plan.budget_bytes, CONTEXT_BYTES + held + free)


def _without_errors(pictures: Sequence[Picture]) -> list[Picture]:
    return [picture for picture in pictures if not picture.error]
