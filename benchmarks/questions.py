"""What only a device can tell, one answer at a time: what `benchmarks.cards` asks first.

How much RAM the driver pins in one piece, and how fast it copies from it and from RAM that is not
pinned; the layers of FLUX.1 in each precision, with the time that the host takes for them; what a
decode of the VAE reserves, contiguous and channels_last; how large the process's context became.
"""

import contextlib
import gc
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from fluxcli.engine import device as hardware
from quant import linear
from quant.codecs import quantize
from quant.scales import drop_tables
from quant.spec import BAKEABLE
from quant.tensor_info import TensorInfo
from quant.weights import Piece

GIB = 2**30
PINS_BYTES = (GIB // 4, GIB, 4 * GIB, 16 * GIB)
COPY_BYTES = GIB // 4
TOKENS = 4608  # of 1024x1024 with 512 text tokens
WIDTH = 3072
SIDES_PX = (512, 1024)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


Answer = dict[str, Any]


def attempt(measure: Callable[[], Answer]) -> Answer:
    """What was measured, or the "error" that it ended with: what comes next goes on.

    Its traceback goes to stderr.
    """
    try:
        return measure()
    except Exception as error:  # noqa: BLE001 - of libraries, of the driver, of ours
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"[:300]}


@torch.no_grad()
def ask(device: str, *, shrunk: bool = False) -> Iterator[Answer]:
    """Yield an answer after the other about a CUDA device; `shrunk` asks for tiny ones."""
    yield {"question": "card"} | attempt(lambda: describe(device))
    yield from ask_copies(device, shrunk=shrunk)
    yield from ask_layers(device, tokens=64 if shrunk else TOKENS, width=64 if shrunk else WIDTH)
    yield from ask_vae(device, shrunk=shrunk)
    gc.collect()
    yield {"question": "used beside the allocator"} | attempt(lambda: ask_context(device))


def time_runs(run: Callable[[], object], *, count: int = 5) -> dict[str, float]:
    """Milliseconds of one of several runs on the current device, between two of its events.

    `host_ms` are those after which the host could go on: near `ms`, it is what limits.
    """
    run()
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    began.record()
    started_s = time.perf_counter()
    for _ in range(count):
        run()
    host_s = time.perf_counter() - started_s
    ended.record()
    ended.synchronize()
    ms = began.elapsed_time(ended) / count
    return {"ms": round(ms, 3), "host_ms": round(host_s / count * 1e3, 3)}


def describe(device: str) -> Answer:
    """The card, its memory and what torch is built for."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "sm": [properties.major, properties.minor],
        "MiB": properties.total_memory >> 20,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "built_for": torch.cuda.get_arch_list(),
        "fixed_segments": hardware.explain_fixed_segments(device),
    }


# --- copies


def ask_copies(device: str, *, shrunk: bool) -> Iterator[Answer]:
    """How much the driver pins in one piece, at most half of the free RAM, and how copies go."""
    scale = 1024 if shrunk else 1
    copied_bytes = COPY_BYTES // scale
    target = torch.empty(copied_bytes, dtype=torch.uint8, device=device)
    for size_bytes in PINS_BYTES:
        if size_bytes // scale > psutil.virtual_memory().available // 2:
            break
        answer = attempt(lambda size=size_bytes // scale: copy_pinned(target, size))
        yield {"question": "pin", "GiB": round(size_bytes / scale / GIB, 5), **answer}
        if answer.get("GB_s") is None:
            break
    source = torch.empty(copied_bytes, dtype=torch.uint8)
    yield {"question": "copy pageable"} | attempt(lambda: time_copy(target, source))


def copy_pinned(target: Tensor, size_bytes: int) -> Answer:
    """Pin so many bytes in one piece, and copy from their beginning."""
    runtime = torch.cuda.cudart()
    memory = torch.empty(size_bytes, dtype=torch.uint8)
    code = int(runtime.cudaHostRegister(memory.data_ptr(), memory.numel(), 0))
    if code:
        # Takes the error that the driver would report to the next kernel.
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device=target.device)
        return {"refused": code}
    try:
        return {"refused": 0, **time_copy(target, memory[: target.numel()])}
    finally:
        torch.cuda.synchronize()
        runtime.cudaHostUnregister(memory.data_ptr())


def time_copy(target: Tensor, source: Tensor) -> Answer:
    """How fast bytes of the host come to the device."""
    taken = time_runs(lambda: target.copy_(source, non_blocking=True))
    return {"GB_s": round(target.numel() / taken["ms"] / 1e6, 1), **taken}


# --- layers


def ask_layers(device: str, *, tokens: int, width: int) -> Iterator[Answer]:
    """Each precision's layer of (4 x width, width), in each way that the device multiplies it."""
    shape = (4 * width, width)
    x = torch.randn(tokens, width, device=device, dtype=torch.bfloat16)
    bias = torch.zeros(shape[0], device=device, dtype=torch.bfloat16)
    weight = torch.randn(*shape, device=device, dtype=torch.bfloat16) * 0.02

    def time_plain() -> Answer:
        return time_runs(lambda: torch.nn.functional.linear(x, weight, bias))

    said = {"question": "layer", "shape": shape}
    yield said | {"precision": "bf16"} | attempt(time_plain)
    for scheme in BAKEABLE:
        for arithmetic in (True, False):

            def time_quantized(scheme: str = scheme, arithmetic: bool = arithmetic) -> Answer:
                return time_layer(scheme, x, weight=weight, bias=bias, arithmetic=arithmetic)

            by = linear.DEQUANTIZE
            if arithmetic:
                by = linear.find_multiply(scheme, device)
                if by == linear.DEQUANTIZE:
                    continue
            yield said | {"precision": scheme, "by": by} | attempt(time_quantized)
    drop_tables()  # of quantizing, which placements do not need


def time_layer(scheme: str, x: Tensor, *, weight: Tensor, bias: Tensor, arithmetic: bool) -> Answer:
    """A layer of the weight in a scheme, which the device quantizes."""
    shape = (weight.shape[0], weight.shape[1])
    where = Piece(Path("random"), TensorInfo("random", "BF16", shape))
    part = quantize(weight, scheme, name="random", where=where, search=False).stored
    layer = linear.make_linear(scheme, [part], shapes=[shape], bias=bias, arithmetic=arithmetic)
    return time_runs(lambda: layer(x))


# --- memory


def ask_vae(device: str, *, shrunk: bool) -> Iterator[Answer]:
    """What decodes of the VAE reserve, by layout and size."""
    for layout in LAYOUTS:
        for side_px in (64,) if shrunk else SIDES_PX:

            def time_decode(layout: str = layout, side_px: int = side_px) -> Answer:
                return decode(device, layout=layout, side_px=side_px, shrunk=shrunk)

            said = {"question": "vae", "layout": layout, "side_px": side_px}
            yield said | attempt(time_decode)
            gc.collect()


def decode(device: str, *, layout: str, side_px: int, shrunk: bool) -> Answer:
    """Decode random latents with a VAE of FLUX.1's shape and random weights."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[16, 32, 64, 64] if shrunk else [128, 256, 512, 512],
        layers_per_block=2,
        latent_channels=16,
        norm_num_groups=8 if shrunk else 32,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    vae.to(device, torch.bfloat16).to(memory_format=LAYOUTS[layout])
    latents = torch.randn(1, 16, side_px // 8, side_px // 8, device=device)
    latents = latents.to(torch.bfloat16).to(memory_format=LAYOUTS[layout])
    hardware.empty_cache(device)
    hardware.reset_peak(device)
    held_bytes = hardware.held_memory(device)
    before_bytes = torch.cuda.memory_allocated(device)
    taken = time_runs(lambda: vae.decode(latents), count=2)
    reserved_bytes = hardware.peak_memory(device)["vram_bytes"] - held_bytes
    live_bytes = torch.cuda.max_memory_allocated(device) - before_bytes
    sizes = {"reserved_MiB": reserved_bytes / 2**20, "live_MiB": live_bytes / 2**20}
    return {**{name: round(size, 2) for name, size in sizes.items()}, **taken}


def ask_context(device: str) -> Answer:
    """What the device has given, to this process and to others, that no allocator of ours holds."""
    torch.cuda.empty_cache()
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    return {"MiB": (total_bytes - free_bytes - torch.cuda.memory_reserved(device)) >> 20}
