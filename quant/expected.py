"""Which tensors a component needs by its config, and whether its files have them.

The classes of diffusers and transformers say the same; here it is said without importing them, so
that what does not fit is found in the headers, before a byte of the weights is read. Names and
shapes are those of the modules: (N, K) of a linear layer, (N, K, 3, 3) of a convolution. Stdlib
only.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quant.config import complete, find_contradiction, is_gated
from quant.dialects import T5_SHARED, T5_TIED
from quant.errors import CheckpointError
from quant.weights import Weight

Shapes = dict[str, tuple[int, ...]]

# What modules of transformers leave out at the beginning of their tensors' names in files.
MODULE_PREFIXES = {"text_encoder": "text_model.", "image_encoder": "vision_model."}
# Channels of the sines and cosines of a timestep.
TIMESTEP_CHANNELS = 256
# Channels of XLabs' hint block, and its convolutions between the first and the last.
HINT_WIDTH = 16
HINT_CONVOLUTIONS = 6


def check_tensors(
    name: str, folder: Path, *, config: Mapping[str, Any], weights: Mapping[str, Weight]
) -> None:
    """Raise `CheckpointError` unless a component has the tensors that its config needs.

    And for a config whose values do not fit each other.
    """
    why = find_contradiction(name, config)
    if why:
        raise CheckpointError(f"impossible config of {name}", folder, why=why)
    expected = list_shapes(name, config)
    check_keys(name, folder, expected=expected, found=_read_shapes(name, weights))


def check_shapes(
    name: str, folder: Path, *, config: Mapping[str, Any], weights: Mapping[str, Weight]
) -> None:
    """Raise `CheckpointError` where a tensor of a component has another shape than its config's."""
    misshapen = _find_misshapen(list_shapes(name, config), _read_shapes(name, weights))
    _refuse_tensors(name, folder, "misshapen", misshapen)


def _read_shapes(name: str, weights: Mapping[str, Weight]) -> Shapes:
    """The shapes of a component's tensors by the names of its modules."""
    return {module: weights[stored].shape for module, stored in map_names(name, weights).items()}


def _find_misshapen(expected: Mapping[str, object], found: Mapping[str, object]) -> list[str]:
    return [key for key in expected if key in found and expected[key] != found[key]]


def count_matching(
    name: str, *, config: Mapping[str, Any], weights: Mapping[str, Weight]
) -> tuple[int, int]:
    """(how many tensors have a place in the component, how many it needs)."""
    expected = list_shapes(name, config)
    found = _read_shapes(name, weights)
    matching = [module for module, shape in found.items() if expected.get(module) == shape]
    return len(matching), len(expected)


def check_keys(
    name: str, folder: Path, *, expected: Mapping[str, object], found: Mapping[str, object]
) -> None:
    """Raise `CheckpointError`, with the count and three names, unless keys and shapes agree."""
    _refuse_tensors(name, folder, "missing", sorted(set(expected) - set(found)))
    _refuse_tensors(name, folder, "unknown", sorted(set(found) - set(expected)))
    _refuse_tensors(name, folder, "misshapen", _find_misshapen(expected, found))


def _refuse_tensors(name: str, folder: Path, what: str, keys: Sequence[str]) -> None:
    if not keys:
        return
    shown = ", ".join(key[:80] for key in keys[:3])
    if len(keys) > 3:
        shown += " ..."
    raise CheckpointError(
        f"weights do not match {name}",
        which=folder,
        why=f"{len(keys)} {what} tensors: {shown}",
        hint="download the model again, or check that config.json belongs to these weights",
    )


def map_names(component: str, stored: Mapping[str, Weight]) -> dict[str, str]:
    """Module key -> key in the file, for the dialects that published folders use."""
    prefix = MODULE_PREFIXES.get(component, "")
    names = {name.removeprefix(prefix): name for name in stored}
    if component == "text_encoder_2":  # one tensor under two names
        shared = names.get(T5_SHARED) or names.get(T5_TIED)
        if shared:
            names[T5_SHARED] = shared
            names[T5_TIED] = shared
    return names


def list_shapes(component: str, config: Mapping[str, Any]) -> Shapes:
    """The tensors of a component with this checked config, by their names in its module."""
    values = complete(component, config)
    lists = {
        "transformer": _list_transformer,
        "text_encoder": _list_clip,
        "text_encoder_2": _list_t5,
        "vae": _list_vae,
        "controlnet": _list_controlnet,
        "image_encoder": _list_siglip,
        "image_embedder": _list_redux,
    }
    return lists[component](values)


