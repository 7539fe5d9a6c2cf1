"""The devices of this machine: the one place that asks drivers and the operating system for them.

What exists, how much memory it has and holds, and the allocator's cap. Knows nothing of requests
or placements. Sizes are in bytes.
"""

import os
import platform
import shutil
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import psutil
import torch

from fluxcli.engine.cards import read_cards
from fluxcli.engine.pinned import find_pin_limit
from fluxcli.engine.ram import read_ram
from fluxcli.errors import DeviceUnusable, NoSuchDevice
from fluxcli.plan.machine import BF16_SINCE, CONTEXT_BYTES, Hardware, Speeds
from quant.errors import is_out_of_memory
from quant.linear import DEQUANTIZE, WAYS, Multiplication, ask_multiply

# What Python and the libraries take of a limit before any weight is loaded. Where the machine alone
# is the limit, the planner's share for others has room for it.
LIBRARIES_BYTES = 512 << 20


def probe(device: str = "auto") -> Hardware:
    """Describe the device that `device` names: auto, cpu, cuda[:n], mps or xpu[:n].

    Raises `NoSuchDevice` for one that is not here, `DeviceUnusable` for one that does not answer.
    """
    counts = _count_accelerators()
    if device == "auto":
        kind = next((name for name, count in counts.items() if count), "cpu")
        if kind == "cpu":
            return _describe_cpu(_explain_no_gpu())
        number, reason = _choose(kind, counts[kind])
        return _describe(kind, number, reason=reason)
    kind, _, index = device.partition(":")
    if kind == "cpu":
        return _describe_cpu(NoGpu("--device"))
    number = int(index or 0)
    if number >= counts[kind]:
        usable = ["cpu"]
        for name, count in counts.items():
            usable += [f"{name}:{k}" for k in range(count)]
        missing = _explain_no_gpu().reason if kind == "cuda" else "none of that kind"
        why = f"usable are {' '.join(usable)}; {missing}"
        hint = "--device auto takes what is here"
        raise NoSuchDevice("no such device", which=device, why=why, hint=hint)
    return _describe(kind, number, reason="--device")


class Choice(NamedTuple):
    """One of several devices by its number, and why it."""

    number: int
    reason: str


def _choose(kind: str, count: int) -> Choice:
    """Take the best of a kind's devices: the one with the most memory, then the fastest.

    Total memory, not what is free: the choice decides pixels and must not depend on what else is
    open. Processes that share a batch take one card each.
    """
    rank = os.environ.get("LOCAL_RANK")
    if count == 1:
        return Choice(0, "the first accelerator found")
    if rank:
        return Choice(int(rank) % count, f"process {rank} of several, one card each")
    found = []
    for number in range(count):
        # Properties, unlike free memory, are known without a context on the device.
        properties = getattr(torch, kind).get_device_properties(number)
        wide = read_cards().find_speeds(kind, properties.name, _capability(kind, number)).wide
        found.append((properties.total_memory, wide, -number, properties.name))
    best = max(found)
    others = [f"{kind}:{-number} {name}" for _, _, number, name in found if number != best[2]]
    reason = f"the best of {count}; also here: {', '.join(others)} (--device takes another)"
    return Choice(-best[2], reason)


def _capability(kind: str, number: int) -> tuple[int, int]:
    """NVIDIA's capability; (0, 0) for others, AMD's cards included, whose numbers mean another."""
    if kind != "cuda" or torch.version.hip:
        return (0, 0)
    capability: tuple[int, int] = torch.cuda.get_device_capability(number)
    return capability


