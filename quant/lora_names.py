"""Names in an adapter's file: which layer of which component, and what a tensor is to its layer.

Read are the names of kohya's sd-scripts, OneTrainer, peft and diffusers, XLabs, LyCORIS (as
SimpleTuner and ai-toolkit write it), ComfyUI's extracted adapters, and BFL's control adapters. Also
whose model an adapter is for, if not FLUX.1's. Knows no files. Stdlib only.
"""

import re
from collections.abc import Collection, Mapping

from quant.tensor_info import TensorInfo

# What tensors are to their layer, by their names here. A low-rank product is B A.
DOWN = "lora_A.weight"
UP = "lora_B.weight"
BIAS = "lora_B.bias"
ALPHA = "alpha"
# Numbers that are added to the weight, or to the bias, as they are.
DIFF = "diff"
DIFF_B = "diff_b"
# A weight that takes the place of a norm's.
NORM = "weight"
# The norms that a weight gets, row by row or column by column (DoRA): as peft adds them, and as
# LyCORIS, kohya's scripts and OneTrainer do, which scale the whole difference to the weight.
MAGNITUDE = "lora_magnitude_vector"
DORA_SCALE = "dora_scale"
# The factors of a Kronecker product (LoKr) and of a Hadamard product (LoHa).
LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
# What else a name may end in, and what it means. BFL calls a norm's weight a scale.
SYNONYMS = {
    "scale": NORM,
    "set_weight": NORM,
    "w_norm": DIFF,
    "b_norm": DIFF_B,
    "lora_magnitude_vector.weight": MAGNITUDE,
    "lora_magnitude_vector.default": MAGNITUDE,
    "lora_magnitude_vector.default.weight": MAGNITUDE,
}
# Ends of names that only adapters have.
OF_ADAPTERS = (DIFF, DIFF_B, MAGNITUDE, DORA_SCALE, *LOKR, *LOHA)

# The name of a matrix of a low-rank product: its layer, which matrix, its weight or its bias.
LOW_RANK = re.compile(
    r"(.+?)\.(?:lora\.|lora_linear_layer\.)?(?:lora_)?(A|B|down|up)(?:\.default)?\.(weight|bias)"
)
BARE_LOW_RANK = re.compile(r"(.+)\.lora_(A|B)()")  # the parameter itself, without `.weight`
MAGNITUDES = re.compile(r"(.+)\.(lora_magnitude_vector(?:\.default)?(?:\.weight)?)")

_PEFT = r"(?:base_model\.model\.)?"
# How the names of a component's layers begin; the transformer's may have no prefix, so it is last.
PREFIXES = {
    "text_encoder": re.compile(
        rf"{_PEFT}(?:text_encoder\.{_PEFT}|(?:lora|lycoris)_te1?[._]"
        r"|(?:text_encoders\.)?clip_l\.transformer\.)(?:text_model[._])?"
    ),
    "text_encoder_2": re.compile(
        rf"{_PEFT}(?:text_encoder_2\.{_PEFT}|(?:lora|lycoris)_te[23][._]"
        r"|(?:text_encoders\.)?t5xxl\.transformer\.)"
    ),
    "transformer": re.compile(
        rf"{_PEFT}(?:transformer\.|(?:model\.)?diffusion_model\.|lora_unet[._]"
        rf"|lora_transformer[._]|lycoris_(?:unet_|transformer_(?!blocks))?|){_PEFT}"
    ),
}
# XLabs' names for BFL's layers of a block.
XLABS = {
    "img_attn.qkv": "processor.qkv_lora1",
    "txt_attn.qkv": "processor.qkv_lora2",
    "linear1": "processor.qkv_lora",
    "img_attn.proj": "processor.proj_lora1",
    "txt_attn.proj": "processor.proj_lora2",
    "linear2": "processor.proj_lora",
}
# The format of a file, by a part of one of its names; of several that fit, the first counts.
FORMATS = {
    "query_norm.scale": "BFL control",
    ".processor.": "XLabs",
    ".lokr_": "LoKr",
    ".hada_": "LoHa",
    ".lora_magnitude_vector": "DoRA",
    ".dora_scale": "DoRA",
    "lora_down": "kohya",
    "lora_A": "diffusers/peft",
    "lora_B": "diffusers/peft",
    ".diff": "full differences",
}
# Parts of names that belong to kinds of adapters which are not read.
OTHER_KINDS = re.compile(
    r"lokr_t2|hada_t[12]|lora_mid|oft_|boft_|(?:lora_A|lora_down)\.bias|lora_embedding_"
    r"|\.reshape_weight|vera_lambda|\.on_input|\.(?:a1|a2|b1|b2)\.weight|lora_E\b|lora_ranknum"
)
# Whose model an adapter is for, by parts of names that no adapter of FLUX.1 has. Words are joined
# by dots, or by underscores as kohya writes them. The first that fits counts: SDXL's text encoders
# and blocks have parts that look like others'.
OTHER_MODELS = (
    (r"lora_te2[._]text_model|text_encoder_2\.text_model|clip_g", "SDXL"),
    (r"lora_prior_", "Stable Cascade"),
    (
        r"(?:input|output|middle)_blocks?[._]\d|(?:down|up)_blocks[._]\d|mid_block[._]",
        "Stable Diffusion or SDXL",
    ),
    (r"joint_blocks[._]", "Stable Diffusion 3"),
    (r"joint_transformer_blocks[._]", "AuraFlow"),
    (r"_stream_modulation|to_qkv_mlp_proj|ff[._]linear_in", "FLUX.2"),
    (r"distilled_guidance_layer", "Chroma"),
    (
        r"token_refiner|\.img_attn_qkv|(?:img|txt)_mlp[._]fc[12]|(?:img|txt)_mod[._]linear"
        r"|modulation[._]linear",
        "HunyuanVideo",
    ),
    (r"Wqkv", "HunyuanDiT"),
    (r"(?:img|txt)_mlp[._]net[._]|(?:img|txt)_mod[._]1\b|txt_norm", "Qwen-Image"),
    (r"(?:context|noise)_refiner|layers[._]\d+[._](?:attention|feed_forward)[._]", "Z-Image"),
    (r"(?:double|single)_stream_blocks", "HiDream"),
    (r"(?<!transformer_)blocks[._]\d+[._]attn[._]qkv_[xy]", "Mochi"),
    (r"(?<!transformer_)blocks[._]\d+[._](?:self_attn|cross_attn|attn[12])[._]", "Wan"),
    (r"transformer_blocks[._]\d+[._]attn[12][._]", "LTX-Video, CogVideoX or PixArt"),
    (
        r"(?<!encoder.)layers[._]\d+[._](?:self_attn[._][qkvo]_proj|mlp[._](?:gate|up|down)_proj)",
        "a language model",
    ),
)
# Widths of transformers whose layers have the names of FLUX.1's.
WIDTHS = {1536: "Stable Diffusion 3", 2432: "Stable Diffusion 3.5 large", 6144: "FLUX.2"}


