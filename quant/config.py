"""Read and check the JSON files of a model folder: classes, types and bounds of what is relied on.

A value that this project does not read is left for the model classes to refuse, but its numbers are
bounded too, so that no hostile file makes them build a billion layers. Knows nothing of weights.
Stdlib only.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quant.errors import CheckpointError
from quant.files import read_small_file
from quant.kinds import CHANNELS
from quant.kinds import LATENT_CHANNELS as FLUX_CHANNELS

CLASSES = {
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "T5EncoderModel",
    "vae": "AutoencoderKL",
    "transformer": "FluxTransformer2DModel",
    "scheduler": "FlowMatchEulerDiscreteScheduler",
    "controlnet": "FluxControlNetModel",
    "image_encoder": "SiglipVisionModel",
    "image_embedder": "ReduxImageEncoder",
}
DOWNLOAD_AGAIN = "download the model again"
# Classes whose configs and weights have all that the class above needs, by regular expressions:
# trainers' own, and those with a second half that FLUX.1 does not use.
ALSO_READ = {
    "text_encoder": "CLIPModel|CLIPTextModelWithProjection",
    "text_encoder_2": "T5ForConditionalGeneration|T5Model|T5WithLMHeadModel",
    "transformer": r"FluxTransformer2DModelWith\w+",
    "image_encoder": "SiglipModel",
}
# What other classes are, for errors, by regular expressions; the first that fits counts.
OTHER_CLASSES = {
    "ControlNet": "a ControlNet",
    "Nunchaku": "a nunchaku (SVDQuant) checkpoint",
    "Redux": "a Redux adapter",
    "Kontext": "FLUX.1 Kontext, which edits a given picture",
    "Fill": "FLUX.1 Fill, which needs a picture",
    "FluxControl": "a control model, which needs a picture",
    "Flux2": "FLUX.2",
    "Chroma": "Chroma",
    "UMT5": "UMT5, FLUX.1 takes T5 1.1 XXL",
    "SD3|StableDiffusion3": "Stable Diffusion 3",
    "UNet2D|StableDiffusion": "Stable Diffusion or SDXL",
    "CLIPVision": "a CLIP of pictures alone",
}
# The index of a model's shards takes 0.2 MB; of what is larger Python would make a gigabyte.
MAX_JSON_BYTES = 4 << 20
MAX_LAYERS = 256
MAX_NUMBER = 1_000_000
READABLE_METHODS = ("bitsandbytes", "quanto")
# The values that this project itself reads, with the libraries' defaults for them. What a file has
# must be of the default's type.
READ: dict[str, dict[str, Any]] = {
    "transformer": {
        "num_layers": 19,
        "num_single_layers": 38,
        "num_attention_heads": 24,
        "attention_head_dim": 128,
        "pooled_projection_dim": 768,
        "in_channels": FLUX_CHANNELS,
        "guidance_embeds": False,
    },
    "vae": {"block_out_channels": [64], "scaling_factor": 0.18215, "shift_factor": 0.0},
    "scheduler": {
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
        "base_shift": 0.5,
        "max_shift": 1.15,
        "shift": 1.0,
        "num_train_timesteps": 1000,
    },
}
# What else the shapes of tensors and the forward depend on, with the libraries' defaults. Unlike
# those above they are not added to a config, of which the fingerprint is made.
ASSUMED: dict[str, dict[str, Any]] = {
    "transformer": {
        "patch_size": 1,
        "joint_attention_dim": 4096,
        "axes_dims_rope": [16, 56, 56],
    },
    "text_encoder": {
        "vocab_size": 49408,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "eos_token_id": 49407,
    },
    "text_encoder_2": {
        "vocab_size": 32128,
        "d_model": 512,
        "d_kv": 64,
        "d_ff": 2048,
        "num_layers": 6,
        "num_heads": 8,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "relu",
    },
    "vae": {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 1,
        "norm_num_groups": 32,
        "down_block_types": ["DownEncoderBlock2D"],
        "up_block_types": ["UpDecoderBlock2D"],
        "use_quant_conv": True,
        "use_post_quant_conv": True,
        "mid_block_add_attention": True,
    },
    "image_encoder": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_channels": 3,
        "image_size": 224,
        "patch_size": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    },
    "image_embedder": {"redux_dim": 1152, "txt_in_features": 4096},
}
# A ControlNet is made of the transformer's blocks, and has the same fields for them.
READ["controlnet"] = READ["transformer"]
ASSUMED["controlnet"] = ASSUMED["transformer"]
# Whole numbers that may be missing, or null.
OPTIONAL = {"controlnet": ("num_mode", "conditioning_embedding_channels")}
# Counts that may be 0.
MAY_BE_NONE = {"controlnet": ("num_layers", "num_single_layers")}
HINT_PATCH = 2  # of XLabs' hint block, whose pixels are an eighth of the picture's a side
# The half of a model for texts and pictures that FLUX.1 uses, by the key of its config.
HALVES = {"text_encoder": "text_config", "image_encoder": "vision_config"}
LATENT_CHANNELS = FLUX_CHANNELS // 4
PROMPT_TOKENS = 77  # that CLIP's tokenizer makes
LONG_CLIP_TOKENS = 248
# Switches of the scheduler that would make another schedule than FLUX.1's.
OTHER_SCHEDULES = (
    "stochastic_sampling",
    "invert_sigmas",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "use_flow_sigmas",
)


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises `CheckpointError` where there is none; `what` is the error's first words, as in "no vae
    in the model folder".
    """
    try:
        value = json.loads(read_small_file(path, MAX_JSON_BYTES).decode("utf-8"))
    except OSError as error:
        why = error.strerror or "not readable"
        raise CheckpointError(what, path, why=why, hint=DOWNLOAD_AGAIN) from error
    except (ValueError, RecursionError) as error:
        why = f"not valid JSON: {str(error)[:80]}"
        raise CheckpointError(what, path, why=why, hint=DOWNLOAD_AGAIN) from error
    if not isinstance(value, dict):
        raise CheckpointError(what, path, why="it is no JSON object", hint=DOWNLOAD_AGAIN)
    return value


