"""Where pictures go: names, templates, and files that are whole or absent.

Knows nothing of how a picture is made. Stdlib only. An automatic name never replaces a file, even
when two processes race for it; a file that the user named is replaced only where that was said.
"""

import contextlib
import errno
import glob
import math
import os
import re
import shutil
import sys
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from itertools import count
from pathlib import Path

from fluxcli.errors import OutputError, UsageError
from fluxcli.request.fields import Order, Output
from fluxcli.request.settings import FORMATS
from fluxcli.request.target import Target, find_fields
from quant.files import move_if_free, nearest, open_temporary, write_atomically

DEFAULT_TEMPLATE = "{slug}-{seed}"
TEMPLATE_FIELDS = ("seed", "n", "row", "slug", "preset", "width", "height", "date")
MAX_SLUG = 48  # characters
STDOUT = "-"
MIB = 1 << 20


# --- what -o means


@dataclass(frozen=True)
class Destination:
    """Where one picture goes, and what its name is made of."""

    target: Target
    order: Order  # of this picture alone
    n: int = 1  # the picture's number in its row, from 1
    row: int = 0  # of the batch, 0 outside one
    seeded: bool = True  # the seed was asked for

    def make_name(self, **changes: object) -> str:
        """Return the best name in the target's folder; `changes` are other values of fields."""
        if self.target.exact:
            return self.target.pattern
        width, height = self.order.request.size
        values: dict[str, object] = {
            "seed": self.order.request.seed,
            "n": self.n,
            "row": self.row,
            "slug": make_slug(self.order.request.prompt),
            "preset": make_slug(self.order.preset),
            "width": width,
            "height": height,
            "date": date.today().isoformat(),
        }
        name = self.target.pattern.format(**(values | changes))
        return f"{name}.{self.order.output.format}"


def parse_target(output: Output, *, force: bool = False) -> Target:
    """Return where the pictures of an output go.

    Raises `UsageError` for a template or a file name that cannot be.
    """
    text = output.output
    if text == STDOUT:
        if output.count > 1:
            raise UsageError("-o - takes one picture", which=f"--count {output.count}")
        return Target(Path(), STDOUT, stdout=True)
    path = Path(os.path.expanduser(text or "."))
    if os.path.isdir(path):
        return Target(path, DEFAULT_TEMPLATE)
    is_template = bool(check_template(str(path)))
    if text and text.endswith(("/", os.sep)):
        if is_template:
            return Target(Path(), str(path / DEFAULT_TEMPLATE))
        return Target(path, DEFAULT_TEMPLATE)
    if is_template:
        return Target(Path(), str(path.with_suffix("")))
    if output.count > 1:
        hint = f"-o {path.stem}-{{seed}}{path.suffix}, or a folder"
        raise UsageError("one file name for several pictures", which=text, hint=hint)
    return Target(path.parent, path.name, exact=True, force=force)


def read_format(text: str | None, *, given: str | None = None) -> str | None:
    """Return the picture format that the extension of an -o decides, None where it is open.

    Raises `UsageError` for an unknown extension, and for another format than a `given` one.
    """
    if text is None or text == STDOUT:
        return None
    if text.endswith(("/", os.sep)) or os.path.isdir(os.path.expanduser(text)):
        return None
    suffix = Path(text).suffix.lower().lstrip(".")
    if not suffix and check_template(text):
        return None
    format = suffix.replace("jpeg", "jpg")
    if format not in FORMATS:
        why = f"extension {suffix!r}" if suffix else "it has no extension"
        hint = f"use one of {', '.join(FORMATS)}; a folder ends in /"
        raise UsageError("unsupported picture format", which=text, why=why, hint=hint)
    if given and format != given:
        raise UsageError("--format contradicts the file name", which=text, why=f"--format {given}")
    return format


def check_template(name: str) -> set[str]:
    """Return the template fields of a name, of which there may be none.

    Raises `UsageError` for fields that there are not, and for braces and formats that cannot be.
    """
    try:
        found = find_fields(name)
        if not found.issubset(TEMPLATE_FIELDS):
            raise ValueError("fields are " + " ".join(f"{{{each}}}" for each in TEMPLATE_FIELDS))
        name.format(seed=1, n=1, row=1, slug="", preset="", width=1, height=1, date="")
    except (ValueError, IndexError, KeyError, MemoryError) as error:  # the last: {n:99999999999}
        raise UsageError("bad template", which=name, why=str(error)) from error
    return found


def make_slug(prompt: str) -> str:
    """Return a short file name made of a prompt: its ASCII letters and digits, joined by -."""
    plain = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode()
    slug = "-".join(re.findall(r"[a-z0-9]+", plain.lower()))
    if len(slug) > MAX_SLUG:
        whole_words = slug[: MAX_SLUG + 1].rpartition("-")[0]
        slug = whole_words or slug[:MAX_SLUG]
    return slug or "image"


# --- names


