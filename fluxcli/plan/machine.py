"""The device that a plan is for: its memory, what it computes, and what it does in a second.

Values only: no driver is asked and no file is opened here. `engine.device` describes the devices of
this machine; `plan.card` describes one that is not here. Sizes are in bytes, speeds in bytes or
FLOP a second. Stdlib only.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from quant.spec import DEQUANTIZE, KITCHEN, SCHEMES

CONTEXT_BYTES = 512 << 20  # the driver's context with the kernels, and cuBLAS' workspace
# What is left alone of a card that other programs are on: their share moves, and the driver loads
# more kernels as they are first used.
RESERVE_BYTES = 256 << 20
RESERVE_SHARE = 0.04  # of all its memory, where that is more
CAPABILITY = re.compile(r"sm(\d+)(\d)")
BF16_SINCE = (8, 0)  # NVIDIA's first generation that multiplies in bfloat16
# In which arithmetic of a card the operators multiply (`quant.spec.Scheme.multiply`).
ARITHMETIC = {"scaled_mm": "fp8", "int_mm": "int8"}


@dataclass(frozen=True)
class Speeds:
    """What a device does in a second; `source` says how that is known."""

    wide: float  # FLOP/s of products in 16 bit (in 32 on a CPU without fast bfloat16)
    eight_bit: dict[str, float]  # FLOP/s of fp8 and int8 products where the device computes them
    attention: float  # FLOP/s of attention, in 16 bit
    memory_bytes: float  # of the device's own memory
    bus_bytes: float  # from pinned memory to the device
    pageable_bytes: float  # to the device from memory that is not pinned, as pages of files
    host_copy_bytes: float  # within RAM, by one thread
    disk_bytes: float
    launch_s: float  # of the host, for each kernel
    source: str = "assumed"
    is_measured: bool = False  # somebody did on such a card; else it is a share of a data sheet
    # By arithmetic in 8 bit: who has timed steps with it on a card of this generation.
    published: Mapping[str, str] = field(default_factory=dict)

    def of(self, scheme: str) -> float:
        """FLOP/s of products in a scheme where the device has its arithmetic, else in 16 bit."""
        return self.eight_bit.get(_find_arithmetic(scheme), self.wide)

    def name_source(self, scheme: str) -> str:
        """Where the seconds of a step in a scheme are from, that of its products included."""
        arithmetic = _find_arithmetic(scheme)
        if self.is_measured or arithmetic not in self.eight_bit:
            return self.source
        if arithmetic in self.published:
            return f"{self.source}, {arithmetic} products as in {self.published[arithmetic]}"
        return f"{self.source}, {arithmetic} products by its data sheet"

    def without_guesses(self) -> "Speeds":
        """The same with products in 8 bit as slow as in 16 bit, unless somebody has timed them."""
        if self.is_measured:
            return self
        sure = {name: self.wide for name in self.eight_bit if name not in self.published}
        return replace(self, eight_bit=self.eight_bit | sure)


def _find_arithmetic(scheme: str) -> str:
    """In which arithmetic a scheme's products are where the device has it; "" for 16 bit."""
    known = SCHEMES.get(scheme)
    return ARITHMETIC.get(known.multiply, "") if known else ""


