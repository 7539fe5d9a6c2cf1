"""One picture under way: what is asked for, and what the engine's phases hand on to each other.

Knows no file and no name of one. Between phases everything is in RAM, so that a group of pictures
takes no more of the device than one does.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fluxcli.engine.prompt_cache import Embeddings
from fluxcli.request.fields import GenerationRequest
from quant.lora import Adapter


# Compared by identity: two pictures of equal requests are two, and tensors have no truth value.
@dataclass(eq=False)
class Picture:
    """One picture from its request to its pixels.

    `tokens` are the packed latents (1, S, 64) after `step` of the request's steps. They may be
    given: then the picture is finished from there, as after an interrupted run.
    """

    request: GenerationRequest  # of this picture alone: its seed is this picture's
    adapters: tuple[Adapter, ...] = ()  # those of `request.lora`, resolved by the caller
    position: int = 1  # for progress: this is picture `position` of `total`
    total: int = 1
    tokens: Tensor | None = None
    step: int = 0
    embeddings: Embeddings | None = None
    table: Tensor | None = None  # (steps, sum of outputs), see `engine.modulation`
    pixels: np.ndarray | None = None  # (H, W, 3) uint8
    error: Exception | None = None  # what ended it
    taken_s: float = 0.0  # its seconds so far, and its share of those that a group takes together

    @property
    def denoised(self) -> bool:
        """Whether the latents are at the last step, so that only the decoder is needed."""
        return self.tokens is not None and self.step == self.request.steps
