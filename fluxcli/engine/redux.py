"""Looks: what a picture looks like, as text tokens, by SigLIP and Redux' embedder.

As diffusers' FluxPriorReduxPipeline: the picture is resized to SigLIP's square, its last hidden
states become tokens of the transformer's text width, and these stand behind the prompt's. Loads no
component (see `encode`). Shapes: looks (1, L, C), L is 729 at the published size, in RAM.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

import fluxcli
from fluxcli.engine import prompt_cache
from fluxcli.engine.prompt_cache import Embeddings
from fluxcli.engine.recent import Recent
from fluxcli.pictures.inputs import InputPicture
from fluxcli.plan.machine import Hardware
from fluxcli.plan.placement import MemoryPlan
from fluxcli.request.fields import GenerationRequest
from quant.checkpoint import Checkpoint
from quant.config import complete
from quant.redux import REDUX_PARTS

KEPT_LOOKS = 16  # in RAM, 6 MB each at the published size in 16 bit


def make_values(pixels: np.ndarray, side_px: int) -> Tensor:
    """SigLIP's input (1, 3, side, side), -1 to 1, of pixels (H, W, 3) uint8 of any ratio.

    As transformers' SiglipImageProcessor: bicubic, mean and deviation 0.5.
    """
    from PIL import Image

    resized = Image.fromarray(pixels).resize((side_px, side_px), Image.Resampling.BICUBIC)
    shares = torch.from_numpy(np.asarray(resized).astype(np.float32)) / 255
    return ((shares - 0.5) / 0.5).permute(2, 0, 1)[None]


def make_empty_prompt(request: GenerationRequest, checkpoint: Checkpoint) -> Embeddings:
    """The zeros that stand for a prompt where there is none."""
    config = complete("transformer", checkpoint.components["transformer"].config)
    pooled = torch.zeros(1, config["pooled_projection_dim"])
    return Embeddings(pooled, torch.zeros(1, request.text_tokens, config["joint_attention_dim"]))


def combine(prompt: Embeddings, looks: Sequence[Tensor], strengths: Sequence[float]) -> Embeddings:
    """The embeddings of a prompt with looks (1, L, C) behind it, each by its strength.

    As in diffusers the embeddings of several pictures, each with the prompt's before its look, are
    summed. The strength scales the look alone.
    """
    dtype = prompt.sequence.dtype
    weighted = [look.to(dtype) * strength for look, strength in zip(looks, strengths, strict=True)]
    summed = torch.cat(weighted).sum(dim=0, keepdim=True)
    pooled = prompt.pooled.expand(len(looks), -1).sum(dim=0, keepdim=True)
    text = prompt.sequence.expand(len(looks), -1, -1).sum(dim=0, keepdim=True)
    return Embeddings(pooled, torch.cat([text, summed], dim=1), prompt.lost, prompt.unknown)


class Looks:
    """Looks of pictures by key; a key stands for everything that they depend on.

    They are kept as `Embeddings` without pooled values, on disk, too, with the prompts'.
    """

    def __init__(
        self, checkpoint: Checkpoint, plan: MemoryPlan, hardware: Hardware, *, on_disk: bool
    ) -> None:
        self.on_disk = on_disk
        self._checkpoint = checkpoint
        self._plan = plan
        self._device = [hardware.kind, hardware.name, str(hardware.capability)]
        if hardware.kind == "cpu":
            self._device.append(torch.backends.cpu.get_cpu_capability())
        self._known: Recent[str, Tensor] = Recent(KEPT_LOOKS)

    @property
    def side_px(self) -> int:
        """The side of the square that SigLIP looks at."""
        config = self._checkpoint.components["image_encoder"].config
        side_px: int = complete("image_encoder", config)["image_size"]
        return side_px

    def key_of(self, picture: InputPicture) -> str:
        """The key of a picture's look."""
        return prompt_cache.key_of(
            look=picture.sha256,
            weights=[self._checkpoint.components[name].fingerprint for name in REDUX_PARTS],
            dtypes=[self._plan.dtypes[name] for name in REDUX_PARTS],
            device=self._device,
            versions=fluxcli.versions(),
        )

    def find(self, key: str) -> Tensor | None:
        """The look (1, L, C) of that key from memory, or from disk where that is allowed."""
        found = self._known.get(key)
        if found is None and self.on_disk:
            kept = prompt_cache.read(key)
            if kept:
                found = kept.sequence
                self._known.keep(key, found)
        return found

    def keep(self, key: str, look: Tensor) -> None:
        """Keep a look (1, L, C); on disk only if it is finite, so that no fault stays."""
        self._known.keep(key, look)
        kept = Embeddings(look.new_zeros(1, 0), look)
        if self.on_disk and kept.are_finite():
            prompt_cache.write(key, kept)
