"""Which tensors of a model are quantized, in which scheme, and what then lies in the file for each. Pure arithmetic.

By `layout` the writer lays out files, the loader knows which keys must exist, the planner prices a precision before
any quantized file exists. nf4 is bitsandbytes': blocks of 64, scales quantized again in blocks of 256. fp8 ("fp8r",
float8_e4m3fn) and int8 have one float32 scale per row. Knows names and shapes, no data. Stdlib only.
"""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase

from quant.errors import SpecError
from quant.header import GGUF_BITS, TensorInfo

POLICY = 1  # of which tensors stay in 16 bit; raised when the rules below change
SCHEMES = ("nf4", "fp8", "int8")
NF4_ONCE = "nf4_once"  # NF4 with float32 scales
FAMILIES = {**{to: to for to in SCHEMES}, NF4_ONCE: "nf4", **dict.fromkeys(GGUF_BITS, "gguf")}  # by scheme, for people
TEXT_ENCODER = {"nf4": "nf4"}  # T5's scheme where none is asked for; kept with others
BLOCK, NESTED_BLOCK, STATE_BYTES = 64, 256, 256
STATE = ".quant_state.bitsandbytes__nf4"
MODULATION = re.compile(r"(?:.*\.)?(?:norm1|norm1_context|norm|norm_out)\.linear\.(?:weight|bias)|time_text_embed\..*")
PACKABLE = {
    "transformer": r"(?:single_)?transformer_blocks\.\d+\..+\.weight",
    "text_encoder_2": r"encoder\.block\..+\.(?:SelfAttention\.[qkvo]|DenseReluDense\.wi(?:_[01])?)\.weight",
}


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
                raise SpecError("impossible choice", f"{field} {value}", why=why)

    def to_json(self) -> dict:
        return asdict(self) | {"policy": POLICY}

    def scheme(self, component: str, name: str, shape: tuple[int, ...]) -> str:
        """The scheme of a 16-bit tensor by its diffusers name, "" where it stays as it is."""
        if len(shape) != 2 or not all(shape) or not re.fullmatch(PACKABLE.get(component, ""), name):
            return ""
        part = self.text_encoder if component == "text_encoder_2" else self.to
        wish = self.modulation if component == "transformer" and is_modulation(name) else part
        return "" if wish == "keep" or self.is_kept(name) else wish

    def is_kept(self, name: str) -> bool:
        """Whether a pattern of `keep` names this tensor or its layer."""
        return any(fnmatchcase(text, pattern) for text in (name, name.rpartition(".")[0]) for pattern in self.keep)

    def check_keep(self, names: Iterable[str]) -> None:
        """Raise `SpecError` for a pattern of `keep` that matches no name."""
        names = list(names)
        for pattern in self.keep:
            if not any(QuantSpec(self.to, keep=(pattern,)).is_kept(name) for name in names):
                raise SpecError("--keep matches nothing", pattern, hint="--dry-run --json lists the tensors")


def scheme_in_memory(component: str, name: str, scheme: str) -> str:
    """The scheme that a stored weight keeps in memory; "" where its module is none of ours and takes values."""
    stays = component == "transformer" or re.fullmatch(PACKABLE.get(component, "-"), name)
    return scheme if stays else ""


def is_modulation(name: str) -> bool:
    """Whether a transformer key only makes adaLN modulation: no forward over the picture reads it."""
    return MODULATION.fullmatch(name) is not None


def layout(scheme: str, tensor: TensorInfo) -> tuple[TensorInfo, ...]:
    """The tensors that store one (N, K) weight in a scheme, with the names and dtypes of the file."""
    codes, blocks = -(-tensor.numel // 2), -(-tensor.numel // BLOCK)
    stored = {
        "fp8": [("", "F8_E4M3", tensor.shape), ("_scale", "F32", tensor.shape[:1])],
        "int8": [("", "I8", tensor.shape), ("_scale", "F32", tensor.shape[:1])],
        "nf4": [("", "U8", (codes, 1)), (".absmax", "U8", (blocks,)),
                (".nested_absmax", "F32", (-(-blocks // NESTED_BLOCK),)), (".nested_quant_map", "F32", (256,)),
                (".quant_map", "F32", (16,)), (STATE, "U8", (STATE_BYTES,))],
        NF4_ONCE: [("", "U8", (codes, 1)), (".absmax", "F32", (blocks,)), (".quant_map", "F32", (16,)),
                   (STATE, "U8", (STATE_BYTES,))],
    }.get(scheme, [("", tensor.dtype, tensor.shape)])  # fmt: skip
    return tuple(TensorInfo(tensor.name + suffix, dtype, shape) for suffix, dtype, shape in stored)
