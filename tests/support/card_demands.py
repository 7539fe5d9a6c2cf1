"""What CUDA's kernels demand of their operands and the CPU's do not.

From torch 2.13, aten/src/ATen/native/cuda: ScaledBlas.cpp and RowwiseScaledMM.cu (`_scaled_mm`),
Blas.cpp (`_int_mm`); and bitsandbytes 0.50, backends/cuda/ops.py. Addresses are those of the CPU's
memory behind the tensors.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Capability = tuple[int, int]


class Refused(RuntimeError):
    """A kernel of CUDA would refuse these operands."""


def check_operands(name: str, sm: Capability, *, rowwise: bool, args: tuple, options: dict) -> None:
    """Raise `Refused` if a card of this capability refuses an operator's operands.

    `rowwise` says whether this torch was built with row-wise `_scaled_mm`, as Windows' is not.
    """
    if name == "_scaled_mm":
        _check_scaled_mm(sm, *args, **options)
        if not rowwise and options.get("scale_a", args[2:3] and args[2]).numel() > 1:
            raise Refused("Rowwise scaling is not currently supported on your device")
    elif name == "convolution" and sm < (8, 0) and args[0].dtype == torch.bfloat16:
        raise Refused("GET was unable to find an engine to execute this computation")
    elif name in CHECKS:
        CHECKS[name](*args, **options)


def _demand(holds: bool, text: str) -> None:
    if not holds:
        raise Refused(text)


def _check_scaled_mm(
    sm: Capability,
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None = None,
    scale_result: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    use_fast_accum: bool = False,
) -> None:
    _demand(sm >= (8, 9), f"_scaled_mm is only supported from sm89, not on sm{sm[0]}{sm[1]}")
    _demand(a.shape[1] == b.shape[0], f"_scaled_mm: shapes {tuple(a.shape)} {tuple(b.shape)}")
    sizes = (*a.shape[1:], *b.shape)
    _demand(all(size % 16 == 0 for size in sizes), f"_scaled_mm: not multiples of 16: {sizes}")
    row_major = a.stride(1) == 1 and a.stride(0) >= a.shape[1]
    _demand(row_major, f"_scaled_mm: a is not row-major: {a.stride()}")
    column_major = b.stride(0) == 1 and b.stride(1) >= b.shape[0]
    _demand(column_major, f"_scaled_mm: b is not column-major: {b.stride()}")
    aligned = a.data_ptr() % 16 == 0 and b.data_ptr() % 16 == 0
    _demand(aligned, "_scaled_mm: operands are not aligned to 16 bytes")

    by_tensor = scale_a.numel() == 1 and scale_b.numel() == 1
    shapes = (tuple(scale_a.shape), tuple(scale_b.shape))
    by_row = shapes == ((a.shape[0], 1), (1, b.shape[1]))
    _demand(by_tensor or by_row, f"_scaled_mm: scales {shapes}")
    _demand(scale_a.dtype == scale_b.dtype == torch.float32, "_scaled_mm: scales' dtype")
    contiguous = scale_a.is_contiguous() and scale_b.t().is_contiguous()
    _demand(contiguous, f"_scaled_mm: scales not contiguous {scale_a.stride()} {scale_b.stride()}")
    # Before torch 2.10 the row-wise kernel gives bfloat16 alone.
    _demand(by_tensor or out_dtype == torch.bfloat16, f"_scaled_mm: row-wise in {out_dtype}")
    if bias is not None:
        fits = bias.is_contiguous() and tuple(bias.shape) == (b.shape[1],)
        _demand(fits, f"_scaled_mm: bias {tuple(bias.shape)}")
        wide = bias.dtype in (torch.bfloat16, torch.float16) and out_dtype == bias.dtype
        _demand(wide or (by_row and bias.dtype == torch.float32), f"_scaled_mm: bias {bias.dtype}")
        _demand(by_tensor or bias.dtype == torch.bfloat16, f"_scaled_mm: bias {bias.dtype}")


def _check_int_mm(a: Tensor, b: Tensor) -> None:
    _demand(a.shape[0] > 16, f"_int_mm: self.size(0) needs to be greater than 16: {a.shape[0]}")
    multiples = a.shape[1] % 8 == 0 and b.shape[1] % 8 == 0
    _demand(multiples, f"_int_mm: not multiples of 8: {tuple(a.shape)} {tuple(b.shape)}")
    # Other layouts fail on some cards and cuBLAS versions, see torch's own test_int_mm.
    _demand(a.stride(1) == 1 and b.stride(0) == 1, f"_int_mm: layout {a.stride()} {b.stride()}")


def _check_dequantize_4bit(a: Tensor, absmax: Tensor, blocksize: int, *_: object) -> None:
    known = blocksize in (32, 64, 128, 256, 512, 1024, 2048, 4096)
    _demand(known, f"dequantize_4bit: blocksize {blocksize}")
    dtypes = a.dtype == torch.uint8 and absmax.dtype == torch.float32
    _demand(dtypes, f"dequantize_4bit: {a.dtype}, absmax {absmax.dtype}")
    # Kernels take their pointers.
    _demand(a.is_contiguous() and absmax.is_contiguous(), "dequantize_4bit: not contiguous")


def _check_dequantize_blockwise(a: Tensor, absmax: Tensor, code: Tensor, *_: object) -> None:
    for tensor in (absmax, code):
        fits = tensor.is_contiguous() and tensor.dtype == torch.float32
        _demand(fits, "dequantize_blockwise: scales and code are not contiguous float32")
        _demand(tensor.data_ptr() % 4 == 0, "dequantize_blockwise: not aligned to 4 bytes")
    _demand(a.is_contiguous(), "dequantize_blockwise: not contiguous")


def _check_quantize_blockwise(a: Tensor, code: Tensor, blocksize: int) -> None:
    known = blocksize in (64, 128, 256, 512, 1024, 2048, 4096)
    _demand(known, f"quantize_blockwise: blocksize {blocksize}")
    _demand(code.dtype == torch.float32, "quantize_blockwise: code's dtype")


CHECKS: dict[str, Callable[..., None]] = {
    "_int_mm": _check_int_mm,
    "dequantize_4bit": _check_dequantize_4bit,
    "dequantize_blockwise": _check_dequantize_blockwise,
    "quantize_blockwise": _check_quantize_blockwise,
}
