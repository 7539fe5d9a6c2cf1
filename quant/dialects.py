"""Key names of FLUX transformers in other layouts than diffusers': the table between BFL's names and ours.

BFL's checkpoints (github.com/black-forest-labs/flux, also inside ComfyUI's files) hold q/k/v and a single block's MLP
input as one tensor, and the two halves of the last modulation in the other order. Stdlib only.
"""

import re
from collections.abc import Iterable, Mapping
from itertools import pairwise

from quant.errors import CheckpointError
from quant.weights import Piece

PREFIX = "model.diffusion_model."
SWAPPED = "final_layer.adaLN_modulation.1"  # shift, scale there; scale, shift in diffusers
BLOCK_KEY = re.compile(r"(double|single)_blocks\.(\d{1,3})\.")
HEAD_DIM = 128
QKV, ADDED = ("attn.to_q", "attn.to_k", "attn.to_v"), ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
DOUBLE: dict[str, tuple[str, ...]] = {
    "img_mod.lin": ("norm1.linear",), "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.qkv": QKV, "txt_attn.qkv": ADDED,
    "img_attn.norm.query_norm": ("attn.norm_q",), "img_attn.norm.key_norm": ("attn.norm_k",),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",), "txt_attn.norm.key_norm": ("attn.norm_added_k",),
    "img_attn.proj": ("attn.to_out.0",), "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",), "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",), "txt_mlp.2": ("ff_context.net.2",),
}  # fmt: skip
SINGLE: dict[str, tuple[str, ...]] = {
    "modulation.lin": ("norm.linear",), "linear1": (*QKV, "proj_mlp"), "linear2": ("proj_out",),
    "norm.query_norm": ("attn.norm_q",), "norm.key_norm": ("attn.norm_k",),
}  # fmt: skip
TOP = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "final_layer.linear": "proj_out",
    SWAPPED: "norm_out.linear",
}
EMBEDDERS = {"time_in": "timestep_embedder", "vector_in": "text_embedder", "guidance_in": "guidance_embedder"}


def table(*, double: int, single: int, guidance: bool) -> dict[str, tuple[str, ...]]:
    """BFL's layers and the diffusers layers whose rows they hold one after the other."""
    found = {bfl: (ours,) for bfl, ours in TOP.items()}
    for bfl, ours in EMBEDDERS.items():
        if guidance or bfl != "guidance_in":
            for k, layer in enumerate(("in_layer", "out_layer"), start=1):
                found[f"{bfl}.{layer}"] = (f"time_text_embed.{ours}.linear_{k}",)
    for kind, count, layers, prefix in (
        ("double_blocks", double, DOUBLE, "transformer_blocks"),
        ("single_blocks", single, SINGLE, "single_transformer_blocks"),
    ):
        for i in range(count):
            found |= {f"{kind}.{i}.{bfl}": tuple(f"{prefix}.{i}.{p}" for p in ours) for bfl, ours in layers.items()}
    return found


OTHERS = {
    "double_stream_modulation": "FLUX.2", "joint_blocks": "Stable Diffusion 3", "conditioner.embedders": "SDXL",
    "input_blocks.": "Stable Diffusion or SDXL", "cond_stage_model": "Stable Diffusion", "lora": "a LoRA",
    "down_blocks.0.attentions": "Stable Diffusion or SDXL", "text_model.encoder": "a CLIP text encoder",
    "encoder.block.": "a T5 text encoder", "decoder.up": "a VAE",
    "single_transformer_blocks": "a FLUX.1 transformer in diffusers' layout",
}  # fmt: skip


def is_bfl(names: Iterable[str]) -> bool:
    """Whether these are the keys of a FLUX transformer as BFL names them."""
    names = list(names)
    other = any(part in name for part in ("double_stream_modulation", "lora") for name in names)
    return not other and any(BLOCK_KEY.match(name.removeprefix(PREFIX)) for name in names)


def kind_of(names: Iterable[str]) -> str:
    """What a file of another kind seems to be, by its keys."""
    names = list(names)
    found = (kind for part, kind in OTHERS.items() if any(part in name for name in names))
    return next(found, f"its first key is {names[0][:60]}")


