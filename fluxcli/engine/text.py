"""Prompts as token ids and as embeddings that are known already, from memory or from disk.

Knows the tokenizers and everything that embeddings depend on; loads no text encoder (see `encode`).
Shapes: pooled embeddings (1, P), sequence embeddings (1, T, C), both in RAM.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fluxcli
from fluxcli.engine import bundled, classes, prompt_cache
from fluxcli.engine.loader import refusing
from fluxcli.engine.prompt_cache import Embeddings
from fluxcli.engine.recent import Recent
from fluxcli.plan.machine import Hardware
from fluxcli.plan.placement import MemoryPlan
from fluxcli.request import syntax
from fluxcli.request.fields import GenerationRequest
from quant.checkpoint import TEXT_ENCODERS, Checkpoint
from quant.config import DOWNLOAD_AGAIN
from quant.errors import CheckpointError
from quant.linear import find_multiply
from quant.lora import Adapter
from quant.spec import MULTIPLIED_IN_TEXT_ENCODER

KEPT_PROMPTS = 64  # in RAM, 4 MiB each at the published size
CLIP_TOKENS = 77
# Rows of the embeddings, where a config does not say how many: the published ones.
VOCABULARY_SIZES = {"text_encoder": 49408, "text_encoder_2": 32128}


class Tokenizers(NamedTuple):
    """CLIP's tokenizer and T5's, as transformers has them."""

    clip: Any
    t5: Any


class Text(NamedTuple):
    """A text that is to be encoded, and everything of a request that its embeddings depend on."""

    prompt: str
    text_tokens: int
    adapters: tuple[Adapter, ...] = ()


class TokenIds(NamedTuple):
    """A prompt for both text encoders.

    `lost` is the end of it that T5 will not see, `unknown` what T5 has no token for.
    """

    clip: Tensor  # (1, 77)
    t5: Tensor  # (1, text_tokens)
    lost: str
    unknown: str


def load_tokenizers(folder: Path) -> Tokenizers:
    """The tokenizers of a model's folder. Raises `CheckpointError`."""
    with refusing("cannot read the tokenizer", folder / "tokenizer"):
        clip = classes.clip_tokenizer().from_pretrained(folder / "tokenizer", local_files_only=True)
    with refusing("cannot read the tokenizer", folder / "tokenizer_2"):
        t5 = classes.t5_tokenizer().from_pretrained(folder / "tokenizer_2", local_files_only=True)
    return Tokenizers(clip, t5)


def tokenize(tokenizers: Tokenizers, prompt: str, text_tokens: int) -> TokenIds:
    """The token ids of a prompt, padded to 77 and to `text_tokens`.

    FLUX.1 masks no padding, so that `text_tokens` changes the picture.
    """
    clip, t5 = tokenizers
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    clip_ids = clip(prompt, max_length=CLIP_TOKENS, **options).input_ids
    t5_ids = t5(prompt, max_length=text_tokens, **options).input_ids
    every = t5(prompt, truncation=False, return_offsets_mapping=True)
    every_id = every.input_ids
    unknown = [
        prompt[start:stop]
        for token_id, (start, stop) in zip(every_id, every.offset_mapping, strict=True)
        if token_id == t5.unk_token_id
    ]
    lost = ""
    if len(every_id) > text_tokens:  # the last id that fits is the end token
        lost = t5.decode(every_id[text_tokens - 1 :], skip_special_tokens=True)
    return TokenIds(clip_ids, t5_ids, lost, " ".join(dict.fromkeys(unknown)))


def _check_ids(ids: Tensor, size: int, folder: Path) -> None:
    """Raise `CheckpointError` where a tokenizer gives an id beyond the encoder's embedding."""
    largest = int(ids.max())
    if largest >= size:
        why = f"it gives the token {largest}, and the text encoder knows {size}"
        what = "the tokenizer is of another model"
        raise CheckpointError(what, folder, why=why, hint=DOWNLOAD_AGAIN)


class PromptEncoder:
    """Embeddings of prompts by key; a key stands for everything that they depend on.

    Ask `find` for those of a key. Where it has none, let the text encoders compute them from what
    `tokenize` gives, and hand them to `keep`.
    """

    def __init__(
        self, checkpoint: Checkpoint, plan: MemoryPlan, hardware: Hardware, *, on_disk: bool
    ) -> None:
        """With `on_disk` embeddings are read from the prompt cache and written to it, too."""
        self.on_disk = on_disk
        self.is_bundled = bundled.is_bundled(checkpoint.folder)
        self._folder = checkpoint.folder
        self._depends_on = {
            "weights": checkpoint.text_encoder_fingerprint,
            "dtypes": [plan.dtypes[name] for name in TEXT_ENCODERS],
            "packed": str(plan.spec),
            "device": [hardware.kind, hardware.name, hardware.capability],
            "cpu": "",
        }
        if hardware.kind == "cpu":
            self._depends_on["cpu"] = torch.backends.cpu.get_cpu_capability()
        t5_scheme = checkpoint.components["text_encoder_2"].precision
        if plan.spec and not t5_scheme:
            t5_scheme = plan.spec.text_encoder
        if t5_scheme in MULTIPLIED_IN_TEXT_ENCODER:
            self._depends_on["multiply"] = find_multiply(t5_scheme, plan.device)
        self._vocabulary = {
            name: checkpoint.components[name].config.get("vocab_size", size)
            for name, size in VOCABULARY_SIZES.items()
        }
        self._known: Recent[str, Embeddings] = Recent(KEPT_PROMPTS)
        self._tokenizers: Tokenizers | None = None

    @property
    def has_tokenizers(self) -> bool:
        """Whether the tokenizers are loaded, which takes a second."""
        return self._tokenizers is not None

    def key_of(self, text: Text) -> str:
        """The key of a text's embeddings."""
        acting = [
            [adapter.identity, adapter.scale]
            for adapter in text.adapters
            if any(adapter.numel(name) for name in TEXT_ENCODERS)
        ]
        return prompt_cache.key_of(
            **self._depends_on,
            prompt=text.prompt,
            text_tokens=text.text_tokens,
            adapters=acting,
            versions=fluxcli.versions(),
        )

    def find(self, key: str) -> Embeddings | None:
        """The embeddings of that key from memory, or from disk where that is allowed."""
        found = self._known.get(key)
        if found is None and self.on_disk:
            found = prompt_cache.read(key)
            if found:
                self._known.keep(key, found)
        return found

    def tokenize(self, text: Text) -> TokenIds:
        """The token ids of a text; `CheckpointError` for bad tokenizer files."""
        if self._tokenizers is None:
            self._tokenizers = load_tokenizers(self._folder)
        with refusing("cannot use the tokenizers", self._folder):
            ids = tokenize(self._tokenizers, text.prompt, text.text_tokens)
        _check_ids(ids.clip, self._vocabulary["text_encoder"], self._folder / "tokenizer")
        _check_ids(ids.t5, self._vocabulary["text_encoder_2"], self._folder / "tokenizer_2")
        return ids

    def list_remarks(self, requests: Sequence[GenerationRequest]) -> Iterator[str]:
        """Yield what the authors of requests should know of their prompts and sizes, each once."""
        for request in requests:
            yield from syntax.list_notices(request.prompt)
            yield from syntax.list_notices(request.negative_prompt or "")
        if self.is_bundled:
            yield from bundled.list_remarks(requests)

    def keep(self, key: str, embeddings: Embeddings) -> None:
        """Keep what the encoders made; on disk only if it is finite, so that no fault stays."""
        self._known.keep(key, embeddings)
        if self.on_disk and embeddings.are_finite():
            prompt_cache.write(key, embeddings)
