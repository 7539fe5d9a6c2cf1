"""The quantization schemes, which tensors of a model get one, and what then lies in a file.

`SCHEMES` has one row for each scheme: its bits, file names, library and memory stand only there.
`lay_out` gives the tensors that store a weight. By it files are written and checked, and the
planner knows what a precision takes before any quantized file exists. This module knows names,
shapes and numbers, and no data. Sizes are in bytes. Stdlib only.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from math import ceil
from typing import NamedTuple

from quant.errors import SpecError
from quant.tensor_info import GGUF_BITS, TensorInfo

# The version of the rules of which tensors stay in 16 bit; raised when those below change.
POLICY = 1

# bitsandbytes' NF4: 64 weights share a scale, and 256 of these scales share a second one.
BLOCK = 64
NESTED_BLOCK = 256
# The JSON text that bitsandbytes stores beside each NF4 weight: the suffix of its name, its size.
STATE = ".quant_state.bitsandbytes__nf4"
STATE_BYTES = 256
# How layers multiply in a scheme that the device has no product for: each weight is dequantized.
DEQUANTIZE = "dequantize"
# What the name of a way to multiply begins with where it is a kernel's; a back end's name follows.
KITCHEN = "comfy-kitchen"
# An NF4 weight whose scales are stored in float32 instead of being quantized themselves.
NF4_ONCE = "nf4_once"

# The rotated schemes: the columns of a weight are multiplied by a Hadamard matrix in groups of this
# many at most, always a power of 4. In w6a8 and w4a8 `GROUP` values of a row share a scale.
LARGEST_ROTATION = 256
GROUP = 16
# What the names of their stored tensors end with; `MARKER` follows the layer's name.
ROW_SCALE = "_scale"
GROUP_SCALE = "_s_rel"
CHANNEL_SCALE = "_s_channel"
LEVELS = "_codebook"
MARKER = ".comfy_quant"
# What ComfyUI calls the two forms.
ROW_FORMAT = "int8_tensorwise"
GROUP_FORMAT = "asym_w4a8_int8"

# The schemes of 8-bit scales for blocks, and BFL's form of the first. So many values share a scale;
# nvfp4 has one for all values, too.
FLOAT4 = "nvfp4"
FLOAT4_BFL = "nvfp4_bfl"
MXFP8 = "mxfp8"
SCALED_BLOCKS = {FLOAT4: 16, FLOAT4_BFL: 16, MXFP8: 32}
OVERALL_SCALE = "_scale_2"
# ComfyUI stores their scales in tiles of so many rows and columns, the last ones filled up.
SCALE_TILE = (128, 4)
TILED = (FLOAT4, MXFP8)


class ActivationLine(NamedTuple):
    """How much memory activations take at the peak of a denoising step.

    `per_token` x tokens x width + `per_width` x width^2 elements of the compute dtype are alive.
    The tokens are those of the picture and of the text together; the width is the transformer's, in
    channels. The figures were fitted to counts by benchmarks/counting.py (docs/memory.md).
    """

    per_token: float
    per_width: float


# Attention, which is the same in every precision.
ATTENTION = ActivationLine(20.25, 0.45)


@dataclass(frozen=True)
class Scheme:
    """How a quantized tensor is stored, and what follows from that elsewhere.

    The peak of a denoising step is the larger of the two `activation_lines`: attention, and
    whatever else can be largest (a dequantized weight, sums in float32). `dequantized_lines` hold
    instead where the device cannot multiply in the scheme, and each weight is dequantized before
    its product.
    """

    name: str
    words: str  # for help and errors
    bits: int  # of one weight, without its scales; 0 where they depend on the form
    # The relative error of a layer's output, activations quantized as they are when it multiplies;
    # 0 where it depends on the form (`find_error`).
    error: float
    forms: tuple[str, ...]  # the names that `Weight.scheme` has for tensors stored in this scheme
    library: str  # the package that quantizes to it; of gguf, that defines it
    activation_lines: tuple[ActivationLine, ActivationLine]
    dequantized_lines: tuple[ActivationLine, ActivationLine]
    can_bake: bool = True  # flux can quantize to it
    # GB of 16-bit weights that two CPU cores read, quantize and write in a second: fp8 and nf4 in
    # whole bakes (benchmarks/bake.py), the others by bakes of two blocks beside fp8's
    # (benchmarks/results/2026-11-30-formats-two-cpu-cores.json).
    bake_gb_s: float = 0.0
    can_bake_modulation: bool = False
    can_bake_text_encoder: bool = False
    # T5's scheme beside a transformer in this one, unless asked otherwise.
    text_encoder: str = "keep"
    file_name: str = ""  # of a baked component where its plain name would be misread by others
    multiply: str = ""  # the operator that multiplies in it; "" where weights are dequantized
    capability: tuple[int, int] | None = None  # NVIDIA's least compute capability for `multiply`
    largest: float = 0.0  # the largest value of a code of the 8-bit schemes
    columns: int = 1  # must divide the width of a weight; others stay in 16 bit
    is_rotated: bool = False  # its weights are rotated (`find_rotation`), and multiplied in int8
    group: int = 0  # how many values of a row share a scale, 0 where all do


# A weight is dequantized to the compute dtype directly, or by way of float32.
_DEQUANTIZED_TO_16_BIT = (ATTENTION, ActivationLine(10.6, 7.2))
_DEQUANTIZED_THROUGH_32_BIT = (ATTENTION, ActivationLine(6.0, 21.3))
# Codes of 4 or 6 bits become levels by a table, whose indexes take two bytes for a weight.
_DECODED = (ATTENTION, ActivationLine(12.6, 12.0))

_ROWS = (
    Scheme(
        name="nf4",
        words="4-bit NormalFloat in blocks of 64, as bitsandbytes has it",
        bits=4,
        error=0.095,
        forms=("nf4", NF4_ONCE),
        library="bitsandbytes",
        activation_lines=_DEQUANTIZED_TO_16_BIT,
        dequantized_lines=_DEQUANTIZED_TO_16_BIT,
        can_bake_modulation=True,
        can_bake_text_encoder=True,
        text_encoder="nf4",
        bake_gb_s=0.085,
    ),
    Scheme(
        name="fp8",
        words="float8_e4m3fn with a float32 scale for each row",
        bits=8,
        error=0.036,
        forms=("fp8",),
        library="optimum-quanto",
        activation_lines=(ATTENTION, ActivationLine(7.0, 3.6)),
        dequantized_lines=_DEQUANTIZED_THROUGH_32_BIT,
        can_bake_modulation=True,
        can_bake_text_encoder=True,
        file_name="flux-fp8r.safetensors",
        multiply="scaled_mm",
        capability=(8, 9),
        largest=448.0,
        bake_gb_s=0.187,
    ),
    Scheme(
        name="int8",
        words="8-bit integers of rotated rows with a float32 scale for each row",
        bits=8,
        error=0.012,
        forms=("int8",),
        library="torch",
        activation_lines=(ATTENTION, ActivationLine(17.3, 4.9)),
        dequantized_lines=_DEQUANTIZED_TO_16_BIT,
        can_bake_text_encoder=True,
        text_encoder="int8",
        file_name="flux-int8-convrot.safetensors",
        multiply="int_mm",
        capability=(7, 5),
        largest=127.0,
        columns=4,
        is_rotated=True,
        bake_gb_s=0.18,
    ),
    Scheme(
        name="w6a8",
        words="6-bit codes of rotated rows with a scale for each 16, multiplied in int8",
        bits=6,
        error=0.022,
        forms=("w6a8",),
        library="torch",
        activation_lines=_DECODED,
        dequantized_lines=_DECODED,
        text_encoder="int8",
        file_name="flux-w6a8.safetensors",
        multiply="int_mm",
        capability=(7, 5),
        largest=127.0,
        columns=32,
        is_rotated=True,
        group=GROUP,
        bake_gb_s=0.1,
    ),
    Scheme(
        name="w4a8",
        words="4-bit codes of rotated rows with a scale for each 16, multiplied in int8",
        bits=4,
        error=0.075,
        forms=("w4a8",),
        library="torch",
        activation_lines=_DECODED,
        dequantized_lines=_DECODED,
        text_encoder="int8",
        file_name="flux-w4a8.safetensors",
        multiply="int_mm",
        capability=(7, 5),
        largest=127.0,
        columns=16,
        is_rotated=True,
        group=GROUP,
        bake_gb_s=0.11,
    ),
    Scheme(
        name="gguf",
        words="GGUF's blocks, as the file has them",
        bits=0,
        error=0.0,
        forms=tuple(GGUF_BITS),
        library="gguf",
        activation_lines=_DEQUANTIZED_TO_16_BIT,
        dequantized_lines=_DEQUANTIZED_TO_16_BIT,
        can_bake=False,
    ),
    Scheme(
        name=FLOAT4,
        words="4-bit floats with a float8 scale for each 16, as the file has them",
        bits=4,
        error=0.0925,
        forms=(FLOAT4, FLOAT4_BFL),
        library="torch",
        activation_lines=_DEQUANTIZED_TO_16_BIT,
        dequantized_lines=_DEQUANTIZED_TO_16_BIT,
        can_bake=False,
    ),
    Scheme(
        name=MXFP8,
        words="8-bit floats with a power of two for each 32, as the file has them",
        bits=8,
        error=0.032,
        forms=(MXFP8,),
        library="torch",
        activation_lines=_DEQUANTIZED_TO_16_BIT,
        dequantized_lines=_DEQUANTIZED_TO_16_BIT,
        can_bake=False,
    ),
)
SCHEMES: dict[str, Scheme] = {scheme.name: scheme for scheme in _ROWS}
# The schemes that flux quantizes to, by name.
BAKEABLE = tuple(scheme.name for scheme in _ROWS if scheme.can_bake)
# The scheme's name by that of a form: "nf4_once" is nf4, "Q4_K" is gguf.
FAMILIES = {form: scheme.name for scheme in _ROWS for form in scheme.forms}
# The schemes whose weights are rotated, and multiplied in int8.
ROTATED = tuple(scheme.name for scheme in _ROWS if scheme.is_rotated)

# What GGUF's kinds err by: ggml's quantizers (d99724f2, without an importance matrix) on student-t6
# weights (1024, 3072), decoded by the gguf package; activations stay in 16 bit.
GGUF_ERRORS = {
    "Q8_0": 0.0065,
    "Q6_K": 0.021,
    "Q5_K": 0.041,
    "Q5_1": 0.042,
    "Q5_0": 0.051,
    "Q4_K": 0.081,
    "IQ4_NL": 0.086,
    "IQ4_XS": 0.087,
    "Q4_1": 0.088,
    "Q4_0": 0.103,
    "Q3_K": 0.171,
    "Q2_K": 0.326,
}
# Of int8 whose columns are not rotated: 0.07 to 0.11 where a few channels of the activations are 30
# to 150 times the others, as in these models; 0.02 where none are.
UNROTATED_ERROR = 0.09

# Transformer keys that only make adaLN modulation.
MODULATION = re.compile(
    r"(?:.*\.)?(?:norm1|norm1_context|norm|norm_out)\.linear\.(?:weight|bias)|time_text_embed\..*"
)
# The weights that may be quantized, by component; all others stay in 16 bit.
QUANTIZABLE = {
    "transformer": re.compile(r"(?:single_)?transformer_blocks\.\d+\..+\.weight"),
    "text_encoder_2": re.compile(
        r"encoder\.block\..+\.(?:SelfAttention\.[qkvo]|DenseReluDense\.wi(?:_[01])?)\.weight"
    ),
}
# A ControlNet's blocks are the transformer's. What makes residuals of their outputs stays wide.
QUANTIZABLE["controlnet"] = QUANTIZABLE["transformer"]
# The components that are made of FLUX.1's blocks, over streams of text and picture.
STREAMS = ("transformer", "controlnet")
# Those of their modules that are no linear layers, by the beginnings of names.
NO_LAYERS = ("controlnet_mode_embedder.", "input_hint_block.")
# What int8 takes beyond these: T5's `wo`. Other codes there break transformers, which casts the
# activations of `wo` to the dtype of its weight, unless that is int8.
QUANTIZABLE_IN_INT8 = {
    "text_encoder_2": re.compile(r"encoder\.block\..+\.DenseReluDense\.wo\.weight"),
}
# The schemes in which T5 multiplies activations, too, if its weights are rotated. A few channels of
# these are hundreds of times the others: the rotation spreads them, so that the embedding errs less
# than with fp8 weights alone (docs/memory.md, benchmarks/t5_error.py). Elsewhere they stay wide.
MULTIPLIED_IN_TEXT_ENCODER = ("int8",)


@dataclass(frozen=True)
class QuantSpec:
    """How to quantize a model: a scheme for each part of it, and the exceptions.

    Raises `SpecError` for choices that do not go together.
    """

    to: str  # of the weights of the transformer's blocks
    text_encoder: str = "keep"  # of T5
    modulation: str = "keep"  # of the blocks' modulation layers
    scales: str = "search"  # of nf4: least squared error of each block, or "absmax"
    keep: tuple[str, ...] = ()  # patterns of tensor or layer names that stay in 16 bit

    def __post_init__(self) -> None:
        if self.to not in BAKEABLE:
            why = f"known are {' or '.join(BAKEABLE)}"
            hint = "--to int8"
            raise SpecError("impossible choice", f"--to {self.to}", why=why, hint=hint)
        text_encoders = [name for name in BAKEABLE if SCHEMES[name].can_bake_text_encoder]
        self._check_choice("--text-encoder", self.text_encoder, known=["keep", *text_encoders])
        modulations = ["keep"]
        if SCHEMES[self.to].can_bake_modulation:
            modulations.append(self.to)
        self._check_choice("--modulation", self.modulation, known=modulations)
        scales = ["search"]
        if "nf4" in (self.to, self.text_encoder):
            scales.append("absmax")
        self._check_choice("--scales", self.scales, known=scales)

    def _check_choice(self, option: str, value: str, *, known: list[str]) -> None:
        if value not in known:
            why = f"known are {' or '.join(known)} with --to {self.to}"
            hint = f"{option} {known[0]}"
            raise SpecError("impossible choice", f"{option} {value}", why=why, hint=hint)

    def to_json(self) -> dict[str, object]:
        """The spec and the policy's version, as a checkpoint's manifest has them."""
        return asdict(self) | {"policy": POLICY}

    def choose_scheme(self, component: str, name: str, shape: tuple[int, ...]) -> str:
        """The scheme of a 16-bit tensor by its diffusers name, "" where it stays as it is."""
        is_matrix = len(shape) == 2 and all(shape)
        if component == "text_encoder_2":
            wish = self.text_encoder
        elif is_modulation(name):
            wish = self.modulation
        else:
            wish = self.to
        if not is_matrix or not can_quantize(component, name, wish) or self.is_kept(name):
            return ""
        return wish if shape[1] % SCHEMES[wish].columns == 0 else ""

    def is_kept(self, name: str) -> bool:
        """Whether a pattern of `keep` matches this tensor's name or its layer's."""
        return any(_matches(pattern, name) for pattern in self.keep)

    def check_keep(self, names: Iterable[str]) -> None:
        """Raise `SpecError` for a pattern of `keep` that matches no name."""
        names = list(names)
        for pattern in self.keep:
            if not any(_matches(pattern, name) for name in names):
                hint = "--dry-run --json lists the tensors"
                raise SpecError("--keep matches nothing", pattern, hint=hint)


def _matches(pattern: str, name: str) -> bool:
    """Whether a pattern as of the shell matches a tensor's name, or that of its layer."""
    layer = name.rpartition(".")[0]
    return fnmatchcase(name, pattern) or fnmatchcase(layer, pattern)


