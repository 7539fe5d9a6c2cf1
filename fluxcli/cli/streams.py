"""The standard streams of the command: what stdout cannot take is an error, stderr never fails.

The interpreter's own streams keep what could not be written and try once more at its end, which is
an exit 120 or a traceback there. These keep nothing. Stdlib only.
"""

import contextlib
import io
import os
import select
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from fluxcli.errors import explain_stdout

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

STDIN, STDOUT, STDERR = range(3)


def open_streams() -> None:
    """Put streams of this module in the place of the interpreter's.

    A descriptor that the caller closed is taken by the null device, so that no file gets its number
    and what a library prints; `sys.stdin` and `sys.stdout` stay None then.
    """
    for number in (STDIN, STDOUT, STDERR):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
    if os.name == "nt":  # its consoles take text, not bytes
        sys.stderr = sys.stderr or io.StringIO()
        return
    if sys.stdout is not None:
        sys.stdout = _Stdout(_open_bytes(STDOUT), sys.stdout.encoding, sys.stdout.errors)
        sys.stdout.reconfigure(line_buffering=sys.stdout.isatty())
    sys.stderr = _Stderr(_open_bytes(STDERR), "utf-8", "backslashreplace", line_buffering=True)


def flush_streams() -> None:
    """Write what is left; raises what `sys.stdout` raises."""
    if sys.stdout is not None:
        sys.stdout.flush()
    sys.stderr.flush()


def _open_bytes(number: int) -> io.BufferedWriter:
    """A descriptor of the caller's, which is waited for where somebody made it non-blocking."""
    kind = io.FileIO if os.get_blocking(number) else _Patient
    return io.BufferedWriter(kind(number, "w", closefd=False))


class _Patient(io.FileIO):
    def write(self, data: "ReadableBuffer", /) -> int:
        while True:
            written: int | None = super().write(data)
            if written is not None:
                return written
            select.select([], [self], [])


class _Stdout(io.TextIOWrapper):
    """Raises `OutputError` once, and drops what comes after it."""

    _failed = False

    def write(self, text: str, /) -> int:
        if not self._failed:
            with self._explaining():
                super().write(text)
        return len(text)

    def flush(self) -> None:
        if not self._failed:
            with self._explaining():
                super().flush()

    @contextlib.contextmanager
    def _explaining(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as error:
            self._failed = True
            raise explain_stdout(error) from error


class _Stderr(io.TextIOWrapper):
    """Drops what cannot be written: nothing that is only said may end a run."""

    def write(self, text: str, /) -> int:
        with contextlib.suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            super().flush()
