"""Linear layers over quantized weights, one class for each way to store them.

A layer may have several weights, one below the other, as q, k and v. fp8 multiplies in float8, and
int8, w6a8 and w4a8 in int8 where the device can, with activations quantized row by row; elsewhere,
and for NF4, GGUF, nvfp4 and mxfp8 always, the weight is dequantized before each product. Knows
nothing of files or models.
Shapes: weight (N, K), input (..., K), output (..., N).
"""

import contextlib
import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from quant import block_scaled, gguf_blocks, int8_products, kernels, rotated
from quant.codecs import SMALLEST_SCALE, stack_rows
from quant.codes import LARGEST_LEVEL, Codebook, decode, read_codebook
from quant.errors import is_out_of_memory
from quant.int8_products import Int8Rows, Int8Weight
from quant.nf4 import dequantize_codes, dequantize_scales, read_offset
from quant.spec import (
    BLOCK,
    CHANNEL_SCALE,
    DEQUANTIZE,
    FAMILIES,
    GROUP_SCALE,
    MXFP8,
    NESTED_BLOCK,
    OVERALL_SCALE,
    ROTATED,
    ROW_SCALE,
    SCALED_BLOCKS,
    SCHEMES,
)

# For each of a layer's weights, its stored tensors by suffix, and its shape (N, K).
Parts = Sequence[Mapping[str, Tensor]]
Shapes = Sequence[tuple[int, ...]]

# CUDA's _int_mm wants more than 16 rows, and both 8-bit products widths that 16 divides.
MIN_ROWS = 32
ALIGNED = 16

# For fp8 where torch has no row-wise kernel: every build for Windows, those for sm120 before 2.11.
PER_TENSOR = "scaled_mm per tensor"
# In which ways layers of a scheme may multiply, best first; the first that a device can is taken,
# and where it can none, DEQUANTIZE.
WAYS = {"fp8": ("scaled_mm", PER_TENSOR), **dict.fromkeys(ROTATED, ("int_mm",))}
EVERY_ROW = slice(None)
# What comfy-kitchen has to have for a scheme's products; where it does, that is the best way.
FUNCTIONS = {"int8": "int8_linear", "w6a8": "w4a8_int8_linear", "w4a8": "w4a8_int8_linear"}
# The sizes of the layer that a kernel is tried with, and how many rows it is given.
PROBE_COLUMNS = 256
PROBE_ROWS = 64
PROBE_TOKENS = 289


class Multiplication(NamedTuple):
    """How a device multiplies in a scheme, and why not in a better way, in the device's words."""

    by: str
    why: str = ""


# What was asked, by (scheme, device): a dict, since torch.compile ignores functools.cache and would
# trace the probe.
PROBED: dict[tuple[str, str], Multiplication] = {}


