"""Where pictures go: names, templates, and files that are whole or absent.

Knows nothing of how a picture is made. Stdlib only. An automatic name never replaces a file, even
when two processes race for it; a file that the user named is replaced only where that was said.
"""

import contextlib
import glob
import math
import os
import re
import shutil
import string
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import date
from itertools import count, dropwhile, takewhile
from pathlib import Path

from fluxcli.errors import OutputError, UsageError, explain_stdout, explain_write
from fluxcli.request.fields import Order, Output
from fluxcli.request.settings import FORMATS
from fluxcli.request.target import Target, find_fields
from quant.files import move_if_free, nearest, open_temporary, write_atomically

DEFAULT_TEMPLATE = "{slug}-{seed}"
TEMPLATE_FIELDS = ("seed", "n", "row", "slug", "preset", "width", "height", "date")
WIDTH = re.compile(r"(0?[1-9]\d?d?)?")  # what a field's format may say: {seed:05}, {n:3}
MAX_SLUG = 48  # characters
MAX_NAME_BYTES = 255  # of a file name, on the file systems in use
DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)")  # Windows makes no file of these names
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
            which = f"--count {output.count}"
            raise UsageError("-o - takes one picture", which=which, hint="-o FOLDER/, or -n 1")
        return Target(Path(), STDOUT, stdout=True)
    path = Path(os.path.expanduser(text or "."))
    if os.path.isdir(path):
        return Target(_resolve_parents(path), DEFAULT_TEMPLATE)
    is_template = bool(check_template(str(path)))
    is_folder = (text or "").endswith(("/", os.sep))
    if is_template:
        return _split_template(path / DEFAULT_TEMPLATE if is_folder else path.with_suffix(""))
    if is_folder:
        return Target(_resolve_parents(path), DEFAULT_TEMPLATE)
    if output.count > 1:
        hint = f"-o {path.stem}-{{seed}}{path.suffix}, or a folder"
        raise UsageError("one file name for several pictures", which=text, hint=hint)
    _check_device_name(path)
    return Target(_resolve_parents(path.parent), path.name, exact=True, force=force)


def _split_template(path: Path) -> Target:
    """Return the target of a template: its folder is what stands before the first field."""
    fixed = list(takewhile(lambda part: not find_fields(part), path.parts))
    folder = Path(*[part.format() for part in fixed])  # {{ becomes {
    pattern = os.path.join(*path.parts[len(fixed) :])
    return Target(_resolve_parents(folder), pattern)


def _resolve_parents(folder: Path) -> Path:
    """Return the folder; without its links where a name is followed by `..`.

    Of new/../x the system would make the folder new, and after a link `..` is where that leads.
    """
    names = list(dropwhile(lambda part: part == os.pardir, folder.parts))
    return Path(os.path.realpath(folder)) if os.pardir in names else folder


def _check_device_name(path: Path) -> None:
    """Raise `UsageError` on Windows for a name that stands for a device there, such as con.png."""
    if os.name == "nt" and DEVICES.fullmatch(path.name.partition(".")[0].rstrip().lower()):
        raise UsageError("the name of a device", which=path, hint="another name for the picture")


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
        why = f"--format {given}"
        hint = "leave --format out"
        raise UsageError("--format contradicts the file name", which=text, why=why, hint=hint)
    return format


def check_template(name: str) -> set[str]:
    """Return the template fields of a name, of which there may be none.

    Raises `UsageError` for fields that there are not, for braces and formats that cannot be, and
    for `..` behind a field.
    """
    try:
        for _, field, width, conversion in string.Formatter().parse(name):
            if field is not None:
                _check_field(field, width or "", conversion)
        name.format(seed=1, n=1, row=1, slug="", preset="", width=1, height=1, date="")
    except ValueError as error:
        hint = '-o "pics/{slug}-{seed:05}.png"'
        raise UsageError("bad template", which=name[:200], why=str(error), hint=hint) from error
    behind = list(dropwhile(lambda part: not find_fields(part), Path(name).parts))
    if os.pardir in behind:
        raise UsageError(
            "bad template",
            which=name[:200],
            why=".. behind a field leads out of the folder",
            hint="begin with the folder: -o FOLDER/{seed}",
        )
    return find_fields(name)


def _check_field(field: str, width: str, conversion: str | None) -> None:
    """Raise ValueError for a field that there is not, and for a format that is more than a width.

    Python's formats could reach into objects, and fill the memory: {seed.real}, {n:99999999999}.
    """
    if field not in TEMPLATE_FIELDS:
        raise ValueError("fields are " + " ".join(f"{{{each}}}" for each in TEMPLATE_FIELDS))
    if conversion or not WIDTH.fullmatch(width):
        raise ValueError(f"of {{{field}}} only a width up to 99 may be said, as in {{{field}:05}}")


def make_slug(prompt: str) -> str:
    """Return a short file name made of a prompt: its ASCII letters and digits, joined by -."""
    plain = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode()
    slug = "-".join(re.findall(r"[a-z0-9]+", plain.lower()))
    if len(slug) > MAX_SLUG:
        whole_words = slug[: MAX_SLUG + 1].rpartition("-")[0]
        slug = whole_words or slug[:MAX_SLUG]
    if DEVICES.fullmatch(slug):
        slug = f"image-{slug}"
    return slug or "image"


