"""The device that a plan is for: its memory, what it computes, and what it does in a second.

Values only: no driver is asked and no file is opened here. `engine.device` describes the devices of
this machine; `plan.card` describes one that is not here. Sizes are in bytes, speeds in bytes or
FLOP a second. Stdlib only.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from quant.spec import SCHEMES

CONTEXT_BYTES = 512 << 20  # the driver's context with the kernels, and cuBLAS' workspace
DEQUANTIZING_SPEED = 0.88  # of a 16-bit product's, where the weight is dequantized before each
CAPABILITY = re.compile(r"sm(\d+)(\d)")
BF16_SINCE = (8, 0)  # NVIDIA's first generation that multiplies in bfloat16
DEQUANTIZE = "dequantize"  # how a scheme is multiplied in that the device does not multiply in


@dataclass(frozen=True)
class Speeds:
    """What a device does in a second; `source` says how that is known."""

    wide: float  # FLOP/s of products in 16 bit (in 32 on a CPU without fast bfloat16)
    eight_bit: dict[str, float]  # FLOP/s of fp8 and int8 products where the device computes them
    bus_bytes: float  # from pinned memory to the device
    disk_bytes: float
    source: str = "assumed"

    def of(self, scheme: str) -> float:
        """FLOP/s of a layer whose weight is stored in a scheme ("" for 16 bit).

        Where the device does not multiply in the scheme, the weight is dequantized first.
        """
        if scheme in self.eight_bit:
            return self.eight_bit[scheme]
        if scheme:
            return self.wide * DEQUANTIZING_SPEED
        return self.wide


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

    @property
    def kind(self) -> str:
        """The device without its number: cpu, cuda, mps or xpu."""
        return self.device.partition(":")[0]

    def find_multiply(self, scheme: str) -> str:
        """How the layers of a scheme multiply here: as the device said, else by its capability.

        The capability is that of torch on Linux in the version that constraints.txt pins.
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
        if known is None or found == (known.multiply or DEQUANTIZE):
            return ""
        how = "unpacked" if found == DEQUANTIZE else "multiplied per tensor"
        why = self.multiply_why.get(scheme, "")
        if not why and known.capability and self.kind == "cuda":
            major, minor = known.capability
            why = f"its products need sm{major}{minor}"
        return f"{how} here, because {why or 'the device has no such product'}"


@dataclass(frozen=True)
class CardTable:
    """What is known of cards: presets/shapes/cards.toml, parsed; its head explains the rows."""

    rows: Mapping[str, Mapping[str, Any]]  # by a part of the driver's name, by "smNN", "gpu", "cpu"
    reached: Mapping[str, float]  # the share of a data sheet's figure, by wide, fp8, int8
    disk_bytes: float  # a second

    def find_speeds(self, device: str, name: str, capability: tuple[int, int]) -> Speeds:
        """The speeds of a card by its name, else by its capability, else by its kind."""
        for key, row in self.rows.items():
            if not CAPABILITY.fullmatch(key) and re.search(rf"\b{re.escape(key)}\b", name):
                return self._read_row(row, capability, key)
        for key, row in self.rows.items():
            found = CAPABILITY.fullmatch(key)
            if found and capability >= (int(found[1]), int(found[2])):
                return self._read_row(row, capability, f"guess for {key}")
        key = "cpu" if device == "cpu" else "gpu"
        return self._read_row(self.rows[key], capability, f"guess for {key}")

    def _read_row(self, row: Mapping[str, Any], capability: tuple[int, int], called: str) -> Speeds:
        """The speeds of one row; a measured row says what was reached, others what is promised."""
        reached = dict(self.reached)
        source = f"a table's {called}"
        if "date" in row:
            reached = dict.fromkeys(reached, 1.0)
            source += f", measured {row['date']} with driver {row['driver']}"
        eight_bit = {}
        for name, scheme in SCHEMES.items():
            if name in row and scheme.capability and capability >= scheme.capability:
                eight_bit[name] = row[name] * reached[name] * 1e12
        return Speeds(
            wide=row["wide"] * reached["wide"] * 1e12,
            eight_bit=eight_bit,
            bus_bytes=row["bus"] * 1e9,
            disk_bytes=self.disk_bytes,
            source=source,
        )
