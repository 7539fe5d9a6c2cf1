"""Linear layers over packed weights: NF4Linear, FP8Linear, Int8Linear, GGUFLinear.

A layer may be several weights one below the other (q, k and v). fp8 and int8 multiply in their own arithmetic,
activations quantized row by row, where the device can; else, and for NF4 and GGUF always, the weight is unpacked first.
Shapes: weight (N, K), input (..., K), output (..., N). It alone imports torch at its top: import it inside functions.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from quant.codecs import SMALLEST_SCALE, dequantize_gguf, stack_rows
from quant.nf4 import dequantize_codes, dequantize_scales, read_offset
from quant.spec import BLOCK, FAMILIES, SCHEMES

Parts, Shapes = Sequence[dict[str, Tensor]], Sequence[tuple[int, int]]
ROWS = 1024  # that are multiplied in int8 at a time: the sums are four bytes wide, twice
MIN_ROWS, ALIGNED = (
    32,
    16,
)  # CUDA's _int_mm wants more rows than 16, both 8-bit products widths that 16 divides
PROBED: dict[
    tuple[str, str], bool
] = {}  # torch.compile looks through functools.cache, not into this


class QuantizedLinear(nn.Module):
    """What the packed layers share: sizes, bias, and the product with `dequantize(dtype)`, the weight (N, K)."""

    def __init__(self, shapes: Shapes, bias: Tensor | None) -> None:
        super().__init__()
        self.in_features, self.out_features = shapes[0][1], sum(rows for rows, _ in shapes)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.dequantize(x.dtype), self.bias)


class NF4Linear(QuantizedLinear):
    """4-bit NormalFloat weights, their scales mostly quantized again, unpacked by bitsandbytes' own operators."""

    def __init__(self, parts: Parts, shapes: Shapes, bias: Tensor | None) -> None:
        super().__init__(shapes, bias)
        self.doubly = ".nested_absmax" in parts[0]
        for name in ("weight", "absmax", "nested_absmax")[: 3 if self.doubly else 2]:
            suffix = f".{name}".removesuffix(".weight")
            self.register_buffer(name, stack_rows([part[suffix].view(-1) for part in parts]))
        if not self.doubly:
            return
        self.register_buffer("nested_quant_map", parts[0][".nested_quant_map"])
        self.register_buffer(
            "offset", torch.tensor([read_offset(p) for p in parts], device=self.absmax.device)
        )
        self.blocks = [part[".absmax"].numel() for part in parts]
        self.nested = [part[".nested_absmax"].numel() for part in parts]

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        absmax = self.absmax
        if self.doubly:
            scales = zip(
                absmax.split(self.blocks),
                self.nested_absmax.split(self.nested),
                self.offset,
                strict=True,
            )
            absmax = stack_rows(
                [
                    dequantize_scales(part, nested, self.nested_quant_map, at)
                    for part, nested, at in scales
                ]
            )
        return dequantize_codes(self.weight, absmax, (self.out_features, self.in_features), dtype)


class GGUFLinear(QuantizedLinear):
    """Weights in GGUF's blocks: rows of bytes (N, B), unpacked by diffusers' functions."""

    def __init__(self, scheme: str, parts: Parts, shapes: Shapes, bias: Tensor | None) -> None:
        super().__init__(shapes, bias)
        self.scheme = scheme
        self.register_buffer("weight", stack_rows([part[""] for part in parts]))

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return dequantize_gguf(self.weight, self.scheme, dtype)


