"""What a run says while it goes on: values in process, JSON on a wire and for `--events`.

Knows nothing of who listens. Stdlib only. Sizes are in pixels or bytes as named, times in seconds.
"""

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from fluxcli.errors import (
    NO_DESCRIPTORS,
    NO_THREADS,
    WRITE_ERRORS,
    ExitCode,
    exit_code_of,
    find_broken_library,
    hint_for_memory,
    name_package,
)
from quant.errors import NO_ENGINE, ExplainedError, is_out_of_memory

MAX_TEXT = 160  # characters of a library's message that are passed on


@dataclass(frozen=True)
class Phase:
    """A phase begins, and the one before it ends.

    Its name is wait, evict, load, encode, condition, denoise, decode or save.
    """

    name: str
    detail: str = ""


@dataclass(frozen=True)
class Step:
    """Denoising step `index` of `total` (from 1) of picture `image` of `images` is done."""

    index: int
    total: int
    image: int = 1
    images: int = 1


@dataclass(frozen=True)
class Preview:
    """A small picture of what the one with this seed will be lies in a file, after a step of all.

    The next preview replaces it, and it is deleted when the picture is saved or given up.
    """

    path: str
    index: int
    total: int
    seed: int
    row: int = 0


@dataclass(frozen=True)
class Notice:
    """Something the user should know; the run goes on."""

    message: str


@dataclass(frozen=True)
class GeneratedImage:
    """A finished picture: where its file is and what identifies it.

    `sha256` is over the file, `pixels_sha256` over the RGB bytes before encoding.
    """

    path: str
    seed: int
    width: int
    height: int
    format: str
    bytes: int
    sha256: str
    pixels_sha256: str


@dataclass(frozen=True)
class Saved:
    """A picture was written, for a row of a batch (from 1; 0 outside one), in so many seconds.

    The seconds are its own, and its share of those that pictures take together.
    """

    image: GeneratedImage
    row: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Kept:
    """The latents of a picture lie in a file, until the picture does."""

    path: str
    seed: int
    row: int = 0


@dataclass(frozen=True)
class Skipped:
    """A picture of the row is there already, whole and made by the same request."""

    row: int
    path: str


@dataclass(frozen=True)
class Done:
    """The run, or a row of a batch, is over.

    It names the pictures, what made them, seconds by phase and memory peaks in bytes. The seconds
    are summed since the command began: those of a row hold the rows before it, too.
    """

    images: tuple[GeneratedImage, ...]
    request: dict[str, Any]
    plan: dict[str, Any]
    timings_s: dict[str, float]
    peak_memory: dict[str, int]
    versions: dict[str, str]
    row: int = 0


@dataclass(frozen=True)
class Failed:
    """The run, or a row of a batch, ended with an error, as the exit code and stderr also say."""

    exit_code: int
    message: str
    hint: str
    row: int = 0


@dataclass(frozen=True)
class Summary:
    """A batch is over.

    It counts rows by what became of them and pictures written; the seconds are since the command
    began.
    """

    rows: int
    done: int
    failed: int
    skipped: int
    pictures: int
    seconds: float


Event = Phase | Step | Preview | Notice | Saved | Kept | Skipped | Done | Failed | Summary
KINDS = {kind.__name__.lower(): kind for kind in get_args(Event)}


def to_json(event: Event) -> dict[str, Any]:
    """Return the event as a dict of JSON types, its kind under "event"."""
    return {"event": type(event).__name__.lower()} | asdict(event)


def from_json(value: Mapping[str, Any]) -> Event:
    """Return the event that `to_json` gave.

    Raises KeyError, TypeError or ValueError for anything else, a value of another type included.
    """
    found = dict(value)
    kind = KINDS[found.pop("event")]
    if kind is Saved:
        found["image"] = GeneratedImage(**found["image"])
    if kind is Done:
        found["images"] = tuple(GeneratedImage(**image) for image in found["images"])
    event: Event = kind(**found)
    check_types(event)
    if isinstance(event, Step) and not (1 <= event.index <= event.total):
        raise ValueError(event)
    if isinstance(event, Failed) and event.exit_code not in set(ExitCode) - {ExitCode.OK}:
        raise ValueError(event)
    return event


