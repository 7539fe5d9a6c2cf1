"""Pictures that came without a file, from stdin or from Python: kept in the user's cache by hash.

So a worker finds them, and so does `flux replay` as long as they are there. The folder is the
user's own and within `LIMIT_BYTES`; what was used longest ago is deleted first. Knows nothing of
what is in the pictures. Stdlib only. Sizes are in bytes.
"""

import hashlib
import os
import re
from pathlib import Path

from fluxcli import kept_files, paths
from fluxcli.errors import OutputError, explain_write
from fluxcli.kept_files import KeptFile
from quant.files import write_atomically

LIMIT_BYTES = 1 << 30
OURS = re.compile(r"[0-9a-f]{64}|\.flux-[0-9a-f]+\.tmp")  # pictures; killed writers'


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
    kept_files.prune(list_kept(), limit_bytes=LIMIT_BYTES, newest=path)
    return path


def find(sha256: str) -> Path | None:
    """Return the kept picture of that hash; None where there is none."""
    path = folder() / sha256
    if not OURS.fullmatch(sha256) or paths.is_linked(folder()) or not path.is_file():
        return None
    return path


def list_kept() -> list[KeptFile]:
    """Return the kept pictures, and what killed writers left, the longest unused first."""
    return kept_files.list_files(folder(), OURS)


def clear() -> list[KeptFile]:
    """Delete every kept picture; return those that are gone."""
    return kept_files.clear(list_kept())
