"""Fault rows of adapters: files that are none, are damaged, are for others, or have moved."""

import json
import os
import struct
from functools import partial
from pathlib import Path
from typing import Any

from tests.faults.case import Case, fault

LAYER = "transformer.transformer_blocks.0.attn.to_out.0"
WIDTH = 128
RANK = 2

# A tensor: its shape, and the number that all its values are.
Tensor = tuple[tuple[int, ...], float]


def low_rank(layer: str = LAYER, *, n: int = WIDTH, k: int = WIDTH, value: float = 0.1) -> dict:
    """The two matrices of a LoRA for a layer."""
    return {
        f"{layer}.lora_A.weight": ((RANK, k), value),
        f"{layer}.lora_B.weight": ((n, RANK), value),
    }


def pack(tensors: dict[str, Tensor], *, metadata: Any = None, **changes: Any) -> bytes:
    """A safetensors file of float32, with entries of the header changed."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    data = b""
    for name, (shape, value) in tensors.items():
        count = 1
        for size in shape:
            count *= size
        stop = len(data) + 4 * count
        entry = {"dtype": "F32", "shape": list(shape), "data_offsets": [len(data), stop]}
        header[name] = entry | changes
        data += struct.pack("<f", value) * count
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


GOOD = low_rank()
NAN = float("nan")
ALPHA = f"{LAYER}.alpha"
# By the row's name: the tensors of the file, and what the error says.
REFUSED: dict[str, tuple[dict[str, Tensor], str]] = {
    "half": ({f"{LAYER}.lora_A.weight": ((RANK, WIDTH), 1)}, "not a whole"),
    "half-lokr": ({f"{LAYER}.lokr_w1": ((4, 4), 1)}, "not a whole"),
    "half-lokr-factor": (
        {f"{LAYER}.lokr_w1": ((4, 4), 1), f"{LAYER}.lokr_w2_a": ((32, 2), 1)},
        "not a whole",
    ),
    "half-loha": ({f"{LAYER}.hada_w1_a": ((WIDTH, 2), 1)}, "not a whole"),
    "magnitude-alone": ({f"{LAYER}.dora_scale": ((WIDTH, 1), 1)}, "not a whole"),
    "two-kinds": (GOOD | {f"{LAYER}.diff": ((WIDTH, WIDTH), 1)}, "not a whole"),
    "tucker-lokr": (GOOD | {f"{LAYER}.lokr_t2": ((2, 2, 1, 1), 1)}, "lokr_t2"),
    "tucker-loha": (GOOD | {f"{LAYER}.hada_t1": ((2, 2, 1, 1), 1)}, "hada_t1"),
    "oft": ({f"{LAYER}.oft_blocks": ((2, 2, 2), 1)}, "oft_blocks"),
    "another-width": (low_rank(n=3072, k=3072), "another model"),
    "another-width-magnitude": (
        GOOD | {f"{LAYER}.lora_magnitude_vector": ((WIDTH + 1,), 1)},
        "another model",
    ),
    "lokr-of-another-width": (
        {f"{LAYER}.lokr_w1": ((4, 4), 1), f"{LAYER}.lokr_w2": ((32, 31), 1)},
        "another model",
    ),
    "lokr-without-shape": (
        {f"{LAYER}.lokr_w1": ((), 1), f"{LAYER}.lokr_w2": ((WIDTH, WIDTH), 1)},
        "another model",
    ),
    "bias-of-another-width": (GOOD | {f"{LAYER}.diff_b": ((7,), 1)}, "another model"),
    "ranks-differ": (GOOD | {f"{LAYER}.lora_B.weight": ((WIDTH, 5), 1)}, "another model"),
    "alpha-nan": (GOOD | {ALPHA: ((), NAN)}, "not finite"),
    "alpha-several": (GOOD | {ALPHA: ((3,), 1)}, "no number"),
    "alpha-alone": ({ALPHA: ((), 1)}, "not a LoRA"),
    "values-nan": (low_rank(value=NAN), "not finite"),
    "bias-infinite": (GOOD | {f"{LAYER}.diff_b": ((WIDTH,), float("inf"))}, "not finite"),
    "diff-nan": ({f"{LAYER}.diff": ((WIDTH, WIDTH), NAN)}, "not finite"),
    "magnitude-nan": (GOOD | {f"{LAYER}.dora_scale": ((WIDTH, 1), NAN)}, "not finite"),
    "no-layer-of-ours": (low_rank("some.layer"), "not a LoRA"),
    "sdxl": (GOOD | low_rank("lora_te2_text_model_encoder_layers_0_mlp_fc1"), "of SDXL"),
    "sd15": (low_rank("lora_unet_down_blocks_0_attentions_0_proj_in"), "of Stable Diffusion"),
    "sd3": (low_rank("transformer.joint_blocks.0.x_block.attn.qkv"), "of Stable Diffusion 3"),
    "flux2": (GOOD | low_rank("transformer.single_stream_modulation.lin"), "of FLUX.2"),
    "wan": (low_rank("diffusion_model.blocks.0.self_attn.q"), "of Wan"),
    "qwen-image": (GOOD | low_rank("transformer_blocks.0.img_mlp.net.2"), "of Qwen-Image"),
    "z-image": (low_rank("diffusion_model.layers.0.attention.to_q"), "of Z-Image"),
    "hunyuan": (low_rank("transformer.double_blocks.0.img_attn_qkv"), "of HunyuanVideo"),
    "chroma": (GOOD | low_rank("distilled_guidance_layer.layers.0.in_layer"), "of Chroma"),
    "ltx": (low_rank("transformer.transformer_blocks.0.attn1.to_q"), "of LTX-Video"),
    "language-model": (low_rank("model.layers.0.self_attn.q_proj"), "of a language model"),
}


def draw_refused(case: Case, *, tensors: dict[str, Tensor]) -> None:
    case.draw("--lora", case.write("x.safetensors", pack(tensors)))


for name, (tensors, says) in REFUSED.items():
    fault(f"lora-{name}", f"an adapter: {name}", codes=[4], says=says)(
        partial(draw_refused, tensors=tensors)
    )

# By the row's name: the whole file.
FILES = {
    "empty": b"",
    "text": b"hello",
    "html": b"<!DOCTYPE html><html>log in</html>",
    "json": b'{"error": "Unauthorized"}',
    "pickle": b"PK\x03\x04" + bytes(64),
    "cut": pack(GOOD)[:-100],
    "longer": pack(GOOD) + bytes(100),
    "header-cut": pack(GOOD)[:60],
    "integers": pack({f"{LAYER}.diff_b": ((WIDTH,), 1)}, dtype="I32"),
    "zeros": bytes(4096),
}


def draw_file(case: Case, *, content: bytes) -> None:
    case.draw("--lora", case.write("x.safetensors", content))


for name, content in FILES.items():
    fault(f"lora-file-{name}", f"a file as an adapter: {name}", codes=[4])(
        partial(draw_file, content=content)
    )

# What the metadata say: numbers and 5 MB are usual, lists and objects are no metadata.
METADATA: dict[str, Any] = {
    "number": {"epoch": 3},
    "object": {"config": {"a": [1, 2]}},
    "list": [1, 2],
    "kohya-5MB": {"ss_tag_frequency": json.dumps({f"tag {n}": n for n in range(300_000)})},
}


def draw_metadata(case: Case, *, metadata: Any) -> None:
    case.draw("--lora", case.write("x.safetensors", pack(GOOD, metadata=metadata)))


for name, metadata in METADATA.items():
    codes = [4] if name in ("object", "list") else [0]
    fault(f"lora-metadata-{name}", f"metadata of an adapter: {name}", codes=codes)(
        partial(draw_metadata, metadata=metadata)
    )

# adapter_config.json beside the file.
CONFIGS = {"cut": "{", "list": "[1]", "alpha": '{"r": 2, "lora_alpha": "x"}', "deep": "[" * 100_000}


def draw_config(case: Case, *, config: str) -> None:
    path = case.write("a/x.safetensors", pack(GOOD))
    case.write("a/adapter_config.json", config)
    case.draw("--lora", path)


for name, config in CONFIGS.items():
    fault(f"lora-config-{name}", f"adapter_config.json: {name}", codes=[4])(
        partial(draw_config, config=config)
    )


@fault("lora-config-fifo", "adapter_config.json is a FIFO", codes=[4], says="adapter_config")
def lora_config_fifo(case: Case) -> None:
    path = case.write("a/x.safetensors", pack(GOOD))
    os.mkfifo(path.with_name("adapter_config.json"))
    case.draw("--lora", path)


@fault("lora-config-folder", "adapter_config.json is a folder", codes=[4], says="adapter_config")
def lora_config_folder(case: Case) -> None:
    path = case.write("a/x.safetensors", pack(GOOD))
    path.with_name("adapter_config.json").mkdir()
    case.draw("--lora", path)


@fault("lora-config-missing", "peft's file without its configuration", codes=[0], says="alpha")
def lora_config_missing(case: Case) -> None:
    tensors = low_rank(LAYER.replace("transformer.", "base_model.model."))
    case.draw("--lora", case.write("adapter_model.safetensors", pack(tensors)))


@fault("lora-partly", "a layer that the model has not", codes=[0], says="1 of 2 layers")
def lora_partly(case: Case) -> None:
    tensors = GOOD | low_rank("transformer.transformer_blocks.70.attn.to_q")
    case.draw("--lora", case.write("x.safetensors", pack(tensors)))


@fault("lora-zero-norm", "a DoRA whose weight becomes zero", codes=[0, 9])
def lora_zero_norm(case: Case) -> None:
    tensors = low_rank(value=0.0) | {f"{LAYER}.dora_scale": ((WIDTH, 1), 0.0)}
    case.draw("--lora", case.write("x.safetensors", pack(tensors)))


@fault("lora-product-infinite", "matrices whose product is beyond float32", codes=[9])
def lora_product_infinite(case: Case) -> None:
    case.draw("--lora", case.write("x.safetensors", pack(low_rank(value=3e38))))


for scale in ("1e39", "-1e300", "1e308"):

    @fault(f"lora-scale-{scale}", f"the scale {scale}", codes=[2, 4], says="float32")
    def lora_scale(case: Case, scale: str = scale) -> None:
        case.draw("--lora", f"{case.write('x.safetensors', pack(GOOD))}:{scale}")


for scale in ("nan", "inf"):

    @fault(f"lora-scale-{scale}", f"the scale {scale}", codes=[2])
    def lora_scale_not_finite(case: Case, scale: str = scale) -> None:
        case.draw("--lora", f"{case.write('x.safetensors', pack(GOOD))}:{scale}")


@fault("lora-missing", "no such file", codes=[3])
def lora_missing(case: Case) -> None:
    case.draw("--lora", "nothing.safetensors")


@fault("lora-fifo", "a FIFO as an adapter", codes=[3, 4])
def lora_fifo(case: Case) -> None:
    os.mkfifo(case.folder / "x.safetensors")
    case.draw("--lora", case.folder / "x.safetensors")


@fault("lora-folder-empty", "a folder without adapters", codes=[3], says="no .safetensors")
def lora_folder_empty(case: Case) -> None:
    (case.folder / "a").mkdir()
    case.draw("--lora", case.folder / "a")


@fault("lora-folder-several", "a folder with two adapters", codes=[2], says="which")
def lora_folder_several(case: Case) -> None:
    for name in "xy":
        case.write(f"a/{name}.safetensors", pack(GOOD))
    case.draw("--lora", case.folder / "a")


@fault("lora-escape", "escape codes in a layer's name", codes=[4])
def lora_escape(case: Case) -> None:
    case.draw("--lora", case.write("x.safetensors", pack(low_rank("\x1b[31mred\u202e"))))


def make_picture(case: Case) -> tuple[Path, Path]:
    """Draw a picture with an adapter; returns both."""
    path = case.write("ink.safetensors", pack(GOOD))
    case.draw("--lora", path, "-o", "x.png")
    return case.folder / "x.png", path


@fault("replay-lora-gone", "the adapter of a picture was deleted", codes=[3], says="--lora none")
def replay_lora_gone(case: Case) -> None:
    picture, path = make_picture(case)
    path.unlink()
    case.flux("replay", picture, "-o", "y.png", "--no-cache")


@fault("replay-lora-moved", "the adapter of a picture moved", codes=[0], says="is now")
def replay_lora_moved(case: Case) -> None:
    picture, path = make_picture(case)
    (case.folder / "b").mkdir()
    path.rename(case.folder / "b/other.safetensors")
    case.flux("replay", picture, "--check", "--no-cache")


@fault("replay-lora-changed", "another file in the adapter's place", codes=[0], says="another file")
def replay_lora_changed(case: Case) -> None:
    picture, path = make_picture(case)
    path.write_bytes(pack(low_rank(value=0.2)))
    case.flux("replay", picture, "-o", "y.png", "--no-cache")
