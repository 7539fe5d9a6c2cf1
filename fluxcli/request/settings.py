"""The settings: one row each, from which everything that must know them is made.

A setting is a field of a request, its resources, its output or the order that joins them (see
`fields`), and one row of `SETTINGS` here. From the row come what values it takes, how text becomes
such a value, its words in errors, its flag on the command line, its key in settings files and
rows, its FLUX_* variable, and its line in docs/commands.md. Stdlib only.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, ClassVar

from fluxcli.errors import UsageError
from fluxcli.request.inputs import ControlRef, Expand, ReduxRef
from fluxcli.request.sizes import (
    ASPECT_RATIOS,
    MAX_SIZE_PX,
    MIN_SIZE_PX,
    MULTIPLE_PX,
    check_side,
    parse_ratio,
    parse_size,
)

MAX_SEED = 2**64 - 1
LORA_NONE = "none"  # as an adapter's name: drops the adapters of weaker settings


@dataclass(frozen=True)
class LoraRef:
    """An adapter as the user names it: PATH, NAME or REPO[:FILE], and how strongly it acts."""

    name: str
    scale: float = 1.0

    @classmethod
    def parse(cls, text: str, *, where: str = "--lora") -> "LoraRef":
        """Parse NAME[:SCALE]; the last colon separates only if a number follows it.

        Raises `UsageError`, which names `where` the text stood, for an empty name, a NUL in it,
        and a scale that is not finite.
        """
        name, colon, end = text.rpartition(":")
        scale = _number_or_none(end) if colon else None
        if scale is None:
            name = text
            scale = 1.0
        if not name.strip() or "\0" in name or not math.isfinite(scale):
            raise UsageError(
                "no adapter",
                which=where,
                why=f"{text[:80]!r} is not PATH[:SCALE]",
                hint="--lora FILE:0.8",
            )
        return cls(name, scale)

    def __str__(self) -> str:
        """Return NAME:SCALE, which `parse` reads back."""
        return f"{self.name}:{self.scale!r}"

    @property
    def drops_weaker(self) -> bool:
        """Whether this stands for --lora none."""
        return self.name == LORA_NONE


def _number_or_none(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def merge_loras(weaker: Sequence[LoraRef], stronger: Sequence[LoraRef]) -> tuple[LoraRef, ...]:
    """Return the adapters of two layers of settings.

    They add up; an adapter that both name has the stronger one's scale; "none" drops all that
    came before it.
    """
    found: dict[str, LoraRef] = {}
    for ref in (*weaker, *stronger):
        if ref.drops_weaker:
            found.clear()
        else:
            found[ref.name] = ref
    return tuple(found.values())


MAX_BARE_GIB = 512  # a size without a unit up to here is in GiB


def parse_bytes(text: str) -> int:
    """Return the bytes of a size like 8GiB, 8 GB or 8G (binary).

    A plain number counts GiB up to `MAX_BARE_GIB`, and bytes above it: nobody means 8 bytes of
    memory. Raises ValueError for anything else.
    """
    match = re.fullmatch(r"(\d{1,16}(?:\.\d{1,6})?)\s*([kmgt]?)(i?b)?", text.strip().lower())
    if not match:
        raise ValueError(text)
    if not match[2] and not match[3] and float(match[1]) <= MAX_BARE_GIB:
        return int(float(match[1]) * (1 << 30))
    base = 1000 if match[3] == "b" else 1024
    power = "kmgt".index(match[2]) + 1 if match[2] else 0
    return int(float(match[1]) * base**power)


class Kind:
    """What values a setting takes. `convert` makes one of text or TOML, `check` refuses others."""

    words: ClassVar[str] = "a text"  # for "... is 'x', not a text"
    example: ClassVar[str] = "TEXT"
    option_type: ClassVar[Any] = str  # what the command line parser makes of the option

    def convert(self, value: Any) -> Any:
        """Return the value of the field's type; raises ValueError or TypeError for another."""
        if not isinstance(value, str):
            raise TypeError(value)
        return value

    def check(self, name: str, value: Any, *, where: str) -> None:
        """Raise `UsageError`, naming `where` it stood, for a value of the type that cannot be."""

    def hint(self, flag: str) -> str:
        """Return what to type instead of a value of another type."""
        return f"{flag} {self.example}, or {flag[2:].replace('-', '_')} = {self.example} in a file"


