"""Read and check the JSON files of a model folder: classes, types and bounds of what this project relies on.

Other values are the model classes' to refuse, but every number is bounded: nobody builds 10^9 layers. Stdlib only.
"""

import json
import stat
from pathlib import Path

from quant.errors import CheckpointError

CLASSES = {"text_encoder": "CLIPTextModel", "text_encoder_2": "T5EncoderModel", "vae": "AutoencoderKL",
           "transformer": "FluxTransformer2DModel", "scheduler": "FlowMatchEulerDiscreteScheduler"}  # fmt: skip
MAX_JSON_BYTES = 32 << 20
MAX_LAYERS, MAX_NUMBER, FLUX_CHANNELS = 256, 1_000_000, 64
NUMBER, READABLE_METHODS = (int, float), ("bitsandbytes", "quanto")
# Library defaults of the values that this project itself reads; each default has the type of its value.
READ: dict[str, dict] = {
    "transformer": {"num_layers": 19, "num_single_layers": 38, "num_attention_heads": 24, "attention_head_dim": 128,
                    "pooled_projection_dim": 768, "in_channels": FLUX_CHANNELS, "guidance_embeds": False},
    "vae": {"block_out_channels": [64], "scaling_factor": 0.18215, "shift_factor": 0.0},
    "scheduler": {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15,
                  "shift": 1.0, "num_train_timesteps": 1000},
}  # fmt: skip
OTHER_MATHS = ("stochastic_sampling", "invert_sigmas", "use_karras_sigmas", "use_exponential_sigmas",
               "use_beta_sigmas", "use_flow_sigmas")  # fmt: skip


def read_json(path: Path, what: str) -> dict:
    """The JSON object in a file; raises `CheckpointError` saying `what` is wrong otherwise."""
    try:
        status = path.stat()
        if not (regular := stat.S_ISREG(status.st_mode)) or status.st_size > MAX_JSON_BYTES:
            raise CheckpointError(what, path, why="the file is too large" if regular else "it is no regular file")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(what, path, why=error.strerror or "not readable") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(what, path, why=f"not valid JSON: {str(error)[:80]}") from error
    if not isinstance(value, dict):
        raise CheckpointError(what, path, why="it is no JSON object")
    return value


def read_config(name: str, path: Path, config: dict | None = None) -> dict:
    """A component's config, read from its file unless given; raises `CheckpointError` for a wrong model or values."""
    config = read_json(path, f"no {name} in the model folder") if config is None else config
    named = config.get("architectures")
    found = config.get("_class_name") or (named[0] if isinstance(named, list) and named else None)
    if found not in (CLASSES[name], None):
        raise CheckpointError(f"wrong class of {name}", path, why=f"{str(found)[:60]!r} instead of {CLASSES[name]!r}")
    read = READ.get(name, {})
    config = read | config
    for key, value in config.items():
        low, high = (0, MAX_LAYERS) if "layers" in key else (-MAX_NUMBER, MAX_NUMBER)
        numbers = [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, NUMBER)]
        sane = all(low <= v <= high for v in numbers)  # False for NaN
        if not sane or (key in read and not _is_like(read[key], value)):
            raise CheckpointError("impossible config", path, why=f"{key[:60]} is {str(value)[:60]}")
    packed = config.pop("quantization_config", {})
    method = packed.get("quant_method") if isinstance(packed, dict) else packed
    if packed and method not in READABLE_METHODS:
        why = f"quant_method is {str(method)[:40]!r}, read are {' and '.join(READABLE_METHODS)}"
        raise CheckpointError("a model quantized in another way", path, why=why)
    if name == "vae" and not config["scaling_factor"]:
        raise CheckpointError("impossible config", path, why="scaling_factor is 0")
    if name == "transformer" and config["in_channels"] != FLUX_CHANNELS:
        why = f"its transformer takes {config['in_channels']} channels (a Fill or control model), not {FLUX_CHANNELS}"
        raise CheckpointError("another kind of FLUX model", path, why=why)
    if name == "scheduler" and (odd := [key for key in OTHER_MATHS if config.get(key)]):
        raise CheckpointError("another schedule than FLUX.1's", path, why=f"{odd[0]} is set")
    if name == "scheduler" and config["max_image_seq_len"] == config["base_image_seq_len"]:
        raise CheckpointError("impossible config", path, why="base and max_image_seq_len are equal")
    return config


def _is_like(default: object, value: object) -> bool:
    """Whether a value has its default's type; whole numbers are positive, and lists hold such."""
    if isinstance(default, list):
        return isinstance(value, list) and bool(value) and all(_is_like(1, v) for v in value)
    if isinstance(default, bool) or isinstance(value, bool):
        return type(value) is type(default)
    return isinstance(value, NUMBER) if isinstance(default, float) else isinstance(value, int) and value > 0
