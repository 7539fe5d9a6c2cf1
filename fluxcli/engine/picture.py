"""One picture under way: what is asked for, and what the engine's phases hand on to each other.

Knows no file and no name of one. Between phases everything is in RAM, so that a group of pictures
takes no more of the device than one does.
"""

from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from fluxcli.engine.prompt_cache import Embeddings
from fluxcli.models.parts import Control
from fluxcli.pictures.canvas import Canvas, load_canvas
from fluxcli.pictures.inputs import NO_INPUTS, InputPictures
from fluxcli.request.fields import GenerationRequest
from quant.lora import Adapter


@dataclass
class InputLatents:
    """What the prepare phase makes of a picture's inputs, in RAM; S are the tokens of the picture.

    With `start` the picture begins as a mixture of it and of `noise`; where `mask` is 0, it stays
    what it was. `channels` are put beside the latents, `references` behind them, as tokens at
    positions of their own. `controls` has a tensor for each of the picture's controls.
    """

    start: Tensor | None = None  # (1, S, 64)
    noise: Tensor | None = None  # (1, S, 64)
    mask: Tensor | None = None  # (1, S, 64), 1 where it is painted
    channels: Tensor | None = None  # (1, S, C - 64)
    references: Tensor | None = None  # (1, R, 64)
    reference_ids: Tensor | None = None  # (R, 3)
    controls: tuple[Tensor, ...] = ()


# Compared by identity: two pictures of equal requests are two, and tensors have no truth value.
@dataclass(eq=False)
class Picture:
    """One picture from its request to its pixels.

    `tokens` are the packed latents (1, S, 64) after `step` of the request's steps. They may be
    given: then the picture is finished from there, as after an interrupted run.
    """

    request: GenerationRequest  # of this picture alone: its seed is this picture's
    adapters: tuple[Adapter, ...] = ()  # those of `request.lora`, resolved by the caller
    inputs: InputPictures = NO_INPUTS  # those that the request names, looked at by the caller
    controls: tuple[Control, ...] = ()  # those of `request.control`, resolved by the caller
    position: int = 1  # for progress: this is picture `position` of `total`
    total: int = 1
    preview_every: int | None = None  # after so many steps its estimate is handed out
    tokens: Tensor | None = None
    step: int = 0
    embeddings: Embeddings | None = None
    negative_embeddings: Embeddings | None = None  # with true guidance, of the negative prompt
    canvas: Canvas | None = None  # what `request.image` is drawn on
    latents: InputLatents | None = None
    tables: dict[str, Tensor] = field(default_factory=dict)  # (steps taken, outputs), by component
    negative_table: Tensor | None = None  # of the transformer, for the negative prompt
    pixels: np.ndarray | None = None  # (H, W, 3) uint8
    error: Exception | None = None  # what ended it
    taken_s: float = 0.0  # its seconds so far, and its share of those that a group takes together

    def load_canvas(self) -> Canvas:
        """What `request.image` is drawn on, read once; raises `BadInputFile`."""
        if self.canvas is None:
            self.canvas = load_canvas(self.inputs, self.request)
        return self.canvas

    @property
    def maps_key(self) -> object:
        """What the maps of its controls depend on: those of pictures with equal keys are equal."""
        kinds = tuple(ref.kind for ref in self.request.control)
        return kinds, self.inputs.controls, self.inputs.image, self.request.size

    @property
    def denoised(self) -> bool:
        """Whether the latents are at the last step, so that only the decoder is needed."""
        return self.tokens is not None and self.step == self.request.steps

    @property
    def taken(self) -> int:
        """How many of its request's `steps_taken` it has."""
        return self.step - self.request.first_step

    @property
    def is_due(self) -> bool:
        """Whether an estimate of it is wanted after this step; after the last one none is."""
        if not self.preview_every or self.denoised:
            return False
        return self.taken % self.preview_every == 0
