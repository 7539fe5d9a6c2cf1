"""A card that is not here, from the words of `flux plan --card`.

`4090` and `RX 7900 XTX` are names of the table of cards, `12` and `12GiB` sizes, `12GiB:sm86` and
`16GiB:xpu` sizes with a generation or a maker. Sizes are in bytes. Stdlib only.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fluxcli.errors import UsageError
from fluxcli.plan.machine import BF16_SINCE, CAPABILITY, CardTable, Hardware
from fluxcli.plan.placement import GIB
from fluxcli.request.settings import parse_bytes

MIN_BYTES = 1 << 28  # less is no card, and a number beyond the bare ones
MAX_BYTES = 1 << 44
DEFAULT_CAPABILITY = (8, 9)
EXAMPLES = "--card 4090 or --card 12GiB:sm89"

# What stands before a card's name, or after it, and says nothing about which it is.
MAKERS = ("nvidia", "geforce", "amd", "radeon", "intel", "arc", "apple", "rtx", "rx", "gtx")
SUFFIXES = ("gpu", "graphics", "generation")
SIZE_AFTER_NAME = re.compile(r"(.+?)[\s:,-]+(\d{1,4})\s*(?:g|gb|gib)?", re.IGNORECASE)

# Devices by their kind in the table, as torch names them.
DEVICES = {"cuda": "cuda:0", "rocm": "cuda:0", "xpu": "xpu:0", "mps": "mps"}
KIND_NAMES = {"rocm": "AMD", "xpu": "Intel", "mps": "Apple"}


@dataclass(frozen=True)
class Ram:
    """The memory that a process may take of this computer's, or the one that is planned for."""

    total_bytes: int
    free_bytes: int
    limited_by: str = ""  # what leaves less than the machine has


@dataclass(frozen=True)
class _Described:
    """What a text says of a card."""

    name: str
    total_bytes: int
    kind: str = "cuda"
    capability: tuple[int, int] = (0, 0)


def card(text: str, table: CardTable, ram: Ram) -> Hardware:
    """Return the hardware that a text describes, beside so much RAM.

    An NVIDIA card is as under Linux, where segments of memory can grow.
    A name of the table is tried first: 4090 is a card and no size. Raises `UsageError` for a text
    that describes none, and for a name that is sold with several sizes.
    """
    found = _find_named(text, table) or _read_size(text)
    if found is None:
        raise _no_such_card(text, table)
    total_bytes = found.total_bytes
    if found.kind == "mps":
        ram = Ram(total_bytes, min(ram.free_bytes, total_bytes))
        total_bytes = _limit_of_metal(total_bytes)
    device = DEVICES[found.kind]
    return Hardware(
        device=device,
        name=found.name,
        total_bytes=total_bytes,
        free_bytes=total_bytes,
        ram_bytes=ram.total_bytes,
        ram_free_bytes=ram.free_bytes,
        ram_limit=ram.limited_by,
        bf16=found.kind != "cuda" or found.capability >= BF16_SINCE,
        reason="--card",
        speeds=table.find_speeds(device, found.name, found.capability),
        identity=text,
        capability=found.capability,
        expandable=found.kind == "cuda",
    )


def _limit_of_metal(ram_bytes: int) -> int:
    """What Metal recommends as the most for its GPU: two thirds of small memories, else 3/4."""
    if ram_bytes <= 36 * GIB:
        return ram_bytes * 2 // 3
    return ram_bytes * 3 // 4


def _find_named(text: str, table: CardTable) -> _Described | None:
    """The card of a name like "4090", "RTX 4060 Ti 16GB" or "m3-max:64"; None for no name."""
    names = {_simplify(name): name for name, row in table.rows.items() if "gib" in row}
    name, size_gib = names.get(_simplify(text)), 0
    if name is None:
        split = SIZE_AFTER_NAME.fullmatch(text.strip())
        name = names.get(_simplify(split[1])) if split else None
        if split is None or name is None:
            return None
        size_gib = int(split[2])
    row = table.rows[name]
    sizes: Sequence[int] = row["gib"]
    if size_gib not in sizes:
        if size_gib or len(sizes) > 1:
            raise _wrong_size(text, name, sizes)
        size_gib = sizes[0]
    return _Described(name, size_gib * GIB, row.get("kind", "cuda"), _read_capability(row))


def _wrong_size(text: str, name: str, sizes: Sequence[int]) -> UsageError:
    *others, last = map(str, sizes)
    listed = f"{', '.join(others)} or {last}" if others else last
    why = f"{name} comes with {listed} GiB"
    hint = " or ".join(f'--card "{name}:{size}GiB"' for size in sizes)
    return UsageError("which card", which=f"--card {text}", why=why, hint=hint)


def _read_capability(row: Mapping[str, Any]) -> tuple[int, int]:
    """NVIDIA's capability of a row, whose `sm` is a number like 89; (0, 0) for other makers."""
    number: int = row.get("sm", 0)
    return divmod(number, 10)


def _simplify(name: str) -> str:
    """A name without its maker, blanks and signs: "NVIDIA GeForce RTX 4070 Ti" is 4070ti."""
    short = re.sub(r"\((r|tm)\)|[^a-z0-9]", "", name.lower().replace("mobile", "laptop"))
    before = None
    while before != short:
        before = short
        for word in MAKERS:
            short = short.removeprefix(word)
        for word in SUFFIXES:
            short = short.removesuffix(word)
    return short


def _read_size(text: str) -> _Described | None:
    """The card of `SIZE`, `SIZE:smNN` or `SIZE:KIND`; None for another text."""
    size, colon, word = text.strip().partition(":")
    total_bytes = _parse_size(size, is_alone=not colon)
    if not total_bytes:
        return None
    if word in KIND_NAMES:
        return _Described(f"a card of {size} by {KIND_NAMES[word]}", total_bytes, word)
    if not re.search("[a-zA-Z]", size):
        size = f"{size} GiB"
    capability = DEFAULT_CAPABILITY
    if colon:
        found = CAPABILITY.fullmatch(word)
        if not found or len(word) > len("sm120"):
            return None
        capability = (int(found[1]), int(found[2]))
    digits = f"{capability[0]}{capability[1]}"
    return _Described(f"a card of {size}, sm{digits}", total_bytes, capability=capability)


def _parse_size(size: str, *, is_alone: bool) -> int:
    """Bytes of a size with a unit, or of a number of GiB that stands alone; 0 for neither."""
    if re.fullmatch(r"[\d.]+", size.strip()) and not is_alone:
        return 0
    try:
        total_bytes = parse_bytes(size)
    except ValueError:
        return 0
    return total_bytes if MIN_BYTES <= total_bytes <= MAX_BYTES else 0


def _no_such_card(text: str, table: CardTable) -> UsageError:
    number = re.fullmatch(r"\s*(\d{1,3}(?:\.\d+)?)\s*:(\w+)\s*", text)
    if number:
        why = f"{number[1]} of what"
        hint = f"--card {number[1]}GiB:{number[2]}"
        return UsageError("no such card", which=f"--card {text}", why=why, hint=hint)
    names = {_simplify(name): name for name, row in table.rows.items() if "gib" in row}
    near = difflib.get_close_matches(_simplify(text), names, n=2, cutoff=0.7)
    why = "it is neither a known name nor SIZE, SIZE:smNN, SIZE:rocm, SIZE:xpu or SIZE:mps"
    hint = EXAMPLES
    if near and re.search(r"\d", text):
        hint = f"did you mean {' or '.join(names[each] for each in near)}? Or by size: {EXAMPLES}"
    return UsageError("no such card", which=f"--card {text}", why=why, hint=hint)
