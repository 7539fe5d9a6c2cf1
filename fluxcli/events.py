"""What a run says while it goes on: in process as it is, on a wire and for `--events` as `to_json`. Stdlib only."""

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Phase:
    """A phase begins (and the one before it ends): load, encode, condition, denoise, decode or save."""

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
    """A picture was written."""

    image: GeneratedImage


@dataclass(frozen=True)
class Done:
    """The run is over: its pictures, what made them, seconds per phase and the memory peaks in bytes."""

    images: tuple[GeneratedImage, ...]
    request: dict
    plan: dict
    timings_s: dict
    peak_memory: dict
    versions: dict


@dataclass(frozen=True)
class Failed:
    """The run ended with an error, as the exit code and stderr also say."""

    exit_code: int
    message: str
    hint: str


Event = Phase | Step | Notice | Saved | Done | Failed


def to_json(event: Event) -> dict:
    """Return the event as a dict of JSON types, its kind under "event"."""
    return {"event": type(event).__name__.lower()} | asdict(event)
