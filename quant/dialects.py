"""Key names in other layouts than diffusers', and what they become in it.

They are those of BFL (github.com/black-forest-labs/flux), which ComfyUI has too, for the
transformer and the VAE, and llama.cpp's for T5. BFL stores q, k and v, and in single blocks the
MLP's input below them, as one tensor, and the halves of the last modulation in the other order.
Knows no files. Stdlib only.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

from quant.config import LONG_CLIP_TOKENS
from quant.errors import CheckpointError
from quant.kinds import LATENT_CHANNELS
from quant.weights import RowRanges, Weight

# Regular expressions, and what their matches are replaced by.
Rules = Sequence[tuple[str, str]]

# BFL's layer whose rows are shift, then scale; diffusers has scale, then shift.
SWAPPED = "final_layer.adaLN_modulation.1"
BLOCK_KEY = re.compile(r"(double|single)_blocks\.(\d{1,3})\.")

QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
ADDED_QKV = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
# BFL's layers of a block, and diffusers' layers whose rows they hold one after the other.
DOUBLE_BLOCK = {
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.qkv": QKV,
    "txt_attn.qkv": ADDED_QKV,
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
SINGLE_BLOCK = {
    "modulation.lin": ("norm.linear",),
    "linear1": (*QKV, "proj_mlp"),
    "linear2": ("proj_out",),
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
}
TOP = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "final_layer.linear": "proj_out",
    SWAPPED: "norm_out.linear",
}
EMBEDDERS = {
    "time_in": "timestep_embedder",
    "vector_in": "text_embedder",
    "guidance_in": "guidance_embedder",
}

# T5's embedding, and the name under which some files have the same tensor once more.
T5_SHARED = "shared.weight"
T5_TIED = "encoder.embed_tokens.weight"
T5_ATTENTION = r"encoder.block.\1.layer.0.SelfAttention"
T5_MLP = r"encoder.block.\1.layer.1.DenseReluDense"
T5_GGUF: Rules = (
    (r"enc\.blk\.(\d+)\.attn_([qkvo])\.", rf"{T5_ATTENTION}.\2."),
    (r"enc\.blk\.(\d+)\.attn_rel_b\.", f"{T5_ATTENTION}.relative_attention_bias."),
    (r"enc\.blk\.(\d+)\.attn_norm\.", r"encoder.block.\1.layer.0.layer_norm."),
    (r"enc\.blk\.(\d+)\.ffn_gate\.", f"{T5_MLP}.wi_0."),
    (r"enc\.blk\.(\d+)\.ffn_up\.", f"{T5_MLP}.wi_1."),
    (r"enc\.blk\.(\d+)\.ffn_down\.", f"{T5_MLP}.wo."),
    (r"enc\.blk\.(\d+)\.ffn_norm\.", r"encoder.block.\1.layer.1.layer_norm."),
    (r"token_embd\.", "shared."),
    (r"enc\.output_norm\.", "encoder.final_layer_norm."),
)
# BFL stores its VAE with the names of latent diffusion's code (LDM).
LDM_VAE: Rules = (
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.(down|up)\.(\d+)\.block\.", r".\1_blocks.\2.resnets."),
    (r"nin_shortcut", "conv_shortcut"),
    (r"\.(down|up)\.(\d+)\.(down|up)sample\.", r".\1_blocks.\2.\1samplers.0."),
    (r"coder\.norm_out\.", "coder.conv_norm_out."),
)
LDM_UP_BLOCK = re.compile(r"decoder\.up\.(\d{1,3})\.")

# Tensors of whole models of which FLUX.1 uses a half: CLIP's vision and projections, T5's decoder.
UNUSED = {
    "text_encoder": re.compile(
        r"(?:.*\.)?position_ids|vision_model\..*|visual_projection\..*"
        r"|(?:.*\.)?text_projection(?:\..*)?|logit_scale"
    ),
    "text_encoder_2": re.compile(r"(?:decoder|lm_head|dec|output)\..*|spiece_model"),
    # Redux takes SigLIP's last hidden state, not what its head pools.
    "image_encoder": re.compile(
        r"(?:vision_model\.)?head\..*|text_model\..*|(?:.*\.)?position_ids|logit_(?:scale|bias)"
    ),
}

# Parts of keys that no FLUX.1 transformer has, though other models' keys may look like its own.
NOT_FLUX_1 = (
    "double_stream_modulation",
    "distilled_guidance_layer",
    "lora",
    "controlnet",
    "input_hint_block",
    "ip_adapter",
    ".qweight",
)
# Text encoders that FLUX.1 does not have, by what tells them.
CLIP_G_WIDTH = 1280
BIAS_TABLE = "relative_attention_bias"
NUNCHAKU = "a nunchaku (SVDQuant) checkpoint, which is not read"
CONTROLNET = "a ControlNet, which --control KIND:PICTURE takes"
IP_ADAPTER = "an IP-Adapter, which is not read: --redux PICTURE draws alike"
MFLUX = "an mflux (MLX) checkpoint, which is not read"
# What a file is, by parts of its metadata's names and values.
KINDS_BY_METADATA = {"svdq": NUNCHAKU, "nunchaku": NUNCHAKU, "mflux_version": MFLUX}
# What a file is, by parts of its keys; of several that fit, the first counts.
OTHER_KINDS = {
    ".wscales": NUNCHAKU,
    ".smooth_factor": NUNCHAKU,
    ".qweight": "a GPTQ or AWQ checkpoint, which is not read",
    "controlnet": CONTROLNET,
    "control_model.": CONTROLNET,
    "input_hint_block": CONTROLNET,
    "lllite": CONTROLNET,
    "ip_adapter": IP_ADAPTER,
    "to_k_ip": IP_ADAPTER,
    "image_proj": IP_ADAPTER,
    "pulid": "a PuLID adapter, which is not read",
    "redux_": "a Redux adapter, which --redux PICTURE takes",
    "double_stream_modulation": "FLUX.2",
    "distilled_guidance_layer": "Chroma",
    "joint_blocks": "Stable Diffusion 3",
    "conditioner.embedders": "SDXL",
    "input_blocks.": "Stable Diffusion or SDXL",
    "cond_stage_model": "Stable Diffusion",
    "lora": "a LoRA",
    "lokr_": "a LoRA",
    "down_blocks.0.attentions": "Stable Diffusion or SDXL",
    "clip_g.": "a CLIP bigG (clip_g), FLUX.1 takes CLIP-L",
    "resblocks.": "a CLIP in OpenCLIP's layout, FLUX.1 takes CLIP-L in Hugging Face's",
    "text_model.encoder": "a CLIP text encoder",
    "encoder.block.": "a T5 text encoder",
    "decoder.up": "a VAE",
}
# MLX's weights in 4 or 8 bit have both beside them.
MLX_ENDS = (".scales", ".biases")


def map_bfl_layers(config: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """BFL's layers of a transformer with this config, by their names.

    The values are the diffusers layers whose rows each of them holds, one after the other.
    """
    layers: dict[str, tuple[str, ...]] = {bfl: (ours,) for bfl, ours in TOP.items()}
    for bfl, ours in EMBEDDERS.items():
        if bfl == "guidance_in" and not config["guidance_embeds"]:
            continue
        layers[f"{bfl}.in_layer"] = (f"time_text_embed.{ours}.linear_1",)
        layers[f"{bfl}.out_layer"] = (f"time_text_embed.{ours}.linear_2",)
    for i in range(config["num_layers"]):
        block = f"transformer_blocks.{i}"
        for bfl, parts in DOUBLE_BLOCK.items():
            layers[f"double_blocks.{i}.{bfl}"] = tuple(f"{block}.{part}" for part in parts)
    for i in range(config["num_single_layers"]):
        block = f"single_transformer_blocks.{i}"
        for bfl, parts in SINGLE_BLOCK.items():
            layers[f"single_blocks.{i}.{bfl}"] = tuple(f"{block}.{part}" for part in parts)
    return layers


def bfl_name(layer: str, leaf: str) -> str:
    """BFL's name of a layer's "weight" or "bias" (`leaf`); the weight of a norm is its "scale"."""
    if "_norm" in layer and leaf == "weight":
        return f"{layer}.scale"
    return f"{layer}.{leaf}"


def is_bfl(names: Collection[str]) -> bool:
    """Whether these are the keys of a FLUX.1 transformer as BFL names them."""
    for part in NOT_FLUX_1:
        if any(part in name for name in names):
            return False
    return has_bfl_blocks(names)


def has_bfl_blocks(names: Collection[str]) -> bool:
    """Whether blocks of FLUX.1 are among these keys, as BFL names them."""
    return any(BLOCK_KEY.match(name) for name in names)


def is_diffusers(names: Collection[str]) -> bool:
    """Whether these are the keys of a FLUX.1 transformer as diffusers names them."""
    for part in NOT_FLUX_1:
        if any(part in name for name in names):
            return False
    return any(name.startswith("single_transformer_blocks.0.") for name in names)


def find_foreign_transformer(names: Collection[str], metadata: Mapping[str, str]) -> str:
    """What a transformer with FLUX.1's names is that no known layout stores; "" for nothing."""
    for part, kind in KINDS_BY_METADATA.items():
        if any(part in key.lower() or part in metadata[key].lower() for key in metadata):
            return kind
    if all(any(name.endswith(end) for name in names) for end in MLX_ENDS):
        return MFLUX
    return ""


