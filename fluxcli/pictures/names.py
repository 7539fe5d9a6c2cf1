"""Where pictures go: names, templates, and files that are whole or absent.

Knows nothing of how a picture is made. Stdlib only. A file is written to a temporary one beside it, flushed to disk
and moved into place; automatic names never replace a file, even when two processes race.
"""

import contextlib
import errno
import glob
import math
import os
import re
import shutil
import string
import sys
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from itertools import count
from pathlib import Path

from fluxcli.errors import OutputError, UsageError
from fluxcli.request.fields import Order
from fluxcli.request.settings import FORMATS
from quant.files import move_if_free, nearest, open_temporary, write_atomically

DEFAULT_TEMPLATE = "{slug}-{seed}"
OPEN_FIELDS = ("date",)  # told by a name, and decided by no request
TEMPLATE_KEYS = ("seed", "n", "row", "slug", "preset", "width", "height", "date")
SLUG_LENGTH = 48
STDOUT = "-"


@dataclass(frozen=True)
class Target:
    """Where a run's pictures go. `pattern` has template fields and no extension unless `exact`; `folder` has none."""

    folder: Path
    pattern: str
    exact: bool = False  # one plain file the user named: replaced only with --force
    force: bool = False
    stdout: bool = False

    def has_field(self, *keys: str) -> bool:
        """Return whether the name is made with one of these template fields."""
        found = {key for _, key, _, _ in string.Formatter().parse(self.pattern)}
        return not self.exact and not found.isdisjoint(keys)


def format_of(text: str | None, *, given: str | None = None) -> str | None:
    """The format that an extension decides, None if open; raises `UsageError` for others and against a `given` one."""
    if text in (None, STDOUT) or text.endswith(("/", os.sep)) or os.path.isdir(os.path.expanduser(text)):
        return None
    suffix = Path(text).suffix.lower().lstrip(".")
    if not suffix and _check_template(text):
        return None
    format = suffix.replace("jpeg", "jpg")
    if format not in FORMATS:
        why = f"extension {suffix!r}" if suffix else "it has no extension"
        hint = f"use one of {', '.join(FORMATS)}; a folder ends in /"
        raise UsageError("unsupported picture format", which=text, why=why, hint=hint)
    if given and format != given:
        raise UsageError("--format contradicts the file name", which=text, why=f"--format {given}")
    return format


def parse_target(order: Order, *, force: bool = False) -> Target:
    """Where the pictures of `request` go; raises `UsageError` for a template or a file name that cannot be."""
    text = order.output.output
    if text == STDOUT:
        if order.output.count > 1:
            raise UsageError("-o - takes one picture", which=f"--count {order.output.count}")
        return Target(Path(), STDOUT, stdout=True)
    path = Path(os.path.expanduser(text or "."))
    folder = os.path.isdir(path)
    is_template = not folder and _check_template(str(path))
    if folder or (text and text.endswith(("/", os.sep))):
        return Target(Path(), str(path / DEFAULT_TEMPLATE)) if is_template else Target(path, DEFAULT_TEMPLATE)
    if is_template:
        return Target(Path(), str(path.with_suffix("")))
    if order.output.count > 1:
        hint = f"-o {path.stem}-{{seed}}{path.suffix}, or a folder"
        raise UsageError("one file name for several pictures", which=text, hint=hint)
    return Target(path.parent, path.name, exact=True, force=force)


def _check_template(name: str) -> bool:
    try:
        keys = [key for _, key, spec, conversion in string.Formatter().parse(name) if key is not None]
        if any(key not in TEMPLATE_KEYS for key in keys):
            raise ValueError("fields are " + " ".join(f"{{{key}}}" for key in TEMPLATE_KEYS))
        name.format(seed=1, n=1, row=1, slug="", preset="", width=1, height=1, date="")
    except (ValueError, IndexError, KeyError, MemoryError) as error:  # the last: {n:99999999999}
        raise UsageError("bad template", which=name, why=str(error)) from error
    return bool(keys)


def slug(prompt: str) -> str:
    """A short file name made of a prompt: ASCII letters and digits where it has any, joined by '-'."""
    plain = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode()
    text = "-".join(re.findall(r"[a-z0-9]+", plain.lower()))
    if len(text) > SLUG_LENGTH:
        text = text[: SLUG_LENGTH + 1].rpartition("-")[0] or text[:SLUG_LENGTH]
    return text or "image"


