"""The model, scheduler and tokenizer classes of diffusers and transformers, imported one by one when first used.

`from diffusers import FluxPipeline` costs seconds, most of it for models that are never used; these modules cost
a good part of that less.
"""


def transformer() -> type:
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

    return FluxTransformer2DModel


def time_text_embed(*, guidance: bool) -> type:
    from diffusers.models import embeddings

    if guidance:
        return embeddings.CombinedTimestepGuidanceTextProjEmbeddings
    return embeddings.CombinedTimestepTextProjEmbeddings


def vae() -> type:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    return AutoencoderKL


def scheduler() -> type:
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler


def clip() -> tuple[type, type]:
    from transformers.models.clip.configuration_clip import CLIPTextConfig
    from transformers.models.clip.modeling_clip import CLIPTextModel

    return CLIPTextModel, CLIPTextConfig


def t5() -> tuple[type, type]:
    from transformers.models.t5.configuration_t5 import T5Config
    from transformers.models.t5.modeling_t5 import T5EncoderModel

    return T5EncoderModel, T5Config


def tokenizers() -> tuple[type, type]:
    """(CLIP's, T5's)."""
    from transformers.models.clip.tokenization_clip import CLIPTokenizer
    from transformers.models.t5.tokenization_t5 import T5Tokenizer

    return CLIPTokenizer, T5Tokenizer