@dataclass(frozen=True)
class Text(Kind):
    """A text that a regular expression matches as a whole; `described` says which in words."""

    pattern: str = r"(?s:.*)"
    described: str = ""

    def convert(self, value: Any) -> str:
        if not isinstance(value, str):
            raise TypeError(value)
        return value

    def check(self, name: str, value: str, *, where: str) -> None:
        if not re.fullmatch(self.pattern, value):
            why = f"{value[:60]!r} is not {self.described}"
            raise UsageError(f"unknown {name}", which=where, why=why)


class ImageFormat(Text):
    """A picture format, in upper or lower case; jpeg is jpg."""

    def convert(self, value: Any) -> str:
        return super().convert(value).lower().replace("jpeg", "jpg")


@dataclass(frozen=True)
class Integer(Kind):
    """A whole number from `low` to `high`."""

    low: int
    high: int
    words: ClassVar[str] = "a whole number"
    example: ClassVar[str] = "20"

    def convert(self, value: Any) -> int:
        if isinstance(value, bool):
            raise TypeError(value)
        if isinstance(value, float) and not value.is_integer():
            raise ValueError(value)
        if isinstance(value, str):  # spreadsheets and pandas write 4.0 beside empty cells
            value = re.sub(r"\.0+$", "", value.strip())
        return int(value)

    def check(self, name: str, value: int, *, where: str) -> None:
        _check_range(name, value, low=self.low, high=self.high, where=where)


@dataclass(frozen=True)
class Side(Integer):
    """A side of a picture in pixels: a multiple of 16 from `low` on."""

    words: ClassVar[str] = "a number of pixels"
    example: ClassVar[str] = "1024"

    def check(self, name: str, value: int, *, where: str) -> None:
        check_side(value, least_px=self.low, where=where)


@dataclass(frozen=True)
class Number(Kind):
    """A number from `low` to `high`, or "none"."""

    low: float
    high: float
    words: ClassVar[str] = "a number"
    example: ClassVar[str] = "3.5"

    def convert(self, value: Any) -> float | None:
        if isinstance(value, bool):
            raise TypeError(value)
        if value in ("none", ""):
            return None
        return float(value)

    def check(self, name: str, value: float, *, where: str) -> None:
        _check_range(name, value, low=self.low, high=self.high, where=where)


class TrueScale(Number):
    """A scale of true guidance: at 1 there is none."""

    example: ClassVar[str] = "3"

    def check(self, name: str, value: float, *, where: str) -> None:
        if value == 1:
            why = "at 1 the negative prompt has no part in the picture"
            hint = "--true-cfg 3, or neither it nor --negative-prompt"
            raise UsageError("no true guidance", which=where, why=why, hint=hint)
        super().check(name, value, where=where)


@dataclass(frozen=True)
class Bytes(Kind):
    """A size in bytes, written like 8GiB."""

    low: int
    high: int
    words: ClassVar[str] = "a size like 8GiB"
    example: ClassVar[str] = "8GiB"

    def convert(self, value: Any) -> int:
        if isinstance(value, bool):
            raise TypeError(value)
        return parse_bytes(str(value))

    def check(self, name: str, value: int, *, where: str) -> None:
        if not self.low <= value <= self.high:
            why = f"{value} bytes are not in {self.low >> 20} MiB to {self.high >> 40} TiB"
            hint = f"write its unit, too: {self.example}"
            raise UsageError(f"{name} out of range", which=where, why=why, hint=hint)


class Switch(Kind):
    """True or false."""

    words: ClassVar[str] = "true or false"
    example: ClassVar[str] = "true"
    option_type: ClassVar[Any] = bool

    def convert(self, value: Any) -> bool:
        if not isinstance(value, bool | str):
            raise TypeError(value)
        return {"true": True, "1": True, "false": False, "0": False}[str(value).lower()]


class Ratio(Kind):
    """An aspect ratio, W:H."""

    def check(self, name: str, value: str, *, where: str) -> None:
        parse_ratio(value, where=where)


class Texts(Kind):
    """A list of texts; one text alone is a list of one."""

    words: ClassVar[str] = "a list of texts"
    option_type: ClassVar[Any] = list[str]

    def convert(self, value: Any) -> tuple[Any, ...]:
        if isinstance(value, str):
            return (value,)
        if not isinstance(value, list | tuple):
            raise TypeError(value)
        for each in value:
            if not isinstance(each, str):
                raise TypeError(each)
        return tuple(value)


