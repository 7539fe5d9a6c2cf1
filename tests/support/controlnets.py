"""ControlNets for the bundled model, made by diffusers' own class: what they add is not zero."""

import json
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

from fluxcli.paths import BUNDLED

# Fields of FluxControlNetModel by what kind of network it is.
KINDS: dict[str, dict[str, object]] = {
    "single": {"num_layers": 2, "num_single_layers": 1},
    "union": {"num_layers": 1, "num_single_layers": 1, "num_mode": 3},
    "double": {"num_layers": 2, "num_single_layers": 0},
    "unguided": {"num_layers": 1, "num_single_layers": 0, "guidance_embeds": False},
    "xlabs": {
        "num_layers": 1,
        "num_single_layers": 0,
        "conditioning_embedding_channels": 16,
        "patch_size": 2,
    },
    # of another model
    "narrow": {"num_layers": 1, "num_single_layers": 0, "num_attention_heads": 2},
}
PLAIN = "diffusion_pytorch_model.safetensors"


def write_controlnet(kind: str, folder: Path, *, seed: int = 0, strength: float = 1.0) -> Path:
    """Save a network in a folder, as diffusers does; its blocks are those of the bundled model.

    Its residuals are `strength` times those that change a picture well.
    """
    from diffusers import FluxControlNetModel

    transformer = BUNDLED / "tiny" / "transformer"
    config = json.loads((transformer / "config.json").read_text())
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    config.pop("out_channels")
    model = FluxControlNetModel(**config | KINDS[kind])
    state = load_file(transformer / PLAIN)
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    state = {key: state[key] for key in state if shapes.get(key) == state[key].shape}
    model.load_state_dict(state, strict=False)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name in state:
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        inputs = parameter[0].numel() if parameter.ndim > 1 else parameter.numel()
        scale = 1.0
        if name.startswith(("controlnet_blocks", "controlnet_single")):
            scale = strength
        elif name.startswith("input_hint_block"):
            scale = 2.0  # eight activations in a row halve what passes
        parameter.data = noise * scale / inputs**0.5
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def save_map(
    path: Path, *, size: tuple[int, int] = (64, 64), box: tuple[int, int, int, int] = (9, 9, 40, 50)
) -> Path:
    """A control picture: the outline of an ellipse in a box (left, top, right, bottom)."""
    image = Image.new("RGB", size, (10 * (box[0] % 3), 0, 10))
    ImageDraw.Draw(image).ellipse(box, outline="white", width=3)
    image.save(path)
    return path


# The layers of a double block by XLabs' names, which are BFL's, and the rows that each holds.
BLOCK = {
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
NORMS = {
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
}
TOP = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "pos_embed_input": "controlnet_x_embedder",
    "input_hint_block.0": "input_hint_block.conv_in",
    **{f"input_hint_block.{2 * i + 2}": f"input_hint_block.blocks.{i}" for i in range(6)},
    "input_hint_block.14": "input_hint_block.conv_out",
}


def to_xlabs(folder: Path, path: Path) -> Path:
    """The same network of one double block as a file with the names of x-flux' ControlNetFlux."""
    state = load_file(folder / PLAIN)
    found = {}
    for leaf in ("weight", "bias"):
        for theirs, ours in {**TOP, "controlnet_blocks.0": "controlnet_blocks.0"}.items():
            found[f"{theirs}.{leaf}"] = state.pop(f"{ours}.{leaf}")
        for theirs, parts in BLOCK.items():
            rows = [state.pop(f"transformer_blocks.0.{part}.{leaf}") for part in parts]
            found[f"double_blocks.0.{theirs}.{leaf}"] = torch.cat(rows)
    for theirs, ours in NORMS.items():
        found[f"double_blocks.0.{theirs}.scale"] = state.pop(f"transformer_blocks.0.{ours}.weight")
    assert not state
    save_file(found, path)
    return path
