"""Prompt to embeddings: CLIP-L's pooled vector and T5-XXL's sequence, by transformers' own classes.

Knows nothing of pictures. Padding is not masked in FLUX.1, so the T5 length changes the picture.
"""

from dataclasses import dataclass
from pathlib import Path

from fluxcli import classes
from fluxcli.loader import refusing
from quant.lazy import nn, torch


@dataclass(frozen=True)
class Tokens:
    """Token ids: `clip` (1, 77), `t5` (1, text_tokens); `lost` is the prompt's text that T5 will not see."""

    clip: "torch.Tensor"
    t5: "torch.Tensor"
    lost: str


def tokenize(folder: Path, prompt: str, text_tokens: int) -> Tokens:
    """Tokenize `prompt` for both encoders with the tokenizers in a model folder; raises `CheckpointError`."""
    opened = []
    for kind, path in zip(classes.tokenizers(), (folder / "tokenizer", folder / "tokenizer_2"), strict=True):
        with refusing("cannot read the tokenizer", path):
            opened.append(kind.from_pretrained(path, local_files_only=True))
    clip, t5 = opened
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    ids = t5(prompt, max_length=text_tokens, **options).input_ids
    every = t5(prompt, truncation=False).input_ids
    lost = t5.decode(every[text_tokens - 1 :], skip_special_tokens=True) if len(every) > text_tokens else ""
    return Tokens(clip(prompt, max_length=77, **options).input_ids, ids, lost)


def pooled_embedding(text_encoder: "nn.Module", ids: "torch.Tensor") -> "torch.Tensor":
    """CLIP-L's pooled output (1, P)."""
    return text_encoder(ids.to(text_encoder.device)).pooler_output


def sequence_embedding(text_encoder_2: "nn.Module", ids: "torch.Tensor") -> "torch.Tensor":
    """T5-XXL's last hidden state (1, text_tokens, C)."""
    return text_encoder_2(ids.to(text_encoder_2.device))[0]