class Loras(Texts):
    """A list of adapters, each as NAME[:SCALE]."""

    def convert(self, value: Any) -> tuple[LoraRef, ...]:
        if isinstance(value, tuple) and all(isinstance(each, LoraRef) for each in value):
            return value
        return tuple(LoraRef.parse(text) for text in super().convert(value))


class Controls(Texts):
    """A list of control pictures, each as KIND:IMAGE[:SCALE][:START-END]."""

    def convert(self, value: Any) -> tuple[ControlRef, ...]:
        if isinstance(value, tuple) and all(isinstance(each, ControlRef) for each in value):
            return value
        return tuple(ControlRef.parse(text) for text in super().convert(value))


class Reduxes(Texts):
    """A list of pictures to look like, each as IMAGE[:STRENGTH]."""

    def convert(self, value: Any) -> tuple[ReduxRef, ...]:
        if isinstance(value, tuple) and all(isinstance(each, ReduxRef) for each in value):
            return value
        return tuple(ReduxRef.parse(text) for text in super().convert(value))


class Borders(Kind):
    """By how many pixels a picture grows: LEFT,TOP,RIGHT,BOTTOM."""

    words: ClassVar[str] = "LEFT,TOP,RIGHT,BOTTOM in pixels"
    example: ClassVar[str] = "0,0,256,0"

    def convert(self, value: Any) -> Expand:
        if isinstance(value, Expand):
            return value
        if not isinstance(value, str):
            raise TypeError(value)
        return Expand.parse(value)


def _check_range(name: str, value: float, *, low: float, high: float, where: str) -> None:
    """Raise `UsageError` for a number outside `low` to `high`, and for NaN."""
    if not low <= value <= high:
        why = f"{str(value)[:40]} is not in {low} to {high}"
        raise UsageError(f"{name} out of range", which=where, why=why)


@dataclass(frozen=True)
class Setting:
    """One setting. `name` is its field and its key in settings files, rows and metadata."""

    name: str
    kind: Kind
    help: str
    flags: tuple[str, ...]
    alias: str = ""  # another key for it in settings files, rows and variables: the flag's word
    optional: bool = False  # None is a value of it

    @property
    def key(self) -> str:
        """The name under which it is shown, and that a file takes."""
        return self.alias or self.name

    @property
    def flag(self) -> str:
        """The long flag on the command line."""
        return self.flags[-1]


PICTURE_FILE = Text(r"[^\0]{1,4000}", "a file of a picture")