def read_config(name: str, path: Path) -> dict[str, Any]:
    """Read and check the config of a component from its file; raises as `check_config` does."""
    return check_config(name, path, read_json(path, f"no {name} in the model folder"))


def check_config(name: str, path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return a component's config with the defaults of `READ`, without its `quantization_config`.

    `path` is where it is from, for errors. Raises `CheckpointError` for the config of another
    class, of another kind of FLUX model, of weights quantized in an unknown way, and for wild
    values.
    """
    _check_class(name, path, config)
    half = config.get(HALVES.get(name, ""))
    if isinstance(half, dict):
        config = {"quantization_config": config.get("quantization_config")} | half
    checked = READ.get(name, {}) | config
    if "_class_name" in checked:
        checked["_class_name"] = CLASSES[name]
    _check_values(name, path, checked)
    _check_quantization(path, checked.pop("quantization_config", {}))
    if name == "vae" and not checked["scaling_factor"]:
        raise CheckpointError("impossible config", path, why="scaling_factor is 0")
    if name == "transformer" and checked["in_channels"] not in CHANNELS:
        why = f"its transformer takes {checked['in_channels']} channels, not {FLUX_CHANNELS}"
        raise CheckpointError("another kind of FLUX model", path, why=why)
    if name == "scheduler":
        _check_schedule(path, checked)
    return checked


def _check_class(name: str, path: Path, config: dict[str, Any]) -> None:
    """Raise `CheckpointError` where the config names a class, and it is another than FLUX.1's."""
    # diffusers writes `_class_name`, transformers a list of one class as `architectures`.
    found = config.get("_class_name") or None
    architectures = config.get("architectures")
    if found is None and isinstance(architectures, list) and architectures:
        found = architectures[0]
    if found is not None and not is_class_of(name, found):
        why = f"{str(found)[:60]!r} instead of {CLASSES[name]!r}"
        kind = name_class(found)
        if kind:
            why += f"; it is {kind}"
        raise CheckpointError(f"wrong class of {name}", path, why=why)


def is_class_of(name: str, found: object) -> bool:
    """Whether this is a class of a component as FLUX.1 has it."""
    pattern = ALSO_READ.get(name, "")
    return isinstance(found, str) and (
        found == CLASSES[name] or re.fullmatch(pattern, found) is not None
    )


def name_class(found: object) -> str:
    """What a class that FLUX.1 does not have is, for people; "" where that is not known."""
    for pattern, kind in OTHER_CLASSES.items():
        if re.search(pattern, str(found)):
            return kind
    return ""


def complete(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """A component's config with all defaults that the shapes of its tensors depend on."""
    return READ.get(name, {}) | ASSUMED.get(name, {}) | dict(config)


def is_gated(values: Mapping[str, Any]) -> bool:
    """Whether T5's MLPs have a gate, a layer more: its configs say it in two ways."""
    by_name = str(values["feed_forward_proj"]).startswith("gated")
    return bool(values.get("is_gated_act", by_name))


def find_contradiction(name: str, config: Mapping[str, Any]) -> str:
    """Why the values of a checked config make no FLUX.1 together; "" where they do."""
    finders = {
        "transformer": _find_contradiction_in_transformer,
        "text_encoder": _find_contradiction_in_clip,
        "text_encoder_2": _find_contradiction_in_t5,
        "vae": _find_contradiction_in_vae,
        "controlnet": _find_contradiction_in_controlnet,
        "image_encoder": _find_contradiction_in_siglip,
    }
    if name not in finders:
        return ""
    return finders[name](complete(name, config))


def _find_wrong_axes(values: Mapping[str, Any]) -> str:
    axes = values["axes_dims_rope"]
    head = values["attention_head_dim"]
    if len(axes) != 3 or any(axis % 2 for axis in axes) or sum(axes) != head:
        return f"axes_dims_rope is {axes}, not three even numbers whose sum is {head}"
    return ""


def _find_contradiction_in_controlnet(values: Mapping[str, Any]) -> str:
    extra = [key for key, value in values.items() if key.startswith("extra_condition") and value]
    if extra:
        return f"it takes more than a map ({extra[0][:40]}), as ControlNets for inpainting do"
    if values["in_channels"] != FLUX_CHANNELS:
        return f"in_channels is {values['in_channels']}, the latents have {FLUX_CHANNELS}"
    if not values["num_layers"] + values["num_single_layers"]:
        return "it has no blocks"
    patch = values["patch_size"]
    channels = values.get("conditioning_embedding_channels")
    if channels is None and patch != 1:
        return f"patch_size is {patch}, without a hint block it is 1"
    if channels is not None and (patch, channels * patch**2) != (HINT_PATCH, FLUX_CHANNELS):
        return f"a hint block of {channels} channels in patches of {patch} is none of XLabs'"
    return _find_wrong_axes(values)


def _find_contradiction_in_transformer(values: Mapping[str, Any]) -> str:
    wrong_axes = _find_wrong_axes(values)
    if wrong_axes:
        return wrong_axes
    if values["patch_size"] != 1:
        return f"patch_size is {values['patch_size']}, FLUX.1 has 1"
    if (values.get("out_channels") or values["in_channels"]) != FLUX_CHANNELS:
        return f"out_channels is {values['out_channels']!r:.20}"
    return ""


def _find_contradiction_in_clip(values: Mapping[str, Any]) -> str:
    heads = values["num_attention_heads"]
    if values["hidden_size"] % heads:
        return f"{heads} heads do not divide the width {values['hidden_size']}"
    positions = values["max_position_embeddings"]
    if positions == LONG_CLIP_TOKENS:
        return f"it is LongCLIP, whose prompts have {LONG_CLIP_TOKENS} tokens"
    if positions < PROMPT_TOKENS:
        return f"max_position_embeddings is less than {PROMPT_TOKENS}"
    return ""


def _find_contradiction_in_t5(values: Mapping[str, Any]) -> str:
    # Half of the buckets are for each direction, and half of these for single distances.
    near = values["relative_attention_num_buckets"] // 4
    if not 0 < near < values["relative_attention_max_distance"]:
        return "its relative_attention_ values leave no distances"
    return ""


def _find_contradiction_in_vae(values: Mapping[str, Any]) -> str:
    channels = values["block_out_channels"]
    groups = values["norm_num_groups"]
    if any(count % groups for count in channels):
        return f"norm_num_groups {groups} does not divide {channels}"
    for key in ("down_block_types", "up_block_types"):
        if values[key] != ASSUMED["vae"][key] * len(channels):
            return f"{key} is not {ASSUMED['vae'][key][0]} {len(channels)} times"
    if values["latent_channels"] != LATENT_CHANNELS:
        return f"latent_channels is {values['latent_channels']}, FLUX.1 has {LATENT_CHANNELS}"
    if (values["in_channels"], values["out_channels"]) != (3, 3):
        return "in_channels and out_channels are not 3"
    return ""


def _find_contradiction_in_siglip(values: Mapping[str, Any]) -> str:
    heads = values["num_attention_heads"]
    if values["hidden_size"] % heads:
        return f"{heads} heads do not divide the width {values['hidden_size']}"
    if values["num_channels"] != 3:
        return "num_channels is not 3"
    if values["image_size"] < values["patch_size"]:
        return f"a picture of {values['image_size']} px has no patch of {values['patch_size']} px"
    return ""


def _check_values(name: str, path: Path, config: dict[str, Any]) -> None:
    """Raise `CheckpointError` for a number out of bounds, and for a value of another type."""
    for key, value in config.items():
        if not (_is_bounded(key, value) and _is_of_type(name, key, value)):
            why = f"{key[:60]} is {str(value)[:60]}"
            raise CheckpointError("impossible config", path, why=why)


def _is_of_type(name: str, key: str, value: object) -> bool:
    """Whether a value of a component's config has the type of its default, if there is one."""
    if key in OPTIONAL.get(name, ()):
        return value is None or _is_like(1, value)
    if key in MAY_BE_NONE.get(name, ()) and type(value) is int and value == 0:
        return True
    defaults = READ.get(name, {}) | ASSUMED.get(name, {})
    return key not in defaults or _is_like(defaults[key], value)


def _is_bounded(key: str, value: object) -> bool:
    """Whether a number, or every number of a list, is within bounds; NaN is not.

    Other values have no bounds. A count of layers has lower ones.
    """
    low = -MAX_NUMBER
    high = MAX_NUMBER
    if "layers" in key:
        low = 0
        high = MAX_LAYERS
    values = value if isinstance(value, list) else [value]
    return all(low <= number <= high for number in values if isinstance(number, int | float))


def _is_like(default: object, value: object) -> bool:
    """Whether a value has the type of its default.

    Whole numbers must be positive, lists must have some and nothing else, and a float may be whole.
    """
    if isinstance(default, list):
        if not isinstance(value, list) or not value:
            return False
        return all(_is_like(default[0], item) for item in value)
    if isinstance(default, str):
        return isinstance(value, str)
    # A bool is an int to isinstance, here it is none.
    if isinstance(default, bool) or isinstance(value, bool):
        return type(value) is type(default)
    if isinstance(default, float):
        return isinstance(value, int | float)
    return isinstance(value, int) and value > 0


def _check_quantization(path: Path, quantization: object) -> None:
    """Raise `CheckpointError` where a `quantization_config` names a method that is not read."""
    if not quantization:
        return
    method = quantization
    if isinstance(quantization, dict):
        method = quantization.get("quant_method")
    if method not in READABLE_METHODS:
        why = f"quant_method is {str(method)[:40]!r}, read are {' and '.join(READABLE_METHODS)}"
        raise CheckpointError("a model quantized in another way", path, why=why)


def _check_schedule(path: Path, config: dict[str, Any]) -> None:
    """Raise `CheckpointError` where a scheduler would compute another schedule than FLUX.1's."""
    for switch in OTHER_SCHEDULES:
        if config.get(switch):
            why = f"{switch} is set"
            raise CheckpointError("another schedule than FLUX.1's", path, why=why)
    if config["max_image_seq_len"] == config["base_image_seq_len"]:
        why = "base and max_image_seq_len are equal"
        raise CheckpointError("impossible config", path, why=why)
