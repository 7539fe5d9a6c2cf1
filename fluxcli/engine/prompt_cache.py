"""Prompt embeddings on disk: a prompt that was encoded before needs neither T5 nor CLIP.

Knows nothing of prompts or encoders: what an entry depends on is in its key, and no prompt is in its file, except what
was lost of it. Bounded by `LIMIT_BYTES`, least recently used first. Everything here may vanish, be damaged or be
unwritable at any time: then there is no entry. A reader never waits, and sees whole entries only.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import time
from dataclasses import dataclass
from pathlib import Path

from fluxcli import paths
from quant.files import write_atomically
from quant.lazy import Tensor, torch

LIMIT_BYTES = 1 << 30  # 256 prompts of 512 tokens in bf16
SUFFIX, DESCRIPTION = ".safetensors", "flux_embeddings"
LEFTOVER_S = 3600  # a temporary file that old is nobody's any more


@dataclass(frozen=True)
class Embeddings:
    """What the text encoders made of one prompt; `lost` is the text that T5 did not see, for a notice."""

    pooled: Tensor  # (1, P)
    sequence: Tensor  # (1, T, C)
    lost: str = ""


def folder() -> Path:
    """Where the entries are; it may not exist."""
    return paths.cache_folder() / "embeddings"


def key_of(**parts: object) -> str:
    """The key of the entry that depends on these parts, which JSON can hold: text, tokenizer, encoders, dtypes."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def read(key: str) -> Embeddings | None:
    """The entry of that key, on the CPU, bit for bit as written; None where there is none. A damaged one is deleted."""
    path = folder() / f"{key}{SUFFIX}"
    try:
        with open(path, "rb", opener=_open) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_size > LIMIT_BYTES:
                raise ValueError("no entry")
            data = file.read()
        found = _parse(key, data)
    except OSError as error:  # mostly of a moment, and the entry is good; but what is no file is in the way
        if error.errno in (errno.EISDIR, errno.ELOOP):
            _delete(path)
        return None
    except Exception:  # noqa: BLE001 - a file can be wrong in any way
        _delete(path)
        return None
    with contextlib.suppress(OSError):
        os.utime(path)
    return found


def write(key: str, embeddings: Embeddings) -> None:
    """Keep an entry, and delete the oldest ones beyond the limit. Nothing happens where that fails."""
    from safetensors.torch import save

    path, options = folder() / f"{key}{SUFFIX}", {"copy": True, "memory_format": torch.contiguous_format}
    pooled, sequence = (each.to("cpu", **options) for each in (embeddings.pooled, embeddings.sequence))
    kept = Embeddings(pooled, sequence, embeddings.lost)
    assert _is_sound(kept), "these are no embeddings"
    data = save({"pooled": pooled, "sequence": sequence}, {DESCRIPTION: _description(key, kept)})
    if len(data) > LIMIT_BYTES:
        return
    with contextlib.suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomically(path, data, place=os.replace)
    _evict(path)


def entries() -> list[tuple[float, int, Path]]:
    """(modification time, bytes, path) of the entries and of what killed writers left, oldest first."""
    found = []
    with contextlib.suppress(OSError), os.scandir(folder()) as files:
        for file in files:
            if re.fullmatch(r"[0-9a-f]{64}\.safetensors|\.flux-[0-9a-f]+\.tmp", file.name):  # others are not ours
                with contextlib.suppress(OSError):
                    status = file.stat(follow_symlinks=False)
                    found.append((status.st_mtime, status.st_size, Path(file.path)))
    return sorted(found)


def clear() -> tuple[int, int]:
    """Delete every entry; returns (how many, bytes) are gone."""
    gone = [size for _, size, path in entries() if _delete(path)]
    return len(gone), sum(gone)


def _open(path: str, flags: int) -> int:
    """Open for reading without following a link or waiting for a pipe."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))


def _parse(key: str, data: bytes) -> Embeddings:
    """The entry of that key in a file's bytes; raises any Exception for anything else."""
    from safetensors.torch import load

    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    description, tensors = header["__metadata__"][DESCRIPTION], load(data)
    found = Embeddings(tensors.pop("pooled"), tensors.pop("sequence"), json.loads(description)["lost"])
    if tensors or not _is_sound(found) or description != _description(key, found):
        raise ValueError("damaged")
    return found


def _is_sound(embeddings: Embeddings) -> bool:
    """Whether shapes and dtypes are those of one prompt's embeddings."""
    pooled, sequence = embeddings.pooled, embeddings.sequence
    known = all(each.dtype in (torch.float32, torch.float16, torch.bfloat16) for each in (pooled, sequence))
    return known and (pooled.ndim, sequence.ndim) == (2, 3) and len(pooled) == len(sequence) == 1


def _description(key: str, embeddings: Embeddings) -> str:
    """What stands in the file beside the tensors: the lost text, and a digest of it, the key and every bit."""
    digest = hashlib.sha256(json.dumps([key, embeddings.lost]).encode())
    for each in (embeddings.pooled, embeddings.sequence):
        digest.update(f"{each.dtype} {list(each.shape)}".encode())
        digest.update(each.flatten().view(torch.uint8).numpy())
    return json.dumps({"lost": embeddings.lost, "sha256": digest.hexdigest()})


def _evict(kept: Path) -> None:
    """Delete old leftovers, then the oldest entries but `kept`, until the folder is within the limit."""
    files, now = [], time.time()
    for seconds, size, path in entries():
        leftover = path.suffix != SUFFIX
        if not (leftover and abs(now - seconds) > LEFTOVER_S and _delete(path)):
            files.append((size, path, leftover or path == kept))
    used = sum(size for size, _, _ in files)
    for size, path, stays in files:
        if used > LIMIT_BYTES and not stays and _delete(path):
            used -= size


def _delete(path: Path) -> bool:
    """Delete whatever has that name; returns whether it is gone."""
    with contextlib.suppress(OSError):
        path.unlink()
    if os.path.isdir(path):
        shutil.rmtree(path, ignore_errors=True)  # follows no link
    return not os.path.lexists(path)
