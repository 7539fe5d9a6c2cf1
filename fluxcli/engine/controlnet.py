"""A ControlNet's forward: what it adds to a picture's tokens after the transformer's blocks.

As in `blocks`, every number comes of diffusers' operations in diffusers' order. What is the same in
all steps of a picture is made once (`ControlInputs`): the embedded text, with a token for the mode
of a union network before it, the embedded control picture, and the rotation. B is the batch, T and
S the tokens of text and picture, D the width.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fluxcli.engine import blocks, classes


class ControlInputs(NamedTuple):
    """What every forward takes beside the latents: the same in each step."""

    text: Tensor  # (B, T, D), in a union network (B, 1 + T, D)
    condition: Tensor  # (B, S, D)
    rotation: Tensor  # as of `blocks.make_rotation`


class Samples(NamedTuple):
    """What goes to the transformer: a tensor (B, S, D) for each block of the network."""

    double: list[Tensor]
    single: list[Tensor]


def install(model: Any, *, backend: str = "") -> None:
    """Make a ControlNet of diffusers', and its blocks, compute as here; see `blocks.install`."""
    model.__class__ = controlnet()
    blocks.install_blocks(model, backend=backend)


def takes_pixels(config: Any) -> bool:
    """Whether a network with this config looks at pixels, by XLabs' hint block, not at latents."""
    return config.get("conditioning_embedding_channels") is not None


@functools.cache
def controlnet() -> type[nn.Module]:
    """diffusers' ControlNet over the blocks of `blocks`."""

    class ControlNet(classes.controlnet()):  # type: ignore[misc]  # of a library without types
        def embed(
            self, sequence: Tensor, control: Tensor, *, positions: Tensor, mode: int | None = None
        ) -> ControlInputs:
            """What the forwards of a picture share.

            `sequence` (B, T, C) is the text's, `positions` (S, 3) those of the picture's tokens.
            `control` is the control picture: packed latents (B, S, 64), or for XLabs' networks
            values (B, 3, H, W) in -1 to 1. A union network needs a `mode`.
            """
            text = self.context_embedder(sequence)
            if mode is not None:
                modes = torch.full((len(text), 1), mode, device=text.device)
                text = torch.cat([self.controlnet_mode_embedder(modes), text], dim=1)
            if self.input_hint_block is not None:
                hint = self.input_hint_block(control)
                control = nn.functional.pixel_unshuffle(hint, self.config.patch_size)
                control = control.flatten(2).mT.contiguous()
            rotation = blocks.make_rotation(self, text.shape[1], positions)
            return ControlInputs(text, self.controlnet_x_embedder(control), rotation)

        def forward(self, hidden_states: Tensor, inputs: ControlInputs, scale: float) -> Samples:
            """What to add for packed latents (B, S, 64), times `scale`."""
            image = self.x_embedder(hidden_states) + inputs.condition
            temb = self.time_text_embed()  # a constant: tables stand for it
            text_tokens = inputs.text.shape[1]
            x = torch.cat([inputs.text, image], dim=1)
            del image
            double = []
            for block, make in zip(self.transformer_blocks, self.controlnet_blocks, strict=True):
                x = block(x, temb, inputs.rotation, text_tokens)
                double.append(make(x[:, text_tokens:]).mul_(scale))
            single = []
            stack = zip(self.single_transformer_blocks, self.controlnet_single_blocks, strict=True)
            for block, make in stack:
                x = block(x, temb, inputs.rotation)
                single.append(make(x[:, text_tokens:]).mul_(scale))
            return Samples(double, single)

    return ControlNet
