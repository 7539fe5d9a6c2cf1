"""The request: what picture is wanted. Its fields, their bounds, and how text becomes their values.

Knows nothing of files, models or devices. Stdlib only. Sizes are in pixels, (width, height).
"""

import math
import re
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches

from fluxcli.errors import UsageError

ASPECT_RATIOS = ("1:1", "16:9", "21:9", "3:2", "2:3", "4:5", "5:4", "3:4", "4:3", "9:16", "9:21")
FORMATS = ("jpg", "png", "webp")
MULTIPLE_PX = 16  # 8x VAE, then 2x2 packing
MIN_SIZE_PX, MAX_SIZE_PX = 64, 4096
MAX_AREA_PX = 8 * 1024 * 1024
MAX_RATIO = 4
MAX_SEED = 2**64 - 1
MAX_PROMPT_BYTES = 8192  # four times what 512 T5 tokens hold, and what fits into a jpg's metadata


@dataclass(frozen=True)
class GenerationRequest:
    """Everything that decides a run. `seed` -1 asks for a random one; `guidance` None is for models without it."""

    prompt: str
    preset: str = "dev"
    model: str = "black-forest-labs/FLUX.1-dev"
    steps: int = 28
    guidance: float | None = 3.5
    seed: int = -1
    count: int = 1
    aspect_ratio: str = "1:1"
    image_size: int = 1024
    width: int | None = None
    height: int | None = None
    text_tokens: int = 512
    format: str = "jpg"
    quality: int = 80
    device: str = "auto"
    precision: str = "auto"
    vram_limit: int | None = None
    offload: str = "auto"
    text_encoders: tuple[str, ...] = ()
    vae: str | None = None
    lora: tuple[str, ...] = ()  # PATH[:SCALE] or REPO[:FILE][:SCALE]
    metadata: bool = True
    output: str | None = None

    def __post_init__(self) -> None:
        check_prompt(self.prompt)
        for name in LISTS:  # JSON has no tuples
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in KEYS:
            check(name, getattr(self, name), where=flag(name))
        if self.seed + self.count - 1 > MAX_SEED:
            raise UsageError("seed out of range", which="--seed", why=f"seed + count passes {MAX_SEED}")
        if (self.width is None) != (self.height is None):
            raise UsageError("--width and --height go together", hint="or give --ar and --size")
        check_size(*self.size, aspect_ratio=None if self.width else self.aspect_ratio)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the picture."""
        return (self.width, self.height) if self.width else size_of(self.aspect_ratio, self.image_size)

    def with_seed(self) -> "GenerationRequest":
        """The same request with a seed: a random 32-bit one where none was given."""
        return self if self.seed >= 0 else replace(self, seed=secrets.randbelow(2**32 - self.count))

    def picture(self, k: int) -> "GenerationRequest":
        """The request that makes picture `k` of this one alone."""
        return replace(self, seed=self.seed + k, count=1, output=None)

    def to_json(self) -> dict:
        return asdict(self) | {key: list(getattr(self, key)) for key in LISTS}


BOUNDS = {
    "steps": (1, 1000), "guidance": (0.0, 100.0), "seed": (-1, MAX_SEED), "count": (1, 10_000), "quality": (1, 100),
    "text_tokens": (1, 512), "vram_limit": (1 << 20, 1 << 50),
}  # fmt: skip
PATTERNS = {  # what a text must be, in a regular expression and in words
    "format": ("jpg|png|webp", "jpg, png or webp"),
    "device": (r"auto|cpu|mps|xpu(:\d{1,3})?|cuda(:\d{1,3})?", "auto, cpu, cuda[:n], mps or xpu[:n]"),
    "precision": ("auto|bf16|fp16|fp32|fp8|int8|nf4", "auto, bf16, fp16, fp32, fp8, int8 or nf4"),
    "offload": ("auto|none|stream|sequential", "auto, none, stream or sequential"),
    "model": (r"[^\0]{1,1000}", "a folder, a file or a hub id"),
    "output": (r"[^\0\ud800-\udc7f\udd00-\udfff]{1,4000}", "a file, a folder, a template or -"),
}
SIDES = {"image_size": MIN_SIZE_PX, "width": MULTIPLE_PX, "height": MULTIPLE_PX}  # the least of each
FLAGS = {"aspect_ratio": "--ar", "image_size": "--size", "metadata": "--no-metadata"}
ALIASES = {"ar": "aspect_ratio", "size": "image_size"}  # the flags' words, for settings files and variables
KEYS = tuple(field.name for field in fields(GenerationRequest) if field.name != "prompt")
OPTIONAL = ("guidance", "width", "height", "output", "vram_limit", "vae")  # None is a value of theirs
INTEGERS = ("steps", "seed", "count", "image_size", "width", "height", "text_tokens", "quality")
LISTS = ("text_encoders", "lora")
KINDS = dict.fromkeys(INTEGERS, "a whole number") | dict.fromkeys(LISTS, "a list of texts")
KINDS |= {"guidance": "a number", "metadata": "true or false", "vram_limit": "a size like 8GiB"}


def flag(name: str) -> str:
    """The command-line flag of a field."""
    return FLAGS.get(name, "--" + name.replace("_", "-"))


def check_prompt(text: str) -> None:
    """Raise `UsageError` for a prompt that is blank, too long or no text (lone surrogates)."""
    if not text.strip():
        raise UsageError("the prompt is empty", hint='flux generate "a red circle on a blue background" -p tiny')
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise UsageError("the prompt is not valid text", why=f"character {error.start}") from error
    if size > MAX_PROMPT_BYTES:
        raise UsageError("the prompt is too long", why=f"{size} bytes, at most {MAX_PROMPT_BYTES} are taken")


def check(name: str, value: object, *, where: str) -> None:
    """Raise `UsageError` naming `where` it stood if the field cannot have this value of its type; None always can."""
    if value is None:
        return
    low, high = BOUNDS.get(name, (value, value))
    if not low <= value <= high:
        raise UsageError(f"{name} out of range", which=where, why=f"{str(value)[:40]} is not in {low} to {high}")
    pattern, words = PATTERNS.get(name, ("(?s:.*)", ""))
    if not re.fullmatch(pattern, str(value)):
        raise UsageError(f"unknown {name}", which=where, why=f"{str(value)[:60]!r} is not {words}")
    if name == "aspect_ratio":
        parse_ratio(value, where=where)
    if name == "lora":
        for text in value:
            parse_lora(text, where=where)
    least = SIDES.get(name)
    if least and (not least <= value <= MAX_SIZE_PX or value % MULTIPLE_PX):
        below = min(max(value // MULTIPLE_PX * MULTIPLE_PX, least), MAX_SIZE_PX - MULTIPLE_PX)
        near = f"the nearest are {below} and {below + MULTIPLE_PX}"
        why = f"{str(value)[:20]} is no multiple of {MULTIPLE_PX} from {least} to {MAX_SIZE_PX}; {near}"
        raise UsageError("size not possible", which=where, why=why)


def size_of(aspect_ratio: str, image_size: int) -> tuple[int, int]:
    """Return (width, height): the longest side exactly `image_size`, the other the nearest multiple of 16."""
    wide, high = parse_ratio(aspect_ratio)
    longest, shortest = max(wide, high), min(wide, high)
    other = max(MULTIPLE_PX, int(image_size * shortest / longest / MULTIPLE_PX + 0.5) * MULTIPLE_PX)
    return (image_size, other) if wide >= high else (other, image_size)


def parse_ratio(text: str, *, where: str = "--ar") -> tuple[float, float]:
    """Parse W:H; raises `UsageError` for anything that is no ratio from 1:4 to 4:1."""
    match = re.fullmatch(r"(\d{1,5}(?:\.\d{1,4})?):(\d{1,5}(?:\.\d{1,4})?)", text)
    wide, high = (float(match[1]), float(match[2])) if match else (0.0, 0.0)
    if not wide or not high:
        hint = " ".join(ASPECT_RATIOS)
        raise UsageError("aspect ratio not possible", which=where, why=f"{text!r} is not W:H", hint=hint)
    if max(wide, high) > MAX_RATIO * min(wide, high):
        limit = f"{MAX_RATIO}:1" if wide > high else f"1:{MAX_RATIO}"
        raise UsageError("aspect ratio not possible", which=where, why=f"{text} is beyond {limit}")
    return wide, high


def check_size(width: int, height: int, *, aspect_ratio: str | None) -> None:
    """Raise `UsageError` if no picture can have these sides, rounded from `aspect_ratio` or (None) asked for."""
    which, longest = f"{width}x{height}", max(width, height)
    if longest < MIN_SIZE_PX:
        raise UsageError("size not possible", which=which, why=f"the longest side is below {MIN_SIZE_PX}")
    if not aspect_ratio and longest > MAX_RATIO * min(width, height):
        raise UsageError("size not possible", which=which, why=f"it is beyond {MAX_RATIO}:1")
    if width * height > MAX_AREA_PX:
        smaller = (size_of(aspect_ratio or f"{width}:{height}", side) for side in range(MAX_SIZE_PX, 0, -MULTIPLE_PX))
        wide, high = next(size for size in smaller if math.prod(size) <= MAX_AREA_PX)
        possible = f"--size {max(wide, high)}" if aspect_ratio else f"--width {wide} --height {high}"
        why = f"{width * height:,} pixels are more than {MAX_AREA_PX:,}"
        raise UsageError("size not possible", which=which, why=why, hint=f"{possible} is the largest")


def coerce(name: str, value: object, *, where: str) -> object:
    """Turn a setting's text or TOML value into the field's type; raises `UsageError` naming `where` it stood."""
    if name not in KEYS:
        near = get_close_matches(name, KEYS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else "known keys: " + " ".join(KEYS)
        raise UsageError("unknown setting", which=where, why=f"{name!r} is no setting", hint=hint)
    if value is None and name in OPTIONAL:
        return None
    try:
        converted = _converted(name, value)
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        why = f"{name} is {str(value)[:60]!r}, not {KINDS.get(name, 'a text')}"
        raise UsageError("wrong value", which=where, why=why) from error
    check(name, converted, where=where)
    return converted


def _converted(name: str, value: object) -> object:
    if name == "metadata" and isinstance(value, (bool, str)):
        return {"true": True, "1": True, "false": False, "0": False}[str(value).lower()]
    if isinstance(value, bool) or (isinstance(value, float) and name in INTEGERS and not value.is_integer()):
        raise ValueError
    if name in INTEGERS:
        return int(value)
    if name == "vram_limit":
        return parse_bytes(str(value))
    if name == "guidance":
        return None if value in ("none", "") else float(value)
    if name in LISTS:
        values = (value,) if isinstance(value, str) else value
        if not isinstance(values, list | tuple):
            raise TypeError
        return tuple("".join(each) for each in values)  # a TypeError for what is no text
    if not isinstance(value, str):
        raise ValueError
    return value.lower().replace("jpeg", "jpg") if name == "format" else value


def parse_lora(text: str, *, where: str = "--lora") -> tuple[str, float]:
    """(what names the adapter, its scale) of NAME[:SCALE]; raises `UsageError` for a scale that is not finite."""
    name, colon, end = text.rpartition(":")
    try:
        scale = float(end) if colon else None
    except ValueError:
        scale = None
    name, scale = (text, 1.0) if scale is None else (name, scale)
    if not name.strip() or "\0" in name or not math.isfinite(scale):
        raise UsageError("no adapter", which=where, why=f"{text[:80]!r} is not PATH[:SCALE]", hint="--lora FILE:0.8")
    return name, scale


def joined(weaker: tuple[str, ...], stronger: tuple[str, ...]) -> tuple[str, ...]:
    """Adapters of two layers of settings: they add up, the same one's scale is replaced, "none" drops what was said."""
    found: dict[str, str] = {}
    for text in (*weaker, *stronger):
        found = {} if text == "none" else found | {parse_lora(text)[0]: text}
    return tuple(found.values())


def parse_bytes(text: str) -> int:
    """Bytes of a size like 8GiB, 8 GB, 8G (binary) or a plain number; raises ValueError."""
    match = re.fullmatch(r"(\d{1,16}(?:\.\d{1,6})?)\s*([kmgt]?)(i?b)?", text.strip().lower())
    if not match:
        raise ValueError(text)
    base = 1000 if match[3] == "b" else 1024
    return int(float(match[1]) * base ** " kmgt".index(match[2] or " "))


def from_settings(prompt: str, settings: Mapping[str, object]) -> GenerationRequest:
    """Build the request from merged settings (keys are field names, values of the fields' types)."""
    return GenerationRequest(prompt=prompt, **settings)
