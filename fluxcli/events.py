"""What a run says while it goes on: in process as it is, on a wire and for `--events` as `to_json`. Stdlib only."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import get_args

from fluxcli.errors import exit_code_of
from quant.errors import ExplainedError


@dataclass(frozen=True)
class Phase:
    """A phase begins (and the one before it ends): wait, evict, load, encode, condition, denoise, decode or save."""

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
class Notice:
    """Something the user should know; the run goes on."""

    message: str


@dataclass(frozen=True)
class GeneratedImage:
    """A finished picture: where it is and what identifies it. `pixels_sha256` is over the RGB bytes before encoding."""

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
    """A picture was written, for a row of a batch (from 1; 0 outside one)."""

    image: GeneratedImage
    row: int = 0


@dataclass(frozen=True)
class Skipped:
    """The row's picture is there already, whole and made by the same request."""

    row: int
    path: str


@dataclass(frozen=True)
class Done:
    """The run, or a row of a batch, is over: its pictures, what made them, seconds per phase, memory peaks in bytes.

    The seconds are those since the command began, of all rows so far.
    """

    images: tuple[GeneratedImage, ...]
    request: dict
    plan: dict
    timings_s: dict
    peak_memory: dict
    versions: dict
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
    """A batch is over: rows by what became of them, pictures written, and seconds since the command began."""

    rows: int
    done: int
    failed: int
    skipped: int
    pictures: int
    seconds: float


Event = Phase | Step | Notice | Saved | Skipped | Done | Failed | Summary
KINDS = {kind.__name__.lower(): kind for kind in get_args(Event)}


def failed(error: ExplainedError, row: int = 0) -> Failed:
    """The event of an error that explains itself."""
    return Failed(int(exit_code_of(error)), str(error), error.hint, row)


def to_json(event: Event) -> dict:
    """Return the event as a dict of JSON types, its kind under "event"."""
    return {"event": type(event).__name__.lower()} | asdict(event)


def from_json(value: Mapping) -> Event:
    """The event that `to_json` gave; raises KeyError or TypeError for anything else."""
    found = dict(value)
    kind = KINDS[found.pop("event")]
    if kind is Saved:
        found["image"] = GeneratedImage(**found["image"])
    if kind is Done:
        found["images"] = tuple(GeneratedImage(**image) for image in found["images"])
    return kind(**found)
