"""Prompt embeddings on disk: a prompt that was encoded before needs neither T5 nor CLIP.

Knows nothing of prompts or encoders: what an entry depends on is in its key, and no prompt is in
its file, except the parts of it that T5 did not read. The folder is the user's own, within
`LIMIT_BYTES`; the entries that were used longest ago are deleted first. An entry that cannot be
read, or whose digest is wrong, is deleted and counts as absent.
torch is imported inside functions, so that `flux cache` lists and deletes without it.
"""

import contextlib
import hashlib
import json
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fluxcli import kept_files, paths
from fluxcli.kept_files import KeptFile
from quant.files import read_small_file, write_atomically

if TYPE_CHECKING:
    from torch import Tensor

LIMIT_BYTES = 1 << 30  # 256 prompts of 512 tokens in bf16
MAX_ENTRY_BYTES = 64 << 20  # 512 tokens of T5 in float32 take 8 MiB
SUFFIX = ".safetensors"
DESCRIPTION = "flux_embeddings"  # of a file, in its metadata
OURS = re.compile(r"[0-9a-f]{64}\.safetensors|\.flux-[0-9a-f]+\.tmp")  # entries; killed writers'


@dataclass(frozen=True)
class Embeddings:
    """What the text encoders made of one prompt.

    `lost` is the end of it that T5 did not see, `unknown` what T5 had no token for.
    """

    pooled: "Tensor"  # (1, P)
    sequence: "Tensor"  # (1, T, C)
    lost: str = ""
    unknown: str = ""

    def are_finite(self) -> bool:
        """Whether no element is NaN or infinite."""
        return bool(self.pooled.isfinite().all() and self.sequence.isfinite().all())


def folder() -> Path:
    """Where the entries are; it may not exist."""
    return paths.cache_folder() / "embeddings"


def is_linked() -> bool:
    """Whether the folder is linked: then nothing is kept, read or deleted there."""
    return paths.is_linked(folder())


def key_of(**parts: object) -> str:
    """The key of the entry that depends on these parts, which JSON can hold, and on no other."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def read(key: str) -> Embeddings | None:
    """The entry of that key, on the CPU, bit for bit as written; None where there is none.

    A damaged entry is deleted.
    """
    from safetensors.torch import load

    if is_linked():
        return None
    path = folder() / f"{key}{SUFFIX}"
    try:
        data = read_small_file(path, MAX_ENTRY_BYTES)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        description = header["__metadata__"][DESCRIPTION]
        tensors = load(data)
        said = json.loads(description)
        found = Embeddings(**tensors, lost=said["lost"], unknown=said.get("unknown", ""))
        if description != _describe(key, found):
            raise ValueError("damaged")
    except FileNotFoundError:
        return None
    except Exception:  # noqa: BLE001 - a file can be wrong in any way
        kept_files.delete(path)
        return None
    with contextlib.suppress(OSError):  # the folder may be readable only
        os.utime(path)
    return found


def write(key: str, embeddings: Embeddings) -> None:
    """Keep an entry, and delete the oldest beyond the limit. Failing to is no error."""
    from safetensors.torch import save

    if is_linked():
        return
    pooled = embeddings.pooled.detach().cpu().contiguous()
    sequence = embeddings.sequence.detach().cpu().contiguous()
    described = _describe(key, replace(embeddings, pooled=pooled, sequence=sequence))
    data = save({"pooled": pooled, "sequence": sequence}, {DESCRIPTION: described})
    with contextlib.suppress(OSError):
        folder().mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomically(folder() / f"{key}{SUFFIX}", data, place=os.replace)
    kept_files.prune(list_entries(), limit_bytes=LIMIT_BYTES)


def list_entries() -> list[KeptFile]:
    """The entries, and what killed writers left, by when they were used: the oldest first."""
    return kept_files.list_files(folder(), OURS)


def clear() -> list[KeptFile]:
    """Delete every entry; returns those that are gone."""
    return kept_files.clear(list_entries())


def _describe(key: str, embeddings: Embeddings) -> str:
    """What stands in the file beside the tensors: the texts, and a digest of everything."""
    import torch

    texts = {"lost": embeddings.lost}
    if embeddings.unknown:
        texts["unknown"] = embeddings.unknown
    digest = hashlib.sha256(json.dumps([key, *texts.values()]).encode())
    for tensor in (embeddings.pooled, embeddings.sequence):
        digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return json.dumps(texts | {"sha256": digest.hexdigest()})
