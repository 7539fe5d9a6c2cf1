"""Runs of the real engine on a simulated card.

With the bundled model, or with the full-size one on FakeTensors.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import bitsandbytes  # noqa: F401 - now: what it logs while it is imported holds the frames, and tensors, of a run
import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from benchmarks.counting import CARD, Counter
from fluxcli.engine import decode, denoise, loader, modulation, prepare, text
from fluxcli.engine.engine import PHASES, Drawn, Engine
from fluxcli.engine.picture import Picture
from fluxcli.events import Event
from fluxcli.models.shapes import read_known_shapes
from fluxcli.pictures.latents import Latents
from fluxcli.plan import costs, placement
from fluxcli.plan import planner as plan
from fluxcli.plan.machine import Hardware
from fluxcli.plan.placement import MemoryPlan
from fluxcli.request.fields import Order
from quant import codecs, codes, int8_products, kernels, linear
from quant.checkpoint import Checkpoint, Component
from quant.codecs import Reader
from quant.rotated import NORMAL_LEVELS
from quant.spec import LEVELS, SCALED_BLOCKS, lay_out
from quant.tensor_info import GGUF_BITS
from quant.weights import Piece, Weight
from tests.support.helpers import machine, picture_of, plan_for

LOADED_FOR = {"controlnet": "denoise", "transformer": "denoise", "vae": "decode"}
DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "U8": torch.uint8, "I8": torch.int8}
DTYPES["F8_E4M3"] = torch.float8_e4m3fn


def on_card(
    checkpoint: Checkpoint, plan: MemoryPlan, machine: Hardware, **options: object
) -> Engine:
    """An engine that runs on the simulated card whatever the plan's device is."""
    return Engine(checkpoint, replace(plan, device=CARD), machine, **options)


def follow(
    engine: Engine, request: Order, counter: Counter, resume: Latents | None = None
) -> tuple:
    """Run one picture under the counter, which learns the phases: (events, pixels)."""
    picture = picture_of(engine, request, resume=resume)
    return count_phases(engine, picture, counter), picture.pixels


def count_phases(engine: Engine, picture: Picture, counter: Counter) -> list[Event]:
    """Draw a picture under the counter, which learns the phases; returns the events."""
    events = []
    phases = [phase.name for phase in PHASES]
    with torch.no_grad(), counter:
        for event in engine.draw([picture]):
            if isinstance(event, Drawn):
                continue
            events.append(event)
            detail = getattr(event, "detail", "")
            if getattr(event, "name", "") in phases:
                counter.phase = event.name
            elif detail in LOADED_FOR:  # loading is part of the phase that it is for
                counter.phase = LOADED_FOR[detail]
                if detail == "vae" and picture.tokens is None:
                    counter.phase = "prepare"
    return events


def every_placement(
    request: Order, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, *, step_kib: int
) -> dict[bool, list]:
    """Pictures under each placement that fits below 40 MiB, by whether they were decoded in tiles.

    Each run completes within its budget as planned, from all in memory to everything passing
    through.
    """
    monkeypatch.setattr(placement, "CONTEXT_BYTES", 0)
    monkeypatch.setattr(costs, "DECODE_BYTES", 64 << 10)
    monkeypatch.setattr(placement, "RESIDENT_SHARE", 0.01)
    monkeypatch.setattr(plan, "USABLE_SHARE", 1.0)
    pictures, levels = {}, set()
    for kib in range(40 << 10, 1 << 10, -step_kib):
        here = machine(kib / 2**20, "xpu:0")  # where no margins are
        try:
            _, made = plan_for(request, [checkpoint], here)
        except plan.DoesNotFit:
            break
        placed = made.placement
        if (placed.encode, placed.level("denoise"), placed.decode) in levels:
            continue
        levels.add((placed.encode, placed.level("denoise"), placed.decode))
        counter = Counter(budget=made.budget_bytes)
        events, pixels = follow(on_card(checkpoint, made, here), request, counter)
        assert not [event for event in events if "out of memory" in str(event)], (kib, placed)
        assert counter.peak <= made.budget_bytes
        pictures.setdefault(placed.decode == "tiled", []).append(pixels)
    assert {level for _, level, _ in levels} >= {"resident", "sequential"} and len(levels) >= 4, (
        levels
    )
    for same in pictures.values():
        assert all(np.array_equal(each, same[0]) for each in same)
    return pictures