def _linear(name: str, outputs: int, inputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _norm(name: str, channels: int) -> Shapes:
    return {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}


def _convolution(name: str, outputs: int, inputs: int, kernel: int = 3) -> Shapes:
    return {f"{name}.weight": (outputs, inputs, kernel, kernel), f"{name}.bias": (outputs,)}


# --- the transformer


def _list_transformer(values: Mapping[str, Any]) -> Shapes:
    width = values["num_attention_heads"] * values["attention_head_dim"]
    shapes = _list_embedders_and_blocks(values)
    shapes |= _linear("norm_out.linear", 2 * width, width)
    shapes |= _linear("proj_out", values.get("out_channels") or values["in_channels"], width)
    return shapes


def _list_embedders_and_blocks(values: Mapping[str, Any]) -> Shapes:
    """What a transformer and a ControlNet have alike."""
    head = values["attention_head_dim"]
    width = values["num_attention_heads"] * head
    embedders = {"timestep": TIMESTEP_CHANNELS, "text": values["pooled_projection_dim"]}
    if values["guidance_embeds"]:
        embedders["guidance"] = TIMESTEP_CHANNELS
    shapes: Shapes = {}
    for name, inputs in embedders.items():
        shapes |= _linear(f"time_text_embed.{name}_embedder.linear_1", width, inputs)
        shapes |= _linear(f"time_text_embed.{name}_embedder.linear_2", width, width)
    shapes |= _linear("context_embedder", width, values["joint_attention_dim"])
    shapes |= _linear("x_embedder", width, values["in_channels"])
    for i in range(values["num_layers"]):
        shapes |= _list_double_block(f"transformer_blocks.{i}", width=width, head=head)
    for i in range(values["num_single_layers"]):
        shapes |= _list_single_block(f"single_transformer_blocks.{i}", width=width, head=head)
    return shapes


def _list_double_block(block: str, *, width: int, head: int) -> Shapes:
    shapes: Shapes = {}
    for norm in ("norm1", "norm1_context"):
        shapes |= _linear(f"{block}.{norm}.linear", 6 * width, width)
    for norm in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
        shapes[f"{block}.attn.{norm}.weight"] = (head,)
    attention = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj")
    for layer in (*attention, "to_add_out"):
        shapes |= _linear(f"{block}.attn.{layer}", width, width)
    for layer in ("ff", "ff_context"):
        shapes |= _linear(f"{block}.{layer}.net.0.proj", 4 * width, width)
        shapes |= _linear(f"{block}.{layer}.net.2", width, 4 * width)
    return shapes


def _list_single_block(block: str, *, width: int, head: int) -> Shapes:
    shapes = _linear(f"{block}.norm.linear", 3 * width, width)
    shapes |= _linear(f"{block}.proj_mlp", 4 * width, width)
    shapes |= _linear(f"{block}.proj_out", width, 5 * width)
    for norm in ("norm_q", "norm_k"):
        shapes[f"{block}.attn.{norm}.weight"] = (head,)
    for layer in ("to_q", "to_k", "to_v"):
        shapes |= _linear(f"{block}.attn.{layer}", width, width)
    return shapes


# --- a ControlNet


def _list_controlnet(values: Mapping[str, Any]) -> Shapes:
    width = values["num_attention_heads"] * values["attention_head_dim"]
    shapes = _list_embedders_and_blocks(values)
    shapes |= _linear("controlnet_x_embedder", width, values["in_channels"])
    for i in range(values["num_layers"]):
        shapes |= _linear(f"controlnet_blocks.{i}", width, width)
    for i in range(values["num_single_layers"]):
        shapes |= _linear(f"controlnet_single_blocks.{i}", width, width)
    if values.get("num_mode") is not None:
        shapes["controlnet_mode_embedder.weight"] = (values["num_mode"], width)
    channels = values.get("conditioning_embedding_channels")
    if channels is not None:
        shapes |= _convolution("input_hint_block.conv_in", HINT_WIDTH, 3)
        for i in range(HINT_CONVOLUTIONS):
            shapes |= _convolution(f"input_hint_block.blocks.{i}", HINT_WIDTH, HINT_WIDTH)
        shapes |= _convolution("input_hint_block.conv_out", channels, HINT_WIDTH)
    return shapes


# --- the text encoders


def _list_clip(values: Mapping[str, Any]) -> Shapes:
    width = values["hidden_size"]
    shapes: Shapes = {
        "embeddings.token_embedding.weight": (values["vocab_size"], width),
        "embeddings.position_embedding.weight": (values["max_position_embeddings"], width),
    }
    shapes |= _norm("final_layer_norm", width)
    return shapes | _list_clip_layers(values)


def _list_clip_layers(values: Mapping[str, Any]) -> Shapes:
    """The layers of CLIP's text half; SigLIP's of pictures have the same names and shapes."""
    width = values["hidden_size"]
    inner = values["intermediate_size"]
    shapes: Shapes = {}
    for i in range(values["num_hidden_layers"]):
        block = f"encoder.layers.{i}"
        for layer in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _linear(f"{block}.self_attn.{layer}", width, width)
        shapes |= _linear(f"{block}.mlp.fc1", inner, width)
        shapes |= _linear(f"{block}.mlp.fc2", width, inner)
        shapes |= _norm(f"{block}.layer_norm1", width)
        shapes |= _norm(f"{block}.layer_norm2", width)
    return shapes


def _list_t5(values: Mapping[str, Any]) -> Shapes:
    width = values["d_model"]
    heads = values["num_heads"]
    inner = heads * values["d_kv"]
    table = (values["vocab_size"], width)
    shapes: Shapes = {T5_SHARED: table, T5_TIED: table, "encoder.final_layer_norm.weight": (width,)}
    # Only the first block has it, the others use its.
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    shapes[bias] = (values["relative_attention_num_buckets"], heads)
    for i in range(values["num_layers"]):
        attention = f"encoder.block.{i}.layer.0"
        mlp = f"encoder.block.{i}.layer.1"
        for layer in ("q", "k", "v"):
            shapes[f"{attention}.SelfAttention.{layer}.weight"] = (inner, width)
        shapes[f"{attention}.SelfAttention.o.weight"] = (width, inner)
        for layer in ("wi_0", "wi_1") if is_gated(values) else ("wi",):
            shapes[f"{mlp}.DenseReluDense.{layer}.weight"] = (values["d_ff"], width)
        shapes[f"{mlp}.DenseReluDense.wo.weight"] = (width, values["d_ff"])
        for layer in (attention, mlp):
            shapes[f"{layer}.layer_norm.weight"] = (width,)
    return shapes


# --- what Redux reads a picture with


def _list_siglip(values: Mapping[str, Any]) -> Shapes:
    """SigLIP without its pooling head, which Redux does not use."""
    width = values["hidden_size"]
    patch = values["patch_size"]
    patches = (values["image_size"] // patch) ** 2
    shapes = _convolution("embeddings.patch_embedding", width, values["num_channels"], kernel=patch)
    shapes["embeddings.position_embedding.weight"] = (patches, width)
    shapes |= _norm("post_layernorm", width)
    return shapes | _list_clip_layers(values)


def _list_redux(values: Mapping[str, Any]) -> Shapes:
    width = values["txt_in_features"]
    shapes = _linear("redux_up", 3 * width, values["redux_dim"])
    return shapes | _linear("redux_down", width, 3 * width)


# --- the VAE


def _list_vae(values: Mapping[str, Any]) -> Shapes:
    channels = values["block_out_channels"]
    latent = values["latent_channels"]
    resnets = values["layers_per_block"]
    shapes = _convolution("encoder.conv_in", channels[0], values["in_channels"])
    shapes |= _convolution("encoder.conv_out", 2 * latent, channels[-1])
    shapes |= _convolution("decoder.conv_in", channels[-1], latent)
    shapes |= _convolution("decoder.conv_out", values["out_channels"], channels[0])
    shapes |= _norm("encoder.conv_norm_out", channels[-1])
    shapes |= _norm("decoder.conv_norm_out", channels[0])
    shapes |= _list_vae_blocks("encoder.down", channels, resnets=resnets)
    # The decoder has one resnet more in each block.
    shapes |= _list_vae_blocks("decoder.up", channels[::-1], resnets=resnets + 1)
    for half in ("encoder", "decoder"):
        shapes |= _list_mid_block(f"{half}.mid_block", channels[-1], values=values)
    if values["use_quant_conv"]:
        shapes |= _convolution("quant_conv", 2 * latent, 2 * latent, kernel=1)
    if values["use_post_quant_conv"]:
        shapes |= _convolution("post_quant_conv", latent, latent, kernel=1)
    return shapes


def _list_vae_blocks(half: str, channels: Sequence[int], *, resnets: int) -> Shapes:
    """The blocks of "encoder.down" or "decoder.up", in which all but the last change the size."""
    shapes: Shapes = {}
    direction = half.rpartition(".")[2]
    inputs = channels[0]
    for i, outputs in enumerate(channels):
        block = f"{half}_blocks.{i}"
        for k in range(resnets):
            shapes |= _list_resnet(f"{block}.resnets.{k}", outputs, inputs)
            inputs = outputs
        if i + 1 < len(channels):
            shapes |= _convolution(f"{block}.{direction}samplers.0.conv", outputs, outputs)
    return shapes


def _list_resnet(name: str, outputs: int, inputs: int) -> Shapes:
    shapes = _norm(f"{name}.norm1", inputs) | _norm(f"{name}.norm2", outputs)
    shapes |= _convolution(f"{name}.conv1", outputs, inputs)
    shapes |= _convolution(f"{name}.conv2", outputs, outputs)
    if inputs != outputs:
        shapes |= _convolution(f"{name}.conv_shortcut", outputs, inputs, kernel=1)
    return shapes


def _list_mid_block(name: str, channels: int, *, values: Mapping[str, Any]) -> Shapes:
    shapes: Shapes = {}
    for k in range(2):
        shapes |= _list_resnet(f"{name}.resnets.{k}", channels, channels)
    if values["mid_block_add_attention"]:
        attention = f"{name}.attentions.0"
        shapes |= _norm(f"{attention}.group_norm", channels)
        for layer in ("to_q", "to_k", "to_v", "to_out.0"):
            shapes |= _linear(f"{attention}.{layer}", channels, channels)
    return shapes