@dataclass(frozen=True)
class Hardware:
    """The device to compute on. Its memory is the RAM for a CPU."""

    device: str  # as torch names it: cpu, cuda:0, mps, xpu:0
    name: str
    total_bytes: int
    free_bytes: int  # that this process may take, its own context included
    ram_bytes: int
    ram_free_bytes: int
    bf16: bool  # computes bfloat16 at full speed
    reason: str  # why this device was taken
    speeds: Speeds
    identity: str = ""  # of the physical device, whatever number it has today
    capability: tuple[int, int] = (0, 0)  # of NVIDIA's cards: (8, 9) is sm89
    gpu_unusable: bool = False  # a GPU's driver is there, and this torch cannot use it
    gpu_fix: str = ""  # the command after which it can, where that is known
    ram_limit: str = ""  # what leaves this process less RAM than the machine has
    # What the device said, by scheme: how it multiplies (`quant.linear.find_multiply`), and why not
    # in the scheme's best way. Nothing of a device that was not asked: a card that is not here.
    multiply: Mapping[str, str] = field(default_factory=dict)
    multiply_why: Mapping[str, str] = field(default_factory=dict)
    pin_bytes: int | None = None  # of RAM that the driver pins at most; None: as much as there is
    expandable: bool = False  # torch's allocator works in segments there that can grow
    fixed_segments: str = ""  # why not

    @property
    def kind(self) -> str:
        """The device without its number: cpu, cuda, mps or xpu."""
        return self.device.partition(":")[0]

    def find_multiply(self, scheme: str) -> str:
        """How the layers of a scheme multiply here: as the device said, else by its capability.

        The capability says what torch for Linux does, in the version that flux is tested with.
        """
        known = SCHEMES.get(scheme)
        if known is None or not known.multiply:
            return DEQUANTIZE
        if scheme in self.multiply:
            return self.multiply[scheme]
        if self.kind == "cpu":
            return known.multiply
        if known.capability and self.capability >= known.capability:
            return known.multiply
        return DEQUANTIZE

    def explain_multiply(self, scheme: str) -> str:
        """Why a scheme is not multiplied in its best way here; "" where it is, or none has it."""
        known = SCHEMES.get(scheme)
        found = self.find_multiply(scheme)
        why = self.multiply_why.get(scheme, "")
        if known is None:
            return ""
        if found.startswith(KITCHEN):
            return f"multiplied by {found} here, because {why}" if why else ""
        if found == (known.multiply or DEQUANTIZE):
            return f"multiplied by torch here, because {why}" if why else ""
        how = "unpacked" if found == DEQUANTIZE else "multiplied per tensor"
        if not why and known.capability and self.capability > (0, 0):
            major, minor = known.capability
            why = f"its products need sm{major}{minor}"
        return f"{how} here, because {why or 'the device has no such product'}"

    def without_circumstances(self) -> "Hardware":
        """The same with what is so on every day and in every process, which may decide pixels.

        How much RAM the driver pins was learned by earlier runs, segments cannot grow in a program
        that had used CUDA before it imported flux, and kernels come and go with a package.
        """
        multiply = dict(self.multiply)
        for scheme, way in self.multiply.items():
            if way.startswith(KITCHEN):
                multiply[scheme] = SCHEMES[scheme].multiply
        return replace(self, pin_bytes=None, expandable=False, multiply=multiply)

    @property
    def usable_bytes(self) -> int:
        """What a plan may take of the free memory."""
        is_empty = self.free_bytes >= self.total_bytes
        if self.kind != "cuda" or is_empty:
            return self.free_bytes
        reserve_bytes = max(RESERVE_BYTES, int(self.total_bytes * RESERVE_SHARE))
        return max(0, self.free_bytes - reserve_bytes)


@dataclass(frozen=True)
class CardTable:
    """What is known of cards: presets/shapes/cards.toml, parsed; its head explains the rows."""

    rows: Mapping[str, Mapping[str, Any]]  # by a part of the driver's name, by "smNN", by a kind
    reached: Mapping[str, float]  # the share of a data sheet's figure, by what it is of
    # By "smNN" and by arithmetic: who has timed steps with it on such a card.
    published: Mapping[str, Mapping[str, str]]
    pageable_bytes: float  # a second, as the others
    host_copy_bytes: float
    disk_bytes: float
    launch_s: float

    def find_speeds(self, device: str, name: str, capability: tuple[int, int]) -> Speeds:
        """The speeds of a card by its name, else by its capability, else by its kind."""
        for key, row in self.rows.items():
            if not CAPABILITY.fullmatch(key) and re.search(rf"\b{re.escape(key)}\b", name):
                return self._read_row(row, capability, key)
        for key, row in self.rows.items():
            found = CAPABILITY.fullmatch(key)
            if found and capability >= (int(found[1]), int(found[2])):
                return self._read_row(row, capability, f"guess for {key}")
        key = device.partition(":")[0]
        if key == "cuda":
            # torch calls AMD's cards so, too; they have no capability of NVIDIA's.
            key = "gpu" if capability > (0, 0) else "rocm"
        return self._read_row(self.rows[key], capability, f"guess for {key}")

    def _read_row(self, row: Mapping[str, Any], capability: tuple[int, int], called: str) -> Speeds:
        """The speeds of one row; a measured row says what was reached, others what is promised."""
        reached = dict(self.reached)
        source = f"a table's {called}"
        is_measured = "date" in row or "source" in row
        if is_measured:
            reached |= {"wide": 1.0, "fp8": 1.0, "int8": 1.0, "memory": 1.0}
            # Measured products are not attention, which reaches less than they do.
            reached["attention"] /= self.reached["wide"]
        if "date" in row:
            source += f", measured {row['date']} with driver {row['driver']}"
        elif "source" in row:
            source += f", published by {row['source']}"
        eight_bit = {}
        for scheme in SCHEMES.values():
            name = ARITHMETIC.get(scheme.multiply, "")
            if name in row and scheme.capability and capability >= scheme.capability:
                eight_bit[name] = row[name] * reached[name] * 1e12
        major, minor = capability
        pageable_bytes = self.pageable_bytes
        if "pageable" in row:
            pageable_bytes = row["pageable"] * 1e9
        return Speeds(
            wide=row["wide"] * reached["wide"] * 1e12,
            eight_bit=eight_bit,
            attention=row["wide"] * reached["attention"] * 1e12,
            memory_bytes=row["memory"] * reached["memory"] * 1e9,
            bus_bytes=row["bus"] * 1e9,
            pageable_bytes=pageable_bytes,
            host_copy_bytes=self.host_copy_bytes,
            disk_bytes=self.disk_bytes,
            launch_s=self.launch_s,
            source=source,
            is_measured=is_measured,
            published=self.published.get(f"sm{major}{minor}", {}),
        )
