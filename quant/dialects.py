"""Key names of FLUX transformers in BFL's layout (github.com/black-forest-labs/flux, also ComfyUI's). Stdlib only.

They hold q/k/v and a single block's MLP input as one tensor, the halves of the last modulation in the other order.
"""

import re
from collections.abc import Collection, Mapping
from itertools import pairwise

from quant.errors import CheckpointError
from quant.weights import Piece

PREFIX = "model.diffusion_model."
SWAPPED = "final_layer.adaLN_modulation.1"  # shift, scale there; scale, shift in diffusers
BLOCK_KEY = re.compile(r"(double|single)_blocks\.(\d{1,3})\.")
HEAD_DIM = 128
QKV, ADDED = "attn.to_q attn.to_k attn.to_v", "attn.add_q_proj attn.add_k_proj attn.add_v_proj"
DOUBLE = {
    "img_mod.lin": "norm1.linear", "txt_mod.lin": "norm1_context.linear", "img_attn.qkv": QKV, "txt_attn.qkv": ADDED,
    "img_attn.norm.query_norm": "attn.norm_q", "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q", "txt_attn.norm.key_norm": "attn.norm_added_k",
    "img_attn.proj": "attn.to_out.0", "txt_attn.proj": "attn.to_add_out", "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2", "txt_mlp.0": "ff_context.net.0.proj", "txt_mlp.2": "ff_context.net.2"}  # fmt: skip
SINGLE = {"modulation.lin": "norm.linear", "linear1": f"{QKV} proj_mlp", "linear2": "proj_out",
          "norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k"}  # fmt: skip
TOP = {"img_in": "x_embedder", "txt_in": "context_embedder",
       "final_layer.linear": "proj_out", SWAPPED: "norm_out.linear"}  # fmt: skip
EMBEDDERS = {"time_in": "timestep_embedder", "vector_in": "text_embedder", "guidance_in": "guidance_embedder"}
OTHERS = {
    "double_stream_modulation": "FLUX.2", "joint_blocks": "Stable Diffusion 3", "conditioner.embedders": "SDXL",
    "input_blocks.": "Stable Diffusion or SDXL", "cond_stage_model": "Stable Diffusion", "lora": "a LoRA",
    "down_blocks.0.attentions": "Stable Diffusion or SDXL", "text_model.encoder": "a CLIP text encoder",
    "encoder.block.": "a T5 text encoder", "decoder.up": "a VAE",
    "single_transformer_blocks": "a FLUX.1 transformer in diffusers' layout"}  # fmt: skip


def table(config: Mapping) -> dict[str, tuple[str, ...]]:
    """BFL's layers, and the diffusers layers of a transformer's config whose rows they hold one after the other."""
    blocks = [(f"double_blocks.{i}", f"transformer_blocks.{i}", DOUBLE) for i in range(config["num_layers"])]
    count = config["num_single_layers"]
    blocks += [(f"single_blocks.{i}", f"single_transformer_blocks.{i}", SINGLE) for i in range(count)]
    found = {bfl: (ours,) for bfl, ours in TOP.items()}
    for bfl, ours in EMBEDDERS.items():
        if bfl != "guidance_in" or config["guidance_embeds"]:
            found[f"{bfl}.in_layer"] = (f"time_text_embed.{ours}.linear_1",)
            found[f"{bfl}.out_layer"] = (f"time_text_embed.{ours}.linear_2",)
    for bfl, ours, layers in blocks:
        found |= {f"{bfl}.{new}": tuple(f"{ours}.{part}" for part in old.split()) for new, old in layers.items()}
    return found


def is_bfl(names: Collection[str]) -> bool:
    """Whether these are the keys of a FLUX transformer as BFL names them."""
    other = any(part in name for part in ("double_stream_modulation", "lora") for name in names)
    return not other and any(BLOCK_KEY.match(name.removeprefix(PREFIX)) for name in names)


def kind_of(names: Collection[str]) -> str:
    """What a file of another kind seems to be, by its keys."""
    found = (kind for part, kind in OTHERS.items() if any(part in name for name in names))
    return next(found, f"its first key is {next(iter(names))[:60]}")


def bfl_leaf(layer: str, leaf: str) -> str:
    """BFL's name of a layer's tensor: its norms call the weight a scale."""
    return f"{layer}.scale" if "_norm" in layer and leaf == "weight" else f"{layer}.{leaf}"


def from_bfl(pieces: Mapping[str, Piece]) -> tuple[dict[str, Piece], dict]:
    """(pieces by diffusers names, the transformer's config) of a BFL file; raises `CheckpointError`."""
    pieces = {name.removeprefix(PREFIX): piece for name, piece in pieces.items()}
    found, known = {}, table(config := _config(pieces))
    for name, piece in pieces.items():
        layer, _, leaf = name.rpartition(".")
        if layer not in known or name not in (bfl_leaf(layer, "weight"), f"{layer}.bias", f"{layer}.weight_scale"):
            raise CheckpointError("another model than FLUX.1", piece.file, why=f"it has {name[:60]}")
        ranges = _rows(layer, known[layer], piece, pieces.get(f"{layer}.weight"))
        for part, rows in zip(known[layer], ranges, strict=True):
            found[f"{part}.{'weight' if leaf == 'scale' else leaf}"] = Piece(piece.file, piece.info, rows)
    return found, config


def _rows(layer: str, ours: tuple[str, ...], piece: Piece, weight: Piece | None) -> list[tuple[tuple[int, int], ...]]:
    """The row ranges of each diffusers layer in a BFL tensor."""
    count = piece.shape[0] if piece.shape else 1
    if (len(ours) == 1 and layer != SWAPPED) or count == 1:
        return [()] * len(ours)
    if layer == SWAPPED:
        return [((count // 2, count), (0, count // 2))]
    width = weight.shape[1] if weight and len(weight.shape) == 2 else 0
    edges = [0, width, 2 * width, 3 * width, count][: len(ours) + 1]
    if not 0 < width * 3 <= count or edges[-1] != count:
        raise CheckpointError("impossible shapes", piece.file, why=f"{layer[:60]} has {count} rows")
    return [((start, stop),) for start, stop in pairwise(edges)]


def _config(pieces: Mapping[str, Piece]) -> dict:
    """The transformer's config, from the names and shapes of a BFL file."""
    kinds = [kind for kind, _ in {(m[1], int(m[2])) for m in map(BLOCK_KEY.match, pieces) if m}]
    file = next(iter(pieces.values())).file

    def shape(name: str, rank: int) -> tuple[int, ...]:
        if name not in pieces or len(pieces[name].shape) != rank:
            raise CheckpointError("not a whole FLUX.1 transformer", file, why=f"{name} is missing or misshapen")
        return pieces[name].shape

    width, channels = shape("img_in.weight", 2)
    if shape("double_blocks.0.img_attn.norm.query_norm.scale", 1) != (HEAD_DIM,) or width % HEAD_DIM:
        raise CheckpointError("another model than FLUX.1", file, why=f"heads are not {HEAD_DIM} wide")
    return {
        "_class_name": "FluxTransformer2DModel", "patch_size": 1, "in_channels": channels, "out_channels": None,
        "num_layers": kinds.count("double"), "num_single_layers": kinds.count("single"),
        "attention_head_dim": HEAD_DIM, "num_attention_heads": width // HEAD_DIM, "axes_dims_rope": [16, 56, 56],
        "joint_attention_dim": shape("txt_in.weight", 2)[1], "guidance_embeds": "guidance_in.in_layer.weight" in pieces,
        "pooled_projection_dim": shape("vector_in.in_layer.weight", 2)[1],
    }  # fmt: skip