def _hardware(
    device: str,
    name: str,
    *,
    total_bytes: int,
    free_bytes: int,
    bf16: bool,
    reason: str,
    identity: str,
    ways: Mapping[str, Multiplication],
    capability: tuple[int, int] = (0, 0),
    gpu_unusable: bool = False,
) -> Hardware:
    """A device of this machine, with the RAM beside it and the speeds that the table has for it."""
    ram = read_ram()
    speeds = read_cards().find_speeds(device, name, capability)
    return Hardware(
        device=device,
        name=name,
        total_bytes=total_bytes,
        free_bytes=free_bytes,
        ram_bytes=ram.total_bytes,
        ram_free_bytes=ram.free_bytes,
        ram_limit=ram.limited_by,
        bf16=bf16,
        reason=reason,
        speeds=_without_unpacked(speeds, ways),
        identity=identity,
        capability=capability,
        gpu_unusable=gpu_unusable,
        multiply={scheme: way.by for scheme, way in ways.items()},
        multiply_why={scheme: way.why for scheme, way in ways.items() if way.why},
        pin_bytes=find_pin_limit(device, identity, ram_bytes=ram.total_bytes),
    )


def _ask_ways(device: str) -> dict[str, Multiplication]:
    """How a device multiplies, by scheme; a scheme is missing where memory ran out on asking."""
    ways = {}
    for scheme in WAYS:
        try:
            ways[scheme] = ask_multiply(scheme, device)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
    return ways


def _without_unpacked(speeds: Speeds, ways: Mapping[str, Multiplication]) -> Speeds:
    """The table's speeds without those of schemes that the device unpacks."""
    eight_bit = {
        scheme: speed
        for scheme, speed in speeds.eight_bit.items()
        if scheme not in ways or ways[scheme].by != DEQUANTIZE
    }
    return replace(speeds, eight_bit=eight_bit)


def _count_accelerators() -> dict[str, int]:
    """How many devices of each kind this torch can use, in the order in which "auto" takes them."""
    try:
        mps = int(torch.backends.mps.is_available())
        return {"cuda": torch.cuda.device_count(), "xpu": torch.xpu.device_count(), "mps": mps}
    except RuntimeError as error:
        why = str(error)[:120]
        hint = "flux doctor, or --device cpu"
        raise DeviceUnusable("the GPU driver does not answer", why=why, hint=hint) from error


def _describe_cpu(why: "NoGpu") -> Hardware:
    """The CPU; its memory is the RAM."""
    ram = read_ram()
    total_bytes = ram.total_bytes
    if ram.limited_by:
        total_bytes = max(0, total_bytes - LIBRARIES_BYTES)
    # Without matrix units bfloat16 runs at a quarter of float32's speed.
    has_matrix_units = getattr(torch.cpu, "_is_amx_tile_supported", bool)()
    return _hardware(
        "cpu",
        platform.processor() or platform.machine(),
        total_bytes=total_bytes,
        free_bytes=min(total_bytes, ram.free_bytes),
        bf16=has_matrix_units,
        reason=why.reason,
        identity="cpu",
        ways=_ask_ways("cpu"),
        gpu_unusable=why.driver_found,
    )


def _describe(kind: str, number: int, *, reason: str) -> Hardware:
    """An accelerator by its kind and number; raises `DeviceUnusable` where it does not answer."""
    if kind == "mps":
        total_bytes = torch.mps.recommended_max_memory()
        return _hardware(
            "mps",
            "Apple GPU",
            total_bytes=total_bytes,
            free_bytes=total_bytes,
            bf16=True,
            reason=reason,
            identity="mps",
            ways=_ask_ways("mps"),
        )
    device = f"{kind}:{number}"
    module = getattr(torch, kind)
    try:
        properties = module.get_device_properties(number)
        capability = _capability(kind, number)
        # Before memory is asked for: the first product loads the libraries into the context.
        ways = _ask_ways(device)
        free_bytes, total_bytes = module.mem_get_info(number)
    except RuntimeError as error:
        why = str(error)[:120]
        hint = "flux doctor, or --device cpu"
        raise DeviceUnusable(
            "the device does not answer", which=device, why=why, hint=hint
        ) from error
    # Asking has made this process's context, which is part of what the process may take.
    own_bytes = CONTEXT_BYTES + held_memory(device)
    return _hardware(
        device,
        properties.name,
        total_bytes=total_bytes,
        free_bytes=min(total_bytes, free_bytes + own_bytes),
        bf16=capability >= BF16_SINCE or capability == (0, 0),
        reason=reason,
        identity=f"{kind} {getattr(properties, 'uuid', number)}",
        ways=ways,
        capability=capability,
    )


