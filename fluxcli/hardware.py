"""What this machine has: the one place that asks drivers and the operating system for devices and memory.

Imports torch inside functions only. Sizes are in bytes.
"""

import os
import platform
import shutil
from dataclasses import dataclass

from fluxcli.errors import DeviceUnusable


@dataclass(frozen=True)
class Hardware:
    """The device to compute on. `total_bytes` and `free_bytes` are the device's memory (the RAM for a CPU)."""

    device: str  # as torch names it: cpu, cuda:0, mps, xpu:0
    name: str
    total_bytes: int
    free_bytes: int
    ram_bytes: int
    bf16: bool  # computes bfloat16 at full speed
    reason: str  # why this device

    @property
    def kind(self) -> str:
        return self.device.partition(":")[0]


def probe(device: str = "auto") -> Hardware:
    """Return the device that `device` (auto, cpu, cuda[:n], mps, xpu[:n]) names; raises `DeviceUnusable`."""
    import psutil
    import torch

    ram = psutil.virtual_memory()
    kind, _, index = device.partition(":")
    counts = _accelerators()
    if kind == "auto":
        kind = next((name for name in ("cuda", "xpu", "mps") if counts[name]), "cpu")
        reason = "the first accelerator found" if kind != "cpu" else _why_no_gpu()
    else:
        reason = "--device"
    if kind == "cpu":
        name = platform.processor() or platform.machine()
        matrix_units = getattr(torch.cpu, "_is_amx_tile_supported", bool)()  # without: a quarter of float32's speed
        return Hardware("cpu", name, ram.total, ram.available, ram.total, matrix_units, reason)
    number = int(index or 0)
    if number >= counts[kind]:
        exist = [f"{name}:{k}" for name, count in counts.items() for k in range(count)]
        why = f"usable are {' '.join(['cpu', *exist])}; {_why_no_gpu() if kind == 'cuda' else 'none of that kind'}"
        raise DeviceUnusable("no such device", which=device, why=why, hint="--device auto takes what is here")
    return _accelerator(kind, number, ram.total, reason)


def _accelerators() -> dict[str, int]:
    import torch

    try:
        return {
            "cuda": torch.cuda.device_count(),
            "xpu": torch.xpu.device_count(),
            "mps": int(torch.backends.mps.is_available()),
        }
    except RuntimeError as error:
        raise DeviceUnusable("the GPU driver does not answer", why=str(error)[:120]) from error


def _accelerator(kind: str, number: int, ram_bytes: int, reason: str) -> Hardware:
    import torch

    if kind == "mps":
        total = torch.mps.recommended_max_memory()
        return Hardware("mps", "Apple GPU", total, total, ram_bytes, True, reason)
    module = getattr(torch, kind)
    try:
        free, total = module.mem_get_info(number)
        name = module.get_device_name(number)
        bf16 = kind != "cuda" or torch.cuda.get_device_capability(number) >= (8, 0)
    except RuntimeError as error:
        raise DeviceUnusable("the device does not answer", which=f"{kind}:{number}", why=str(error)[:120]) from error
    return Hardware(f"{kind}:{number}", name, total, free, ram_bytes, bf16, reason)


def _why_no_gpu() -> str:
    import torch

    driver = shutil.which("nvidia-smi") or os.path.exists("/proc/driver/nvidia/version")
    if driver and not torch.version.cuda:
        return "this torch is CPU-only beside an NVIDIA driver: install a CUDA build (pytorch.org, Get Started)"
    if driver and os.environ.get("CUDA_VISIBLE_DEVICES") is not None:
        return f"CUDA_VISIBLE_DEVICES is {os.environ['CUDA_VISIBLE_DEVICES']!r}"
    return "no GPU was found"


def peak_memory(device: str) -> dict[str, int]:
    """The process's memory peaks so far, in bytes: resident RAM, and the device's allocator where there is one."""
    if os.name == "nt":
        import psutil

        peaks = {"rss_bytes": psutil.Process().memory_info().peak_wset}
    else:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peaks = {"rss_bytes": peak if platform.system() == "Darwin" else peak * 1024}
    if device.startswith(("cuda", "xpu")):
        import torch

        peaks["vram_bytes"] = getattr(torch, device.partition(":")[0]).max_memory_reserved(device)
    return peaks


def empty_cache(device: str) -> None:
    """Give freed blocks back to the device's driver."""
    if device != "cpu":
        import torch

        getattr(torch, device.partition(":")[0]).empty_cache()