def check_types(value: Any, names: Collection[str] = ()) -> None:
    """Raise TypeError where a dataclass that was made of JSON holds what its annotations forbid.

    Looks at the fields with these names, or at all.
    """
    hints = get_type_hints(type(value))
    for each in fields(value):
        if not names or each.name in names:
            _check_type(getattr(value, each.name), hints[each.name])


def _check_type(value: Any, hint: Any) -> None:
    """Raise TypeError where a value is not of the type that an annotation names."""
    kind = get_origin(hint) or hint
    if kind is Any:
        return
    if kind is UnionType:
        fits = type(value) in get_args(hint)
    elif kind is float:
        fits = type(value) in (int, float)
    else:
        fits = type(value) is kind
    if not fits:
        raise TypeError(f"{value!r:.80} is no {hint}")
    if is_dataclass(value):
        check_types(value)
    elif kind is tuple:
        for each in value:
            _check_type(each, get_args(hint)[0])
    elif kind is dict:
        for each in value.values():
            _check_type(each, get_args(hint)[1])


def explain(error: Exception, row: int = 0) -> Failed:
    """Return the exit code, the one line and the hint that an exception is for the user.

    An error of ours says them itself. What libraries raise is told apart by its kind, and what is
    of none is a bug (exit 1).
    """
    if isinstance(error, ExplainedError):
        return Failed(int(exit_code_of(error)), str(error), error.hint, row=row)
    text = type(error).__name__
    if str(error):
        text = f"{text}: {str(error).splitlines()[0][:MAX_TEXT]}"
    number = error.errno if isinstance(error, OSError) else None
    code = ExitCode.BUG
    what = "this is a bug"
    hint = "run it again with --debug and report what it prints"
    if is_out_of_memory(error):
        code = ExitCode.DOES_NOT_FIT
        what = "out of memory"
        hint = hint_for_memory()
    elif number in WRITE_ERRORS:
        code = ExitCode.OUTPUT
        what = WRITE_ERRORS[number]
        hint = "free some space, or write elsewhere, and run the command again"
    elif number in NO_DESCRIPTORS:
        code = ExitCode.DEVICE
        what = "no more files can be opened"
        hint = "ulimit -n 1024"
    elif NO_THREADS.search(text):
        code = ExitCode.DEVICE
        what = "no more threads can be started"
        hint = "ulimit -u unlimited"
    elif NO_ENGINE in text:
        code = ExitCode.DEVICE
        what = "cuDNN has no kernel for this on this card"
        hint = "--precision fp32, or --device cpu"
    elif "CUDA error" in text:
        code = ExitCode.DEVICE
        what = "the device failed"
        hint = "run it again; if it stays: flux doctor"
    elif library := find_broken_library(error):
        code = ExitCode.DEVICE
        what = f"{library} cannot be imported"
        hint = f"pip install --force-reinstall {name_package(library)}"
    elif isinstance(error, ImportError):
        code = ExitCode.DEVICE
        what = "a dependency cannot be imported"
        hint = "pip install --force-reinstall fluxcli"
    elif isinstance(error, RecursionError):
        code = ExitCode.INPUT_FILE
        what = "something is nested too deep"
        hint = "look for a file whose values lie in each other hundreds deep"
    elif number is not None:
        code = ExitCode.INPUT_FILE
        what = "the operating system refuses"
        hint = "see that what it names is there and can be read"
    return Failed(int(code), f"{what}: {text}", hint, row=row)


def is_of_one_row(error: Exception) -> bool:
    """Return whether other rows of a batch can be drawn after an error.

    Not where it is unforeseen and of the device or a library: every row would end in it.
    """
    return isinstance(error, ExplainedError) or explain(error).exit_code != ExitCode.DEVICE
