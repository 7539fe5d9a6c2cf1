"""Write files so that they are whole or absent, and check before whether the disk has room.

A file is written to a temporary one beside it, brought to the disk and moved into place. Knows
nothing of what is in the files. Sizes are in bytes. Stdlib only.
"""

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

from quant.errors import WriteError

# What file systems without hard links answer to the attempt.
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


def nearest(folder: Path) -> Path:
    """The folder where it exists, otherwise the nearest folder above it that does."""
    for path in (folder, *folder.absolute().parents):
        if path.exists():
            return path
    raise FileNotFoundError(folder)


def check_room(folder: Path, need_bytes: int, *, hint: str) -> None:
    """Raise `WriteError` where the disk of a folder has less than `need_bytes` free.

    The folder may not exist yet: its disk is that of the first folder above it that does.
    """
    existing = nearest(folder)
    free_bytes = shutil.disk_usage(existing).free
    if need_bytes > free_bytes:
        why = f"needs {need_bytes / 1e9:.2f} GB, {free_bytes / 1e9:.2f} GB are free"
        raise WriteError("the disk is too small", existing, why=why, hint=hint)


def flush_to_disk(file: IO[Any]) -> None:
    """Bring what was written to an open file to the disk; raises OSError."""
    file.flush()
    os.fsync(file.fileno())


def write_atomically(path: Path, data: bytes, *, place: Callable[[Path, Path], None]) -> None:
    """Write `data` to `path`, which afterwards is whole on the disk or as before; raises OSError.

    `place(temporary, path)` gives the finished file its name: `os.replace`, or `move_if_free`.
    """
    with open_temporary(path.parent) as (temporary, file):
        with file:
            file.write(data)
            flush_to_disk(file)
        if place is os.replace and path.exists():
            shutil.copymode(path, temporary)
        place(temporary, path)
        # Windows and some file systems refuse to sync a folder; the file itself is on the disk.
        with contextlib.suppress(OSError):
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


@contextlib.contextmanager
def open_temporary(folder: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """Yield a new file's path in `folder` and the file, open for writing.

    It has the mode that the umask gives. Whatever still has its name afterwards is deleted.
    """
    path = folder / f".flux-{secrets.token_hex(6)}.tmp"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags, 0o666)
        yield path, os.fdopen(descriptor, "wb")
    finally:
        path.unlink(missing_ok=True)


def move_if_free(temporary: Path, path: Path) -> None:
    """Give the file its name unless that is taken, which raises FileExistsError.

    This never replaces a file, even when two processes race for the name.
    """
    try:
        if os.name == "nt":
            os.rename(temporary, path)  # which never replaces there
        else:
            os.link(temporary, path)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        # No links here (FAT): reserve the name, then replace the reservation.
        reserved = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            os.close(reserved)
            os.replace(temporary, path)
        except BaseException:
            path.unlink()
            raise
