"""What a request says of pictures that it starts from: which, for what, and how strongly.

Each type parses the text of an option and `str` gives that text back, so that a request can travel
as JSON. Knows no file: a name is text here, and what it names is looked up elsewhere. Stdlib only.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any, NamedTuple

from fluxcli.errors import UsageError

CONTROL_EXAMPLE = "--control canny:photo.jpg:0.7"
REDUX_EXAMPLE = "--redux photo.jpg:0.8"
MAX_EXPAND_PX = 4096
NUMBER = r"\d+(?:\.\d*)?|\.\d+"
SPAN = re.compile(rf"({NUMBER})-({NUMBER})")
STDIN = "-"  # as the name of a picture
PICTURE_SETTINGS = ("image", "mask", "reference", "redux", "control")  # that name some
MAX_CONTROL_SCALE = 10
# What a kind may begin with and hold a colon in it: a drive of Windows, an address, a file of the
# hub.
KIND_START = re.compile(
    r"[A-Za-z]:(?=[\\/])|[A-Za-z][A-Za-z0-9+.-]+://|hf:(?=[\w.-]+/)"
    r"|[\w.-]+/[\w.-]+(?:@[\w./-]+)?:(?=[^:]+\.(?:safetensors|sft|gguf):)",
    re.IGNORECASE,
)
CONTROL_KEYS = ("kind", "image", "scale", "start", "end", "mode")
PAIR = re.compile(rf",(?=(?:{'|'.join(CONTROL_KEYS)})=)")


@dataclass(frozen=True)
class ControlRef:
    """A control picture: `kind` picks the weights, by a preset's name, a path or a hub id.

    `scale` is how strongly it acts, `start` and `end` are the shares of the steps between which it
    does (0 to 1), `mode` is what the picture shows, to a union of several networks: a name of the
    kind's preset, or a number. None takes what the kind's preset says.
    """

    kind: str
    image: str
    scale: float | None = None
    start: float | None = None
    end: float | None = None
    mode: str | None = None

    @classmethod
    def parse(cls, text: str, *, where: str = "--control") -> "ControlRef":
        """Parse KIND:IMAGE[:SCALE][:START-END] or kind=..,image=..,scale=..,start=..,end=..,mode=..

        The first form is taken apart from the right, and then where the kind ends, so that the
        image's name may hold colons. Raises `UsageError`, which names `where` the text stood.
        """
        if text.startswith(tuple(f"{key}=" for key in CONTROL_KEYS)):
            return cls._parse_pairs(text, where)
        rest = text
        span: tuple[float | None, float | None] = (None, None)
        scale = None
        match = SPAN.fullmatch(rest.rpartition(":")[2])
        if match:
            span = (float(match[1]), float(match[2]))
            rest = rest.rpartition(":")[0]
        head, _, last = rest.rpartition(":")
        if re.fullmatch(NUMBER, last) and _find_end_of_kind(head) > 0:
            scale = float(last)
            rest = head
        end = _find_end_of_kind(rest)
        if end < 0:
            raise _refuse_control(text, where, why="it names no picture")
        return cls.make(rest[:end], rest[end + 1 :], scale=scale, span=span, where=where)

    @classmethod
    def _parse_pairs(cls, text: str, where: str) -> "ControlRef":
        pairs: dict[str, str] = {}
        for part in PAIR.split(text):
            key, _, value = part.partition("=")
            if key in pairs:
                raise _refuse_control(text, where, why=f"{key} stands in it twice")
            pairs[key] = value
        numbers = {}
        for key in ("scale", "start", "end"):
            if key in pairs and not re.fullmatch(NUMBER, pairs[key]):
                why = f"{key} is {pairs[key][:40]!r}, not a number"
                raise _refuse_control(text, where, why=why)
            numbers[key] = float(pairs[key]) if key in pairs else None
        return cls.make(
            pairs.get("kind", ""),
            pairs.get("image", ""),
            scale=numbers["scale"],
            span=(numbers["start"], numbers["end"]),
            mode=pairs.get("mode"),
            where=where,
        )

    @classmethod
    def make(
        cls,
        kind: str,
        image: str,
        *,
        scale: float | None = None,
        span: tuple[float | None, float | None] = (None, None),
        mode: str | None = None,
        where: str = "--control",
    ) -> "ControlRef":
        """Make one of its parts; raises `UsageError` for what cannot be."""
        text = f"{kind}:{image}"
        if not kind.strip() or not image.strip() or "\0" in text:
            raise _refuse_control(text, where, why="a kind and a picture are needed")
        if PAIR.search(kind) or PAIR.search(image):
            raise _refuse_control(text, where, why="a comma and KEY= are in a name; rename it")
        if mode is not None and not re.fullmatch(r"[\w.-]{1,40}", mode):
            raise _refuse_control(text, where, why=f"the mode {mode[:40]!r} is no name or number")
        if scale is not None and not 0 <= scale <= MAX_CONTROL_SCALE:
            why = f"the scale {scale:g} is not in 0 to {MAX_CONTROL_SCALE}"
            raise _refuse_control(text, where, why=why)
        start, end = span
        first = 0.0 if start is None else start
        last = 1.0 if end is None else end
        if not 0 <= first < last <= 1:
            why = f"{first:g}-{last:g} are no shares of the steps, as 0-0.8 is"
            raise _refuse_control(text, where, why=why)
        return cls(kind, image, scale, start, end, mode)

    def __str__(self) -> str:
        """Return a text that `parse` reads back."""
        text = f"kind={self.kind},image={self.image}"
        for key in ("scale", "start", "end"):
            value = getattr(self, key)
            if value is not None:
                text += f",{key}={_write_number(value)}"
        return text if self.mode is None else f"{text},mode={self.mode}"


def acts_in_step(index: int, steps: int, *, span: tuple[float, float]) -> bool:
    """Whether a control with a span of shares acts in a step, of which `index` counts from 0.

    As diffusers counts: by the first step's share at its start, by the last one's at its end.
    """
    start, end = span
    return index / steps >= start and (index + 1) / steps <= end


def _find_end_of_kind(text: str) -> int:
    """Return where the colon between KIND and IMAGE is, less than 0 where there is none."""
    start = KIND_START.match(text)
    return text.find(":", start.end() if start else 0)


def _write_number(value: float) -> str:
    """Return a number from 0 to 10 without an exponent, which no option's text has."""
    text = repr(float(value))
    return format(Decimal(text), "f") if "e" in text else text


