"""The prompts of a run as embeddings: which are known, from memory or disk, and which still need an encoder.

Knows tokenizers and what embeddings depend on; loads no encoder. Shapes: pooled (1, P), sequence (1, T, C), in RAM.
"""

from collections.abc import Sequence

import fluxcli
from fluxcli.engine import prompt_cache as embeddings
from fluxcli.engine import sampling
from fluxcli.engine.prompt_cache import Embeddings
from fluxcli.plan.machine import Hardware
from fluxcli.plan.placement import MemoryPlan
from fluxcli.request.fields import GenerationRequest
from quant.checkpoint import TEXT_ENCODERS, Checkpoint
from quant.lazy import Tensor, torch
from quant.lora import Adapter

KEPT = 64  # embeddings in RAM: 4 MiB each


class Texts:
    """Embeddings by key; a key stands for everything that they depend on."""

    def __init__(self, checkpoint: Checkpoint, plan: MemoryPlan, machine: Hardware, *, cache: bool) -> None:
        """`cache` reads and keeps them on disk, too."""
        self.cache = cache
        self._folder = checkpoint.folder
        self._depends = {
            "weights": checkpoint.text_encoder_fingerprint, "dtypes": [plan.dtypes[name] for name in TEXT_ENCODERS],
            "packed": str(plan.spec), "device": [machine.kind, machine.name, machine.capability],
            "cpu": torch.backends.cpu.get_cpu_capability() if machine.kind == "cpu" else "",
        }  # fmt: skip
        self._known: dict[str, Embeddings] = {}
        self._waiting: dict[str, tuple[Tensor, str, Tensor]] = {}  # T5's ids, lost text, pooled
        self._ids: dict[str, tuple[Tensor, str]] = {}
        self._tokenizers: tuple | None = None

    def key(self, request: GenerationRequest, adapters: Sequence[Adapter]) -> str:
        """The key of a request's embeddings."""
        acting = [[each.identity, each.scale] for each in adapters if any(map(each.numel, TEXT_ENCODERS))]
        what = {"prompt": request.prompt, "text_tokens": request.text_tokens, "adapters": acting}
        return embeddings.key_of(**self._depends, **what, versions=fluxcli.versions())

    def known(self, key: str) -> bool:
        """Whether no encoder is needed for the key; looks on the disk where that is allowed."""
        if key not in self._known and self.cache and (found := embeddings.read(key)):
            self._keep(key, found)
        return key in self._known or key in self._waiting

    @property
    def ready(self) -> bool:
        """Whether the tokenizers are loaded."""
        return self._tokenizers is not None

    def tokenize(self, key: str, request: GenerationRequest) -> Tensor:
        """CLIP's token ids (1, 77) of the prompt; T5's wait until `waiting`. Raises `CheckpointError`."""
        self._tokenizers = self._tokenizers or sampling.tokenizers(self._folder)
        clip_ids, t5_ids, lost = sampling.tokenize(self._tokenizers, request.prompt, request.text_tokens)
        self._ids[key] = t5_ids, lost
        return clip_ids

    def add_pooled(self, key: str, pooled: Tensor) -> None:
        """What CLIP made of the prompt."""
        self._waiting[key] = (*self._ids.pop(key), pooled.cpu())

    def waiting(self, key: str) -> "Tensor | None":
        """T5's token ids (1, text_tokens) of a prompt that waits for it."""
        return self._waiting[key][0] if key in self._waiting else None

    def add_sequence(self, key: str, sequence: Tensor) -> None:
        """What T5 made of the prompt: it is known now."""
        _, lost, pooled = self._waiting.pop(key)
        self._keep(key, Embeddings(pooled, sequence.cpu(), lost))
        if self.cache and sampling.is_finite(pooled) and sampling.is_finite(sequence):  # else a fault would stay
            embeddings.write(key, self._known[key])

    def of(self, key: str) -> Embeddings:
        """The embeddings of a known prompt."""
        self._keep(key, self._known[key])
        return self._known[key]

    def _keep(self, key: str, found: Embeddings) -> None:
        self._known.pop(key, None)
        self._known[key] = found  # the last used is the last
        while len(self._known) > KEPT:
            self._known.pop(next(iter(self._known)))
