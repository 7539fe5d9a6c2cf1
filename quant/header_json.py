"""Read the JSON of a safetensors header piece by piece, in memory that its length bounds.

json.loads would make Python objects of all of it first: gigabytes of a hostile header of 100 MB.
Here each entry is read by itself, whatever is not one is refused where it begins, and a long text
of the metadata is passed over (kohya's trainer writes megabytes of them). Stdlib only.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

MAX_MEMBERS = 1 << 16
MAX_NAME_BYTES = 1024
# Longer texts of the metadata are not kept.
MAX_TEXT_BYTES = 1 << 20
# Where ComfyUI says how layers are quantized (see `quant.markers`).
MARKERS = "_quantization_metadata"

SPACE = re.compile(rb"[ \t\n\r]*")
TEXT = re.compile(rb'"(?:[^"\\\x00-\x1f]++|\\.)*+"')
# An entry has no braces inside. The shape of a tensor and its place take less than this.
ENTRY = re.compile(rb"\{[^{}]{0,1000}\}")
PLAIN_VALUE = re.compile(rb"-?\d[\d.eE+-]{0,40}|true|false|null")


class HeaderJson:
    """A header's JSON and how far it was read. Every method raises `ValueError` for what it is not.

    The methods read on from there, and pass over white space first.
    """

    def __init__(self, text: bytes) -> None:
        self._text = text
        self._position = 0

    def members(self) -> Iterator[str]:
        """Yield the names of an object's members; whoever asks reads each value before the next."""
        names: set[str] = set()
        self._read_mark(b"{")
        if self._skip_mark(b"}"):
            return
        while True:
            name = self._read_name()
            if name in names:
                raise ValueError(f"the name {name[:60]!r} stands twice")
            if len(names) >= MAX_MEMBERS:
                raise ValueError(f"it has more than {MAX_MEMBERS} names")
            names.add(name)
            self._read_mark(b":")
            yield name
            if not self._skip_mark(b","):
                break
        self._read_mark(b"}")

    def read_entry(self) -> Any:
        """The object of a tensor, whose values are unchecked."""
        entry = self._match(ENTRY)
        if entry is None:
            raise ValueError("an entry is no object of a dtype, a shape and offsets")
        return json.loads(entry.decode(), object_pairs_hook=make_dict)

    def read_metadata(self) -> dict[str, str]:
        """The texts of an object by name.

        Numbers, which the format does not allow but some trainers write, and long texts are left
        out; so is a value that is no object. "" stands for what is too long and must not be missed.
        """
        texts: dict[str, str] = {}
        if self._match(PLAIN_VALUE) is not None:
            return texts
        for name in self.members():
            start = self._position
            if self._match(PLAIN_VALUE) is not None:
                continue
            text = self._match(TEXT, longest=MAX_TEXT_BYTES)
            if text is not None:
                texts[name] = _decode(text)
            elif self._position > start and name == MARKERS:
                texts[name] = ""
            elif self._position == start:
                raise ValueError(f"the metadata {name[:60]!r} is no text")
        return texts

    def read_end(self) -> None:
        """Read to the end, where only white space may be."""
        self._skip_space()
        if self._position < len(self._text):
            raise ValueError("it goes on behind its end")

    def _read_name(self) -> str:
        start = self._position
        text = self._match(TEXT, longest=MAX_NAME_BYTES)
        if text is not None:
            return _decode(text)
        if self._position > start:
            raise ValueError(f"a name is longer than {MAX_NAME_BYTES} bytes")
        raise ValueError(f"a name is missing at byte {self._position}")

    def _match(self, pattern: re.Pattern[bytes], *, longest: int = MAX_TEXT_BYTES) -> bytes | None:
        """What a pattern matches here, None where it does not or is longer; reads over it."""
        self._skip_space()
        match = pattern.match(self._text, self._position)
        if not match:
            return None
        self._position = match.end()
        if match.end() - match.start() > longest:
            return None
        return match[0]

    def _read_mark(self, mark: bytes) -> None:
        if not self._skip_mark(mark):
            raise ValueError(f"no {mark.decode()} at byte {self._position}")

    def _skip_mark(self, mark: bytes) -> bool:
        """Read over a character, if it is the next one; returns whether it is."""
        self._skip_space()
        if not self._text.startswith(mark, self._position):
            return False
        self._position += 1
        return True

    def _skip_space(self) -> None:
        match = SPACE.match(self._text, self._position)
        assert match, "it matches nothing, too"
        self._position = match.end()


def _decode(text: bytes) -> str:
    """A JSON text with its quotes as what it means; half of a surrogate pair is none."""
    decoded: str = json.loads(text.decode())
    decoded.encode()
    return decoded


def make_dict(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object's dict; raises `ValueError` where a name stands twice, which json allows."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name stands twice")
    return result
