"""What only a device can tell, one answer at a time: what `benchmarks.cards` asks first.

How much RAM the driver pins in one piece, and how fast it copies from it and from RAM that is not
pinned; the layers of FLUX.1 in each precision, with the time that the host takes for them; what a
decode of the VAE reserves, contiguous and channels_last; how large the process's context became.
"""

import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from fluxcli.engine import device as hardware
from quant import linear
from quant.codecs import quantize
from quant.spec import BAKEABLE
from quant.tensor_info import TensorInfo
from quant.weights import Piece

GIB = 2**30
PINS_GIB = (0.25, 1.0, 4.0, 16.0)
TOKENS = 4608  # of 1024x1024 with 512 text tokens
WIDTH = 3072


def time_runs(run: Callable[[], object], device: str, *, count: int = 5) -> dict[str, float]:
    """Milliseconds of one of several runs, and those after which the host could go on."""
    run()
    hardware.synchronize(device)
    started_s = time.perf_counter()
    for _ in range(count):
        run()
    host_s = time.perf_counter() - started_s
    hardware.synchronize(device)
    whole_s = time.perf_counter() - started_s
    return {"ms": round(whole_s / count * 1e3, 3), "host_ms": round(host_s / count * 1e3, 3)}


@torch.no_grad()
def ask(device: str, *, shrunk: bool = False) -> Iterator[dict[str, Any]]:
    """Yield an answer after the other; `shrunk` asks for tiny ones, of any device."""
    if device.startswith("cuda"):
        yield from _ask_copies(device)
    yield from _ask_layers(device, tokens=64 if shrunk else TOKENS, width=64 if shrunk else WIDTH)
    yield from _ask_vae(device, sides_px=(64,) if shrunk else (512, 1024), shrunk=shrunk)
    if device.startswith("cuda"):
        gc.collect()
        torch.cuda.empty_cache()
        free_bytes, total_bytes = torch.cuda.mem_get_info()
        used_bytes = total_bytes - free_bytes - torch.cuda.memory_reserved()
        yield {"question": "used beside the allocator", "MiB": used_bytes >> 20}


def _ask_copies(device: str) -> Iterator[dict[str, Any]]:
    runtime = torch.cuda.cudart()
    target = torch.empty(GIB // 4, dtype=torch.uint8, device=device)
    for gib in PINS_GIB:
        memory = torch.empty(int(gib * GIB), dtype=torch.uint8)
        source = memory[: target.numel()]
        code = int(runtime.cudaHostRegister(memory.data_ptr(), memory.numel(), 0))
        yield {"question": "pin", "GiB": gib, "refused": code}
        if code:
            # Takes the error that the driver would report to the next kernel.
            with contextlib.suppress(RuntimeError):
                torch.zeros(1, device=device)
            break
        taken = time_runs(lambda source=source: target.copy_(source, non_blocking=True), device)
        yield {"question": "copy pinned", "GB_s": round(target.numel() / taken["ms"] / 1e6, 1)}
        runtime.cudaHostUnregister(memory.data_ptr())
    source = torch.empty(target.numel(), dtype=torch.uint8)
    taken = time_runs(lambda: target.copy_(source), device)
    yield {"question": "copy pageable", "GB_s": round(target.numel() / taken["ms"] / 1e6, 1)}


def _ask_layers(device: str, *, tokens: int, width: int) -> Iterator[dict[str, Any]]:
    x = torch.randn(tokens, width, device=device, dtype=torch.bfloat16)
    shape = (4 * width, width)
    weight = torch.randn(*shape, dtype=torch.bfloat16) * 0.02
    here = weight.to(device)
    bias = torch.zeros(shape[0], device=device, dtype=torch.bfloat16)
    taken = time_runs(lambda: torch.nn.functional.linear(x, here, bias), device)
    yield {"question": "layer", "precision": "bf16", "shape": shape, **taken}
    where = Piece(Path("random"), TensorInfo("random", "BF16", shape))
    for scheme in BAKEABLE:
        stored = quantize(weight, scheme, name="random", where=where, search=False).stored
        part = {suffix: tensor.to(device) for suffix, tensor in stored.items()}
        for arithmetic in (True, False):
            layer = linear.make_linear(
                scheme, [part], shapes=[shape], bias=bias, arithmetic=arithmetic
            )
            by = linear.find_multiply(scheme, device) if arithmetic else linear.DEQUANTIZE
            if arithmetic and by == linear.DEQUANTIZE:
                continue
            taken = time_runs(lambda layer=layer: layer(x), device)
            yield {"question": "layer", "precision": scheme, "by": by, "shape": shape, **taken}


def _ask_vae(device: str, *, sides_px: tuple[int, ...], shrunk: bool) -> Iterator[dict[str, Any]]:
    from diffusers import AutoencoderKL

    widths = [16, 32, 64, 64] if shrunk else [128, 256, 512, 512]
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=widths,
        layers_per_block=2,
        latent_channels=16,
        norm_num_groups=8 if shrunk else 32,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).to(device, torch.bfloat16)
    for layout in (torch.contiguous_format, torch.channels_last):
        vae.to(memory_format=layout)
        for side_px in sides_px:
            latents = torch.randn(1, 16, side_px // 8, side_px // 8, device=device)
            latents = latents.to(torch.bfloat16).to(memory_format=layout)
            hardware.empty_cache(device)
            hardware.reset_peak(device)
            held_bytes = hardware.held_memory(device)
            taken = time_runs(lambda latents=latents: vae.decode(latents), device, count=2)
            peak_bytes = hardware.peak_memory(device).get("vram_bytes", held_bytes)
            said = {"layout": str(layout).partition(".")[2], "side_px": side_px}
            said["reserved_GiB"] = round((peak_bytes - held_bytes) / GIB, 2)
            yield {"question": "vae", **said, **taken}