class QuantizedLinear(nn.Module):
    """What the layers share: their sizes, the bias, and a product with the dequantized weight."""

    bias: Tensor | None

    def __init__(self, shapes: Shapes, *, bias: Tensor | None) -> None:
        super().__init__()
        self.in_features = shapes[0][1]
        self.out_features = sum(shape[0] for shape in shapes)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.dequantize(x.dtype), self.bias)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight (N, K) in `dtype`, all parts of it."""
        raise NotImplementedError

    def dequantize_rows(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """Some rows of the weight in `dtype`."""
        raise NotImplementedError


class NF4Linear(QuantizedLinear):
    """4-bit NormalFloat weights, dequantized by bitsandbytes' own operators.

    Mostly the scales are quantized, too. The mean that was taken off them is another for each
    weight.
    """

    weight: Tensor
    absmax: Tensor
    nested_absmax: Tensor
    nested_quant_map: Tensor
    offset: Tensor

    def __init__(self, parts: Parts, shapes: Shapes, *, bias: Tensor | None) -> None:
        super().__init__(shapes, bias=bias)
        self.has_nested_scales = ".nested_absmax" in parts[0]
        self._stack("weight", [part[""] for part in parts])
        self._stack("absmax", [part[".absmax"] for part in parts])
        if not self.has_nested_scales:
            return
        self._stack("nested_absmax", [part[".nested_absmax"] for part in parts])
        self.register_buffer("nested_quant_map", parts[0][".nested_quant_map"])
        self.scale_counts = [part[".absmax"].numel() for part in parts]
        self.nested_counts = [part[".nested_absmax"].numel() for part in parts]
        # The scales of all parts are dequantized together where no second scale is for two parts:
        # as runs of one length, each with its part's offset. 0 where that cannot be.
        run_length = math.gcd(*self.scale_counts)
        self.run_length = run_length if run_length % NESTED_BLOCK == 0 else 0
        offsets = []
        for part, count in zip(parts, self.scale_counts, strict=True):
            runs = count // run_length if self.run_length else 1
            # Filled in on the device: a copy of a list there would make the host wait.
            offsets.append(part[".nested_absmax"].new_full((runs,), read_offset(part)))
        self.register_buffer("offset", stack_rows(offsets))

    def _stack(self, name: str, tensors: list[Tensor]) -> None:
        """Register a buffer of these tensors, flat and one behind the other."""
        self.register_buffer(name, stack_rows([tensor.view(-1) for tensor in tensors]))

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        scales = self._dequantize_scales()
        shape = (self.out_features, self.in_features)
        return dequantize_codes(self.weight, scales, shape=shape, dtype=dtype)

    def dequantize_rows(self, rows: slice, dtype: torch.dtype) -> Tensor:
        if self.in_features % BLOCK:
            # Blocks cross from one row to the next.
            return self.dequantize(dtype)[rows]
        scales = self._dequantize_scales()
        first = rows.start * self.in_features
        stop = rows.stop * self.in_features
        return dequantize_codes(
            self.weight[first // 2 : stop // 2],
            scales[first // BLOCK : stop // BLOCK],
            shape=(rows.stop - rows.start, self.in_features),
            dtype=dtype,
        )

    def _dequantize_scales(self) -> Tensor:
        """The scales (blocks,) float32 of all parts."""
        if not self.has_nested_scales:
            return self.absmax
        levels = self.nested_quant_map
        if self.run_length:
            scales = dequantize_scales(self.absmax, self.nested_absmax, levels)
            return scales.view(-1, self.run_length).add_(self.offset[:, None]).view(-1)
        parts = zip(
            torch.split(self.absmax, self.scale_counts),
            torch.split(self.nested_absmax, self.nested_counts),
            self.offset,
            strict=True,
        )
        every = [
            dequantize_scales(absmax, nested, levels).add_(offset)
            for absmax, nested, offset in parts
        ]
        return stack_rows(every)


class GGUFLinear(QuantizedLinear):
    """Weights in GGUF's blocks: rows of bytes (N, B)."""

    weight: Tensor

    def __init__(self, parts: Parts, shapes: Shapes, *, bias: Tensor | None, scheme: str) -> None:
        super().__init__(shapes, bias=bias)
        self.scheme = scheme
        self.register_buffer("weight", stack_rows([part[""] for part in parts]))

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return gguf_blocks.unpack(self.weight, self.scheme, dtype)

    def dequantize_rows(self, rows: slice, dtype: torch.dtype) -> Tensor:
        return gguf_blocks.unpack(self.weight[rows], self.scheme, dtype)


class BlockScaledLinear(QuantizedLinear):
    """Weights in nvfp4 or mxfp8, whose blocks have scales in 8 bit (`quant.block_scaled`)."""

    weight: Tensor
    weight_scale: Tensor
    overall_scale: Tensor

    def __init__(self, parts: Parts, shapes: Shapes, *, bias: Tensor | None, scheme: str) -> None:
        super().__init__(shapes, bias=bias)
        self.scheme = scheme
        self.register_buffer("weight", stack_rows([part[""] for part in parts]))
        self.register_buffer("weight_scale", stack_rows([part[ROW_SCALE] for part in parts]))
        if scheme == MXFP8:
            return
        # nvfp4 has one scale for all values of a part; here each row has that of its part.
        scales = []
        for part, shape in zip(parts, shapes, strict=True):
            scales.append(part[OVERALL_SCALE].float().reshape(-1, 1).expand(shape[0], 1))
        self.register_buffer("overall_scale", stack_rows(scales).contiguous())

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return self.dequantize_rows(EVERY_ROW, dtype)

    def dequantize_rows(self, rows: slice, dtype: torch.dtype) -> Tensor:
        stored = {"": self.weight[rows], ROW_SCALE: self.weight_scale[rows]}
        if self.scheme != MXFP8:
            stored[OVERALL_SCALE] = self.overall_scale[rows]
        return block_scaled.dequantize(stored, self.scheme, dtype)


