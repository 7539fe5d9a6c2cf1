"""One product where diffusers' FLUX transformer has several over the same input: q, k, v (and a single block's MLP).

Knows nothing of how weights are stored. Each row of a product is its own, so the pictures stay the same.
"""

import functools
from collections.abc import Callable, Sequence

from fluxcli import classes
from quant.lazy import nn

QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
FUSED: dict[str, dict[str, tuple[str, ...]]] = {  # of each block of a kind: new layers, and the old ones in each
    "transformer_blocks": {"attn.to_qkv": QKV, "attn.to_added_qkv": tuple(f"attn.add_{x}_proj" for x in "qkv")},
    "single_transformer_blocks": {"proj_in": (*QKV, "proj_mlp")},
}


def fuse(transformer: "nn.Module", together: Callable[[Sequence[str]], bool]) -> dict[str, tuple[str, ...]]:
    """Replace layers (on meta) that `together` allows to be one; returns the fused layers and what each holds."""
    found: dict[str, tuple[str, ...]] = {}
    for stack, table in FUSED.items():
        for i, block in enumerate(getattr(transformer, stack)):
            names = {new: tuple(f"{stack}.{i}.{name}" for name in old) for new, old in table.items()}
            if not all(together(parts) for parts in names.values()):
                continue
            for new, parts in names.items():
                layers = [transformer.get_submodule(part) for part in parts]
                rows, bias = sum(layer.out_features for layer in layers), layers[0].bias is not None
                block.set_submodule(new, nn.Linear(layers[0].in_features, rows, bias=bias, device="meta"))
                for owner, _, leaf in (name.rpartition(".") for name in table[new]):
                    delattr(block.get_submodule(owner), leaf)
                found[f"{stack}.{i}.{new}"] = parts
            block.attn.fused_projections = True
            if "proj_in" in names:
                block.attn.to_qkv, block.__class__ = nn.Identity(), _single_block()
    return found


@functools.cache
def _single_block() -> type:
    """diffusers' single block with one layer for q, k, v and the MLP's input."""
    import torch  # itself: torch.compile does not look through a lazy one

    class FusedSingleBlock(classes.single_block()):
        """`proj_in` gives (B, S, 3 D + M); the attention gets q, k and v ready."""

        def forward(
            self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, temb: torch.Tensor,
            image_rotary_emb: tuple | None = None, joint_attention_kwargs: dict | None = None,
        ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
            residual = torch.cat([encoder_hidden_states, hidden_states], dim=1)  # (B, T + S, D)
            normed, gate = self.norm(residual, emb=temb)
            projected = self.proj_in(normed)
            qkv, mlp = projected.split([projected.shape[-1] - self.mlp_hidden_dim, self.mlp_hidden_dim], dim=-1)
            attended = self.attn(qkv, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
            joined = torch.cat([attended, self.act_mlp(mlp)], dim=2)
            del normed, projected, qkv, mlp, attended  # most of what is alive
            output = residual + gate.unsqueeze(1) * self.proj_out(joined)
            if output.dtype == torch.float16:
                output = output.clip(-65504, 65504)
            return output.tensor_split([encoder_hidden_states.shape[1]], dim=1)

    return FusedSingleBlock