def is_lora(names: Collection[str]) -> bool:
    """Whether these are the keys of an adapter, of whatever kind and model."""
    return any(_is_lora_key(name) for name in names)


def _is_lora_key(name: str) -> bool:
    """Whether a tensor's name is that of an adapter's."""
    _, kind = split_name(name)
    if kind in OF_ADAPTERS or OTHER_KINDS.search(name):
        return True
    return "lora" in name and kind in (DOWN, UP, BIAS)


def split_name(name: str) -> tuple[str, str]:
    """(the layer, what the tensor is to it) of a tensor's name.

    What it is is the end of the name, or what stands for that here.
    """
    match = LOW_RANK.fullmatch(name) or BARE_LOW_RANK.fullmatch(name)
    if match:
        matrix = "A" if match[2] in ("A", "down") else "B"
        return match[1], f"lora_{matrix}.{match[3] or 'weight'}"
    match = MAGNITUDES.fullmatch(name)
    if match:
        return match[1], MAGNITUDE
    layer, _, end = name.rpartition(".")
    return layer, SYNONYMS.get(end, end)


def group_by_layer(tensors: Mapping[str, TensorInfo]) -> dict[str, dict[str, TensorInfo]]:
    """The tensors of each layer of the file, by what they are to it.

    Layers in kohya's spelling come last: where a file has a layer in two spellings, the other
    counts.
    """
    found: dict[str, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        layer, kind = split_name(name)
        found.setdefault(layer, {})[kind] = info
    return dict(sorted(found.items(), key=lambda item: item[0].startswith("lora_unet_")))


def split_prefix(layer: str) -> tuple[str, str]:
    """The component that a layer's name in the file belongs to, and its name without the prefix."""
    for component, prefix in PREFIXES.items():
        match = prefix.match(layer)
        if match:
            return component, layer[match.end() :]
    raise AssertionError("the transformer's prefix may be empty")


def flatten(name: str) -> str:
    """A layer's name with underscores for dots, as kohya writes it."""
    return name.replace(".", "_")


def name_format(names: Collection[str]) -> str:
    """The format of an adapter with tensors of these names, for people."""
    for mark, name_of_format in FORMATS.items():
        if any(mark in name for name in names):
            return name_of_format
    return "diffusers/peft"


def find_other_model(names: Collection[str]) -> tuple[str, str]:
    """(a name that no adapter for FLUX.1 has, the model that it belongs to); ("", "") for none."""
    for pattern, model in OTHER_MODELS:
        for name in names:
            if re.search(pattern, name):
                return name, model
    return "", ""
