"""The third phase: noise becomes latents, by Euler steps of the rectified flow.

Formulas as in black-forest-labs/flux, `sampling.py`, and diffusers' FluxPipeline, whose scheduler
and transformer compute here. Pictures are (width, height) in pixels; packed latents (1, S, 64) with
S = height/16 x width/16: each 2x2 patch of the latents (1, 16, height/8, width/8) is one token.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fluxcli.engine import blocks, classes
from fluxcli.engine.components import Components
from fluxcli.engine.loader import refusing
from fluxcli.engine.picture import Picture
from fluxcli.engine.prompt_cache import Embeddings
from fluxcli.events import Event, Notice, Phase, Step
from fluxcli.request.fields import GenerationRequest
from quant.checkpoint import Checkpoint


def run(components: Components, pictures: Sequence[Picture]) -> Iterator[Event]:
    """Take the steps that each picture's `tokens` lack, one picture after the other.

    An interrupted picture keeps its tokens, so that another run goes on where this one ended.
    """
    for picture in pictures:
        if picture.denoised:
            continue
        model = yield from components.load("transformer", picture.adapters)
        yield Phase("denoise")
        yield from _denoise(components, model, picture)


def _denoise(components: Components, model: Any, picture: Picture) -> Iterator[Event]:
    """Take one picture's steps; its latents are set after each, so that they outlive an error."""
    request = picture.request
    device = components.plan.device
    dtype = components.dtype("transformer")
    row = components.modulation_row
    assert row and picture.embeddings and picture.table is not None, "a phase was left out"

    scheduler = make_scheduler(components.checkpoint, request)
    scheduler.set_begin_index(picture.step)
    inputs = _make_inputs(model, request.size, picture.embeddings, device=device, dtype=dtype)
    table = picture.table.to(device)
    tokens = picture.tokens
    if tokens is None:
        tokens = make_noise(request.seed, request.size, dtype=dtype)
    tokens = tokens.to(device, dtype)
    compiler = components.compiler
    if compiler and compiler.begins:
        yield Notice("the first step compiles the blocks: it takes longer than the others")
    for index in range(picture.step, request.steps):
        row.select(table, index)
        timestep = scheduler.timesteps[index]
        tokens = take_step(model, scheduler, tokens, timestep=timestep, inputs=inputs)
        picture.tokens = tokens
        picture.step = index + 1
        yield Step(picture.step, request.steps, picture.position, images=picture.total)
        failure = compiler.tell_failure() if compiler else ""
        if failure:
            yield Notice(f"not compiled, the picture is drawn without: {failure}")
    picture.tokens = tokens.cpu()
    picture.table = None
    picture.embeddings = None


def make_noise(seed: int, size: tuple[int, int], *, dtype: torch.dtype) -> Tensor:
    """Packed noise (1, S, 64) from a generator on the CPU, so that every device has the same."""
    width, height = size
    generator = torch.Generator("cpu").manual_seed(seed)
    latents = torch.randn((1, 16, height // 8, width // 8), generator=generator)
    tokens = torch.pixel_unshuffle(latents, 2).flatten(2).mT
    return tokens.to(dtype).contiguous()


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
    embeddings: Embeddings,
    *,
    device: str,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """What every forward of the transformer takes beside the latents: the same in each step."""
    sequence = embeddings.sequence.to(device, dtype)  # (1, T, C)
    positions = make_position_ids(size).to(sequence)
    rotation = blocks.make_rotation(model, sequence.shape[1], positions)
    return {"encoder_hidden_states": sequence, "rotation": rotation}


def make_position_ids(size: tuple[int, int]) -> Tensor:
    """Positions (S, 3) of the tokens for the rotary embedding: (0, row, column)."""
    width, height = size
    rows = torch.arange(height // 16)
    columns = torch.arange(width // 16)
    return torch.cartesian_prod(torch.tensor([0]), rows, columns)


def take_step(
    model: Any,
    scheduler: Any,
    tokens: Tensor,
    *,
    timestep: Tensor,
    inputs: Mapping[str, Tensor],
) -> Tensor:
    """One Euler step: packed latents (1, S, 64) at `timestep` -> at the next one."""
    velocity = model(hidden_states=tokens, **inputs)[0]
    return scheduler.step(velocity, timestep, tokens, return_dict=False)[0]
