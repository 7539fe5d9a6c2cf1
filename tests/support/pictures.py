"""Input pictures of tests, and what the engine draws from them."""

import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from fluxcli.engine.engine import Engine
from fluxcli.engine.picture import Picture
from fluxcli.models.parts import resolve_parts
from fluxcli.pictures.inputs import load_inputs
from fluxcli.request.fields import Order
from quant.checkpoint import Checkpoint
from tests.support.helpers import engine_of


def make_picture(path: Path, size: tuple[int, int]) -> Image.Image:
    """Write a picture (width, height) of a few smooth colours that its file's name decides."""
    generator = np.random.default_rng(zlib.crc32(path.name.encode()))
    coarse = Image.fromarray(generator.integers(0, 256, (3, 4, 3), dtype=np.uint8))
    image = coarse.resize(size, Image.Resampling.BICUBIC)
    image.save(path)
    return image


def make_engine(checkpoint: Checkpoint, order: Order, *, prompt_cache: bool = False) -> Engine:
    """An engine on the CPU for an order with what its request adds to the model."""
    engine = engine_of(resolve_parts(order.request, checkpoint).add_to(checkpoint), order)
    engine.adopt(engine.plan, engine.hardware, prompt_cache=prompt_cache)
    return engine


def begin_picture(engine: Engine, order: Order) -> Picture:
    """A picture of an order with input pictures, before its first phase."""
    controls = resolve_parts(order.request, engine.checkpoint).controls
    return Picture(order.request, inputs=load_inputs(order.request), controls=controls)


def draw_from(engine: Engine, order: Order) -> np.ndarray:
    """The pixels (H, W, 3) that an engine draws for an order with input pictures."""
    picture = begin_picture(engine, order)
    for _ in engine.draw([picture]):
        pass
    return picture.pixels


def count_levels_apart(one: np.ndarray, other: np.ndarray) -> int:
    """The largest difference of any value, of 255."""
    return int(np.abs(one.astype(int) - other.astype(int)).max())