def bfl_leaf(layer: str, leaf: str) -> str:
    """BFL's name of a layer's tensor: its norms call the weight a scale."""
    return f"{layer}.scale" if "_norm" in layer and leaf == "weight" else f"{layer}.{leaf}"


def from_bfl(pieces: Mapping[str, Piece]) -> tuple[dict[str, Piece], dict]:
    """(pieces by diffusers names, the transformer's config) of a BFL file; raises `CheckpointError`."""
    pieces = {name.removeprefix(PREFIX): piece for name, piece in pieces.items()}
    file = next(iter(pieces.values())).file
    config = _config(pieces)
    known = table(double=config["num_layers"], single=config["num_single_layers"], guidance=config["guidance_embeds"])
    found = {}
    for name, piece in pieces.items():
        layer, _, leaf = name.rpartition(".")
        if layer not in known or name not in (bfl_leaf(layer, "weight"), f"{layer}.bias", f"{layer}.weight_scale"):
            raise CheckpointError("another model than FLUX.1", which=file, why=f"it has {name[:60]}")
        ours, weight = known[layer], pieces.get(f"{layer}.weight")
        for part, rows in zip(ours, _rows(layer, ours, piece, weight), strict=True):
            found[f"{part}.{'weight' if leaf == 'scale' else leaf}"] = Piece(piece.file, piece.info, rows)
    return found, config


def _rows(layer: str, ours: tuple[str, ...], piece: Piece, weight: Piece | None) -> list[tuple[tuple[int, int], ...]]:
    """The row ranges of each diffusers layer in a BFL tensor."""
    shape = piece.shape
    if (len(ours) == 1 and layer != SWAPPED) or not shape or shape[0] == 1:
        return [()] * len(ours)
    count = shape[0]
    if layer == SWAPPED:
        return [((count // 2, count), (0, count // 2))]
    width = weight.shape[1] if weight and len(weight.shape) == 2 else 0
    if not 0 < width * 3 <= count:
        raise CheckpointError("impossible shapes", which=piece.file, why=f"{layer[:60]} has {count} rows")
    edges = [0, width, 2 * width, 3 * width, count][: len(ours) + 1]
    if edges[-1] != count:
        raise CheckpointError("impossible shapes", which=piece.file, why=f"{layer[:60]} has {count} rows")
    return [((start, stop),) for start, stop in pairwise(edges)]


def _config(pieces: Mapping[str, Piece]) -> dict:
    """The transformer's config, from the names and shapes of a BFL file."""
    blocks = {(m[1], int(m[2])) for name in pieces if (m := BLOCK_KEY.match(name))}
    file = next(iter(pieces.values())).file

    def shape(name: str, rank: int) -> tuple[int, ...]:
        if name not in pieces or len(pieces[name].shape) != rank:
            raise CheckpointError("not a whole FLUX.1 transformer", which=file, why=f"{name} is missing or misshapen")
        return pieces[name].shape

    width, channels = shape("img_in.weight", 2)
    if shape("double_blocks.0.img_attn.norm.query_norm.scale", 1) != (HEAD_DIM,) or width % HEAD_DIM:
        why = f"heads are not {HEAD_DIM} wide"
        raise CheckpointError("another model than FLUX.1", which=file, why=why)
    return {
        "_class_name": "FluxTransformer2DModel", "patch_size": 1, "in_channels": channels, "out_channels": None,
        "num_layers": sum(kind == "double" for kind, _ in blocks),
        "num_single_layers": sum(kind == "single" for kind, _ in blocks),
        "attention_head_dim": HEAD_DIM, "num_attention_heads": width // HEAD_DIM,
        "joint_attention_dim": shape("txt_in.weight", 2)[1],
        "pooled_projection_dim": shape("vector_in.in_layer.weight", 2)[1],
        "guidance_embeds": "guidance_in.in_layer.weight" in pieces, "axes_dims_rope": [16, 56, 56],
    }  # fmt: skip
