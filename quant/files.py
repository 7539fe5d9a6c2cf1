"""Read files that a stranger may have prepared; write files so that they are whole or absent.

What is read must be a regular file, for a FIFO would hang and a device never ends. A file is
written to a temporary one beside it, brought to the disk and moved into place. Knows nothing of
what is in the files. Sizes are in bytes. Stdlib only.
"""

import contextlib
import errno
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

from quant.errors import CheckpointError, WriteError

COPY_BYTES = 8 << 20
# Linux' ioctl that makes a file share the blocks of another until one of them is written
# (linux/fs.h: FICLONE).
FICLONE = 0x40049409
# What file systems without hard links answer to the attempt.
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)

CHUNK_BYTES = 64 << 10
# No open waits for a FIFO's writer, and no terminal becomes this process's own.
WITHOUT_WAITING = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading that a stranger may have prepared.

    Raises OSError where it cannot be read, and for what is no regular file: a folder, a FIFO, a
    socket, a device. Its `strerror` says which.
    """
    _check_regular(os.stat(path), path)  # before it is opened, which has effects on some devices
    descriptor = os.open(path, os.O_RDONLY | WITHOUT_WAITING | getattr(os, "O_BINARY", 0))
    try:
        _check_regular(os.fstat(descriptor), path)
    except OSError:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def open_appending(path: Path) -> BinaryIO:
    """Open a file to write at its end, which is made if need be; raises as `open_regular` does."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | WITHOUT_WAITING | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags, 0o666)
    try:
        _check_regular(os.fstat(descriptor), path)
    except OSError:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "ab")


def _check_regular(status: os.stat_result, path: Path) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is no regular file", str(path))


def read_small_file(path: Path, limit_bytes: int) -> bytes:
    """Return what is in a file that a stranger may have prepared.

    Raises OSError as `open_regular` does, and where the file has more than `limit_bytes`.
    """
    data = bytearray()
    with open_regular(path) as file:
        # In pieces: one call would take memory for all of the limit.
        for chunk in iter(lambda: file.read(CHUNK_BYTES), b""):
            data += chunk
            if len(data) > limit_bytes:
                why = f"the file is too large: more than {limit_bytes / 1e6:.1f} MB"
                raise OSError(errno.EFBIG, why, str(path))
    return bytes(data)


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


@contextlib.contextmanager
def explain_reading(path: Path) -> Iterator[None]:
    """Turn an OSError into the `CheckpointError` that a source cannot be read."""
    try:
        yield
    except OSError as error:
        why = error.strerror or "read error"
        hint = "check its disk and its permissions"
        raise CheckpointError("cannot read the source", path, why=why, hint=hint) from error


class Unchanged:
    """The size and time of a file that is read; `check` tells whether somebody has written it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._status = self._read_status()

    def check(self) -> None:
        """Raise `CheckpointError` where the file is another than it was."""
        if self._read_status() != self._status:
            raise changed(self._path)

    def _read_status(self) -> tuple[int, int, int]:
        with explain_reading(self._path):
            status = self._path.stat()
        return status.st_ino, status.st_size, status.st_mtime_ns


def changed(path: Path) -> CheckpointError:
    """The error of a file that somebody writes while it is read."""
    why = "somebody wrote to it meanwhile"
    return CheckpointError("the source has changed", path, why=why, hint="run it again")


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's bytes, which the disk then has; it shares blocks where the file system can.

    Raises `CheckpointError` for a source that cannot be read or changes, and OSError for a target
    that cannot be written.
    """
    unchanged = Unchanged(source)
    with explain_reading(source):
        reading = source.open("rb")
    with reading, target.open("xb") as writing:
        if not _clone(reading, writing):
            while True:
                with explain_reading(source):
                    data = reading.read(COPY_BYTES)
                if not data:
                    break
                writing.write(data)
        flush_to_disk(writing)
    unchanged.check()


def _clone(reading: BinaryIO, writing: BinaryIO) -> bool:
    """Make an empty file share the blocks of another; returns whether the file system can."""
    if sys.platform != "linux":
        return False
    import fcntl

    try:
        fcntl.ioctl(writing.fileno(), FICLONE, reading.fileno())
    except OSError:
        return False
    return True


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
