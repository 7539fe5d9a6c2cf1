"""One product where diffusers' FLUX transformer has several over the same input: q, k, v (and a single block's MLP).

Knows diffusers' classes, nothing of how weights are stored. The result of each row of a product is its own, so the
fused model draws what the plain one draws.
"""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from fluxcli import classes

if TYPE_CHECKING:
    from torch import nn

QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
ADDED = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")


def fuse(transformer: "nn.Module", together: Callable[[Sequence[str]], bool]) -> dict[str, tuple[str, ...]]:
    """Replace layers (on meta) that `together` allows to be one; returns the fused layers and what each holds."""
    from torch import nn

    found: dict[str, tuple[str, ...]] = {}
    for i, block in enumerate(transformer.transformer_blocks):
        path = f"transformer_blocks.{i}."
        names = {new: tuple(path + name for name in old) for new, old in (("to_qkv", QKV), ("to_added_qkv", ADDED))}
        if all(together(parts) for parts in names.values()):
            for new, parts in names.items():
                setattr(block.attn, new, _take(transformer, parts))
                found[f"{path}attn.{new}"] = parts
            block.attn.fused_projections = True
    for i, block in enumerate(transformer.single_transformer_blocks):
        path = f"single_transformer_blocks.{i}."
        parts = tuple(path + name for name in (*QKV, "proj_mlp"))
        if together(parts):
            block.proj_in = _take(transformer, parts)
            block.attn.to_qkv, block.attn.fused_projections = nn.Identity(), True
            block.__class__ = _single_block()
            found[f"{path}proj_in"] = parts
    return found


def _take(transformer: "nn.Module", parts: Sequence[str]) -> "nn.Linear":
    """A layer on meta of the size of all parts, which are removed."""
    from torch import nn

    layers = [transformer.get_submodule(part) for part in parts]
    for part in parts:
        owner, _, leaf = part.rpartition(".")
        delattr(transformer.get_submodule(owner), leaf)
    rows = sum(layer.out_features for layer in layers)
    return nn.Linear(layers[0].in_features, rows, bias=layers[0].bias is not None, device="meta")


@functools.cache
def _single_block() -> type:
    """diffusers' single block with one layer for q, k, v and the MLP's input."""
    import torch

    class FusedSingleBlock(classes.single_block()):
        """`proj_in` gives (B, S, 3 D + M); the attention gets q, k and v ready."""

        def forward(
            self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, temb: torch.Tensor,
            image_rotary_emb: tuple | None = None, joint_attention_kwargs: dict | None = None,
        ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
            text = encoder_hidden_states.shape[1]
            residual = torch.cat([encoder_hidden_states, hidden_states], dim=1)  # (B, T + S, D)
            normed, gate = self.norm(residual, emb=temb)
            projected = self.proj_in(normed)
            qkv, mlp = projected.split([projected.shape[-1] - self.mlp_hidden_dim, self.mlp_hidden_dim], dim=-1)
            attended = self.attn(qkv, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
            output = self.proj_out(torch.cat([attended, self.act_mlp(mlp)], dim=2))
            output = residual + gate.unsqueeze(1) * output
            if output.dtype == torch.float16:
                output = output.clip(-65504, 65504)
            return output[:, :text], output[:, text:]

    return FusedSingleBlock
