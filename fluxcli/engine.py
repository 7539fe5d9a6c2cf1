"""The engine: a request becomes events and pictures, in phases encode -> condition -> denoise -> decode.

It never prints and owns neither progress nor cancellation: `run` is a generator, and closing it stops after the
current step. Model, scheduler and tokenizer classes are diffusers' and transformers' own; the loop equals
diffusers' FluxPipeline on the same folder and seed.
"""

import gc
import hashlib
import platform
import time
from collections.abc import Generator, Iterator
from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING

import fluxcli
from fluxcli import classes, encoders, hardware, image, modulation, output, sampling
from fluxcli.errors import NotFinite
from fluxcli.events import Event, GeneratedImage, Notice, Phase, Saved, Step
from fluxcli.loader import load_component, refusing
from fluxcli.plan import MemoryPlan
from fluxcli.request import GenerationRequest
from quant.checkpoint import Checkpoint
from quant.spec import SCHEMES, is_modulation

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn


class Engine:
    """Runs requests on one checkpoint under one plan, and keeps what the plan says between them."""

    def __init__(self, checkpoint: Checkpoint, plan: MemoryPlan) -> None:
        self.checkpoint, self.plan = checkpoint, plan
        self._models: dict[str, nn.Module] = {}
        self._row: modulation.ModulationRow | None = None
        self._prompt: tuple[str, int] | None = None  # whose embeddings are kept: the text and its T5 length
        self._embeddings: tuple[torch.Tensor, torch.Tensor] | None = None  # pooled (1, P), sequence (1, T, C)
        self._tables: dict[modulation.TableKey, torch.Tensor] = {}

    def run(self, request: GenerationRequest, target: output.Target) -> Iterator[Event]:
        """Yield the run's events; each `Saved` names a finished picture. Raises `FluxError` and `QuantError`."""
        request = request.with_seed()
        for k in range(request.count):
            single = request.picture(k)
            pixels = yield from self.picture(single, image=k + 1, images=request.count)
            yield Phase("save")
            yield Saved(self._save(single, pixels, target, k + 1))

    def picture(
        self, request: GenerationRequest, *, image: int = 1, images: int = 1
    ) -> "Generator[Event, None, np.ndarray]":
        """Yield the events of one picture; returns its pixels (H, W, 3) uint8."""
        pooled, sequence = yield from self._encode(request)
        scheduler = self._scheduler(request)
        table = yield from self._condition(request, pooled, scheduler)
        model = yield from self._load("transformer")
        yield Phase("denoise")
        options = {"dtype": self._dtype("transformer"), "device": self.plan.device}
        latents = sampling.noise(request.seed, request.size, **options)
        inputs = self._inputs(request, sequence, pooled)
        for index, timestep in enumerate(scheduler.timesteps):
            self._row.select(table, index)
            latents = _step(model, scheduler, latents, timestep, inputs)
            yield Step(index + 1, request.steps, image, images)
        if not sampling.is_finite(latents):
            raise NotFinite("the picture is not finite", which=f"seed {request.seed}", why="NaN or Inf in the latents")
        return (yield from self._decode(request, latents))

    def _scheduler(self, request: GenerationRequest) -> object:
        """diffusers' scheduler with the timesteps of this request."""
        kind, (width, height) = classes.scheduler(), request.size
        with refusing("cannot use the scheduler's config", self.checkpoint.folder / "scheduler"):
            scheduler = kind.from_config(self.checkpoint.scheduler)
            sampling.set_timesteps(scheduler, request.steps, width * height // 256, self.plan.device)
        return scheduler

    def _encode(self, request: GenerationRequest) -> "Generator[Event, None, tuple[torch.Tensor, torch.Tensor]]":
        """Pooled (1, P) and sequence (1, T, C) embeddings of the prompt; the last prompt's are kept."""
        key = (request.prompt, request.text_tokens)
        if self._prompt == key:
            return self._embeddings
        yield Phase("load", "tokenizers")
        tokens = encoders.tokenize(self.checkpoint.folder, *key)
        if tokens.lost:
            yield Notice(f"the prompt is longer than {request.text_tokens} T5 tokens; lost: {tokens.lost!r}")
        clip = yield from self._load("text_encoder")
        yield Phase("encode")
        pooled = encoders.pooled_embedding(clip, tokens.clip)
        del clip
        self._evict("text_encoder")
        t5 = yield from self._load("text_encoder_2")
        yield Phase("encode")
        sequence = encoders.sequence_embedding(t5, tokens.t5)
        del t5
        self._evict("text_encoder_2")
        dtype = self._dtype("transformer")
        self._prompt, self._embeddings = key, (pooled.to(dtype), sequence.to(dtype))
        return self._embeddings

    def _condition(
        self, request: GenerationRequest, pooled: "torch.Tensor", scheduler: object
    ) -> "Generator[Event, None, torch.Tensor]":
        """The run's modulation table (steps, sum of outputs); the last run's is kept."""
        wanted = modulation.condition(
            pooled, weights=self.checkpoint.fingerprint, guidance=request.guidance, timesteps=scheduler.timesteps
        )
        if wanted.key not in self._tables:
            yield Phase("condition")
            self._tables = modulation.make_tables(self.checkpoint.components["transformer"], [wanted])
        return self._tables[wanted.key]

    def _load(self, name: str) -> "Generator[Event, None, nn.Module]":
        """The component's module, loaded now unless it is there."""
        if name not in self._models:
            yield Phase("load", name)
            options = {"dtype": self._dtype(name), "device": self.plan.device}
            component, since = self.checkpoint.components[name], time.perf_counter()
            skip = is_modulation if name == "transformer" else lambda _: False
            model = self._models[name] = load_component(component, **options, spec=self.plan.spec, skip=skip)
            if name == "transformer":
                self._row = modulation.ModulationRow(model, component, **options)
            if name == "transformer" and self.plan.spec:
                taken, to = time.perf_counter() - since, self.plan.precision
                yield Notice(f"packed to {to} in {taken:.1f} s while loading: flux quantize ... --to {to} saves that")
        return self._models[name]

    def _evict(self, name: str) -> None:
        if name not in self.plan.keep:
            self._models.pop(name, None)
            gc.collect()
            hardware.empty_cache(self.plan.device)

    def _dtype(self, name: str) -> "torch.dtype":
        import torch

        return getattr(torch, self.plan.dtypes[name])

    def _inputs(self, request: GenerationRequest, sequence: "torch.Tensor", pooled: "torch.Tensor") -> dict:
        """What every forward of the transformer takes beside latents and timestep."""
        import torch

        options = {"dtype": sequence.dtype, "device": sequence.device}
        guidance = None if request.guidance is None else torch.full([1], request.guidance, device=sequence.device)
        return {
            "encoder_hidden_states": sequence,
            "pooled_projections": pooled,
            "guidance": guidance,
            "txt_ids": torch.zeros(sequence.shape[1], 3, **options),
            "img_ids": sampling.image_ids(request.size, dtype=options["dtype"], device=str(sequence.device)),
        }

    def _decode(self, request: GenerationRequest, tokens: "torch.Tensor") -> "Generator[Event, None, np.ndarray]":
        """Pixels (H, W, 3) uint8 of packed latents (1, S, 64); once more in float32 where they are not finite."""
        vae = yield from self._load("vae")
        yield Phase("decode")
        latents = sampling.unpack(tokens, request.size)
        decoded = _decode(vae, latents.to(self._dtype("vae")))
        if not sampling.is_finite(decoded) and self.plan.dtypes["vae"] != "float32":
            yield Notice("the VAE overflowed: decoding once more in float32")
            decoded = _decode(vae.float(), latents.float())
            vae.to(self._dtype("vae"))
        if not sampling.is_finite(decoded):
            why = "NaN or Inf in the pixels, decoded in float32"
            raise NotFinite("the picture is not finite", which=f"seed {request.seed}", why=why)
        return sampling.to_pixels(decoded).numpy()

    def _save(self, request: GenerationRequest, pixels: "np.ndarray", target: output.Target, n: int) -> GeneratedImage:
        digest = image.pixels_sha256(pixels)
        metadata = self.metadata(request) | {"pixels_sha256": digest}
        embedded = metadata if request.metadata else None
        data = image.encode(pixels, request.format, quality=request.quality, metadata=embedded)
        path = output.save(data, target, request, n)
        width, height = request.size
        sha256 = hashlib.sha256(data).hexdigest()
        return GeneratedImage(path, request.seed, width, height, request.format, len(data), sha256, digest)

    @property
    def multiply(self) -> str:
        """How the transformer's blocks multiply here: in the dtype, by "scaled_mm", "int_mm" or "dequantize"."""
        from quant.linear import path_of

        precision = self.plan.precision
        return path_of(precision, self.plan.device) if precision in SCHEMES else precision

    def metadata(self, request: GenerationRequest) -> dict:
        """What identifies a picture: the request that makes it alone, the model, what computed it, versions."""
        return {
            "request": replace(request, output=None).to_json(),
            "size": list(request.size),
            "model": {"name": request.model, "fingerprint": self.checkpoint.fingerprint},
            "compute": {
                "device": self.plan.device.partition(":")[0],
                "precision": self.plan.precision,
                "multiply": self.multiply,
                "dtypes": self.plan.dtypes,
            },
            "versions": versions(),
        }


def versions() -> dict[str, str]:
    """Versions of what decides the pixels."""
    libraries = {name: version(name) for name in ("torch", "diffusers", "transformers")}
    return {"flux": fluxcli.__version__, "python": platform.python_version()} | libraries


def _step(
    model: "nn.Module", scheduler: object, latents: "torch.Tensor", timestep: "torch.Tensor", inputs: dict
) -> "torch.Tensor":
    """One Euler step: packed latents (1, S, 64) at `timestep` -> at the next one."""
    at = timestep.expand(1).to(latents) / 1000
    velocity = model(hidden_states=latents, timestep=at, return_dict=False, **inputs)[0]
    return scheduler.step(velocity, timestep, latents, return_dict=False)[0]


def _decode(vae: "nn.Module", latents: "torch.Tensor") -> "torch.Tensor":
    """VAE output (1, 3, H, W) of latents (1, 16, H/8, W/8)."""
    return vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)[0]