class RowLinear(QuantizedLinear):
    """8-bit weights with a float32 scale per row; `multiply` takes 8-bit activations (M, K) and scales (M, 1)."""

    def __init__(self, parts: Parts, shapes: Shapes, bias: Tensor | None, arithmetic: bool) -> None:
        super().__init__(shapes, bias)
        scales = [
            part.get("_scale", part[""].new_ones(1, dtype=torch.float32)).float().view(-1)
            for part in parts
        ]
        scales = [scale.expand(rows) for scale, (rows, _) in zip(scales, shapes, strict=True)]
        self.register_buffer("weight", stack_rows([part[""] for part in parts]))
        self.register_buffer("weight_scale", stack_rows(scales).contiguous())
        self.arithmetic = arithmetic and not (
            self.in_features % ALIGNED or self.out_features % ALIGNED
        )
        if self.arithmetic:
            _multiplies(self.scheme, str(self.weight.device))  # probed before anything is compiled

    def forward(self, x: Tensor) -> Tensor:
        if not (self.arithmetic and _multiplies(self.scheme, str(x.device))):
            return super().forward(x)
        rows, most = x.reshape(-1, self.in_features), SCHEMES[self.scheme].largest
        scale = (
            rows.abs().amax(1, keepdim=True).float().div_(most).clamp_(min=SMALLEST_SCALE)
        )  # (M, 1)
        values = rows / scale
        values = (
            values.round_().char()
            if self.scheme == "int8"
            else values.clamp_(-most, most).to(torch.float8_e4m3fn)
        )
        product = self.multiply(values, scale, x.dtype)
        return (product if self.bias is None else product + self.bias).view(
            *x.shape[:-1], self.out_features
        )

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return self.weight.float().mul_(self.weight_scale[:, None]).to(dtype)


class FP8Linear(RowLinear):
    """float8_e4m3fn weights; activations become float8 row by row."""

    scheme = "fp8"

    def multiply(self, values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        wide = (
            dtype if values.device.type == "cpu" else torch.bfloat16
        )  # the only one of CUDA's row-wise kernel
        options = {
            "scale_a": scale,
            "scale_b": self.weight_scale[None],
            "use_fast_accum": values.is_cuda,
        }
        return torch._scaled_mm(values, self.weight.T, **options, out_dtype=wide).to(dtype)


class Int8Linear(RowLinear):
    """int8 weights; activations become int8 row by row."""

    scheme = "int8"

    def multiply(self, values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        products = []
        for part, by in zip(values.split(ROWS), scale.split(ROWS), strict=True):
            padded = functional.pad(part, (0, 0, 0, max(0, MIN_ROWS - len(part))))
            product = torch._int_mm(padded, self.weight.T)[: len(part)].float()
            products.append(product.mul_(by).mul_(self.weight_scale).to(dtype))
        return stack_rows(products)


def make_linear(
    scheme: str, parts: Parts, shapes: Shapes, bias: Tensor | None, *, arithmetic: bool
) -> QuantizedLinear:
    """A layer of one or more packed weights of the same width; `arithmetic` allows the scheme's own products."""
    if FAMILIES[scheme] == "nf4":
        return NF4Linear(parts, shapes, bias)
    if FAMILIES[scheme] == "gguf":
        return GGUFLinear(scheme, parts, shapes, bias)
    return (FP8Linear if scheme == "fp8" else Int8Linear)(parts, shapes, bias, arithmetic)


def fits_together(scheme: str, shapes: Shapes) -> bool:
    """Whether weights of these shapes can be one layer: NF4's blocks must not cross from one to the next."""
    return FAMILIES.get(scheme) != "nf4" or all(
        rows * columns % BLOCK == 0 for rows, columns in shapes
    )


def path_of(scheme: str, device: str) -> str:
    """How a scheme multiplies on a device: "scaled_mm", "int_mm" or "dequantize"."""
    row = SCHEMES.get(scheme)
    if row and row.multiply and _multiplies(scheme, device):
        return row.multiply
    return "dequantize"


def _multiplies(scheme: str, device: str) -> bool:
    if (scheme, device) not in PROBED:
        PROBED[scheme, device] = _probe(scheme, device)
    return PROBED[scheme, device]


def _probe(scheme: str, device: str) -> bool:
    """Whether the device has the scheme's arithmetic: by capability, then by a product that must be right."""
    kind = torch.device(device).type
    if kind != "cpu" and (
        kind != "cuda" or torch.cuda.get_device_capability(device) < SCHEMES[scheme].capability
    ):
        return False
    ones = torch.ones(MIN_ROWS, MIN_ROWS, device=device)
    packed = {
        "": ones.to(torch.int8 if scheme == "int8" else torch.float8_e4m3fn),
        "_scale": ones[0],
    }
    layer = make_linear(scheme, [packed], [(MIN_ROWS, MIN_ROWS)], None, arithmetic=False)
    try:
        return bool(
            (layer.multiply(packed[""], ones[:, :1].contiguous(), torch.float32) == MIN_ROWS).all()
        )
    except (RuntimeError, NotImplementedError, ValueError) as error:
        if "OutOfMemory" in type(error).__name__:  # that says nothing of the arithmetic
            raise
        return False
