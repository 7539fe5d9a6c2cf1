"""Which tensors of a model are quantized, in which scheme, and what then lies in the file for each. Pure arithmetic.

`layout` is the hinge: the writer lays out files with it, the loader knows by it which keys must exist, the planner
prices a precision before any quantized file exists. Knows names and shapes, no data. Stdlib only.

    nf4    bitsandbytes' 4-bit NormalFloat: blocks of 64, scales quantized again in blocks of 256
    fp8    float8_e4m3fn with one float32 scale per row ("fp8r")
    int8   int8 with one float32 scale per row
"""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase

from quant.errors import SpecError
from quant.header import TensorInfo

POLICY = 1  # of which tensors stay in 16 bit; raised when the rules below change
SCHEMES = ("nf4", "fp8", "int8")
TEXT_ENCODER = {"nf4": "nf4"}  # T5's scheme where none is asked for; kept with others
BLOCK, NESTED_BLOCK, STATE_BYTES = 64, 256, 256
STATE = ".quant_state.bitsandbytes__nf4"
MODULATION = re.compile(r"(?:.*\.)?(?:norm1|norm1_context|norm|norm_out)\.linear\.(?:weight|bias)|time_text_embed\..*")
BLOCK_WEIGHTS = re.compile(r"(?:single_)?transformer_blocks\.\d+\..+\.weight")
T5_WEIGHTS = re.compile(r"encoder\.block\..+\.(?:SelfAttention\.[qkvo]|DenseReluDense\.wi(?:_[01])?)\.weight")


@dataclass(frozen=True)
class QuantSpec:
    """How a model is stored: the scheme of the transformer's blocks, of its modulation, of T5; what else is kept."""

    to: str
    text_encoder: str = "keep"
    modulation: str = "keep"
    scales: str = "search"  # of nf4: least squared error per block, or "absmax"
    keep: tuple[str, ...] = ()  # patterns of tensor or layer names that stay in 16 bit

    def __post_init__(self) -> None:
        for field, value, known in (
            ("--to", self.to, SCHEMES),
            ("--text-encoder", self.text_encoder, ("keep", "nf4", "fp8")),
            ("--modulation", self.modulation, ("keep", self.to)[: 1 if self.to == "int8" else 2]),
            ("--scales", self.scales, ("search", "absmax")[: 2 if "nf4" in (self.to, self.text_encoder) else 1]),
        ):
            if value not in known:
                why = f"known are {' or '.join(known)}" + f" with --to {self.to}" * (field != "--to")
                raise SpecError("impossible choice", which=f"{field} {value}", why=why)

    def to_json(self) -> dict:
        return asdict(self) | {"policy": POLICY}

    def scheme(self, component: str, name: str, shape: tuple[int, ...]) -> str:
        """The scheme of a 16-bit tensor by its diffusers name, "" where it stays as it is."""
        if len(shape) != 2 or not all(shape) or self.is_kept(name):
            return ""
        if component == "text_encoder_2":
            return self.text_encoder if self.text_encoder != "keep" and T5_WEIGHTS.fullmatch(name) else ""
        if component != "transformer" or not BLOCK_WEIGHTS.fullmatch(name):
            return ""
        modulation = "" if self.modulation == "keep" else self.modulation
        return modulation if is_modulation(name) else self.to

    def is_kept(self, name: str) -> bool:
        """Whether a pattern of `keep` names this tensor or its layer."""
        return any(fnmatchcase(text, pattern) for text in (name, name.rpartition(".")[0]) for pattern in self.keep)

    def check_keep(self, names: Iterable[str]) -> None:
        """Raise `SpecError` for a pattern of `keep` that matches no name."""
        names = list(names)
        for pattern in self.keep:
            if not any(QuantSpec(self.to, keep=(pattern,)).is_kept(name) for name in names):
                raise SpecError("--keep matches nothing", which=pattern, hint="--dry-run --json lists the tensors")


def is_modulation(name: str) -> bool:
    """Whether a transformer key only makes adaLN modulation: no forward over the picture reads it."""
    return MODULATION.fullmatch(name) is not None


def layout(scheme: str, tensor: TensorInfo) -> tuple[TensorInfo, ...]:
    """The tensors that store one (N, K) weight in a scheme, with the names and dtypes of the file."""
    name, shape = tensor.name, tensor.shape
    if scheme == "nf4":
        blocks = -(-tensor.numel // BLOCK)
        return (
            TensorInfo(name, "U8", (-(-tensor.numel // 2), 1)),
            TensorInfo(f"{name}.absmax", "U8", (blocks,)),
            TensorInfo(f"{name}.nested_absmax", "F32", (-(-blocks // NESTED_BLOCK),)),
            TensorInfo(f"{name}.nested_quant_map", "F32", (256,)),
            TensorInfo(f"{name}.quant_map", "F32", (16,)),
            TensorInfo(f"{name}{STATE}", "U8", (STATE_BYTES,)),
        )
    if scheme in ("fp8", "int8"):
        data = TensorInfo(name, "F8_E4M3" if scheme == "fp8" else "I8", shape)
        return data, TensorInfo(f"{name}_scale", "F32", shape[:1])
    return (TensorInfo(name, tensor.dtype, shape),)
