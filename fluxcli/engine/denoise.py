"""The fourth phase: noise becomes latents, by Euler steps of the rectified flow.

Formulas as in black-forest-labs/flux, `sampling.py`, and diffusers' FluxPipeline, whose scheduler
and transformer compute here. Pictures are (width, height) in pixels; packed latents (1, S, 64) with
S = height/16 x width/16: each 2x2 patch of the latents (1, 16, height/8, width/8) is one token.
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fluxcli.engine import blocks, classes
from fluxcli.engine.components import Components
from fluxcli.engine.controls import Controls, list_networks
from fluxcli.engine.loader import refusing
from fluxcli.engine.modulation import ModulationRow
from fluxcli.engine.picture import InputLatents, Picture
from fluxcli.engine.preview import Estimated, Previewer
from fluxcli.engine.prompt_cache import Embeddings
from fluxcli.events import Event, Notice, Phase, Step
from fluxcli.request.fields import GenerationRequest
from quant.checkpoint import Checkpoint


def run(components: Components, pictures: Sequence[Picture]) -> Iterator[Event | Estimated]:
    """Take the steps that each picture's `tokens` lack, one picture after the other.

    An interrupted picture keeps its tokens, so that another run goes on where this one ended.
    """
    for picture in pictures:
        if picture.denoised:
            continue
        for name in list_networks(picture.controls):
            yield from components.load(name)
        model = yield from components.load("transformer", picture.adapters)
        yield Phase("denoise")
        yield from _denoise(components, model, picture)


def _denoise(components: Components, model: Any, picture: Picture) -> Iterator[Event | Estimated]:
    """Take one picture's steps; its latents are set after each, so that they outlive an error."""
    request = picture.request
    device = components.plan.device
    dtype = components.dtype("transformer")
    row = components.rows["transformer"]
    assert picture.embeddings and picture.tables, "a phase was left out"

    latents = _move(picture.latents or InputLatents(), device=device, dtype=dtype)
    scheduler = make_scheduler(components.checkpoint, request)
    if picture.tokens is None:
        picture.step = request.first_step
    scheduler.set_begin_index(picture.step)
    tokens = picture.tokens
    if tokens is None:
        tokens = _begin(request, latents, scheduler, dtype=dtype)
    tokens = tokens.to(device, dtype)
    make_inputs = functools.partial(
        _make_inputs, model, request.size, latents, device=device, dtype=dtype
    )
    first = request.first_step
    table = picture.tables["transformer"].to(device)
    ways = [_Way(table, first, make_inputs(picture.embeddings))]
    if picture.negative_embeddings and picture.negative_table is not None:
        negative = make_inputs(picture.negative_embeddings)
        ways.append(_Way(picture.negative_table.to(device), first, negative))
    sequence = ways[0].inputs["encoder_hidden_states"]
    controls = Controls.make(
        components,
        picture,
        latents,
        sequence=sequence,
        positions=make_position_ids(request.size).to(sequence),
    )
    compiler = components.compiler
    if compiler and compiler.begins:
        yield Notice("the first step compiles the blocks: it takes longer than the others")
    previewer = None
    if picture.preview_every:
        previewer = Previewer(components.checkpoint.components["vae"].config)
        if previewer.problem:
            yield Notice(previewer.problem)
    for index in range(picture.step, request.steps):
        before = tokens
        tokens = take_step(
            model,
            scheduler,
            tokens,
            row=row,
            ways=ways,
            inputs=latents,
            controls=controls,
            index=index,
            true_scale=request.true_scale,
        )
        picture.tokens = tokens
        picture.step = index + 1
        yield Step(picture.taken, request.steps_taken, picture.position, images=picture.total)
        if previewer and picture.is_due:
            sigmas = scheduler.sigmas[index : index + 2]
            yield Estimated(picture, previewer.draw(before, tokens, sigmas, request.size))
        failure = compiler.tell_failure() if compiler else ""
        if failure:
            yield Notice(f"not compiled, the picture is drawn without: {failure}")
    picture.tokens = tokens.cpu()
    picture.latents = None
    picture.tables = {}
    picture.negative_table = None
    picture.embeddings = None
    picture.negative_embeddings = None


@dataclass(frozen=True)
class _Way:
    """What one forward of the transformer takes for a prompt: its table and its inputs."""

    table: Tensor  # (steps taken, sum of outputs)
    first_step: int  # the table's first row is of this one
    inputs: Mapping[str, Tensor]


def _move(latents: InputLatents, *, device: str, dtype: torch.dtype) -> InputLatents:
    """The same latents on the device, in what the transformer computes in."""
    values = {
        each.name: value.to(device, dtype)
        for each in fields(latents)
        if isinstance(value := getattr(latents, each.name), Tensor)
    }
    controls = tuple(each.to(device, dtype) for each in latents.controls)
    return replace(latents, **values, controls=controls)


