"""One picture under way, from its request to its file: what the engine's phases hand on to each other.

Between phases everything is in RAM, so that a window of pictures takes no more of the device than one does.
"""

from dataclasses import dataclass

from fluxcli.engine.prompt_cache import Embeddings
from fluxcli.pictures import names as output
from fluxcli.pictures.latents import Latents
from fluxcli.request.fields import GenerationRequest, Order
from quant.errors import ExplainedError
from quant.lazy import np, torch
from quant.lora import Adapter


@dataclass
class Picture:
    """One picture under way: what is asked for, and what the phases have made of it."""

    order: Order  # of this picture alone
    target: output.Target | None = None  # None: the pixels stay here
    number: int = 1  # of its request, for its name
    row: int = 0  # of the batch
    seeded: bool = True  # the seed was asked for
    image: int = 1  # of so many `images`, for progress
    images: int = 1
    latents: Latents | None = None
    adapters: tuple[Adapter, ...] = ()
    text: str = ""  # the key of its embeddings
    embeddings: Embeddings | None = None
    table: "torch.Tensor | None" = None  # (steps, sum of outputs)
    pixels: "np.ndarray | None" = None  # (H, W, 3) uint8
    saved: bool = False
    error: ExplainedError | None = None  # what ended it

    @property
    def request(self) -> GenerationRequest:
        return self.order.request

    @property
    def denoised(self) -> bool:
        return self.latents is not None and self.latents.step == self.request.steps
