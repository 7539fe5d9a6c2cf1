"""Pictures that came without a file, from stdin or from Python: kept in the user's cache by hash.

So a worker finds them, and so does `flux replay` as long as they are there. The folder is the
user's own and within `LIMIT_BYTES`; what was used longest ago is deleted first. Knows nothing of
what is in the pictures. Stdlib only. Sizes are in bytes.
"""

import contextlib
import hashlib
import os
import re
from pathlib import Path
from typing import NamedTuple

from fluxcli import paths
from fluxcli.errors import OutputError, explain_write
from quant.files import write_atomically

LIMIT_BYTES = 1 << 30
OURS = re.compile(r"[0-9a-f]{64}|\.flux-[0-9a-f]+\.tmp")  # pictures; killed writers'


class Kept(NamedTuple):
    """A file of the folder."""

    used_s: float  # its modification time: when it was last given
    size_bytes: int
    path: Path


def folder() -> Path:
    """Return where the pictures are; it may not exist."""
    return paths.cache_folder() / "inputs"


def keep(data: bytes) -> Path:
    """Return the file of a picture's bytes, which only this user can read.

    Raises `OutputError` where it cannot be written.
    """
    path = folder() / hashlib.sha256(data).hexdigest()
    hint = "give the picture as a file"
    if paths.is_linked(folder()):
        raise OutputError("cannot keep the picture", which=folder(), why="it is a link", hint=hint)
    try:
        folder().mkdir(mode=0o700, parents=True, exist_ok=True)
        os.chmod(folder(), 0o700)
        if path.is_file() and path.read_bytes() == data:
            os.utime(path)
        else:
            write_atomically(path, data, place=os.replace)
    except OSError as error:
        why = explain_write(error)
        raise OutputError("cannot keep the picture", which=folder(), why=why, hint=hint) from error
    _prune(path)
    return path


def find(sha256: str) -> Path | None:
    """Return the kept picture of that hash; None where there is none."""
    path = folder() / sha256
    if not OURS.fullmatch(sha256) or paths.is_linked(folder()) or not path.is_file():
        return None
    return path


def list_kept() -> list[Kept]:
    """Return the kept pictures, and what killed writers left, the longest unused first."""
    found: list[Kept] = []
    if paths.is_linked(folder()):
        return found
    with contextlib.suppress(OSError), os.scandir(folder()) as files:
        for file in files:
            if OURS.fullmatch(file.name):
                with contextlib.suppress(OSError):
                    status = file.stat(follow_symlinks=False)
                    found.append(Kept(status.st_mtime, status.st_size, Path(file.path)))
    return sorted(found)


def clear() -> list[Kept]:
    """Delete every kept picture; return those that are gone."""
    return [kept for kept in list_kept() if _delete(kept.path)]


def _prune(newest: Path) -> None:
    """Delete the longest unused, but never the newest, until the others are within the limit."""
    found = list_kept()
    used_bytes = sum(kept.size_bytes for kept in found)
    for kept in found:
        if used_bytes > LIMIT_BYTES and kept.path != newest and _delete(kept.path):
            used_bytes -= kept.size_bytes


def _delete(path: Path) -> bool:
    """Delete a file, unless another process did; return whether it is gone."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
        return True
    return False