def _refuse_control(text: str, where: str, *, why: str) -> UsageError:
    return UsageError(
        "no control", which=where, why=f"{text[:80]!r}: {why}", hint=f"{CONTROL_EXAMPLE}:0-0.8"
    )


@dataclass(frozen=True)
class ReduxRef:
    """A picture that the new one should look like, and how strongly."""

    image: str
    strength: float = 1.0

    @classmethod
    def parse(cls, text: str, *, where: str = "--redux") -> "ReduxRef":
        """Parse IMAGE[:STRENGTH]; the last colon separates only if a number follows it.

        Raises `UsageError`, which names `where` the text stood.
        """
        image, _, end = text.rpartition(":")
        strength = 1.0
        if image and re.fullmatch(NUMBER, end):
            strength = float(end)
        else:
            image = text
        if not image.strip() or "\0" in image or not 0 <= strength <= 10:
            why = f"{text[:80]!r} is not IMAGE[:STRENGTH]"
            raise UsageError("no picture", which=where, why=why, hint=REDUX_EXAMPLE)
        return cls(image, strength)

    def __str__(self) -> str:
        """Return IMAGE:STRENGTH, which `parse` reads back."""
        return f"{self.image}:{self.strength!r}"


class Expand(NamedTuple):
    """By how many pixels a picture grows on each side."""

    left: int
    top: int
    right: int
    bottom: int

    @classmethod
    def parse(cls, text: str) -> "Expand":
        """Parse LEFT,TOP,RIGHT,BOTTOM; raises ValueError."""
        numbers = [int(part) for part in text.split(",")]
        is_possible = all(0 <= each <= MAX_EXPAND_PX for each in numbers) and any(numbers)
        if len(numbers) != 4 or not is_possible:
            raise ValueError(text)
        return cls(*numbers)

    def __str__(self) -> str:
        """Return LEFT,TOP,RIGHT,BOTTOM, which `parse` reads back."""
        return ",".join(str(each) for each in self)


def rename_pictures(values: Mapping[str, Any], rename: Callable[[str], str]) -> dict[str, Any]:
    """Return those of the settings that name pictures, with what `rename` makes of the names.

    The values are of the fields' types; settings that are not among them stay out.
    """
    found: dict[str, Any] = {}
    for name in ("image", "mask"):
        if name in values:
            found[name] = None if values[name] is None else rename(values[name])
    if "reference" in values:
        found["reference"] = tuple(rename(name) for name in values["reference"])
    for name in ("redux", "control"):
        if name in values:
            refs = values[name]
            found[name] = tuple(replace(ref, image=rename(ref.image)) for ref in refs)
    return found


def list_pictures(values: Mapping[str, Any]) -> list[str]:
    """Return the names of all pictures in settings of the fields' types."""
    names: list[str] = []

    def note(name: str) -> str:
        names.append(name)
        return name

    rename_pictures(values, note)
    return names