_ROWS = (
    Setting(
        "preset",
        Text(),
        help="Named settings: flux presets lists them.",
        flags=("-p", "--preset"),
    ),
    Setting(
        "model",
        Text(r"[^\0]{1,1000}", "a folder, a file or a hub id"),
        help="Model folder, file or hub id.",
        flags=("-m", "--model"),
    ),
    Setting(
        "text_encoders",
        Texts(),
        help="Folder or file (CLIP, T5) for a model in one file.",
        flags=("--text-encoders",),
    ),
    Setting(
        "vae",
        Text(),
        help="Folder or file of the VAE for a model in one file.",
        flags=("--vae",),
        optional=True,
    ),
    Setting(
        "lora",
        Loras(),
        help="PATH[:SCALE] or REPO[:FILE][:SCALE]; repeatable; none drops presets'.",
        flags=("--lora",),
    ),
    Setting(
        "aspect_ratio",
        Ratio(),
        help=f"W:H, e.g. {' '.join(ASPECT_RATIOS)}.",
        flags=("--ar",),
        alias="ar",
    ),
    Setting(
        "image_size",
        Side(MIN_SIZE_PX, MAX_SIZE_PX),
        help="Longest side in pixels, a multiple of 16; or both, as 1024x768.",
        flags=("--size",),
        alias="size",
    ),
    Setting(
        "width",
        Side(MULTIPLE_PX, MAX_SIZE_PX),
        help="Pixels, instead of --size; the height follows from --ar where it is not given.",
        flags=("--width",),
        optional=True,
    ),
    Setting(
        "height",
        Side(MULTIPLE_PX, MAX_SIZE_PX),
        help="Pixels; the width follows from --ar where it is not given.",
        flags=("--height",),
        optional=True,
    ),
    Setting(
        "image",
        PICTURE_FILE,
        help="Picture to start from, - for stdin; its ratio decides the size.",
        flags=("--init", "--image"),
        optional=True,
    ),
    Setting(
        "strength",
        Number(0.0, 1.0),
        help="How much of --image is drawn anew, 0 to 1.",
        flags=("--strength",),
        optional=True,
    ),
    Setting(
        "mask",
        PICTURE_FILE,
        help="Where --image is drawn anew: white is painted, black stays.",
        flags=("--mask",),
        optional=True,
    ),
    Setting(
        "mask_invert",
        Switch(),
        help="Paint where the mask is black.",
        flags=("--mask-invert",),
    ),
    Setting(
        "mask_feather",
        Integer(0, 512),
        help="Let --image fade out over so many pixels inside the mask's white.",
        flags=("--mask-feather",),
    ),
    Setting(
        "expand",
        Borders(),
        help="Paint LEFT,TOP,RIGHT,BOTTOM pixels around --image (a Fill model).",
        flags=("--expand",),
        optional=True,
    ),
    Setting(
        "reference",
        Texts(),
        help="Picture that a Kontext model edits as the prompt says; repeatable.",
        flags=("--reference",),
    ),
    Setting(
        "redux",
        Reduxes(),
        help="IMAGE[:STRENGTH] that the picture is to look like; repeatable.",
        flags=("--redux",),
    ),
    Setting(
        "redux_model",
        Texts(),
        help="Where SigLIP and Redux' embedder are: folder, file or hub id; repeatable.",
        flags=("--redux-model",),
    ),
    Setting(
        "control",
        Controls(),
        help="KIND:IMAGE[:SCALE][:START-END] to follow, as canny:a.jpg; repeatable.",
        flags=("--control",),
    ),
    Setting(
        "negative_prompt",
        Text(),
        help="What the picture is not to show: each step is computed twice.",
        flags=("--negative-prompt",),
        optional=True,
    ),
    Setting(
        "true_cfg",
        TrueScale(1.01, 100.0),
        help="How strongly --negative-prompt pushes away; 3 where that is given alone.",
        flags=("--true-cfg",),
        optional=True,
    ),
    Setting(
        "kind",
        Text(
            "auto|dev|schnell|fill|kontext|canny|depth",
            "auto, dev, schnell, fill, kontext, canny or depth",
        ),
        help="Which kind of FLUX.1 the model is, where its file does not tell.",
        flags=("--kind",),
    ),
    Setting("steps", Integer(1, 1000), help="Denoising steps.", flags=("--steps",)),
    Setting(
        "guidance",
        Number(0.0, 100.0),
        help="How closely to follow the prompt; none for schnell.",
        flags=("--guidance",),
        optional=True,
    ),
    Setting(
        "seed",
        Integer(-1, MAX_SEED),
        help="-1 picks one; the seed used is always reported.",
        flags=("--seed",),
    ),
    Setting(
        "count",
        Integer(1, 10_000),
        help="How many pictures; number k uses seed+k.",
        flags=("-n", "--count"),
    ),
    Setting(
        "text_tokens",
        Integer(1, 512),
        help="T5 length; padding counts: it changes the picture.",
        flags=("--text-tokens",),
    ),
    Setting(
        "output",
        Text(
            r"[^\x00-\x1f\x7f-\x9f\ud800-\udc7f\udd00-\udfff]{1,4000}",
            "a file, a folder, a template or -",
        ),
        help="File, folder/, - for stdout, or template"
        " of {seed} {n} {row} {slug} {preset} {width} {height} {date}.",
        flags=("-o", "--output"),
        optional=True,
    ),
    Setting(
        "format",
        ImageFormat("jpg|png|webp", "jpg, png or webp"),
        help="jpg, png or webp.",
        flags=("--format",),
    ),
    Setting(
        "preview_every",
        Integer(1, 1000),
        help="Write a small preview beside the target every N steps.",
        flags=("--preview-every",),
        optional=True,
    ),
    Setting(
        "quality",
        Integer(1, 100),
        help="1 to 100, for jpg and webp; a webp of 100 is lossless.",
        flags=("--quality",),
    ),
    Setting("metadata", Switch(), help="Write the bare picture.", flags=("--no-metadata",)),
    Setting(
        "precision",
        Text(
            "auto|bf16|fp16|fp32|int8|w6a8|fp8|w4a8|nf4",
            "auto, bf16, fp16, fp32, int8, w6a8, fp8, w4a8 or nf4",
        ),
        help="auto, bf16, fp16, fp32, int8, w6a8, fp8, w4a8 or nf4.",
        flags=("--precision",),
    ),
    Setting(
        "vram_limit",
        Bytes(1 << 20, 1 << 50),
        help="Plan as if the device had only so much, e.g. 8GiB.",
        flags=("--vram-limit",),
        optional=True,
    ),
    Setting(
        "offload",
        Text("auto|none|stream|sequential", "auto, none, stream or sequential"),
        help="auto, none, stream (blocks pass through) or sequential (least memory).",
        flags=("--offload",),
    ),
    Setting(
        "device",
        Text(r"auto|cpu|mps|xpu(:\d{1,3})?|cuda(:\d{1,3})?", "auto, cpu, cuda[:n], mps or xpu[:n]"),
        help="auto, cpu, cuda[:n], mps or xpu[:n].",
        flags=("--device",),
    ),
    Setting(
        "compile",
        Switch(),
        help="Compile the transformer's blocks: the first step takes longer, the others less.",
        flags=("--compile",),
    ),
)