def can_quantize(component: str, name: str, scheme: str) -> bool:
    """Whether a weight of a component may be quantized to a scheme; to "keep" none may."""
    if scheme == "keep":
        return False
    rules = [QUANTIZABLE]
    if scheme == "int8":
        rules.append(QUANTIZABLE_IN_INT8)
    return any(component in rule and rule[component].fullmatch(name) for rule in rules)


def scheme_in_memory(component: str, name: str, scheme: str) -> str:
    """The scheme in which a weight stored in `scheme` stays in memory.

    Linear layers of `quant.linear` keep theirs. It is "" for the weights of torch's own modules
    (an embedding, a norm of T5), which cannot compute with quantized ones: those are dequantized.
    """
    if component in STREAMS:
        return "" if name.startswith(NO_LAYERS) else scheme
    is_layer = can_quantize(component, name, FAMILIES.get(scheme, ""))
    return scheme if is_layer else ""


def find_error(form: str, *, is_rotated: bool = True) -> float:
    """The relative error of a layer's output whose weight has a form; 0 for 16 bit (`form` "")."""
    if not form:
        return 0.0
    if form == "int8" and not is_rotated:
        return UNROTATED_ERROR
    if form in GGUF_ERRORS:
        return GGUF_ERRORS[form]
    return SCHEMES[FAMILIES[form]].error