def list_candidates(destination: Destination) -> Iterator[Path]:
    """Yield the names to try for a picture, best first: without a number, then with -2, -3 ...

    They never end.
    """
    first = destination.target.folder / destination.make_name()
    yield first
    for k in count(2):
        yield first.with_name(f"{first.stem}-{k}{first.suffix}")


def list_names(destination: Destination) -> Iterator[Path]:
    """Yield the names that a picture has or could have got in another run, best first.

    Mostly these are its candidates. But a name may hold what the order leaves open: {date} is
    another one tomorrow, and without a seed {seed} and {n} differ from run to run. Then these are
    the files that are there with any value in its place: of x-{date} for one, x-2026-11-28.png and
    x-2026-11-29.png.
    """
    target = destination.target
    if target.exact:
        yield target.folder / target.pattern
        return
    open_fields = ["date"] if destination.seeded else ["date", "seed", "n"]
    if not target.has_field(*open_fields):
        yield from list_candidates(destination)
        return
    name = destination.make_name(**dict.fromkeys(open_fields, AnyValue()))
    stem, dot, suffix = name.rpartition(".")
    pattern = glob.escape(stem).replace(ANY, "*") + "*" + glob.escape(dot + suffix)
    expression = re.escape(stem).replace(ANY, ".*") + r"(-\d+)?" + re.escape(dot + suffix)
    for found in sorted(glob.glob(pattern, root_dir=target.folder)):
        if re.fullmatch(expression, found, re.DOTALL):
            yield target.folder / found


ANY = "\0"  # no file name holds it


class AnyValue:
    """Stands for any value of a template field: becomes `ANY`, whatever the field's format says."""

    def __format__(self, _format: str) -> str:
        return ANY

    def __str__(self) -> str:
        return ANY


# --- files


def check_writable(target: Target, order: Order, *, row: int = 0) -> None:
    """Raise `OutputError` before any compute if a row's pictures could not be written.

    Leaves nothing behind. Raises `UsageError` where stdout is a terminal.
    """
    if target.stdout:
        _check_stdout()
        return
    path = next(list_candidates(Destination(target, order, row=row)))
    try:
        with contextlib.suppress(FileNotFoundError):
            os.lstat(path)  # not `exists`: a dangling link takes a name, too
            if target.exact and not target.force:
                hint = "--force replaces it; -o FOLDER/ picks a free name"
                raise OutputError("the file exists", which=path, hint=hint)
        folder = nearest(Path(os.path.realpath(path)).parent)
        with open_temporary(folder) as (_, file):
            file.close()
        free_bytes = shutil.disk_usage(folder).free
    except OSError as error:
        raise _explain_os_error(path, error) from error
    need_bytes = order.output.count * (math.prod(order.request.size) * 3 + MIB)
    if free_bytes < need_bytes:
        why = f"needs about {need_bytes // MIB + 1} MiB, {free_bytes // MIB} MiB are free"
        raise OutputError("the disk is full", which=folder, why=why)


def _check_stdout() -> None:
    if sys.stdout is None:
        raise OutputError("cannot write to stdout", which="-o -", why="it is closed")
    if sys.stdout.isatty():
        hint = "flux generate ... -o - > x.jpg"
        raise UsageError("a picture would garble the terminal", which="-o -", hint=hint)


def save(data: bytes, destination: Destination) -> str:
    """Write a picture's bytes under the first of its names that is free.

    Returns the path as the user would spell it, - for stdout. Raises `OutputError`: also where a
    name that the user gave was taken meanwhile; the picture is kept under another one then.
    """
    target = destination.target
    if target.stdout:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        return STDOUT
    for path in list_candidates(destination):
        try:
            if _write(data, path, force=target.force):
                break
        except OSError as error:
            raise _explain_os_error(path, error) from error
    if target.exact and path.name != target.pattern:
        raise OutputError(
            "the file exists now",
            which=target.folder / target.pattern,
            why=f"the picture is kept as {path}",
            hint="--force replaces",
        )
    return str(path)


def _write(data: bytes, path: Path, *, force: bool) -> bool:
    """Write the file, through a link; returns False where the name is taken. Raises OSError."""
    real = Path(os.path.realpath(path))
    real.parent.mkdir(parents=True, exist_ok=True)
    if force:
        write_atomically(real, data, place=os.replace)
        return True
    if os.path.lexists(path):
        return False
    try:
        write_atomically(real, data, place=move_if_free)
    except FileExistsError:  # another process was quicker
        return False
    return True


def _explain_os_error(path: Path, error: OSError) -> OutputError:
    if error.errno == errno.ENOSPC:
        why = "the disk is full"
    elif error.errno == errno.EROFS:
        why = "the file system is read-only"
    else:
        why = (error.strerror or str(error)).lower()
    hint = "-o FOLDER/ writes elsewhere"
    return OutputError("cannot write the picture", which=path, why=why, hint=hint)
