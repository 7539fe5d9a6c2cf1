"""Classes of diffusers and transformers for models, scheduler and tokenizers, imported lazily.

`from diffusers import FluxPipeline` spends most of its seconds on what a picture never uses:
torch._dynamo, torch.distributed.tensor with sympy, other models. `_frugal_imports` leaves these out
while the modules are imported; both libraries have code for environments without them, and
torch.compile imports the real torch._dynamo when it is asked. This module knows no model and
imports nothing heavy itself.
"""

import contextlib
import importlib
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Installed or not, no picture uses them. diffusers and transformers look for them at import.
UNUSED_LIBRARIES = ("bitsandbytes", "accelerate", "optimum", "peft")


def transformer() -> type[Any]:
    return _import_class("diffusers.models.transformers.transformer_flux", "FluxTransformer2DModel")


def single_block() -> type[Any]:
    return _import_class(
        "diffusers.models.transformers.transformer_flux", "FluxSingleTransformerBlock"
    )


def time_text_embed(*, guidance: bool) -> type[Any]:
    """What embeds timestep and pooled prompt, and `guidance` where the model takes it."""
    name = "CombinedTimestepTextProjEmbeddings"
    if guidance:
        name = "CombinedTimestepGuidanceTextProjEmbeddings"
    return _import_class("diffusers.models.embeddings", name)


def vae() -> type[Any]:
    return _import_class("diffusers.models.autoencoders.autoencoder_kl", "AutoencoderKL")


def scheduler() -> type[Any]:
    return _import_class(
        "diffusers.schedulers.scheduling_flow_match_euler_discrete",
        "FlowMatchEulerDiscreteScheduler",
    )


def clip() -> type[Any]:
    return _import_class("transformers.models.clip.modeling_clip", "CLIPTextModel")


def t5() -> type[Any]:
    return _import_class("transformers.models.t5.modeling_t5", "T5EncoderModel")


def clip_tokenizer() -> type[Any]:
    return _import_class("transformers.models.clip.tokenization_clip", "CLIPTokenizer")


def t5_tokenizer() -> type[Any]:
    return _import_class("transformers.models.t5.tokenization_t5", "T5Tokenizer")


def _import_class(module: str, name: str) -> type[Any]:
    """Import a class frugally; in the plain way where a library's version cannot do without."""
    try:
        with _frugal_imports():
            return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, RuntimeError):
        return getattr(importlib.import_module(module), name)


@contextlib.contextmanager
def _frugal_imports() -> Iterator[None]:
    """Imports inside see neither torch.distributed nor unused libraries.

    In place of torch._dynamo they see a module whose decorators do nothing. What was imported
    before stays as it is.
    """
    import torch.compiler
    import torch.distributed

    dynamo = _make_idle_dynamo()
    replaced: dict[str, types.ModuleType | None] = {"torch._dynamo": dynamo}
    replaced |= dict.fromkeys(UNUSED_LIBRARIES)  # None: importing it raises ImportError
    hidden = {name: module for name, module in replaced.items() if name not in sys.modules}
    is_available = torch.distributed.is_available
    torch.distributed.is_available = lambda: False
    for name, module in hidden.items():
        sys.modules[name] = module  # type: ignore[assignment]  # None is what Python reads, too
    try:
        yield
    finally:
        torch.distributed.is_available = is_available
        for name in hidden:
            sys.modules.pop(name, None)
        if "torch._dynamo" in hidden:
            vars(torch).pop("_dynamo", None)


def _make_idle_dynamo() -> types.ModuleType:
    """A torch._dynamo with the decorators that class bodies take from it, without effect."""
    import torch

    dynamo = types.ModuleType("torch._dynamo")
    # Its submodules can be found, should a library ask for one.
    dynamo.__path__ = [str(Path(torch.__file__).parent / "_dynamo")]
    for name in ("allow_in_graph", "assume_constant_result", "disable"):
        setattr(dynamo, name, _decorate_with_nothing)
    return dynamo


def _decorate_with_nothing(
    function: Callable[..., Any] | None = None, *_: object, **__: object
) -> Callable[..., Any]:
    """Stand for a decorator, with or without arguments, that returns what it decorates."""
    if function is not None:
        return function
    return lambda decorated: decorated