def _begin(
    request: GenerationRequest, latents: InputLatents, scheduler: Any, *, dtype: torch.dtype
) -> Tensor:
    """The tokens (1, S, 64) before the first step: noise, mixed with what the picture starts as."""
    if latents.noise is None:
        return make_noise(request.seed, request.size, dtype=dtype)
    if latents.start is None:
        return latents.noise
    timestep = scheduler.timesteps[request.first_step : request.first_step + 1]
    return scheduler.scale_noise(latents.start, timestep, latents.noise)


def take_step(
    model: Any,
    scheduler: Any,
    tokens: Tensor,
    *,
    row: ModulationRow,
    ways: Sequence[_Way],
    inputs: InputLatents,
    controls: Controls | None = None,
    index: int,
    true_scale: float = 1.0,
) -> Tensor:
    """Euler step `index` (from 0): packed latents (1, S, 64) at its timestep -> at the next one.

    The first way is the prompt's. Where there is a second, the negative prompt's, the velocity goes
    `true_scale` times the way from that one's to the first one's. ControlNets look at the prompt
    alone, and what they add is the same for both.
    """
    residuals = controls.compute(tokens, index) if controls else ()
    hidden = tokens
    if inputs.channels is not None:
        hidden = torch.cat([hidden, inputs.channels], dim=2)
    if inputs.references is not None:
        hidden = torch.cat([hidden, inputs.references], dim=1)
    velocities = []
    for way in ways:
        row.select(way.table, index - way.first_step)
        velocity = model(hidden_states=hidden, residuals=residuals, **way.inputs)[0]
        velocities.append(velocity[:, : tokens.shape[1]])
    velocity = velocities[0]
    if len(ways) > 1:
        velocity = velocities[1] + true_scale * (velocity - velocities[1])
    stepped = scheduler.step(velocity, scheduler.timesteps[index], tokens, return_dict=False)[0]
    if inputs.mask is None:
        return stepped
    return _restore_around(stepped, inputs, scheduler, index=index)


def _restore_around(tokens: Tensor, latents: InputLatents, scheduler: Any, *, index: int) -> Tensor:
    """The tokens after step `index`, around the mask those of the picture that it starts from.

    These have the noise of the next step; after the last one they have none.
    """
    kept = latents.start
    assert kept is not None and latents.mask is not None, "a mask is of a picture"
    if index + 1 < len(scheduler.timesteps):
        kept = scheduler.scale_noise(kept, scheduler.timesteps[index + 1][None], latents.noise)
    return (1 - latents.mask) * kept + latents.mask * tokens


def make_noise(seed: int, size: tuple[int, int], *, dtype: torch.dtype) -> Tensor:
    """Packed noise (1, S, 64) from a generator on the CPU, so that every device has the same."""
    return pack(draw_noise(size, torch.Generator("cpu").manual_seed(seed))).to(dtype)


def draw_noise(size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Noise of a picture's latents (1, 16, height/8, width/8)."""
    width, height = size
    return torch.randn((1, 16, height // 8, width // 8), generator=generator)


def pack(latents: Tensor) -> Tensor:
    """Latents (B, C, H, W) -> tokens (B, H/2 x W/2, 4C), each of a patch of 2 x 2."""
    return torch.pixel_unshuffle(latents, 2).flatten(2).mT.contiguous()


def make_scheduler(checkpoint: Checkpoint, request: GenerationRequest) -> Any:
    """diffusers' scheduler with this request's timesteps, on the CPU. Raises `CheckpointError`.

    The sigmas are linear from 1 to 1/steps; where the scheduler's config asks for it, it shifts
    them by `mu`, which is linear in the number of tokens.
    """
    with refusing("cannot use the scheduler's config", checkpoint.folder / "scheduler"):
        scheduler = classes.scheduler().from_config(checkpoint.scheduler)
        config = scheduler.config
        least_tokens = config.base_image_seq_len
        slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - least_tokens)
        tokens = math.prod(request.size) // 256
        mu = tokens * slope + config.base_shift - slope * least_tokens
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / request.steps, request.steps), mu=mu)
        scheduler.set_begin_index(0)
    return scheduler


def _make_inputs(
    model: Any,
    size: tuple[int, int],
    latents: InputLatents,
    embeddings: Embeddings,
    *,
    device: str,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """What every forward of the transformer takes beside the latents: the same in each step."""
    sequence = embeddings.sequence.to(device, dtype)  # (1, T, C)
    positions = make_position_ids(size).to(sequence)
    if latents.reference_ids is not None:
        positions = torch.cat([positions, latents.reference_ids.to(sequence)])
    rotation = blocks.make_rotation(model, sequence.shape[1], positions)
    return {"encoder_hidden_states": sequence, "rotation": rotation}


def make_position_ids(size: tuple[int, int], *, first: int = 0) -> Tensor:
    """Positions (S, 3) of the tokens for the rotary embedding: (first, row, column)."""
    width, height = size
    rows = torch.arange(height // 16)
    columns = torch.arange(width // 16)
    return torch.cartesian_prod(torch.tensor([first]), rows, columns)