def is_modulation(name: str) -> bool:
    """Whether a transformer key is of a layer that only makes adaLN modulation.

    Such a layer sees the timestep, the guidance and the pooled embedding, but no token.
    """
    return MODULATION.fullmatch(name) is not None


def find_rotation(columns: int) -> int:
    """How many columns of so many are rotated together: the largest power of 4, 0 for none."""
    rotation = LARGEST_ROTATION
    while columns % rotation:
        rotation //= 4
    return rotation if rotation > 1 else 0


def find_tiles(ranges: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """For ranges of a weight's rows, those rows of its stored scales that hold their tiles."""
    tile_rows = SCALE_TILE[0]
    return tuple(
        (start // tile_rows * tile_rows, ceil(stop / tile_rows) * tile_rows)
        for start, stop in ranges
    )


def describe_marker(scheme: str, columns: int) -> dict[str, object]:
    """What the marker of a weight of so many columns says, in a rotated scheme."""
    described: dict[str, object] = {"format": ROW_FORMAT}
    if SCHEMES[scheme].group:
        described = {"format": GROUP_FORMAT, "group_size": GROUP}
    return described | {"convrot": True, "convrot_groupsize": find_rotation(columns)}


def make_marker(scheme: str, columns: int) -> bytes:
    """The marker of a weight of so many columns, as the bytes of its tensor."""
    return json.dumps(describe_marker(scheme, columns)).encode()


def name_stored(weight: str, suffix: str) -> str:
    """The name in a file of a weight's stored tensor; a marker's follows the name of the layer."""
    if suffix == MARKER:
        return weight.removesuffix(".weight") + MARKER
    return weight + suffix


def lay_out(scheme: str, tensor: TensorInfo) -> tuple[TensorInfo, ...]:
    """The tensors that store one (N, K) weight in a scheme, with the names and dtypes of the file.

    The first has the weight's own name, the others that and a suffix. "" and GGUF's forms store the
    tensor as it is.
    """
    if scheme == "fp8":
        codes = TensorInfo(tensor.name, "F8_E4M3", tensor.shape)
        scales = TensorInfo(tensor.name + ROW_SCALE, "F32", tensor.shape[:1])
        return codes, scales
    if FAMILIES.get(scheme) in ROTATED:
        return _layout_rotated(scheme, tensor)
    if scheme in SCALED_BLOCKS:
        return _layout_scaled_blocks(scheme, tensor)
    if scheme in ("nf4", NF4_ONCE):
        return _layout_nf4(tensor, has_nested_scales=scheme == "nf4")
    return (TensorInfo(tensor.name, tensor.dtype, tensor.shape),)


def _layout_rotated(scheme: str, tensor: TensorInfo) -> tuple[TensorInfo, ...]:
    """ComfyUI's tensors of one weight: codes, scales, and the marker that says what they are."""
    name = tensor.name
    rows, columns = tensor.shape
    codes = TensorInfo(name, "I8", (rows, columns * SCHEMES[scheme].bits // 8))
    if not SCHEMES[scheme].group:
        scales = [TensorInfo(name + ROW_SCALE, "F32", (rows, 1))]
    else:
        scales = [
            TensorInfo(name + GROUP_SCALE, "F8_E4M3", (rows, columns // GROUP)),
            TensorInfo(name + CHANNEL_SCALE, "F32", (rows,)),
        ]
    if scheme == "w4a8":
        scales.append(TensorInfo(name + LEVELS, "F32", (16,)))
    marker = TensorInfo(name_stored(name, MARKER), "U8", (len(make_marker(scheme, columns)),))
    return (codes, *scales, marker)


def _layout_scaled_blocks(scheme: str, tensor: TensorInfo) -> tuple[TensorInfo, ...]:
    """The tensors of nvfp4 and mxfp8, as they are in memory: with the scales row after row."""
    rows, columns = tensor.shape
    scales_shape = (rows, columns // SCALED_BLOCKS[scheme])
    if scheme == MXFP8:
        return (
            TensorInfo(tensor.name, "F8_E4M3", tensor.shape),
            TensorInfo(tensor.name + ROW_SCALE, "U8", scales_shape),
        )
    return (
        TensorInfo(tensor.name, "U8", (rows, columns // 2)),
        TensorInfo(tensor.name + ROW_SCALE, "F8_E4M3", scales_shape),
        TensorInfo(tensor.name + OVERALL_SCALE, "F32", (rows, 1)),
    )


def _layout_nf4(tensor: TensorInfo, *, has_nested_scales: bool) -> tuple[TensorInfo, ...]:
    """bitsandbytes' tensors of one weight; without nested scales they are stored in float32."""
    name = tensor.name
    code_bytes = ceil(tensor.numel * SCHEMES["nf4"].bits / 8)
    blocks = ceil(tensor.numel / BLOCK)
    if has_nested_scales:
        scales = [
            TensorInfo(f"{name}.absmax", "U8", (blocks,)),
            TensorInfo(f"{name}.nested_absmax", "F32", (ceil(blocks / NESTED_BLOCK),)),
            TensorInfo(f"{name}.nested_quant_map", "F32", (256,)),
        ]
    else:
        scales = [TensorInfo(f"{name}.absmax", "F32", (blocks,))]
    return (
        TensorInfo(name, "U8", (code_bytes, 1)),
        *scales,
        TensorInfo(f"{name}.quant_map", "F32", (16,)),
        TensorInfo(name + STATE, "U8", (STATE_BYTES,)),
    )
