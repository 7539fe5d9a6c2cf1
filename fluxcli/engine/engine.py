"""The engine: requests become events and pictures, in phases encode -> condition -> denoise -> decode.

A window of pictures goes through each phase together, so that every component is loaded once for all of them; each is
computed by itself, so that its pixels are those of a run of its own. The engine never prints and owns neither progress
nor cancellation: `window` is a generator, and closing it stops after the current step. Model, scheduler and tokenizer
classes are diffusers' and transformers' own; the loop equals diffusers' FluxPipeline on the same folder and seed.
"""

import hashlib
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace

import fluxcli
from fluxcli.engine import classes, modulation, sampling
from fluxcli.engine import device as hardware
from fluxcli.engine.components import Stage
from fluxcli.engine.loader import refusing
from fluxcli.engine.picture import Picture
from fluxcli.engine.text import Texts
from fluxcli.errors import DoesNotFit, NotFinite, is_out_of_memory
from fluxcli.events import Event, GeneratedImage, Notice, Phase, Saved, Step
from fluxcli.models import loras as lora
from fluxcli.pictures import image
from fluxcli.pictures import names as output
from fluxcli.pictures.latents import Latents
from fluxcli.plan import costs
from fluxcli.plan import placement as residency
from fluxcli.plan.machine import CONTEXT_BYTES
from fluxcli.plan.placement import GIB, MemoryPlan
from fluxcli.request.fields import GenerationRequest, Order
from quant.checkpoint import Checkpoint
from quant.errors import ExplainedError
from quant.lazy import Tensor, np, torch
from quant.lora import Adapter
from quant.spec import SCHEMES

KEPT_BYTES = 256 << 20  # of tables in RAM between windows: four prompts of the published size


@dataclass(frozen=True)
class OutOfMemory:
    """A phase ran out of memory, with so many bytes less than it was planned to need (0 or less: with more)."""

    phase: str
    missing_bytes: int


