"""What a request says of pictures that it starts from: which, for what, and how strongly.

Each type parses the text of an option and `str` gives that text back, so that a request can travel
as JSON. Knows no file: a name is text here, and what it names is looked up elsewhere. Stdlib only.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from fluxcli.errors import UsageError

CONTROL_EXAMPLE = "--control canny:photo.jpg:0.7"
REDUX_EXAMPLE = "--redux photo.jpg:0.8"
EXPAND_EXAMPLE = "--expand 0,0,256,0"
MAX_EXPAND_PX = 4096
NUMBER = r"\d+(?:\.\d*)?|\.\d+"
SPAN = re.compile(rf"({NUMBER})-({NUMBER})")
# A colon that divides: not that of C:\ or C:/, which follows a single letter.
DIVIDING_COLON = re.compile(r":(?![\\/])|(?<=[^:][^:]):(?=[\\/])")
STDIN = "-"  # as the name of a picture
CONTROL_KEYS = ("kind", "image", "scale", "start", "end")


@dataclass(frozen=True)
class ControlRef:
    """A control picture: `kind` picks the weights, by a preset's name, a path or a hub id.

    `scale` is how strongly it acts, `start` and `end` are the shares of the steps between which it
    does (0 to 1). None takes what the kind's preset says.
    """

    kind: str
    image: str
    scale: float | None = None
    start: float | None = None
    end: float | None = None

    @classmethod
    def parse(cls, text: str, *, where: str = "--control") -> "ControlRef":
        """Parse KIND:IMAGE[:SCALE][:START-END] or kind=..,image=..,scale=..,start=..,end=...

        The first form is taken apart from the right, so that an image's name may hold colons.
        Raises `UsageError`, which names `where` the text stood.
        """
        if text.startswith(("kind=", "image=")):
            return cls._parse_pairs(text, where)
        rest = text
        span: tuple[float | None, float | None] = (None, None)
        scale = None
        head, _, last = rest.rpartition(":")
        if match := SPAN.fullmatch(last):
            span = (float(match[1]), float(match[2]))
            rest = head
            head, _, last = rest.rpartition(":")
        if re.fullmatch(NUMBER, last) and DIVIDING_COLON.search(head):
            scale = float(last)
            rest = head
        colon = DIVIDING_COLON.search(rest)
        if not colon:
            raise _refuse_control(text, where, why="it names no picture")
        return cls._make(
            rest[: colon.start()], rest[colon.end() :], scale, *span, text=text, where=where
        )

    @classmethod
    def _parse_pairs(cls, text: str, where: str) -> "ControlRef":
        pairs = {}
        for part in re.split(rf",(?=(?:{'|'.join(CONTROL_KEYS)})=)", text):
            key, _, value = part.partition("=")
            if key not in CONTROL_KEYS:
                raise _refuse_control(text, where, why=f"{key[:40]!r} is none of its keys")
            pairs[key] = value
        numbers = []
        for key in ("scale", "start", "end"):
            try:
                numbers.append(float(pairs[key]) if key in pairs else None)
            except ValueError as error:
                why = f"{key} is {pairs[key][:40]!r}, not a number"
                raise _refuse_control(text, where, why=why) from error
        kind = pairs.get("kind", "")
        return cls._make(kind, pairs.get("image", ""), *numbers, text=text, where=where)

    @classmethod
    def _make(
        cls,
        kind: str,
        image: str,
        scale: float | None,
        start: float | None,
        end: float | None,
        *,
        text: str,
        where: str,
    ) -> "ControlRef":
        if not kind.strip() or not image.strip() or "\0" in text:
            raise _refuse_control(text, where, why="kind and picture are needed")
        if scale is not None and not 0 <= scale <= 10:
            raise _refuse_control(text, where, why=f"the scale {scale:g} is not in 0 to 10")
        first, last = start or 0.0, 1.0 if end is None else end
        if not 0 <= first < last <= 1:
            why = f"{first:g}-{last:g} are no shares of the steps, as 0-0.8 is"
            raise _refuse_control(text, where, why=why)
        return cls(kind, image, scale, start, end)

    def __str__(self) -> str:
        """Return a text that `parse` reads back."""
        text = f"kind={self.kind},image={self.image}"
        for key in ("scale", "start", "end"):
            value = getattr(self, key)
            if value is not None:
                text += f",{key}={value!r}"
        return text


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
        if len(numbers) != 4 or not all(0 <= each <= MAX_EXPAND_PX for each in numbers):
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