def candidates(target: Target, order: Order, n: int, row: int = 0) -> Iterator[Path]:
    """The names to try for picture `n` (from 1) of a row, best first."""
    first = target.folder / _named(target, order, n=n, row=row, seed=order.request.seed, date=date.today().isoformat())
    yield first
    for k in count(2):
        yield first.with_name(f"{first.stem}-{k}{first.suffix}")


def _named(target: Target, order: Order, **values: object) -> str:
    """The file's name in the target's folder."""
    width, height = order.request.size
    values |= {"slug": slug(order.request.prompt), "preset": slug(order.preset), "width": width, "height": height}
    return target.pattern if target.exact else f"{target.pattern.format(**values)}.{order.output.format}"


def list_names(target: Target, order: Order, n: int, row: int, *, seeded: bool) -> Iterator[Path]:
    """Yield the names that picture `n` of a row has or could have got, best first.

    Where the name tells what the request leaves open (the day; without a seed also the seed, and
    the number, since equal pictures differ in nothing else), these are the files that are there.
    """
    if target.exact:
        yield target.folder / target.pattern
        return
    open_fields = OPEN_FIELDS if seeded else (*OPEN_FIELDS, "seed", "n")
    if not target.has_field(*open_fields):
        yield from candidates(target, order, n, row)
        return
    values = {"n": n, "row": row, "seed": order.request.seed} | dict.fromkeys(open_fields, _Open())
    stem, dot, suffix = _named(target, order, **values).rpartition(".")
    wanted = re.escape(stem).replace(_Open.MARK, ".*") + r"(-\d+)?" + re.escape(dot + suffix)
    pattern = glob.escape(stem).replace(_Open.MARK, "*") + "*" + glob.escape(dot + suffix)
    for name in sorted(glob.glob(pattern, root_dir=target.folder)):
        if re.fullmatch(wanted, name, re.DOTALL):
            yield target.folder / name


class _Open(str):
    """The value of a field that is open, whatever its format: a mark that no file name holds."""

    MARK = "\0"

    def __format__(self, _: str) -> str:
        return self.MARK


def check_writable(target: Target, order: Order, row: int = 0) -> None:
    """Raise `OutputError` before any compute if the pictures could not be written; leaves nothing behind."""
    if target.stdout:
        if sys.stdout is None:
            raise OutputError("cannot write to stdout", which="-o -", why="it is closed")
        if sys.stdout.isatty():
            raise UsageError("a picture would garble the terminal", which="-o -", hint="flux generate ... -o - > x.jpg")
        return
    path = next(candidates(target, order, 1, row))
    need = order.output.count * (math.prod(order.request.size) * 3 + (1 << 20))
    try:
        with contextlib.suppress(FileNotFoundError):
            os.lstat(path)  # raises where it is no possible name; a dangling link takes it, too
            if target.exact and not target.force:
                hint = "--force replaces it; -o FOLDER/ picks a free name"
                raise OutputError("the file exists", which=path, hint=hint)
        folder = nearest(Path(os.path.realpath(path)).parent)
        with open_temporary(folder) as (_, file):
            file.close()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise _output_error(path, error) from error
    if free < need:
        why = f"needs about {need // 2**20 + 1} MiB, {free // 2**20} MiB are free"
        raise OutputError("the disk is full", which=folder, why=why)


def save(data: bytes, target: Target, order: Order, n: int, row: int = 0) -> str:
    """Write `data` as picture `n` of a row; returns its path as the user would spell it ('-' for stdout)."""
    if target.stdout:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        return STDOUT
    try:
        for path in candidates(target, order, n, row):
            real = Path(os.path.realpath(path))
            real.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                if target.force or not os.path.lexists(path):
                    write_atomically(real, data, place=os.replace if target.force else move_if_free)
                    break
    except OSError as error:
        raise _output_error(path, error) from error
    if target.exact and path.name != target.pattern:
        why = f"the picture is kept as {path}"
        raise OutputError("the file exists now", which=target.folder / target.pattern, why=why, hint="--force replaces")
    return str(path)


def _output_error(path: Path, error: OSError) -> OutputError:
    reasons = {errno.ENOSPC: "the disk is full", errno.EROFS: "the file system is read-only"}
    why = reasons.get(error.errno or 0, (error.strerror or str(error)).lower())
    return OutputError("cannot write the picture", which=path, why=why, hint="-o FOLDER/ writes elsewhere")
