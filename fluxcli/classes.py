"""The model, scheduler and tokenizer classes of diffusers and transformers, imported one by one when first used.

`from diffusers import FluxPipeline` spends most of its seconds on what a picture never uses: torch._dynamo,
torch.distributed.tensor with sympy, other models. `_frugally` leaves these out while the modules are imported; both
libraries have code for environments without them, and torch.compile imports the real torch._dynamo when it is asked.
"""

import contextlib
import importlib
import sys
import types
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path


def time_text_embed(*, guidance: bool) -> type:
    name = "CombinedTimestepGuidanceTextProjEmbeddings" if guidance else "CombinedTimestepTextProjEmbeddings"
    return _class("diffusers.models.embeddings", name)


def clip() -> tuple[type, type]:
    """(model, config)."""
    at = "transformers.models.clip"
    return _class(f"{at}.modeling_clip", "CLIPTextModel"), _class(f"{at}.configuration_clip", "CLIPTextConfig")


def t5() -> tuple[type, type]:
    """(model, config)."""
    at = "transformers.models.t5"
    return _class(f"{at}.modeling_t5", "T5EncoderModel"), _class(f"{at}.configuration_t5", "T5Config")


def tokenizers() -> tuple[type, type]:
    """(CLIP's, T5's)."""
    clip_class = _class("transformers.models.clip.tokenization_clip", "CLIPTokenizer")
    return clip_class, _class("transformers.models.t5.tokenization_t5", "T5Tokenizer")


UNUSED = ("bitsandbytes", "accelerate", "optimum")  # the libraries import these where they are installed


def _class(module: str, name: str) -> type:
    """Import `name`; once more in the plain way where a library version cannot do without what was left out."""
    try:
        with _frugally():
            return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, RuntimeError):
        return getattr(importlib.import_module(module), name)


transformer = partial(_class, "diffusers.models.transformers.transformer_flux", "FluxTransformer2DModel")
single_block = partial(_class, "diffusers.models.transformers.transformer_flux", "FluxSingleTransformerBlock")
vae = partial(_class, "diffusers.models.autoencoders.autoencoder_kl", "AutoencoderKL")
scheduler = partial(
    _class, "diffusers.schedulers.scheduling_flow_match_euler_discrete", "FlowMatchEulerDiscreteScheduler"
)


@contextlib.contextmanager
def _frugally() -> Iterator[None]:
    """Imports inside see no torch.distributed, none of `UNUSED`, and a torch._dynamo of decorators without effect."""
    import torch
    import torch.compiler
    import torch.distributed

    loaded = "torch._dynamo" in sys.modules
    available = torch.distributed.is_available
    torch.distributed.is_available = lambda: False
    hidden = [name for name in UNUSED if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))
    if not loaded:
        stand_in = types.ModuleType("torch._dynamo")
        stand_in.__path__ = [str(Path(torch.__file__).parent / "_dynamo")]
        for name in ("allow_in_graph", "assume_constant_result", "disable"):  # what class bodies take from it
            setattr(stand_in, name, _no_decorator)
        sys.modules["torch._dynamo"] = stand_in
    try:
        yield
    finally:
        torch.distributed.is_available = available
        for name in hidden:
            del sys.modules[name]
        if not loaded:
            sys.modules.pop("torch._dynamo", None)
            vars(torch).pop("_dynamo", None)


def _no_decorator(function: Callable | None = None, *_: object, **__: object) -> Callable:
    return function if function is not None else lambda decorated: decorated
