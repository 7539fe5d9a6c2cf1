"""The tiny model's shape: the sizes of its modules, and the modules themselves, random.

The classes are the stock ones of diffusers and transformers: FLUX.1 [dev]'s architecture with small
numbers. Knows nothing about training, files of weights or pictures; of tokenizers only how many
words they have.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from diffusers import AutoencoderKL, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

SCHEDULER = {
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 1.15,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
TRANSFORMER = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 2,
    "num_single_layers": 5,
    "attention_head_dim": 32,
    "num_attention_heads": 4,
    "joint_attention_dim": 128,
    "pooled_projection_dim": 96,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 14, 14),
}
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (16, 32, 32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "latent_channels": 16,
    "sample_size": 128,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "mid_block_add_attention": True,
    "force_upcast": True,
    "scaling_factor": 1.0,
    "shift_factor": 0.0,
}
CLIP = {
    "hidden_size": 96,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "projection_dim": 96,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
}
T5 = {
    "d_model": 128,
    "d_kv": 32,
    "d_ff": 256,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "feed_forward_proj": "gated-gelu",
    "relative_attention_num_buckets": 32,
    "decoder_start_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}


@dataclass
class Parts:
    """The four modules, named as in the published folder."""

    text_encoder: CLIPTextModel
    text_encoder_2: T5EncoderModel
    transformer: FluxTransformer2DModel
    vae: AutoencoderKL


def read_vocabulary_sizes(tokenizers: Path) -> tuple[int, int]:
    """(CLIP, T5) vocabulary sizes of the tokenizers below `tokenizers`."""
    clip = json.loads((tokenizers / "tokenizer/vocab.json").read_text(encoding="utf-8"))
    t5 = json.loads((tokenizers / "tokenizer_2/tokenizer.json").read_text(encoding="utf-8"))
    return len(clip), len(t5["model"]["vocab"])


def build(tokenizers: Path) -> Parts:
    """Random float32 modules of the final shape; the vocabulary sizes come from the tokenizers."""
    clip_size, t5_size = read_vocabulary_sizes(tokenizers)
    clip = CLIPTextConfig(
        vocab_size=clip_size,
        bos_token_id=clip_size - 2,
        eos_token_id=clip_size - 1,
        pad_token_id=clip_size - 1,
        **CLIP,
    )
    return Parts(
        text_encoder=CLIPTextModel(clip),
        text_encoder_2=T5EncoderModel(T5Config(vocab_size=t5_size, **T5)),
        transformer=FluxTransformer2DModel(**TRANSFORMER),
        vae=AutoencoderKL(**VAE),
    )
