"""The engine: a request becomes events and pictures, in phases encode -> condition -> denoise -> decode.

It never prints and owns neither progress nor cancellation: `run` is a generator, and closing it stops after the
current step. Model, scheduler and tokenizer classes are diffusers' and transformers' own; the loop equals
diffusers' FluxPipeline on the same folder and seed.
"""

import gc
import hashlib
import math
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace

import fluxcli
from fluxcli import classes, costs, hardware, image, lora, modulation, output, residency, sampling
from fluxcli.adapters import attach
from fluxcli.errors import DoesNotFit, NotFinite
from fluxcli.events import Event, GeneratedImage, Notice, Phase, Saved, Step
from fluxcli.latents import Latents
from fluxcli.loader import refusing
from fluxcli.placement import load_component
from fluxcli.request import GenerationRequest
from fluxcli.residency import GIB, MemoryPlan
from quant.checkpoint import Checkpoint, Component
from quant.lazy import Tensor, Tensors, nn, np, torch
from quant.lora import Adapter
from quant.spec import FAMILIES, is_modulation


class Engine:
    """Runs requests on one checkpoint under one plan, and keeps what the plan says between them.

    Where memory runs out it goes on under the plan's next rung, with the same latents, until none is left.
    """

    def __init__(self, checkpoint: Checkpoint, plan: MemoryPlan, machine: hardware.Hardware) -> None:
        self.checkpoint, self.plan, self.machine = checkpoint, plan, machine
        self.latents: Latents | None = None  # of the picture that is under way
        self.measured: dict[str, int] = {}  # peaks by "phase level", of phases that ended or ran out of memory
        self._models: dict[str, nn.Module] = {}
        self._row: modulation.ModulationRow | None = None
        self._prompt: tuple | None = None  # whose embeddings are kept: the text, its T5 length, adapters
        self._embeddings: tuple[Tensor, Tensor] | None = None  # pooled (1, P), sequence (1, T, C)
        self._tables: dict[modulation.Condition, Tensor] = {}
        self._modulation: Tensors = {}  # the weights, where the plan keeps them
        self._adapters: tuple[tuple[str, ...], tuple[Adapter, ...]] = (), ()  # as asked for, and what that is
        hardware.cap(plan.device, plan.budget_bytes)

    def run(
        self, request: GenerationRequest, target: output.Target, *, resume: Latents | None = None
    ) -> Iterator[Event]:
        """Yield the run's events; each `Saved` names a finished picture. Raises `FluxError` and `QuantError`."""
        request = request.with_seed()
        for k in range(request.count):
            single = request.picture(k)
            pixels = yield from self.picture(single, image=k + 1, images=request.count, resume=resume)
            yield Phase("save")
            yield Saved(self._save(single, pixels, target, k + 1))

    def picture(
        self, request: GenerationRequest, *, image: int = 1, images: int = 1, resume: Latents | None = None
    ) -> "Generator[Event, None, np.ndarray]":
        """Yield the events of one picture, or of what `resume` has left of it; returns its pixels (H, W, 3) uint8."""
        for said in self._read_adapters(request):
            yield Notice(said)
        self.latents = resume or Latents(
            request,
            sampling.noise(request.seed, request.size, dtype=self._dtype("transformer")),
            model=self.checkpoint.fingerprint,
        )
        if self.latents.step < request.steps:
            pooled, sequence = yield from self._surviving("encode", request, self._encode)
            table = yield from self._surviving("condition", request, self._condition, pooled)
            inputs = self._inputs(request, sequence, pooled)
            yield from self._surviving("denoise", request, self._denoise, table, inputs, image, images)
        if not sampling.is_finite(self.latents.tokens):
            raise NotFinite("the picture is not finite", which=f"seed {request.seed}", why="NaN or Inf in the latents")
        return (yield from self._surviving("decode", request, self._decode))

    def _surviving(
        self, phase: str, request: GenerationRequest, attempt: Callable, *arguments: object
    ) -> "Generator[Event, None, object]":  # fmt: skip
        """The phase's result; where memory runs out, by the plan's next rung. Raises `DoesNotFit` after the last."""
        while True:
            level, failed = self.plan.residency.level(phase), ""
            known = phase == "encode" and self._prompt == self._text(request)
            hardware.reset_peak(self.plan.device)
            try:
                result = yield from attempt(request, *arguments)
                peak = hardware.peak_memory(self.plan.device).get("vram_bytes")
                if peak and not known:
                    self.measured[f"{phase} {level}"] = peak + costs.CONTEXT_BYTES
                return result
            except Exception as error:
                if not hardware.is_out_of_memory(error):
                    raise
                failed = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
            self.measured[f"{phase} {level}"] = max(self.plan.budget_bytes, self.plan.peak_bytes[phase]) + 1
            self._models.clear()
            self._modulation.clear()  # kept where there was room: no lower rung keeps it
            self._free()
            now = self.plan
            offer = residency.make_offer(request, self.checkpoint, self.machine, now.precision, now.spec, now.dtypes)
            following = residency.relaxed(self.plan, phase, offer)
            if following is None:
                needs, free = now.peak_bytes[phase] / GIB, hardware.free_memory(now.device) / GIB
                why = f"{phase} needs about {needs:.1f} GiB by plan, {free:.1f} GiB are free: {failed}"
                raise DoesNotFit("out of memory, and no rung is left", which=now.device, why=why)
            self.plan, words = following
            yield Notice(f"out of memory in {phase} ({level or 'as planned'}): once more, {words}")

    def _denoise(
        self, request: GenerationRequest, table: Tensor, inputs: dict, image: int, images: int
    ) -> Iterator[Event]:
        """The steps that are left."""
        model = yield from self._load("transformer")
        yield Phase("denoise")
        scheduler, latents = self._scheduler(request), self.latents
        scheduler.set_begin_index(latents.step)
        latents.tokens = latents.tokens.to(self.plan.device, self._dtype("transformer"))
        for index in range(latents.step, request.steps):
            self._row.select(table, index)
            latents.tokens = sampling.step(model, scheduler, latents.tokens, scheduler.timesteps[index], inputs)
            latents.step = index + 1
            yield Step(index + 1, request.steps, image, images)

    def _scheduler(self, request: GenerationRequest) -> object:
        """diffusers' scheduler with the timesteps of this request."""
        with refusing("cannot use the scheduler's config", self.checkpoint.folder / "scheduler"):
            scheduler = classes.scheduler().from_config(self.checkpoint.scheduler)
            sampling.set_timesteps(scheduler, request.steps, math.prod(request.size) // 256)
        return scheduler

    def _text(self, request: GenerationRequest) -> tuple:
        """What the embeddings depend on."""
        return request.prompt, request.text_tokens, self._acting("text_encoder"), self._acting("text_encoder_2")

    def _encode(self, request: GenerationRequest) -> Generator[Event, None, tuple[Tensor, Tensor]]:
        """Pooled (1, P) and sequence (1, T, C) embeddings of the prompt; the last prompt's are kept."""
        key = self._text(request)
        if self._prompt == key:
            return self._embeddings
        yield Phase("load", "tokenizers")
        clip_ids, t5_ids, lost = sampling.tokenize(self.checkpoint.folder, *key[:2])
        if lost:
            yield Notice(f"the prompt is longer than {request.text_tokens} T5 tokens; lost: {lost!r}")
        clip = yield from self._load("text_encoder")
        yield Phase("encode")
        pooled = clip(clip_ids.to(clip.device)).pooler_output
        del clip
        t5 = yield from self._load("text_encoder_2")
        yield Phase("encode")
        sequence = t5(t5_ids.to(t5.device))[0]
        del t5
        dtype = self._dtype("transformer")
        self._prompt, self._embeddings = key, (pooled.to(dtype), sequence.to(dtype))
        return self._embeddings

    def _condition(self, request: GenerationRequest, pooled: Tensor) -> Generator[Event, None, Tensor]:
        """The run's modulation table (steps, sum of outputs); the last run's is kept."""
        options = {"weights": self.checkpoint.fingerprint, "guidance": request.guidance, "adapters": self._adapters[1]}
        wanted = modulation.condition(pooled, timesteps=self._scheduler(request).timesteps, **options)
        if wanted not in self._tables:
            self._make_room("transformer")
            yield Phase("condition")
            keep = self._modulation if "modulation" in self.plan.residency.keep else None
            self._tables = modulation.make_tables(self.checkpoint.components["transformer"], [wanted], keep=keep)
        return self._tables[wanted]

    def _load(self, name: str) -> "Generator[Event, None, nn.Module]":
        """The component's module, placed as the plan says; loaded now unless it is there."""
        self._make_room(name)
        if name not in self._models:
            yield Phase("load", name)
            options = {"dtype": self._dtype(name), "device": self.plan.device}
            component, since, is_main = self.checkpoint.components[name], time.perf_counter(), name == "transformer"
            model = load_component(
                component, blocks=self._passing(name, component), spec=self.plan.spec, **options,
                arena=is_main and self.plan.residency.denoise == "streamed",
                skip=is_modulation if is_main else lambda _: False,
            )  # fmt: skip
            if is_main:
                self._row = modulation.ModulationRow(model, component, **options)
            self._models[name] = model
            if unpinned := getattr(model, "unpinned_bytes", 0):
                yield Notice(f"the driver does not pin {unpinned / GIB:.1f} GiB of RAM: streaming is slower")
            if is_main and self.plan.spec:
                taken, to = time.perf_counter() - since, self.plan.precision
                yield Notice(f"packed to {to} in {taken:.1f} s while loading: flux quantize ... --to {to} saves that")
        self._adapt(name)
        return self._models[name]

    def _read_adapters(self, request: GenerationRequest) -> list[str]:
        """Read the request's adapters unless they are known; what is to be said of them."""
        if self._adapters[0] == request.lora:
            return []
        self._adapters = request.lora, lora.adapters_of(request.lora, self.checkpoint.components)
        return list(lora.warnings(self._adapters[1]))

    def _acting(self, name: str) -> tuple[Adapter, ...]:
        """The adapters that change a component."""
        return tuple(adapter for adapter in self._adapters[1] if adapter.numel(name))

    def _adapt(self, name: str) -> None:
        """Attach the component's adapters instead of those of another request; its own tensors stay as they are."""
        model, wanted = self._models[name], self._acting(name)
        attached, handles = getattr(model, "adapters", ((), ()))
        if attached != wanted:
            for handle in handles:
                handle.remove()
            model.adapters = (), ()
            options = {"dtype": self._dtype(name), "device": self.plan.device}
            model.adapters = wanted, attach(model, wanted, name, **options)

    def _passing(self, name: str, component: Component) -> list[str]:
        """The component's blocks that pass through the device instead of staying on it."""
        placed = self.plan.residency
        if name == "text_encoder_2":
            return costs.t5_block_names(component) if placed.encode == "sequential" else []
        if name != "transformer" or placed.denoise == "resident":
            return []
        blocks = costs.block_names(component)
        return blocks if placed.denoise == "sequential" else [blocks[i] for i in placed.streamed]

    def _make_room(self, name: str) -> None:
        """Evict what may not stay beside a component."""
        keep = self.plan.residency.keep
        self._evict(*(other for other in self._models if other != name and not {other, name} <= set(keep)))

    def _evict(self, *names: str) -> None:
        if names:
            for name in names:
                self._models.pop(name, None)
            self._free()

    def _free(self) -> None:
        """Give back what nothing holds any more, and count the peak of what comes next."""
        gc.collect()
        hardware.empty_cache(self.plan.device)
        hardware.reset_peak(self.plan.device)

    def _dtype(self, name: str) -> "torch.dtype":
        return getattr(torch, self.plan.dtypes[name])

    def _inputs(self, request: GenerationRequest, sequence: Tensor, pooled: Tensor) -> dict:
        """What every forward of the transformer takes beside latents and timestep."""
        guidance = None if request.guidance is None else torch.full([1], request.guidance, device=sequence.device)
        return {
            "encoder_hidden_states": sequence,
            "pooled_projections": pooled,
            "guidance": guidance,
            "txt_ids": sequence.new_zeros(sequence.shape[1], 3),
            "img_ids": sampling.image_ids(request.size).to(sequence),
        }

    def _decode(self, request: GenerationRequest) -> "Generator[Event, None, np.ndarray]":
        """Pixels (H, W, 3) uint8 of the latents; once more in float32 where they are not finite."""
        vae = yield from self._load("vae")
        yield Phase("decode")
        tile = costs.TILE_PX if self.plan.residency.decode == "tiled" else 0
        vae.use_tiling, vae.tile_sample_min_size, vae.tile_latent_min_size = bool(tile), tile, tile // 8
        latents = sampling.unpack(self.latents.tokens.to(self.plan.device), request.size)
        decoded = sampling.decode(vae, latents.to(self._dtype("vae")))
        if not sampling.is_finite(decoded) and self.plan.dtypes["vae"] != "float32":
            yield Notice("the VAE overflowed: decoding once more in float32")
            decoded = sampling.decode(vae.float(), latents.float())
            vae.to(self._dtype("vae"))
        if not sampling.is_finite(decoded):
            why = "NaN or Inf in the pixels, decoded in float32"
            raise NotFinite("the picture is not finite", which=f"seed {request.seed}", why=why)
        return sampling.to_pixels(decoded).numpy()

    def _save(self, request: GenerationRequest, pixels: "np.ndarray", target: output.Target, n: int) -> GeneratedImage:
        digest = image.pixels_sha256(pixels)
        metadata = self.metadata(request) | {"pixels_sha256": digest} if request.metadata else None
        data = image.encode(pixels, request.format, quality=request.quality, metadata=metadata)
        path, sha256 = output.save(data, target, request, n), hashlib.sha256(data).hexdigest()
        return GeneratedImage(path, request.seed, *request.size, request.format, len(data), sha256, digest)

    @property
    def multiply(self) -> str:
        """How the transformer's blocks multiply here: in the dtype, by "scaled_mm", "int_mm" or "dequantize"."""
        from quant.linear import path_of

        precision = self.plan.precision
        return path_of(precision, self.plan.device) if precision in FAMILIES.values() else precision

    def metadata(self, request: GenerationRequest) -> dict:
        """What identifies a picture: the request that makes it alone, the model, what computed it, versions."""
        plan, described = self.plan, replace(request, output=None).to_json()
        compute = {"device": plan.device.partition(":")[0], "precision": plan.precision, "multiply": self.multiply}
        compute |= {"dtypes": plan.dtypes, "tiled": plan.residency.decode == "tiled"}
        model = {"name": request.model, "fingerprint": self.checkpoint.fingerprint}
        self._read_adapters(request)
        adapters = lora.identities(*self._adapters)
        found = {"request": described, "size": list(request.size), "model": model, "compute": compute, "lora": adapters}
        return found | {"versions": fluxcli.versions()}
