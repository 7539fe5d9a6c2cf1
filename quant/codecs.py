"""Read, decode and encode one weight: nf4 by `quant.nf4`, fp8 and int8 by optimum-quanto's row-wise types; GGUF's
blocks are decoded by diffusers.

Pieces are keyed by suffix, as in `quant.spec.layout`; the headers of their files were validated before. Imports
optimum.quanto (seconds) only where it quantizes.
"""

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

from quant import nf4
from quant.errors import CheckpointError, MissingLibrary
from quant.header import GGUF_BITS, is_gguf
from quant.lazy import Tensor, Tensors, torch
from quant.spec import NF4_ONCE, SCHEMES
from quant.weights import SCB, Piece, Weight

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
          "I16": "int16", "I8": "int8"}  # fmt: skip
# Where a block's float16 scales are, in bytes.
GGUF_SCALES = dict.fromkeys(("Q4_0", "Q5_0", "Q8_0"), (0, 2)) | dict.fromkeys(
    ("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 4)
)
GGUF_SCALES |= {"Q2_K": (-4, None), "Q3_K": (-2, None), "Q6_K": (-2, None)}
CHUNK = 1 << 19  # values that are encoded at a time
SMALLEST_SCALE = 1e-12  # of a row of zeros
NF4_BOUND = 0.15  # relative; Gaussian weights have 0.085 to 0.092


@dataclass(frozen=True)
class Quantized:
    """A packed weight, and how far its values are from the weight's, as a share of the norm."""

    stored: Tensors
    relative_error: float


class Reader(dict):
    """Opened files by path, each mapped when it is first read, for as long as a tensor of it lives."""

    def __missing__(self, path: object) -> object:
        from safetensors import safe_open

        if is_gguf(path):
            return self.setdefault(
                path, torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)
            )
        return self.setdefault(path, safe_open(path, framework="pt", device="cpu"))

    def read(self, weight: Weight) -> Tensors:
        """The tensors of a weight by suffix, as they are stored, GGUF's blocks as rows of bytes; `_scale` if any."""
        found = {
            suffix: take_rows(self._tensor(piece), piece) for suffix, piece in weight.pieces.items()
        }
        if SCB in found:
            found["_scale"] = found.pop(SCB).float() / SCHEMES["int8"].largest
        return found

    def read_checked(self, weight: Weight, device: str = "cpu") -> Tensors:
        """The tensors of a weight on a device; raises `CheckpointError` for values that are not finite."""
        stored = {suffix: tensor.to(device) for suffix, tensor in self.read(weight).items()}
        check_values(
            weight.name, stored, weight.pieces.get("") or next(iter(weight.pieces.values()))
        )
        return stored

    def _tensor(self, piece: Piece) -> Tensor:
        if not isinstance(opened := self[piece.file], torch.Tensor):
            return opened.get_tensor(piece.info.name)
        raw = opened[piece.info.start : piece.info.stop]
        if piece.info.dtype in GGUF_BITS:
            return raw.view(*piece.info.shape[:-1], -1)
        return raw.view(getattr(torch, DTYPES[piece.info.dtype])).view(piece.info.shape)


def take_rows(tensor: Tensor, piece: Piece) -> Tensor:
    """The piece's rows of the tensor that holds it, where it is not the whole."""
    return stack_rows([tensor[start:stop] for start, stop in piece.rows] or [tensor])


def stack_rows(tensors: Sequence[Tensor]) -> Tensor:
    """One below the other; a single tensor stays where it is (mapped, perhaps)."""
    import torch  # itself: torch.compile does not look through a lazy one

    return torch.cat(tuple(tensors)) if len(tensors) > 1 else tensors[0]


def import_library(scheme: str) -> ModuleType:
    """Import what packs in a scheme, seconds the first time; raises `MissingLibrary`."""
    name = SCHEMES[scheme].library
    try:
        return importlib.import_module(name.replace("-", "."))
    except ImportError as error:
        raise MissingLibrary(
            f"{name} is missing", why=str(error)[:100], hint=f"pip install {name}"
        ) from error


