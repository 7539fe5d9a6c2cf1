"""Input pictures of tests, and what the engine draws from them."""

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fluxcli.engine.engine import Engine
from fluxcli.engine.picture import Picture
from fluxcli.models.parts import resolve_parts
from fluxcli.pictures.inputs import load_inputs
from fluxcli.pictures.references import stitch
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


def draw_by_diffusers(pipe: Any, order: Order, **inputs: object) -> np.ndarray:
    """The pixels that a pipeline of diffusers makes of an order; `inputs` go before the order's."""
    request = order.request
    width, height = request.size
    pipe.set_progress_bar_config(disable=True)
    options = {
        "prompt": request.prompt,
        "width": width,
        "height": height,
        "num_inference_steps": request.steps,
        "guidance_scale": request.guidance,
        "max_sequence_length": request.text_tokens,
        "generator": torch.Generator("cpu").manual_seed(request.seed),
    }
    return np.asarray(pipe(**options | inputs).images[0])


def count_levels_apart(one: np.ndarray, other: np.ndarray) -> int:
    """The largest difference of any value, of 255."""
    return int(np.abs(one.astype(int) - other.astype(int)).max())


def make_canvas(order: Order) -> Image.Image:
    """The canvas of an order's references, which diffusers is given."""
    references = load_inputs(order.request).references
    size = order.request.fit_canvas([each.size for each in references])
    return Image.fromarray(stitch([each.read_pixels() for each in references], size))


def make_prior(siglip: dict[str, int], text_width: int) -> Any:
    """diffusers' pipeline with random SigLIP and embedder, whose looks are like T5's embeddings."""
    from diffusers import FluxPriorReduxPipeline
    from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
    from transformers import SiglipVisionConfig, SiglipVisionModel
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    torch.manual_seed(0)
    side = siglip["image_size"]
    return FluxPriorReduxPipeline(
        image_encoder=SiglipVisionModel(SiglipVisionConfig(**siglip)).eval(),
        feature_extractor=SiglipImageProcessorPil(size={"height": side, "width": side}),
        image_embedder=ReduxImageEncoder(siglip["hidden_size"], text_width),
    )
