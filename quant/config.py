"""Read and check the JSON files of a model folder: classes, types and bounds of what is relied on.

A value that this project does not read is left for the model classes to refuse, but its numbers are
bounded too, so that no hostile file makes them build a billion layers. Knows nothing of weights.
Stdlib only.
"""

import json
from pathlib import Path
from typing import Any

from quant.errors import CheckpointError
from quant.files import read_small_file

CLASSES = {
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "T5EncoderModel",
    "vae": "AutoencoderKL",
    "transformer": "FluxTransformer2DModel",
    "scheduler": "FlowMatchEulerDiscreteScheduler",
}
DOWNLOAD_AGAIN = "download the model again"
MAX_JSON_BYTES = 32 << 20
MAX_LAYERS = 256
MAX_NUMBER = 1_000_000
FLUX_CHANNELS = 64
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
    checked = READ.get(name, {}) | config
    _check_values(name, path, checked)
    _check_quantization(path, checked.pop("quantization_config", {}))
    if name == "vae" and not checked["scaling_factor"]:
        raise CheckpointError("impossible config", path, why="scaling_factor is 0")
    if name == "transformer" and checked["in_channels"] != FLUX_CHANNELS:
        channels = f"{checked['in_channels']} channels (a Fill or control model)"
        why = f"its transformer takes {channels}, not {FLUX_CHANNELS}"
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
    wanted = CLASSES[name]
    if found not in (wanted, None):
        why = f"{str(found)[:60]!r} instead of {wanted!r}"
        raise CheckpointError(f"wrong class of {name}", path, why=why)


def _check_values(name: str, path: Path, config: dict[str, Any]) -> None:
    """Raise `CheckpointError` for a number out of bounds, and for a value of another type."""
    defaults = READ.get(name, {})
    for key, value in config.items():
        sane = _is_bounded(key, value)
        if key in defaults:
            sane = sane and _is_like(defaults[key], value)
        if not sane:
            why = f"{key[:60]} is {str(value)[:60]}"
            raise CheckpointError("impossible config", path, why=why)


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
        return all(_is_like(1, item) for item in value)
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
