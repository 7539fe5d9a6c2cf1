"""Folders of files that flux keeps for later, within a limit: encoded prompts, pictures of stdin.

A folder holds whatever its user puts there; what is ours is told by its name, and nothing else is
looked at. What was used longest ago, by its modification time, is deleted first. Of a linked folder
nothing is listed or deleted, see `paths.is_linked`. Stdlib only. Sizes are in bytes.
"""

import contextlib
import os
import re
from pathlib import Path
from typing import NamedTuple

from fluxcli import paths


class KeptFile(NamedTuple):
    """A file of such a folder."""

    used_s: float  # its modification time: when it was last read or written
    size_bytes: int
    path: Path


def list_files(folder: Path, ours: re.Pattern[str]) -> list[KeptFile]:
    """Return the files whose whole names `ours` matches, the longest unused first."""
    found: list[KeptFile] = []
    if paths.is_linked(folder):
        return found
    with contextlib.suppress(OSError), os.scandir(folder) as files:
        for file in files:
            if ours.fullmatch(file.name):
                with contextlib.suppress(OSError):
                    status = file.stat(follow_symlinks=False)
                    found.append(KeptFile(status.st_mtime, status.st_size, Path(file.path)))
    return sorted(found)


def clear(files: list[KeptFile]) -> list[KeptFile]:
    """Delete files; return those that are gone."""
    return [file for file in files if delete(file.path)]


def prune(files: list[KeptFile], *, limit_bytes: int, newest: Path | None = None) -> None:
    """Delete the first ones until the others are within the limit; `newest` always stays."""
    used_bytes = sum(file.size_bytes for file in files)
    for file in files:
        if used_bytes > limit_bytes and file.path != newest and delete(file.path):
            used_bytes -= file.size_bytes


def delete(path: Path) -> bool:
    """Delete a file, unless another process did; return whether it is gone."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
        return True
    return False