class FP8Linear(QuantizedLinear):
    """float8_e4m3fn weights with a float32 scale for each row; activations become float8 likewise.

    They are multiplied so where `arithmetic` allows it, the sizes are multiples of 16, and the
    device can; elsewhere the weight is dequantized.
    """

    scheme = "fp8"
    weight: Tensor
    weight_scale: Tensor

    def __init__(
        self, parts: Parts, shapes: Shapes, *, bias: Tensor | None, arithmetic: bool
    ) -> None:
        super().__init__(shapes, bias=bias)
        self.register_buffer("weight", stack_rows([part[""] for part in parts]))
        scales = []
        for part, shape in zip(parts, shapes, strict=True):
            scale = part.get("_scale")
            if scale is None:
                scale = part[""].new_ones(1, dtype=torch.float32)
            scales.append(scale.float().view(-1).expand(shape[0]))
        self.register_buffer("weight_scale", stack_rows(scales).contiguous())
        is_aligned = self.in_features % ALIGNED == 0 and self.out_features % ALIGNED == 0
        self.arithmetic = arithmetic and is_aligned
        if self.arithmetic:
            # The device is probed now, before anything is compiled.
            _can_multiply(self.scheme, str(self.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        if not self.arithmetic or not _can_multiply(self.scheme, str(x.device)):
            return super().forward(x)
        rows = x.reshape(-1, self.in_features)  # (M, K)
        # The largest absolute value of each row, (M, 1).
        scale = torch.linalg.vector_norm(rows, torch.inf, 1, keepdim=True, dtype=torch.float32)
        scale = scale.div_(SCHEMES[self.scheme].largest).clamp_(min=SMALLEST_SCALE)
        product = self.multiply(self.quantize_rows(rows, scale), scale, x.dtype)
        return product.view(*x.shape[:-1], self.out_features)

    def add_bias(self, product: Tensor) -> Tensor:
        """The product (M, N), which may be changed in place, and the bias."""
        return product if self.bias is None else product.add_(self.bias)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return self.weight.float().mul_(self.weight_scale[:, None]).to(dtype)

    def dequantize_rows(self, rows: slice, dtype: torch.dtype) -> Tensor:
        return self.weight[rows].float().mul_(self.weight_scale[rows, None]).to(dtype)

    def quantize_rows(self, rows: Tensor, scale: Tensor) -> Tensor:
        """The rows (M, K), divided by their scales (M, 1), in float8."""
        # A quotient is at most 448.00003, which becomes 448: there is nothing to clamp.
        values = torch.empty(rows.shape, dtype=torch.float8_e4m3fn, device=rows.device)
        return torch.div(rows, scale, out=values)

    def multiply(self, values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """The product (M, N) in `dtype` of activations with the weight, and the bias.

        The activations are float8 `values` (M, K) times float32 `scale` (M, 1).
        """
        if find_multiply(self.scheme, str(values.device)) == PER_TENSOR:
            return self.multiply_per_tensor(values, scale, dtype)
        return self.multiply_by_rows(values, scale, dtype)

    def multiply_by_rows(self, values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """As `multiply`, the scales applied by the operator itself.

        In bfloat16 it adds the bias, too, before it rounds.
        """
        # CUDA's row-wise kernel gives bfloat16 only.
        wide = dtype if values.device.type == "cpu" else torch.bfloat16
        is_bias_inside = self.bias is not None and dtype == self.bias.dtype == torch.bfloat16
        product = torch._scaled_mm(
            values,
            self.weight.T,
            scale_a=scale,
            scale_b=self.weight_scale[None],
            bias=self.bias if is_bias_inside else None,
            use_fast_accum=values.is_cuda,
            out_dtype=wide,
        ).to(dtype)
        return product if is_bias_inside else self.add_bias(product)

    def multiply_per_tensor(self, values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """As `multiply`, the scales applied to the product: other last bits than by rows.

        Bare sums are at most 448 * 448 * K, which bfloat16 and float32 hold and float16 does not.
        """
        wide = dtype if values.device.type == "cpu" else torch.bfloat16
        if wide == torch.float16:
            wide = torch.float32
        one = scale.new_ones(1)
        product = torch._scaled_mm(
            values,
            self.weight.T,
            scale_a=one,
            scale_b=one,
            use_fast_accum=values.is_cuda,
            out_dtype=wide,
        )
        return self.add_bias(product.mul_(scale).mul_(self.weight_scale).to(dtype))


class RotatedLinear(QuantizedLinear):
    """Weights in int8, or in 4 or 6 bits that become int8 for the product (`quant.rotated`).

    So many columns as `rotation` says were rotated together, 0 for none; the activations are
    rotated like them, and become int8 row by row. That is done where `arithmetic` allows it, the
    sizes are multiples of 16, and the device can; elsewhere the activations are rotated alone, and
    multiplied with the dequantized weight. Parts may differ in what 4-bit codes stand for.
    """

    weight: Tensor
    weight_scale: Tensor
    group_scale: Tensor

    def __init__(
        self,
        parts: Parts,
        shapes: Shapes,
        *,
        bias: Tensor | None,
        scheme: str,
        rotation: int,
        arithmetic: bool,
    ) -> None:
        super().__init__(shapes, bias=bias)
        self.scheme = scheme
        self.rotation = rotation
        self.register_buffer("weight", stack_rows([part[""] for part in parts]))
        scales = []
        for part, shape in zip(parts, shapes, strict=True):
            scale = part[ROW_SCALE] if scheme == "int8" else part[CHANNEL_SCALE]
            scales.append(scale.float().reshape(-1).expand(shape[0]))
        self.register_buffer("weight_scale", stack_rows(scales).contiguous())
        if scheme != "int8":
            self.register_buffer("group_scale", stack_rows([part[GROUP_SCALE] for part in parts]))
            self.runs = _join_runs([read_codebook(part) for part in parts], shapes)
        is_aligned = self.in_features % ALIGNED == 0 and self.out_features % ALIGNED == 0
        self.arithmetic = arithmetic and is_aligned
        if self.arithmetic:
            # The device is probed now, before anything is compiled.
            _can_multiply(self.scheme, str(self.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        backend = self._find_backend(x)
        if backend:
            return self.run_kernel(x, backend)
        rows = x.reshape(-1, self.in_features)  # (M, K)
        if self.arithmetic and _can_multiply(self.scheme, str(x.device)):
            product = self.multiply(self.quantize_rows(rows), x.dtype)
        else:
            turned = int8_products.rotate_rows(rows, self.rotation)
            product = functional.linear(turned, self.make_factor(x.dtype), self.bias)
        return product.view(*x.shape[:-1], self.out_features)

    def _find_backend(self, x: Tensor) -> str:
        """Whose kernel multiplies x; "" for torch. Packed weights are rotated in all of them."""
        if not self.arithmetic or (not self.rotation and self.scheme != "int8"):
            return ""
        return kernels.find_backend(find_multiply(self.scheme, str(x.device)))

    def run_kernel(self, x: Tensor, backend: str) -> Tensor:
        """The product (..., N) and the bias, by a back end of comfy-kitchen."""
        if self.scheme == "int8":
            return kernels.int8_linear(
                x,
                self.weight,
                self.weight_scale,
                bias=self.bias,
                rotation=self.rotation,
                backend=backend,
            )
        products = []
        first = 0
        for run in self.runs:
            rows = slice(first, first + run.rows)
            first += run.rows
            weight = kernels.Packed(
                self.weight[rows],
                self.group_scale[rows],
                self.weight_scale[rows],
                kernels.find_codebook(run.codebook, x.device),
            )
            bias = None if self.bias is None else self.bias[rows]
            product = kernels.packed_linear(
                x, weight, bias=bias, rotation=self.rotation, backend=backend
            )
            products.append(product)
        return products[0] if len(products) == 1 else torch.cat(products, dim=-1)

    def quantize_rows(self, rows: Tensor) -> Int8Rows:
        """The rows (M, K) as they are multiplied."""
        return int8_products.quantize_rows(rows, self.rotation)

    def multiply(self, rows: Int8Rows, dtype: torch.dtype) -> Tensor:
        """The product (M, N) in `dtype` of quantized rows with the weight, and the bias."""
        weight = Int8Weight(self.decode_levels(), self.weight_scale)
        return int8_products.multiply(rows, weight, bias=self.bias, dtype=dtype)

    def decode_levels(self, rows: slice = EVERY_ROW) -> Tensor:
        """The levels (N, K) int8 of the weight, or of some of its rows."""
        if self.scheme == "int8":
            return self.weight[rows]
        start, stop, _ = rows.indices(self.out_features)
        decoded = []
        first = 0
        for run in self.runs:
            chosen = slice(max(first, start), min(first + run.rows, stop))
            first += run.rows
            if chosen.start < chosen.stop:
                codes, scale = self.weight[chosen], self.group_scale[chosen]
                decoded.append(decode(codes, scale, run.codebook))
        return stack_rows(decoded)

    def make_factor(self, dtype: torch.dtype) -> Tensor:
        """What rotated rows in `dtype` are multiplied with: the weight (N, K), rotated still.

        It is times what these rows were divided by.
        """
        levels = self.decode_levels()
        scale = self.weight_scale[:, None]
        divisor = int8_products.find_divisor(dtype, self.rotation)
        if divisor > 1:
            scale = scale * divisor
        values = torch.empty(levels.shape, dtype=dtype, device=levels.device)
        return torch.mul(levels, scale, out=values)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return self.dequantize_rows(EVERY_ROW, dtype)

    def dequantize_rows(self, rows: slice, dtype: torch.dtype) -> Tensor:
        values = self.decode_levels(rows).float().mul_(self.weight_scale[rows, None])
        if self.scheme == "int8":
            return rotated.rotate(values, self.rotation).to(dtype)
        return rotated.rotate(values.to(dtype), self.rotation)


class Run(NamedTuple):
    """Rows of a layer whose codes stand for the same."""

    rows: int
    codebook: Codebook


def _join_runs(codebooks: Sequence[Codebook], shapes: Shapes) -> list[Run]:
    """The runs of a layer's weights, one below the other: one where all stand for the same."""
    runs: list[Run] = []
    for codebook, shape in zip(codebooks, shapes, strict=True):
        if runs and runs[-1].codebook == codebook:
            runs[-1] = Run(runs[-1].rows + shape[0], codebook)
        else:
            runs.append(Run(shape[0], codebook))
    return runs


def make_linear(
    scheme: str,
    parts: Parts,
    *,
    shapes: Shapes,
    bias: Tensor | None,
    arithmetic: bool,
    rotation: int = 0,
) -> QuantizedLinear:
    """A layer of one or more weights of the same width that are stored in the same scheme.

    `arithmetic` allows the products of fp8 and int8; `rotation` says how many columns of the
    weights were rotated together.
    """
    family = FAMILIES[scheme]
    if family == "nf4":
        return NF4Linear(parts, shapes, bias=bias)
    if family == "gguf":
        return GGUFLinear(parts, shapes, bias=bias, scheme=scheme)
    if scheme in SCALED_BLOCKS:
        return BlockScaledLinear(parts, shapes, bias=bias, scheme=scheme)
    if family == "fp8":
        return FP8Linear(parts, shapes, bias=bias, arithmetic=arithmetic)
    return RotatedLinear(
        parts, shapes, bias=bias, scheme=family, rotation=rotation, arithmetic=arithmetic
    )


def fits_together(scheme: str, shapes: Shapes) -> bool:
    """Whether weights of these shapes can be one layer.

    NF4's blocks must not cross from one weight to the next.
    """
    if FAMILIES.get(scheme) != "nf4":
        return True
    return all(rows * columns % BLOCK == 0 for rows, columns in shapes)


def find_multiply(scheme: str, device: str) -> str:
    """How a scheme's layers multiply on a device.

    "scaled_mm", "scaled_mm per tensor", "int_mm", "dequantize", or comfy-kitchen and its back end.
    """
    return ask_multiply(scheme, device).by


def ask_multiply(scheme: str, device: str) -> Multiplication:
    """How a device multiplies in a scheme; it is asked once, by small products.

    Raises torch's error where memory runs out, which says nothing of the arithmetic.
    """
    if scheme not in WAYS:
        return Multiplication(DEQUANTIZE)
    if (scheme, device) not in PROBED:
        PROBED[scheme, device] = _probe(scheme, device)
    return PROBED[scheme, device]


def _can_multiply(scheme: str, device: str) -> bool:
    """Whether a device multiplies in fp8 or int8, in whatever way."""
    return find_multiply(scheme, device) != DEQUANTIZE


def _probe(scheme: str, device: str) -> Multiplication:
    """The best way of a scheme in which a device multiplies two small matrices, and rightly.

    A card's compute capability must be enough, for some kernels below it end the process.
    """
    kind = torch.device(device).type
    if kind not in ("cpu", "cuda"):
        return Multiplication(DEQUANTIZE, f"{kind} has no such product")
    least = SCHEMES[scheme].capability
    if kind == "cuda" and least and torch.cuda.get_device_capability(device) < least:
        return Multiplication(DEQUANTIZE, f"its products need sm{least[0]}{least[1]}")
    why = ""
    if scheme in FUNCTIONS:
        check = functools.partial(_check_kernel, scheme, device)
        choice = kernels.choose([FUNCTIONS[scheme]], device, check=check)
        if choice.backend:
            return Multiplication(kernels.PREFIX + choice.backend, choice.why)
        why = choice.why
    for way in WAYS[scheme]:
        failed = _try_to_multiply(way, device)
        if not failed:
            return Multiplication(way, why)
        why = why or failed
    return Multiplication(DEQUANTIZE, why)


def _try_to_multiply(way: str, device: str) -> str:
    """Multiply two small matrices; returns "", or why a device cannot, in its own words.

    It is the call of the layers there, so that on a card the product adds a bias in bfloat16.
    """
    computing = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    ones = torch.ones(MIN_ROWS, MIN_ROWS, device=device)
    dtype = torch.int8 if way == "int_mm" else torch.float8_e4m3fn
    values = ones.to(dtype)
    layer = make_linear(
        "int8" if way == "int_mm" else "fp8",
        [{"": values, ROW_SCALE: ones[0]}],
        shapes=[(MIN_ROWS, MIN_ROWS)],
        bias=ones[0].to(computing),
        arithmetic=False,
    )
    assert isinstance(layer, FP8Linear | RotatedLinear)
    scale = ones[:, :1].contiguous()
    try:
        if isinstance(layer, RotatedLinear):
            product = layer.multiply(Int8Rows(values, scale), computing)
        elif way == PER_TENSOR:
            product = layer.multiply_per_tensor(values, scale, computing)
        else:
            product = layer.multiply_by_rows(values, scale, computing)
        return "" if bool((product == MIN_ROWS + 1).all()) else "its product is wrong"
    except (RuntimeError, ValueError) as error:
        return explain_failed_probe(error, device)


def _check_kernel(scheme: str, device: str, backend: str) -> str:
    """Whether comfy-kitchen computes a small layer as plain torch does on the CPU.

    Returns "", or what is wrong. A unit is the distance of two levels: of a row of activations,
    whose outputs may err by one in the root mean square; and of the weight, which activations that
    are 1 in one column alone (after their rotation) show level by level.
    """
    layer, x = _make_probe(scheme)
    dtype = torch.bfloat16
    if torch.device(device).type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        dtype = torch.float16
    expected = layer.multiply(layer.quantize_rows(x), torch.float32)
    levels = layer.decode_levels().float()
    row_units = rotated.rotate(x, PROBE_COLUMNS).abs().amax(1, keepdim=True) / LARGEST_LEVEL
    units = row_units * layer.weight_scale * levels.norm(dim=1)
    level_units = row_units * layer.weight_scale * LARGEST_LEVEL
    try:
        moved = layer.to(device)
        found = moved.run_kernel(x.to(device, dtype), backend).float().cpu()
    except Exception as error:  # noqa: BLE001 - kernels raise anything
        return explain_failed_probe(error, device)
    # What the output's rounding to 16 bit does is no fault.
    wrong = ((found - expected).abs() - expected.abs() / 256).clamp_(min=0)
    by_row = (wrong / units).square().mean(1).sqrt()[PROBE_COLUMNS:]
    by_level = (wrong / level_units)[:PROBE_COLUMNS]
    most = max(by_row.max().item(), by_level.max().item())
    if not most <= 1:  # NaN, too
        return f"it differs from torch by {most:.1f} units of int8"
    return ""


def _make_probe(scheme: str) -> tuple[RotatedLinear, Tensor]:
    """A small layer, and activations (M, K) that bfloat16 and float16 hold.

    The first K of these are rows of the matrix that rotates them. The others are enough for the
    kernels that a picture uses, which differ from those for few rows.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(PROBE_ROWS, PROBE_COLUMNS, generator=generator)
    layer = make_linear(
        scheme,
        [rotated.quantize(weight, scheme)],
        shapes=[tuple(weight.shape)],
        bias=torch.randn(PROBE_ROWS, generator=generator),
        arithmetic=False,
        rotation=PROBE_COLUMNS,
    )
    assert isinstance(layer, RotatedLinear)
    drawn = torch.randn(PROBE_TOKENS, PROBE_COLUMNS, generator=generator)
    drawn[:, 0] *= 30  # as columns of activations are
    matrix = rotated.make_hadamard(PROBE_COLUMNS, dtype=torch.float32, device="cpu")
    return layer, torch.cat([matrix, drawn.bfloat16().float()])


def explain_failed_probe(error: Exception, device: str) -> str:
    """Why a device cannot compute what it was asked to, in its own words.

    Raises the error itself where memory ran out, which says nothing of what the device can.
    """
    if is_out_of_memory(error):
        raise error
    take_driver_error(device)
    return kernels.summarize(error)


def take_driver_error(device: str) -> None:
    """Take the error of a call that failed, which the driver would report to the next kernel."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device=device)