def blocked(checkpoint: Checkpoint, kind: str) -> Checkpoint:
    """The same model with its transformer in blocks of one kind, as in published files.

    `kind` is one of GGUF's, nvfp4 or mxfp8.
    """
    part, weights = checkpoint.components["transformer"], {}
    for key, weight in part.weights.items():
        packs = len(weight.shape) == 2 and weight.numel > 1 << 20
        info = replace(weight.info, dtype=kind) if packs else weight.info
        infos = lay_out(kind, weight.info) if packs and kind in SCALED_BLOCKS else [info]
        file = weight.pieces[""].file
        pieces = {each.name.removeprefix(info.name): Piece(file, each) for each in infos}
        weights[key] = Weight(key, weight.shape, kind if packs else "", pieces)
    return replace(
        checkpoint, components=checkpoint.components | {part.name: replace(part, weights=weights)}
    )


def _stored(piece: Piece) -> torch.Tensor:
    if piece.info.dtype not in GGUF_BITS:
        return torch.empty(piece.shape, dtype=DTYPES[piece.info.dtype])
    return torch.empty(piece.shape[0], piece.nbytes // piece.shape[0], dtype=torch.uint8)


@contextlib.contextmanager
def full_size(monkeypatch: pytest.MonkeyPatch, *, arithmetic: bool = True) -> Iterator[Checkpoint]:
    """The full-size model by its shapes, and engines that compute nothing.

    Only what needs numbers is left out.
    """
    monkeypatch.setattr(
        Reader,
        "read",
        lambda _, weight: {suffix: _stored(piece) for suffix, piece in weight.pieces.items()},
    )
    made = torch.tensor  # of FakeTensors it knows no card
    monkeypatch.setattr(
        torch, "tensor", lambda values, device=None, **options: made(values, **options).to(device)
    )
    for module in (codecs, loader.codecs):
        monkeypatch.setattr(module, "check_values", lambda *_: None)
    monkeypatch.setattr(codecs.ValueChecks, "finish", lambda _: None)
    monkeypatch.setattr(linear, "read_offset", lambda _: 0.0)
    monkeypatch.setattr(linear, "read_codebook", _read_codebook)
    monkeypatch.setattr(int8_products, "CONSTANTS", {})
    monkeypatch.setattr(codes, "TABLES", {})
    monkeypatch.setattr(kernels, "CODEBOOKS", {})
    for module in (decode, prepare):
        monkeypatch.setattr(module, "is_finite", lambda _: True)
    monkeypatch.setattr(
        decode, "to_pixels", lambda decoded: SimpleNamespace(numpy=lambda: decoded.shape)
    )
    monkeypatch.setattr(Checkpoint, "fingerprint", "full size")
    monkeypatch.setattr(Component, "fingerprint", property(lambda part: part.name))
    monkeypatch.setattr(Checkpoint, "text_encoder_fingerprint", "full size")
    monkeypatch.setattr(modulation, "make_digest", lambda _: "")
    monkeypatch.setattr(text, "tokenize", _tokens)
    monkeypatch.setattr(text, "_check_ids", lambda *_: None)  # which asks for values
    real = denoise.make_scheduler

    def make_scheduler(*arguments):
        with _disable_current_modes():
            return real(*arguments)

    monkeypatch.setattr(denoise, "make_scheduler", make_scheduler)
    for scheme, ways in linear.WAYS.items():
        way = linear.Multiplication(ways[0] if arithmetic else linear.DEQUANTIZE)
        for device in (CARD, "cpu"):
            monkeypatch.setitem(linear.PROBED, (scheme, device), way)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield read_known_shapes("black-forest-labs/FLUX.1-dev")


def _read_codebook(part: dict[str, torch.Tensor]) -> tuple[float, ...]:
    return NORMAL_LEVELS if LEVELS in part else ()


def _tokens(folder: object, prompt: str, text_tokens: int) -> text.TokenIds:
    ids = torch.zeros(1, text_tokens, dtype=torch.long)
    return text.TokenIds(torch.zeros(1, 77, dtype=torch.long), ids, lost="", unknown="")
