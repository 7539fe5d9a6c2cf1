"""The model, scheduler and tokenizer classes of diffusers and transformers, imported one by one when first used.

`from diffusers import FluxPipeline` spends most of its seconds on what a picture never uses: torch._dynamo,
torch.distributed.tensor with sympy, other models. `_frugally` leaves these out while the modules are imported; both
libraries have code for environments without them, and torch.compile imports the real torch._dynamo when it is asked.
"""

import contextlib
import importlib
import sys
import types
from collections.abc import Iterator
from functools import partial
from pathlib import Path


def time_text_embed(*, guidance: bool) -> type:
    name = "CombinedTimestepGuidanceTextProjEmbeddings" if guidance else "CombinedTimestepTextProjEmbeddings"
    return _class(f"diffusers.models.embeddings.{name}")


def _class(path: str) -> type:
    """Import a class; once more in the plain way where a library version cannot do without what was left out."""
    module, _, name = path.rpartition(".")
    try:
        with _frugally():
            return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, RuntimeError):
        return getattr(importlib.import_module(module), name)


transformer = partial(_class, "diffusers.models.transformers.transformer_flux.FluxTransformer2DModel")
single_block = partial(_class, "diffusers.models.transformers.transformer_flux.FluxSingleTransformerBlock")
vae = partial(_class, "diffusers.models.autoencoders.autoencoder_kl.AutoencoderKL")
scheduler = partial(_class, "diffusers.schedulers.scheduling_flow_match_euler_discrete.FlowMatchEulerDiscreteScheduler")
clip = partial(_class, "transformers.models.clip.modeling_clip.CLIPTextModel")
t5 = partial(_class, "transformers.models.t5.modeling_t5.T5EncoderModel")
clip_tokenizer = partial(_class, "transformers.models.clip.tokenization_clip.CLIPTokenizer")
t5_tokenizer = partial(_class, "transformers.models.t5.tokenization_t5.T5Tokenizer")


@contextlib.contextmanager
def _frugally() -> Iterator[None]:
    """Imports inside see no torch.distributed, none that are merely installed, and a torch._dynamo without effect."""
    import torch.compiler
    import torch.distributed

    dynamo = types.ModuleType("torch._dynamo")
    dynamo.__path__ = [str(Path(torch.__file__).parent / "_dynamo")]
    for name in ("allow_in_graph", "assume_constant_result", "disable"):  # what class bodies take from it: decorators
        setattr(dynamo, name, lambda function=None, *_, **__: function or (lambda decorated: decorated))
    instead = {"bitsandbytes": None, "accelerate": None, "optimum": None, "peft": None, "torch._dynamo": dynamo}
    hidden = {name: module for name, module in instead.items() if name not in sys.modules}
    available, torch.distributed.is_available = torch.distributed.is_available, lambda: False
    sys.modules.update(hidden)
    try:
        yield
    finally:
        torch.distributed.is_available = available
        for name in hidden:
            sys.modules.pop(name, None)
        if dynamo in hidden.values():
            vars(torch).pop("_dynamo", None)
