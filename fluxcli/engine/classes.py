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

from fluxcli.errors import find_broken_library, name_package
from quant.errors import MissingLibrary, is_out_of_memory

MAX_WHY = 120  # characters of a library's error
# Installed or not, no picture uses them. diffusers and transformers look for them at import, and
# one that was built for another torch would break theirs.
UNUSED_LIBRARIES = (
    "accelerate",
    "bitsandbytes",
    "flash_attn",
    "flash_attn_3",
    "flax",
    "jax",
    "k_diffusion",
    "librosa",
    "onnxruntime",
    "optimum",
    "peft",
    "sageattention",
    "tensorflow",
    "timm",
    "torchaudio",
    "torchao",
    "torchvision",
    "xformers",
)


def transformer() -> type[Any]:
    return _import_class("diffusers.models.transformers.transformer_flux", "FluxTransformer2DModel")


def controlnet() -> type[Any]:
    return _import_class("diffusers.models.controlnets.controlnet_flux", "FluxControlNetModel")


def double_block() -> type[Any]:
    return _import_class("diffusers.models.transformers.transformer_flux", "FluxTransformerBlock")


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


def tiny_vae() -> type[Any]:
    return _import_class("diffusers.models.autoencoders.autoencoder_tiny", "AutoencoderTiny")


def scheduler() -> type[Any]:
    return _import_class(
        "diffusers.schedulers.scheduling_flow_match_euler_discrete",
        "FlowMatchEulerDiscreteScheduler",
    )


def clip() -> type[Any]:
    return _import_class("transformers.models.clip.modeling_clip", "CLIPTextModel")


def t5() -> type[Any]:
    return _import_class("transformers.models.t5.modeling_t5", "T5EncoderModel")


def siglip() -> type[Any]:
    return _import_class("transformers.models.siglip.modeling_siglip", "SiglipVisionModel")


def redux_embedder() -> type[Any]:
    return _import_class("diffusers.pipelines.flux.modeling_flux", "ReduxImageEncoder")


def clip_tokenizer() -> type[Any]:
    return _import_class("transformers.models.clip.tokenization_clip", "CLIPTokenizer")


def t5_tokenizer() -> type[Any]:
    return _import_class("transformers.models.t5.tokenization_t5", "T5Tokenizer")


def _import_class(module: str, name: str) -> type[Any]:
    """Import a class frugally; in the plain way where a library's version cannot do without.

    Raises `MissingLibrary` where neither succeeds, whatever a broken library raises.
    """
    try:
        with _frugal_imports():
            if sys.flags.optimize >= 2 and module.startswith("transformers."):
                # Its decorator reads the docstrings, and Python has left them out.
                utils: Any = importlib.import_module("transformers.utils")
                utils.auto_docstring = _decorate_with_nothing
            return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, RuntimeError) as error:
        frugal_error = error
    except Exception as error:
        raise _explain_import(error, module) from error
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:
        raise _explain_import(frugal_error, module) from error


def _explain_import(error: Exception, module: str) -> Exception:
    """What to raise for an error at the import of a library's module."""
    if is_out_of_memory(error):
        return error
    library = find_broken_library(error) or module.partition(".")[0]
    why = f"{type(error).__name__}: {str(error)[:MAX_WHY]}"
    hint = f"pip install --force-reinstall {name_package(library)}"
    return MissingLibrary(f"{library} cannot be imported", why=why, hint=hint)


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