class Engine:
    """Draws pictures of one checkpoint under one plan, and keeps what the plan says between them.

    Where memory runs out it goes on under the plan's next rung, with the same latents, until none is left.
    """

    def __init__(
        self, checkpoint: Checkpoint, plan: MemoryPlan, machine: hardware.Hardware, *, cache: bool = False
    ) -> None:  # fmt: skip
        """`cache` keeps prompt embeddings on disk."""
        self.checkpoint, self.machine, self.stage = checkpoint, machine, Stage(checkpoint, plan)
        self.out_of_memory: list[OutOfMemory] = []  # what has happened so far, for who remembers it
        self.texts = Texts(checkpoint, plan, machine, cache=cache)
        self._tables: dict[modulation.Condition, Tensor] = {}  # in RAM
        self._adapters: dict[tuple[str, ...], tuple[Adapter, ...]] = {}  # of the window's requests

    @property
    def plan(self) -> MemoryPlan:
        """The plan now: of another job, or a rung further down, than at first."""
        return self.stage.plan

    def adopt(self, plan: MemoryPlan, machine: hardware.Hardware) -> None:
        """Go on under another plan of the same precision, see `Stage.adopt`."""
        self.machine, self._adapters = machine, {}
        self.stage.adopt(plan)

    def window(self, pictures: Sequence[Picture], *, isolate: bool = False) -> Iterator[Event]:
        """Yield the events of all phases; each `Saved` names a finished picture. Raises `FluxError` and `QuantError`.

        With `isolate` an error ends only the picture that has it, which keeps it.
        """
        self._adapters = {}
        phases = ("encode", self._begin), ("encode", self._encode_clip), ("encode", self._encode_t5)
        phases += ("condition", self._condition), ("denoise", self._denoise)
        for phase, attempt in phases:
            yield from self._phase(phase, [picture for picture in pictures if not picture.error], attempt, isolate)
        for picture in (each for each in pictures if not each.error):
            whole = self.plan.residency.decode != "tiled"
            yield from self._phase("decode", [picture], self._decode, isolate)
            if whole and self.plan.residency.decode == "tiled":  # other pixels: this picture's matter alone
                self.stage.plan = replace(self.plan, residency=replace(self.plan.residency, decode="alone"))

    def picture(self, order: Order, *, resume: Latents | None = None) -> "Generator[Event, None, np.ndarray]":
        """Yield the events of one picture, or of what `resume` has left of it; returns its pixels (H, W, 3) uint8."""
        alone = Picture(order, latents=resume)
        yield from self.window([alone])
        return alone.pixels

    def _phase(self, phase: str, pictures: Sequence[Picture], attempt: Callable, isolate: bool) -> Iterator[Event]:
        """A phase for all pictures; where that fails for each alone, since attempts go on where they were."""
        try:
            yield from self._surviving(phase, pictures, attempt)
        except ExplainedError as error:
            if not isolate:
                raise
            if len(pictures) == 1:
                pictures[0].error = error
                return
            for picture in (each for each in pictures if not each.error):
                yield from self._phase(phase, [picture], attempt, isolate)

    def _surviving(self, phase: str, pictures: Sequence[Picture], attempt: Callable) -> Iterator[Event]:
        """The phase, by the plan's next rung where memory runs out. Raises `DoesNotFit` after the last."""
        while pictures:
            level, failed = self.plan.residency.level(phase), ""
            try:
                yield from attempt(pictures)
                return
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                failed = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
            self.out_of_memory.append(OutOfMemory(phase, self.plan.peak_bytes[phase] - self._available_bytes()))
            self.stage.clear()
            now, largest = self.plan, max((each.order for each in pictures), key=lambda it: math.prod(it.request.size))
            offer = residency.make_offer(largest, self.checkpoint, self.machine, now.precision, now.spec, now.dtypes)
            following = residency.relaxed(self.plan, phase, offer)
            if following is None:
                needs, free = now.peak_bytes[phase] / GIB, hardware.free_memory(now.device) / GIB
                why = f"{phase} needs about {needs:.1f} GiB by plan, {free:.1f} GiB are free: {failed}"
                raise DoesNotFit("out of memory, and no rung is left", which=now.device, why=why)
            self.stage.plan, words = following
            yield Notice(f"out of memory in {phase} ({level or 'as planned'}): once more, {words}")

    def _available_bytes(self) -> int:
        """What this process may take of the device: what it holds and what is free, within its budget."""
        held, free = hardware.held_memory(self.plan.device), hardware.free_memory(self.plan.device)
        return min(self.plan.budget_bytes, CONTEXT_BYTES + held + free)

    def _begin(self, pictures: Sequence[Picture]) -> Iterator[Event]:
        """Adapters, the name of the embeddings, and noise where there are no latents yet."""
        for picture in pictures:
            request, known = picture.request, picture.request.lora in self._adapters
            picture.adapters = self._adapters_of(request)
            for said in () if known else lora.warnings(picture.adapters):
                yield Notice(said)
            picture.text = self.texts.key(request, picture.adapters)
            picture.latents = picture.latents or Latents(
                picture.order,
                sampling.noise(request.seed, request.size, dtype=self.stage.dtype("transformer")),
                model=self.checkpoint.fingerprint,
            )

    def _encode_clip(self, pictures: Sequence[Picture]) -> Generator[Event, None, bool]:
        """Pooled embeddings (1, P) of the prompts that are not known."""
        computed = False
        for picture in (each for each in pictures if not each.denoised and not self.texts.known(each.text)):
            if not self.texts.ready:
                yield Phase("load", "tokenizers")
            ids = self.texts.tokenize(picture.text, picture.request)
            clip = yield from self.stage.load("text_encoder", picture.adapters)
            yield Phase("encode")
            self.texts.add_pooled(picture.text, clip(ids.to(clip.device)).pooler_output)
            computed = True
        return computed

    def _encode_t5(self, pictures: Sequence[Picture]) -> Generator[Event, None, bool]:
        """Sequence embeddings (1, T, C) of the prompts that are not known."""
        computed, said = False, set()
        for picture in (each for each in pictures if not each.denoised):
            if (ids := self.texts.waiting(picture.text)) is not None:
                t5 = yield from self.stage.load("text_encoder_2", picture.adapters)
                yield Phase("encode")
                self.texts.add_sequence(picture.text, t5(ids.to(t5.device))[0])
                computed = True
            picture.embeddings = self.texts.of(picture.text)
            if (lost := picture.embeddings.lost) and picture.text not in said:
                yield Notice(f"the prompt is longer than {picture.request.text_tokens} T5 tokens; lost: {lost!r}")
            said.add(picture.text)
        return computed

    def _condition(self, pictures: Sequence[Picture]) -> Generator[Event, None, bool]:
        """The modulation tables (steps, sum of outputs) of all pictures, in one pass over the weights."""
        wanted = {}
        for k, picture in enumerate(pictures):
            if not picture.denoised:
                pooled = picture.embeddings.pooled.to(self.plan.device, self.stage.dtype("transformer"))
                options = {"weights": self.checkpoint.fingerprint, "guidance": picture.request.guidance}
                timesteps = self._scheduler(picture.request).timesteps
                wanted[k] = modulation.condition(pooled, timesteps=timesteps, adapters=picture.adapters, **options)
        missing = list(dict.fromkeys(each for each in wanted.values() if each not in self._tables))
        if missing:
            yield from self.stage.make_room("transformer")
            yield Phase("condition")
            keep = self.stage.modulation if "modulation" in self.plan.residency.keep else None
            self._tables |= modulation.make_tables(self.checkpoint.components["transformer"], missing, keep=keep)
        for k, condition in wanted.items():
            pictures[k].table = self._tables[condition] = self._tables.pop(condition)  # the last used is the last
        while len(self._tables) > 1 and sum(table.nbytes for table in self._tables.values()) > KEPT_BYTES:
            self._tables.pop(next(iter(self._tables)))
        return bool(missing)

    def _denoise(self, pictures: Sequence[Picture]) -> Generator[Event, None, bool]:
        """The steps that are left."""
        waiting = [picture for picture in pictures if not picture.denoised]
        for picture in waiting:
            model = yield from self.stage.load("transformer", picture.adapters)
            yield Phase("denoise")
            scheduler, latents, request = self._scheduler(picture.request), picture.latents, picture.request
            scheduler.set_begin_index(latents.step)
            table, inputs = picture.table.to(self.plan.device), self._inputs(picture)
            latents.tokens = latents.tokens.to(self.plan.device, self.stage.dtype("transformer"))
            for index in range(latents.step, request.steps):
                self.stage.row.select(table, index)
                latents.tokens = sampling.step(model, scheduler, latents.tokens, scheduler.timesteps[index], inputs)
                latents.step = index + 1
                yield Step(index + 1, request.steps, picture.image, picture.images)
            latents.tokens, picture.table, picture.embeddings = latents.tokens.cpu(), None, None
            del table, inputs
        return bool(waiting)

    def _scheduler(self, request: GenerationRequest) -> object:
        """diffusers' scheduler with the timesteps of this request."""
        with refusing("cannot use the scheduler's config", self.checkpoint.folder / "scheduler"):
            scheduler = classes.scheduler().from_config(self.checkpoint.scheduler)
            sampling.set_timesteps(scheduler, request.steps, math.prod(request.size) // 256)
        return scheduler

    def _adapters_of(self, request: GenerationRequest) -> tuple[Adapter, ...]:
        if request.lora not in self._adapters:
            self._adapters[request.lora] = lora.adapters_of(request.lora, self.checkpoint.components)
        return self._adapters[request.lora]

    def _inputs(self, picture: Picture) -> dict:
        """What every forward of the transformer takes beside latents and timestep."""
        request, at = picture.request, {"device": self.plan.device, "dtype": self.stage.dtype("transformer")}
        sequence, pooled = (each.to(**at) for each in (picture.embeddings.sequence, picture.embeddings.pooled))
        guidance = None if request.guidance is None else torch.full([1], request.guidance, device=sequence.device)
        return {
            "encoder_hidden_states": sequence,
            "pooled_projections": pooled,
            "guidance": guidance,
            "txt_ids": sequence.new_zeros(sequence.shape[1], 3),
            "img_ids": sampling.image_ids(request.size).to(sequence),
        }

    def _decode(self, pictures: Sequence[Picture]) -> Generator[Event, None, bool]:
        """Pixels of the latents, saved as soon as they are there."""
        for picture in (each for each in pictures if not each.saved):
            if picture.pixels is None:
                picture.pixels = yield from self._pixels(picture)
            if picture.target:
                yield Phase("save")
                try:
                    saved = Saved(self._save(picture), picture.row)
                except ExplainedError as error:  # the file may be there under another name: do not try again
                    picture.error = error
                    raise
                picture.saved, picture.pixels = True, None
                yield saved
        return True

    def _pixels(self, picture: Picture) -> "Generator[Event, None, np.ndarray]":
        """(H, W, 3) uint8; decoded once more in float32 where they are not finite."""
        seed = f"seed {picture.request.seed}"
        if not sampling.is_finite(picture.latents.tokens):
            raise NotFinite("the picture is not finite", which=seed, why="NaN or Inf in the latents")
        vae = yield from self.stage.load("vae", picture.adapters)
        yield Phase("decode")
        tile = costs.TILE_PX if self.plan.residency.decode == "tiled" else 0
        vae.use_tiling, vae.tile_sample_min_size, vae.tile_latent_min_size = bool(tile), tile, tile // 8
        latents = sampling.unpack(picture.latents.tokens.to(self.plan.device), picture.request.size)
        decoded = sampling.decode(vae, latents.to(self.stage.dtype("vae")))
        if not sampling.is_finite(decoded) and self.plan.dtypes["vae"] != "float32":
            yield Notice("the VAE overflowed: decoding once more in float32")
            decoded = sampling.decode(vae.float(), latents.float())
            vae.to(self.stage.dtype("vae"))
        if not sampling.is_finite(decoded):
            raise NotFinite("the picture is not finite", which=seed, why="NaN or Inf in the pixels, decoded in float32")
        return sampling.to_pixels(decoded).numpy()

    def _save(self, picture: Picture) -> GeneratedImage:
        order, pixels, digest = picture.order, picture.pixels, image.pixels_sha256(picture.pixels)
        metadata = None
        if order.output.metadata:
            metadata = self.metadata(order, seeded=picture.seeded) | {"pixels_sha256": digest}
        data = image.encode(pixels, order.output.format, quality=order.output.quality, metadata=metadata)
        path = output.save(data, picture.target, order, picture.number, picture.row)
        sha256 = hashlib.sha256(data).hexdigest()
        return GeneratedImage(
            path, order.request.seed, *order.request.size, order.output.format, len(data), sha256, digest
        )

    @property
    def multiply(self) -> str:
        """How the transformer's blocks multiply here: in the dtype, by "scaled_mm", "int_mm" or "dequantize"."""
        from quant.linear import path_of

        precision = self.plan.precision
        return path_of(precision, self.plan.device) if precision in SCHEMES else precision

    def metadata(self, order: Order, *, seeded: bool = True) -> dict:
        """What identifies a picture: the request that makes it alone, the model, what computed it, versions.

        `seeded` tells whether the seed was asked for.
        """
        request, plan = order.request, self.plan
        described = order.to_json() | {"output": None}
        compute = {"device": plan.device.partition(":")[0], "precision": plan.precision, "multiply": self.multiply}
        compute |= {"dtypes": plan.dtypes, "tiled": plan.residency.decode == "tiled"}
        model = {"name": request.model, "fingerprint": self.checkpoint.fingerprint}
        adapters = lora.identities(request.lora, self._adapters_of(request))
        found = {"request": described, "size": list(request.size), "model": model, "compute": compute, "lora": adapters}
        return found | {"seeded": seeded, "versions": fluxcli.versions()}