class NoGpu(NamedTuple):
    """Why the CPU is taken, and whether a GPU's driver is there all the same."""

    reason: str
    driver_found: bool = False


def _explain_no_gpu() -> NoGpu:
    """Why torch sees no CUDA device."""
    driver = shutil.which("nvidia-smi") or os.path.exists("/proc/driver/nvidia/version")
    if driver and not torch.version.cuda:
        why = "this torch is CPU-only beside an NVIDIA driver: install a CUDA build"
        return NoGpu(f"{why} (pytorch.org, Get Started)", driver_found=True)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if driver and visible is not None:
        return NoGpu(f"CUDA_VISIBLE_DEVICES is {visible!r}", driver_found=True)
    return NoGpu("no GPU was found")


# --- memory


def cap(device: str, budget_bytes: int) -> None:
    """Make the allocator fail beyond the budget, the context counted: some drivers spill into RAM.

    A CPU has no allocator to cap.
    """
    kind = _kind_of(device)
    if kind == "cpu":
        return
    total_bytes = _total_memory(device)
    share = min(1.0, max(0, budget_bytes - CONTEXT_BYTES) / total_bytes)
    module = getattr(torch, kind)
    if not hasattr(module, "set_per_process_memory_fraction"):
        return
    if kind == "mps":
        module.set_per_process_memory_fraction(share)
    else:
        module.set_per_process_memory_fraction(share, device)


def free_memory(device: str) -> int:
    """Bytes that are free on the device now (of RAM, where it is the same)."""
    ask = _find_function(device, "mem_get_info")
    if ask is None:
        return read_ram().free_bytes
    free_bytes: int = ask(device)[0]
    return free_bytes


def held_memory(device: str) -> int:
    """Bytes of the device that this process's allocator holds; 0 where there is none."""
    ask = _find_function(device, "memory_reserved")
    return ask(device) if ask else 0


def synchronize(device: str) -> None:
    """Wait until the device has computed what it was given."""
    wait = _find_function(device, "synchronize")
    if wait and _kind_of(device) == "mps":
        wait()
    elif wait:
        wait(device)


def reset_peak(device: str) -> None:
    """Begin to count the allocator's peak anew."""
    reset = _find_function(device, "reset_peak_memory_stats")
    if reset:
        reset(device)


def empty_cache(device: str) -> None:
    """Give freed blocks back to the device's driver."""
    empty = _find_function(device, "empty_cache")
    if empty:
        empty()


def peak_memory(device: str) -> dict[str, int]:
    """The process's memory peaks so far: "rss_bytes" of RAM, and "vram_bytes" of the allocator.

    The latter is missing where the device has no allocator that counts.
    """
    peaks = {"rss_bytes": _peak_rss()}
    ask = _find_function(device, "max_memory_reserved")
    if ask:
        peaks["vram_bytes"] = ask(device)
    return peaks


def _peak_rss() -> int:
    """The most bytes of RAM that this process has had so far."""
    if os.name == "nt":
        peak_bytes: int = psutil.Process().memory_info().peak_wset
        return peak_bytes
    import resource  # only POSIX has it

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if platform.system() == "Darwin":
        return peak
    return peak * 1024


def _total_memory(device: str) -> int:
    """Bytes of an accelerator's memory."""
    ask = _find_function(device, "mem_get_info")
    if ask:
        total_bytes: int = ask(device)[1]
        return total_bytes
    return torch.mps.recommended_max_memory()


def _kind_of(device: str) -> str:
    return device.partition(":")[0]


def _find_function(device: str, name: str) -> Any:
    """A function of torch's module for the device; None for a CPU, or where there is none."""
    kind = _kind_of(device)
    if kind == "cpu":
        return None
    return getattr(getattr(torch, kind), name, None)