def find_foreign_text_encoder(component: str, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Which other text encoder this is, by the shapes of its weights; "" for none that is known."""
    if component == "text_encoder":
        words = shapes.get("text_model.embeddings.token_embedding.weight", ())
        positions = shapes.get("text_model.embeddings.position_embedding.weight", ())
        if words[1:] == (CLIP_G_WIDTH,):
            return "a CLIP bigG (clip_g), FLUX.1 takes CLIP-L"
        if positions[:1] == (LONG_CLIP_TOKENS,):
            return f"LongCLIP, whose prompts have {LONG_CLIP_TOKENS} tokens; FLUX.1 takes CLIP-L"
    # T5 has it in the first block alone.
    if any(name.startswith("encoder.block.1.") and BIAS_TABLE in name for name in shapes):
        return "UMT5, FLUX.1 takes T5 1.1 XXL"
    return ""


def guess_kind(names: Collection[str], metadata: Mapping[str, str] | None = None) -> str:
    """What a file that holds nothing of FLUX.1 seems to be, by its keys and its metadata."""
    kind = find_foreign_transformer(names, metadata or {})
    if kind:
        return kind
    for part, kind in OTHER_KINDS.items():
        if any(part in name for name in names):
            return kind
    first = next(iter(names))
    return f"its first key is {first[:60]}"


class _Tellers(NamedTuple):
    """The names by which a layout of the transformer tells its config."""

    image: str
    text: str
    pooled: str
    guidance: str
    head: str  # the norm of a head's queries in the first block
    double_block: re.Pattern[str]
    single_block: re.Pattern[str]


BFL_TELLERS = _Tellers(
    image="img_in.weight",
    text="txt_in.weight",
    pooled="vector_in.in_layer.weight",
    guidance="guidance_in.in_layer.weight",
    head="double_blocks.0.img_attn.norm.query_norm.scale",
    double_block=re.compile(r"double_blocks\.(\d{1,3})\."),
    single_block=re.compile(r"single_blocks\.(\d{1,3})\."),
)
DIFFUSERS_TELLERS = _Tellers(
    image="x_embedder.weight",
    text="context_embedder.weight",
    pooled="time_text_embed.text_embedder.linear_1.weight",
    guidance="time_text_embed.guidance_embedder.linear_1.weight",
    head="transformer_blocks.0.attn.norm_q.weight",
    double_block=re.compile(r"transformer_blocks\.(\d{1,3})\."),
    single_block=re.compile(r"single_transformer_blocks\.(\d{1,3})\."),
)


def infer_bfl_config(stored: Mapping[str, Weight]) -> dict[str, Any]:
    """The config that a transformer by BFL's names implies; raises `CheckpointError`."""
    return _infer_config(stored, BFL_TELLERS)


def infer_diffusers_config(stored: Mapping[str, Weight]) -> dict[str, Any]:
    """The config that a transformer by diffusers' names implies; raises `CheckpointError`."""
    return _infer_config(stored, DIFFUSERS_TELLERS)


def from_bfl(stored: Mapping[str, Weight]) -> tuple[dict[str, Weight], dict[str, Any]]:
    """Return the weights of a BFL transformer as diffusers has them, and the config they imply.

    Raises `CheckpointError` for keys that FLUX.1 does not have, and for impossible shapes.
    """
    config = infer_bfl_config(stored)
    return translate_layers(stored, map_bfl_layers(config)), config


def translate_layers(
    stored: Mapping[str, Weight], layers: Mapping[str, tuple[str, ...]]
) -> dict[str, Weight]:
    """The weights by diffusers' names; `layers` is as of `map_bfl_layers`.

    Raises `CheckpointError` for a weight of none of these layers, and for impossible shapes.
    """
    weights = {}
    for name, weight in stored.items():
        layer, _, leaf = name.rpartition(".")
        if layer not in layers or name not in (bfl_name(layer, "weight"), f"{layer}.bias"):
            file = weight.pieces[""].file
            raise CheckpointError("another model than FLUX.1", file, why=f"it has {name[:60]}")
        our_leaf = "weight" if leaf == "scale" else leaf
        matrix = stored.get(f"{layer}.weight")
        ranges = _split_rows(layer, weight, matrix=matrix, parts=len(layers[layer]))
        for part, rows in zip(layers[layer], ranges, strict=True):
            ours = f"{part}.{our_leaf}"
            weights[ours] = weight.take_rows(ours, rows)
    return weights


def _split_rows(
    layer: str, stored: Weight, *, matrix: Weight | None, parts: int
) -> list[RowRanges]:
    """Which rows of a BFL layer's tensor belong to each of its `parts`, diffusers' layers.

    The ranges are as `Weight.take_rows` wants them, () for all rows. `matrix` is the layer's
    weight, whose width tells where q, k and v end: they are square. Raises `CheckpointError` where
    the tensor has not as many rows as its parts together.
    """
    count = stored.shape[0] if stored.shape else 1
    if layer == SWAPPED:
        first_half = (0, count // 2)
        second_half = (count // 2, count)
        return [(second_half, first_half)]
    if parts == 1:
        return [()]
    width = 0
    if matrix and len(matrix.shape) == 2:
        width = matrix.shape[1]
    edges = [0, width, 2 * width, 3 * width]
    # A fourth part has the rows behind q, k and v: the MLP's.
    if parts == 4:
        edges.append(count)
    if not 0 < width * 3 <= count or edges[-1] != count:
        file = stored.pieces[""].file
        why = f"{layer[:60]} has {count} rows"
        raise CheckpointError("impossible shapes", file, why=why)
    return [((start, stop),) for start, stop in pairwise(edges)]


def _infer_config(stored: Mapping[str, Weight], tellers: _Tellers) -> dict[str, Any]:
    """The transformer's config, from the names and shapes of a file.

    Raises `CheckpointError` where a tensor that tells a value is missing or misshapen.
    """
    file = next(iter(stored.values())).pieces[""].file
    width, channels = _shape_of(stored, tellers.image, rank=2)
    (head,) = _shape_of(stored, tellers.head, rank=1)
    if not head or head % 16 or width % head:
        why = f"heads are {head} wide, all together {width}"
        raise CheckpointError("another model than FLUX.1", file, why=why)
    return {
        "_class_name": "FluxTransformer2DModel",
        "patch_size": 1,
        "in_channels": channels,
        "out_channels": None if channels == LATENT_CHANNELS else LATENT_CHANNELS,
        "num_layers": _count_blocks(stored, tellers.double_block),
        "num_single_layers": _count_blocks(stored, tellers.single_block),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "axes_dims_rope": [head // 8, head * 7 // 16, head * 7 // 16],
        "joint_attention_dim": _shape_of(stored, tellers.text, rank=2)[1],
        "guidance_embeds": tellers.guidance in stored,
        "pooled_projection_dim": _shape_of(stored, tellers.pooled, rank=2)[1],
    }


def _count_blocks(names: Collection[str], pattern: re.Pattern[str]) -> int:
    """How many blocks have names that the pattern matches."""
    matches = [pattern.match(name) for name in names]
    return len({match[1] for match in matches if match})


def _shape_of(stored: Mapping[str, Weight], name: str, *, rank: int) -> tuple[int, ...]:
    """The shape of a weight; raises `CheckpointError` unless it is there with `rank` dimensions."""
    if name not in stored or len(stored[name].shape) != rank:
        file = next(iter(stored.values())).pieces[""].file
        why = f"{name} is missing or misshapen"
        raise CheckpointError("not a whole FLUX.1 transformer", file, why=why)
    return stored[name].shape


def from_ldm(stored: Mapping[str, Weight]) -> dict[str, Weight]:
    """Return the weights of a VAE as diffusers has them, from those that BFL stores.

    BFL counts the up blocks from the last, and its attention is convolutions with kernels of 1x1
    (N, K, 1, 1) in place of matrices (N, K).
    """
    matches = {name: LDM_UP_BLOCK.match(name) for name in stored}
    last = max((int(match[1]) for match in matches.values() if match), default=0)
    found = {}
    for name, weight in stored.items():
        ours = name
        match = matches[name]
        if match:
            ours = f"decoder.up.{last - int(match[1])}.{name[match.end() :]}"
        shape = weight.shape
        if ".attn_1." in name and shape[2:] == (1, 1):
            shape = shape[:2]
        found[ours] = replace(weight, shape=shape)
    return rename_weights(found, LDM_VAE)


def rename_weights(stored: Mapping[str, Weight], rules: Rules) -> dict[str, Weight]:
    """The weights by the names that the rules make of theirs, applied one after the other."""
    found = {}
    for name, weight in stored.items():
        ours = name
        for pattern, replacement in rules:
            ours = re.sub(pattern, replacement, ours)
        found[ours] = replace(weight, name=ours)
    return found
