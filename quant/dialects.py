"""Key names in other layouts than diffusers': BFL's (github.com/black-forest-labs/flux, also ComfyUI's) for the
transformer and the VAE, llama.cpp's for T5. Stdlib only.

BFL's transformer holds q/k/v and a single block's MLP input as one tensor, the halves of the last modulation in the
other order.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from itertools import pairwise

from quant.errors import CheckpointError
from quant.weights import Weight

SWAPPED = "final_layer.adaLN_modulation.1"  # shift, scale there; scale, shift in diffusers
BLOCK_KEY = re.compile(r"(double|single)_blocks\.(\d{1,3})\.")
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
T5_GGUF = (
    (r"enc\.blk\.(\d+)\.attn_([qkvo])\.", r"encoder.block.\1.layer.0.SelfAttention.\2."),
    (r"enc\.blk\.(\d+)\.attn_rel_b\.", r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias."),
    (r"enc\.blk\.(\d+)\.attn_norm\.", r"encoder.block.\1.layer.0.layer_norm."),
    (r"enc\.blk\.(\d+)\.ffn_gate\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_0."),
    (r"enc\.blk\.(\d+)\.ffn_up\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_1."),
    (r"enc\.blk\.(\d+)\.ffn_down\.", r"encoder.block.\1.layer.1.DenseReluDense.wo."),
    (r"enc\.blk\.(\d+)\.ffn_norm\.", r"encoder.block.\1.layer.1.layer_norm."),
    (r"token_embd\.", "shared."), (r"enc\.output_norm\.", "encoder.final_layer_norm."))  # fmt: skip
LDM_VAE = (
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."), (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.(down|up)\.(\d+)\.block\.", r".\1_blocks.\2.resnets."), (r"nin_shortcut", "conv_shortcut"),
    (r"\.(down|up)\.(\d+)\.(down|up)sample\.", r".\1_blocks.\2.\1samplers.0."),
    (r"coder\.norm_out\.", "coder.conv_norm_out."))  # fmt: skip
OTHERS = {
    "double_stream_modulation": "FLUX.2", "distilled_guidance_layer": "Chroma", "joint_blocks": "Stable Diffusion 3",
    "conditioner.embedders": "SDXL", "input_blocks.": "Stable Diffusion or SDXL",
    "cond_stage_model": "Stable Diffusion", "lora": "a LoRA", "lokr_": "a LoRA",
    "down_blocks.0.attentions": "Stable Diffusion or SDXL",
    "text_model.encoder": "a CLIP text encoder", "encoder.block.": "a T5 text encoder", "decoder.up": "a VAE",
    "single_transformer_blocks": "a FLUX.1 transformer in diffusers' layout"}  # fmt: skip


def map_bfl_layers(config: Mapping) -> dict[str, tuple[str, ...]]:
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
    others = ("double_stream_modulation", "distilled_guidance_layer", "lora")
    other = any(part in name for part in others for name in names)
    return not other and any(map(BLOCK_KEY.match, names))


def guess_kind(names: Collection[str]) -> str:
    """What a file of another kind seems to be, by its keys."""
    found = (kind for part, kind in OTHERS.items() if any(part in name for name in names))
    return next(found, f"its first key is {next(iter(names))[:60]}")


def bfl_name(layer: str, leaf: str) -> str:
    """BFL's name of a layer's tensor: its norms call the weight a scale."""
    return f"{layer}.scale" if "_norm" in layer and leaf == "weight" else f"{layer}.{leaf}"


def from_bfl(stored: Mapping[str, Weight]) -> tuple[dict[str, Weight], dict]:
    """(weights by diffusers names, the transformer's config) of a BFL file's; raises `CheckpointError`."""
    found, known = {}, map_bfl_layers(config := _config(stored))
    for name, weight in stored.items():
        layer, _, leaf = name.rpartition(".")
        if layer not in known or name not in (bfl_name(layer, "weight"), f"{layer}.bias"):
            raise CheckpointError("another model than FLUX.1", weight.pieces[""].file, why=f"it has {name[:60]}")
        ranges = _rows(layer, known[layer], weight, stored.get(f"{layer}.weight"))
        for part, rows in zip(known[layer], ranges, strict=True):
            ours = f"{part}.{'weight' if leaf == 'scale' else leaf}"
            found[ours] = weight.part(ours, rows)
    return found, config


def rename_weights(stored: Mapping[str, Weight], rules: Sequence[tuple[str, str]]) -> dict[str, Weight]:
    """The weights by the names that the rules give, one after the other."""
    found = {}
    for name, weight in stored.items():
        ours = reduce(lambda text, rule: re.sub(*rule, text), rules, name)
        found[ours] = replace(weight, name=ours)
    return found


def from_ldm(stored: Mapping[str, Weight]) -> dict[str, Weight]:
    """A VAE's weights by diffusers names: up blocks count the other way, attention has no 1x1 kernels."""
    numbers = [int(m[1]) for m in map(re.compile(r"decoder\.up\.(\d{1,3})\.").match, stored) if m]
    last, found = max(numbers, default=0), {}
    for name, weight in stored.items():
        turned = re.sub(r"^decoder\.up\.(\d{1,3})(?=\.)", lambda match: f"decoder.up.{last - int(match[1])}", name)
        kernel = ".attn_1." in name and weight.shape[2:] == (1, 1)
        found[turned] = replace(weight, shape=weight.shape[:2]) if kernel else weight
    return rename_weights(found, LDM_VAE)


def _rows(layer: str, ours: tuple[str, ...], stored: Weight, weight: Weight | None) -> list[tuple]:
    """The row ranges of each diffusers layer in a BFL tensor."""
    count = stored.shape[0] if stored.shape else 1
    if len(ours) == 1 and layer != SWAPPED:
        return [()]
    if layer == SWAPPED:
        return [((count // 2, count), (0, count // 2))]
    width = weight.shape[1] if weight and len(weight.shape) == 2 else 0
    edges = [0, width, 2 * width, 3 * width, count][: len(ours) + 1]
    if not 0 < width * 3 <= count or edges[-1] != count:
        file = stored.pieces[""].file
        raise CheckpointError("impossible shapes", file, why=f"{layer[:60]} has {count} rows")
    return [((start, stop),) for start, stop in pairwise(edges)]


def _config(stored: Mapping[str, Weight]) -> dict:
    """The transformer's config, from the names and shapes of a BFL file."""
    kinds = [kind for kind, _ in {(m[1], int(m[2])) for m in map(BLOCK_KEY.match, stored) if m}]
    file = next(iter(stored.values())).pieces[""].file

    def shape(name: str, rank: int) -> tuple[int, ...]:
        if name not in stored or len(stored[name].shape) != rank:
            raise CheckpointError("not a whole FLUX.1 transformer", file, why=f"{name} is missing or misshapen")
        return stored[name].shape

    (width, channels), (head,) = shape("img_in.weight", 2), shape("double_blocks.0.img_attn.norm.query_norm.scale", 1)
    if not head or head % 16 or width % head:
        raise CheckpointError("another model than FLUX.1", file, why=f"heads are {head} wide, all together {width}")
    return {
        "_class_name": "FluxTransformer2DModel", "patch_size": 1, "in_channels": channels, "out_channels": None,
        "num_layers": kinds.count("double"), "num_single_layers": kinds.count("single"),
        "attention_head_dim": head, "num_attention_heads": width // head,
        "axes_dims_rope": [head // 8, head * 7 // 16, head * 7 // 16],
        "joint_attention_dim": shape("txt_in.weight", 2)[1],
        "guidance_embeds": "guidance_in.in_layer.weight" in stored,
        "pooled_projection_dim": shape("vector_in.in_layer.weight", 2)[1],
    }  # fmt: skip