# --- names


def list_candidates(destination: Destination) -> Iterator[Path]:
    """Yield the names to try for a picture, best first: without a number, then with -2, -3 ...

    They never end. Where a number would make the name too long, the name is cut before it.
    """
    first = destination.target.folder / destination.make_name()
    yield first
    for k in count(2):
        yield first.with_name(join_name(first.stem, f"-{k}{first.suffix}"))


def write_first_free(data: bytes, paths: Iterable[Path]) -> Path:
    """Write a new file at the first path where there is none, and return it; raises OSError.

    The paths must be without end.
    """
    for path in paths:
        if os.path.lexists(path):
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):  # another process was quicker
            write_atomically(path, data, place=move_if_free)
            return path
    raise AssertionError("the candidates are endless")


def move_from_stdout(destination: Destination) -> Destination:
    """Return where files beside a picture go: of one for stdout they go into the current folder."""
    if not destination.target.stdout:
        return destination
    return replace(destination, target=Target(Path(), DEFAULT_TEMPLATE))


def join_name(stem: str, end: str) -> str:
    """Return a file name of two parts, the first cut so that file systems take the whole."""
    room_bytes = MAX_NAME_BYTES - len(os.fsencode(end))
    if len(os.fsencode(stem)) > room_bytes:
        stem = stem.encode(errors="ignore")[:room_bytes].decode(errors="ignore")
    return stem + end


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
    elif list_open_fields(destination):
        yield from list_there(destination, f".{destination.order.output.format}")
    else:
        yield from list_candidates(destination)


def list_open_fields(destination: Destination) -> list[str]:
    """Return the template fields of a picture's name whose values its order leaves open."""
    fields = ["date"] if destination.seeded else ["date", "seed", "n"]
    return fields if destination.target.has_field(*fields) else []


def list_there(destination: Destination, ending: str) -> Iterator[Path]:
    """Yield the files that are there with any value in the place of what the order leaves open.

    Their names have this `ending` in the place of the picture's extension.
    """
    fields = list_open_fields(destination)
    name = destination.make_name(**dict.fromkeys(fields, AnyValue()))
    stem = name.rpartition(".")[0]
    pattern = glob.escape(stem).replace(ANY, "*") + "*" + glob.escape(ending)
    expression = re.escape(stem).replace(ANY, ".*") + r"(-\d+)?" + re.escape(ending)
    for found in sorted(glob.glob(pattern, root_dir=destination.target.folder)):
        if re.fullmatch(expression, found, re.DOTALL):
            yield destination.target.folder / found


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
    k = order.output.count - 1
    last = next(list_candidates(Destination(target, order.picture(k), n=k + 1, row=row)))
    try:
        _check_inside(path, target)
        with contextlib.suppress(FileNotFoundError):
            os.lstat(last)  # its numbers may be longer: too long a name is known before it is drawn
        with contextlib.suppress(FileNotFoundError):
            os.lstat(path)  # not `exists`: a dangling link takes a name, too
            if target.exact and not target.force:
                hint = "--force replaces it; -o FOLDER/ picks a free name"
                raise OutputError("the file exists", which=path, hint=hint)
            _check_replaceable(path, target)
        folder = nearest(Path(os.path.realpath(path)).parent)
        with open_temporary(folder) as (_, file):
            file.close()
        free_bytes = shutil.disk_usage(folder).free
    except OSError as error:
        raise _explain_os_error(path, error) from error
    need_bytes = order.output.count * (math.prod(order.request.size) * 3 + MIB)
    if free_bytes < need_bytes:
        why = f"needs about {need_bytes // MIB + 1} MiB, {free_bytes // MIB} MiB are free"
        hint = "free some space, or -o FOLDER/ on another disk"
        raise OutputError("the disk is full", which=folder, why=why, hint=hint)


def _check_replaceable(path: Path, target: Target) -> None:
    """Raise `OutputError` where --force would put a picture in a device's or a FIFO's place."""
    if target.exact and path.exists() and not path.is_file():
        why = "it is no regular file, which --force does not replace"
        raise OutputError(
            "cannot write the picture", which=path, why=why, hint="-o - writes to stdout"
        )


def _check_inside(path: Path, target: Target) -> None:
    """Raise `OutputError` where links lead a name that is made of fields out of its folder."""
    if target.exact:
        return
    folder = Path(os.path.realpath(target.folder))
    found = Path(os.path.realpath(path.parent))
    if not found.is_relative_to(folder):
        why = f"a link leads to {found}"
        hint = "begin with that folder: -o FOLDER/{slug}"
        raise OutputError("the name leaves its folder", which=path, why=why, hint=hint)


def _check_stdout() -> None:
    if sys.stdout is None:
        raise OutputError(
            "cannot write to stdout", which="-o -", why="it is closed", hint="> FILE opens it"
        )
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
        try:
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise explain_stdout(error) from error
        return STDOUT
    for path in list_candidates(destination):
        try:
            _check_inside(path, target)
            _check_replaceable(path, target)
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
    hint = "-o FOLDER/ writes elsewhere"
    why = explain_write(error)
    return OutputError("cannot write the picture", which=path, why=why, hint=hint)