def quantize(
    weight: Tensor,
    scheme: str,
    *,
    name: str,
    where: Piece,
    search: bool = True,
    scalar: bool = False,
) -> Quantized:
    """Pack a (N, K) weight, fp8 with one scale if `scalar`; raises `CheckpointError` for what a scheme cannot hold."""
    check_values(name, {"": weight}, where)
    if scheme == "nf4":
        stored, error, norm = nf4.quantize(weight, search=search), 0.0, 0.0
        decoded = nf4.dequantize(stored, tuple(weight.shape), torch.float32)
        for part, other in zip(weight.split(256), decoded.split(256), strict=True):
            values = part.float()
            norm, error = norm + _dot(values), error + _dot(other.sub_(values))
        bound = NF4_BOUND * math.sqrt(norm)
    else:
        quanto, data, scales, error, norm = import_library(scheme), [], [], 0.0, 0.0
        kind = quanto.qfloat8_e4m3fn if scheme == "fp8" else quanto.qint8
        one = (
            weight.abs().amax().float().clamp(min=SMALLEST_SCALE) / SCHEMES[scheme].largest
            if scalar
            else None
        )
        for part in weight.tensor_split(max(1, min(weight.shape[0] // 2, weight.numel() // CHUNK))):
            values = part.float()
            scale = (
                values.abs()
                .amax(1, keepdim=True)
                .div_(SCHEMES[scheme].largest)
                .clamp_(min=SMALLEST_SCALE)
            )
            scale = scale if one is None else one.expand_as(scale).contiguous()
            given = scale if len(values) > 1 else scale.view(())
            packed = quanto.quantize_weight(values, kind, 0, given, optimized=False)._data
            data.append(packed)
            scales.append(scale.flatten())
            norm, error = norm + _dot(values), error + _dot(_widen(packed).mul_(scale).sub_(values))
        scale = torch.cat(scales)
        # int8 errs by half a step, float8_e4m3 by 1/16 of the value or half a step of its subnormals.
        step = (
            float(scale.norm()) * math.sqrt(weight.shape[1]) * (0.5 if scheme == "int8" else 2**-10)
        )
        bound = (step + (math.sqrt(norm) / 16 if scheme == "fp8" else 0)) * 1.001
        stored = {"": torch.cat(data), "_scale": scale if one is None else one.reshape(())}
    relative = math.sqrt(error / norm) if norm else 0.0
    if not (math.isfinite(norm) and error <= bound**2):
        why = f"{name} would differ by {relative:.3f} of its norm"
        raise CheckpointError(
            f"weights that {scheme} cannot hold", where.file, why=why, hint=f"--keep {name}"
        )
    return Quantized(stored, relative)


def _dot(values: Tensor) -> float:
    """The squared norm."""
    return float(values.view(-1).dot(values.view(-1)))


def _widen(packed: Tensor) -> Tensor:
    """8-bit values as float32. e4m3's bits are float16's, shifted, of 2^-8 the value: much faster than torch's cast."""
    if packed.dtype != torch.float8_e4m3fn:
        return packed.float()
    bits = packed.view(torch.int8).to(torch.int16)
    return (bits & -(1 << 15) | (bits & 127) << 7).view(torch.float16).float().mul_(256)


def dequantize(
    stored: Tensors, scheme: str, shape: tuple[int, ...], dtype: "torch.dtype"
) -> Tensor:
    """The values (N, K) of a packed weight in `dtype`."""
    if not scheme:
        return stored[""].to(dtype).view(shape)
    if scheme in ("nf4", NF4_ONCE):
        return nf4.dequantize(stored, shape, dtype)
    if scheme in GGUF_BITS:
        return dequantize_gguf(stored[""], scheme, dtype)
    values = _widen(stored[""])
    return (
        values.mul_(stored["_scale"].float().reshape(-1, 1)) if "_scale" in stored else values
    ).to(dtype)


def dequantize_gguf(rows: Tensor, scheme: str, dtype: "torch.dtype") -> Tensor:
    """The values (N, K) of GGUF's blocks, given as rows of bytes (N, B): computed in float32, part by part."""
    import torch  # itself: torch.compile does not look through a lazy one
    from diffusers.quantizers.gguf.utils import dequantize_functions
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    kind = GGMLQuantizationType[scheme]
    size, nbytes = GGML_QUANT_SIZES[kind]
    columns = rows.shape[1] // nbytes * size
    values = torch.empty(rows.shape[0], columns, dtype=dtype, device=rows.device)
    step = max(1, 8 * CHUNK // columns)
    for part, target in zip(rows.split(step), values.split(step), strict=True):
        blocks = part.reshape(-1, nbytes)
        target.copy_(
            dequantize_functions[kind](blocks, size, nbytes, torch.float32).view(target.shape)
        )
    return values


def check_values(name: str, stored: Tensors, where: Piece) -> None:
    """Raise `CheckpointError` where a tensor or its scales hold NaN or Inf, or a scale is 0 or negative."""
    if ends := GGUF_SCALES.get(where.info.dtype):  # of each block, in float16
        nbytes = int(GGUF_BITS[where.info.dtype] * (32 if "_K" in where.info.dtype else 4))
        stored = {
            "": stored[""].reshape(-1, nbytes)[:, slice(*ends)].contiguous().view(torch.float16)
        }
    for suffix, tensor in stored.items():
        if tensor.dtype == torch.float8_e4m3fn and bool(
            (tensor.view(torch.uint8) & 127 == 127).any()
        ):
            raise CheckpointError("weights that are not finite", where.file, why=f"NaN in {name}")
        if (
            not tensor.is_floating_point()
            or tensor.dtype == torch.float8_e4m3fn
            or not tensor.numel()
        ):
            continue
        wide = tensor.half() if tensor.dtype == torch.float8_e5m2 else tensor
        low, high = (
            float(end.float()) for end in wide.aminmax()
        )  # NaN wins both; far faster than isfinite
        if not math.isfinite(low) or not math.isfinite(high):
            raise CheckpointError(
                "weights that are not finite", where.file, why=f"NaN or Inf in {name}{suffix}"
            )
        if suffix == "_scale" and low <= 0:
            raise CheckpointError(
                "impossible scales", where.file, why=f"one of {name} is 0 or negative"
            )