SETTINGS: dict[str, Setting] = {row.name: row for row in _ROWS}
# Settings that hold pictures or say what is done with them: left out of what identifies a picture
# where they have their defaults, so that pictures of before keep their hashes.
FROM_PICTURES = (
    "image", "strength", "mask", "mask_invert", "mask_feather", "expand", "reference", "redux",
    "redux_model", "control", "negative_prompt", "true_cfg", "kind", "preview_every",
)  # fmt: skip
ALIASES: dict[str, str] = {row.alias: row.name for row in _ROWS if row.alias}
KEYS = tuple(row.key for row in _ROWS)  # as they are shown
FORMATS = ("jpg", "png", "webp")


def to_json_value(value: Any) -> Any:
    """Return a setting's value as JSON has it: adapters and pictures as texts, tuples as lists."""
    if isinstance(value, LoraRef | ControlRef | ReduxRef | Expand):
        return str(value)
    if isinstance(value, tuple):
        return [to_json_value(each) for each in value]
    return value


def flag(name: str) -> str:
    """Return the command-line flag of a setting."""
    return SETTINGS[name].flag


def check(name: str, value: object, *, where: str) -> None:
    """Raise `UsageError`, naming `where` it stood, if the setting cannot have this value.

    The value must be of the field's type; None is always taken.
    """
    if value is not None:
        setting = SETTINGS[name]
        setting.kind.check(setting.key, value, where=where)


def coerce(name: str, value: object, *, where: str) -> Any:
    """Return a setting's text or TOML value as the field's type.

    Raises `UsageError`, naming `where` it stood, for an unknown setting, a value of another type,
    and a value out of range.
    """
    setting = SETTINGS[find_name(name, where=where)]
    if value is None and setting.optional:
        return None
    try:
        converted = setting.kind.convert(value)
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        why = f"{setting.key} is {str(value)[:60]!r}, not {setting.kind.words}"
        hint = setting.kind.hint(setting.flag)
        raise UsageError("wrong value", which=where, why=why, hint=hint) from error
    check(setting.name, converted, where=where)
    return converted


def coerce_all(values: Mapping[str, Any], where: Callable[[str], str]) -> dict[str, Any]:
    """Return settings by name, of the fields' types; `where` says where a name stood.

    A size like 1024x768 becomes a width and a height. Raises what `coerce` does, and `UsageError`
    where these are given beside it.
    """
    found = {name: value for name, value in values.items() if name != "image_size"}
    size = values.get("image_size")
    sides = parse_size(size) if isinstance(size, str) else None
    if sides is None:
        found = dict(values)
    elif found.get("width") or found.get("height"):
        raise UsageError(
            "--width/--height exclude --ar/--size",
            which=where("image_size"),
            hint="--width and --height, or --ar and --size",
        )
    else:
        found["width"], found["height"] = sides
    return {name: coerce(name, value, where=where(name)) for name, value in found.items()}


def find_name(key: str, *, where: str, also: Sequence[str] = ()) -> str:
    """Return the name of the setting that a key stands for.

    Raises `UsageError`, naming `where` it stood, for another one: with the nearest key, or all.
    `also` are keys that may stand there beside the settings'.
    """
    name = ALIASES.get(key, key)
    if name in SETTINGS:
        return name
    known = (*also, *KEYS)
    near = get_close_matches(key, (*known, *ALIASES.values()), n=1, cutoff=0.5)
    hint = "known keys: " + " ".join(known)
    if near:
        hint = f"did you mean {near[0]!r}?"
    raise UsageError("unknown setting", which=where, why=f"{key[:60]!r} is no setting", hint=hint)
