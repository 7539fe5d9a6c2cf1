"""Requests and runs that several tests share."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from fluxcli import hardware, plan
from fluxcli.engine import Engine
from fluxcli.image import open_picture
from fluxcli.request import GenerationRequest
from quant.checkpoint import Checkpoint

TINY = GenerationRequest(
    "a red circle on a blue background", preset="tiny", model="bundled/tiny", steps=3, seed=7, image_size=64,
    text_tokens=16, format="png", device="cpu",
)  # fmt: skip

BAKED: dict[str, dict] = {  # specs of the packed bundled model that most tests share
    "nf4": {"text_encoder": "nf4", "scales": "absmax"},
    "fp8": {"text_encoder": "fp8"},
    "int8": {},
}


def tiny(**changes: object) -> GenerationRequest:
    """A small, quick request of the bundled model."""
    return replace(TINY, **changes)


def engine_of(checkpoint: Checkpoint, request: GenerationRequest = TINY) -> Engine:
    machine = hardware.probe("cpu")
    return Engine(*plan.make_plan(request, [checkpoint], machine), machine)


def draw(engine: Engine, request: GenerationRequest) -> tuple[list, np.ndarray]:
    """Run one picture to its end: (events, pixels)."""
    events, run = [], engine.picture(request)
    while True:
        try:
            events.append(next(run))
        except StopIteration as finished:
            return events, finished.value


def read_pixels(path: Path) -> np.ndarray:
    """A picture as (H, W, 3) uint8."""
    with open_picture(path) as image:
        return np.asarray(image.convert("RGB"))
