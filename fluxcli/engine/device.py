"""The devices of this machine: the one place that asks drivers and the operating system for them.

What exists, which is taken, what it computes, how much memory it has and holds, and the allocator's
cap. Knows nothing of requests or placements. Sizes are in bytes.
"""

import contextlib
import os
import platform
import re
import shutil
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import psutil
import torch

from fluxcli.engine.cards import read_cards
from fluxcli.engine.pinned import find_pin_limit
from fluxcli.engine.ram import read_ram
from fluxcli.engine.segments import NAMES, has_asked, is_supported
from fluxcli.errors import DeviceUnusable, NoSuchDevice
from fluxcli.plan.machine import BF16_SINCE, CONTEXT_BYTES, Hardware
from quant import kernels
from quant.errors import is_out_of_memory
from quant.linear import WAYS, Multiplication, ask_multiply

# What Python and the libraries take of a limit before any weight is loaded. Where the machine alone
# is the limit, the planner's share for others has room for it.
LIBRARIES_BYTES = 512 << 20

# Of `torch.cuda.get_arch_list()`: sm_86, sm_90a, compute_120; on ROCm there are gfx1100 and others.
ARCHITECTURE = re.compile(r"(?P<kind>sm|compute)_(?P<major>\d+)(?P<minor>\d)(?P<exact>a?)f?")
# PyTorch's builds and the capabilities that they have kernels for, from the support matrix in its
# RELEASE.md (torch 2.8 to 2.14): CUDA 13 knows no Maxwell, Pascal and Volta.
INDEX = "https://download.pytorch.org/whl"
BUILDS = (("cu126", (5, 0), (7, 2)), ("cu130", (7, 5), (12, 1)))


def probe(device: str = "auto") -> Hardware:
    """Describe the device that `device` names: auto, cpu, cuda[:n], mps or xpu[:n].

    Raises `NoSuchDevice` for one that is not here, `DeviceUnusable` for one that does not answer,
    and `SpecError` for a FLUX_KERNELS that says nothing.
    """
    kernels.is_off()  # a wrong FLUX_KERNELS is told here, whatever the device
    counts = _count_accelerators()
    if device == "auto":
        return _probe_best(counts)
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


def _probe_best(counts: Mapping[str, int]) -> Hardware:
    """Describe the best device that this torch has kernels for; the CPU where there is none."""
    refused: list[MissingKernels] = []
    for kind, count in counts.items():
        usable = []
        for number in range(count):
            missing = _find_missing_kernels(kind, number)
            if missing:
                refused.append(missing)
            else:
                usable.append(number)
        if usable:
            choice = _choose(kind, usable)
            reasons = [choice.reason, *(f"not {each.which}: {each.why}" for each in refused)]
            return _describe(kind, choice.number, reason="; ".join(reasons))
    if refused:
        first = refused[0]
        why = f"not {first.which}: {first.why}"
        return _describe_cpu(NoGpu(why, driver_found=True, fix=first.fix))
    return _describe_cpu(_explain_no_gpu())


class Choice(NamedTuple):
    """One of several devices by its number, and why it."""

    number: int
    reason: str


def _choose(kind: str, numbers: Sequence[int]) -> Choice:
    """Take the best of these devices of a kind: the one with the most memory, then the fastest.

    Total memory, not what is free: the choice decides pixels and must not depend on what else is
    open. Processes that share a batch take one card each.
    """
    rank = os.environ.get("LOCAL_RANK")
    if len(numbers) == 1:
        return Choice(numbers[0], "the first accelerator found")
    if rank:
        number = numbers[int(rank) % len(numbers)]
        return Choice(number, f"process {rank} of several, one card each")
    found = []
    for number in numbers:
        # Properties, unlike free memory, are known without a context on the device.
        properties = getattr(torch, kind).get_device_properties(number)
        wide = read_cards().find_speeds(kind, properties.name, _capability(kind, number)).wide
        found.append((properties.total_memory, wide, -number, properties.name))
    best = max(found)
    others = [f"{kind}:{-number} {name}" for _, _, number, name in found if number != best[2]]
    reason = f"the best of {len(numbers)}; also here: {', '.join(others)} (--device takes another)"
    return Choice(-best[2], reason)


def _capability(kind: str, number: int) -> tuple[int, int]:
    """NVIDIA's capability; (0, 0) for others, AMD's cards included, whose numbers mean another."""
    if kind != "cuda" or torch.version.hip:
        return (0, 0)
    capability: tuple[int, int] = torch.cuda.get_device_capability(number)
    return capability


class MissingKernels(NamedTuple):
    """A card that this torch has no kernels for, what it has, and the command that mends it."""

    which: str
    why: str
    fix: str


def _find_missing_kernels(kind: str, number: int) -> MissingKernels | None:
    """What to say of a card that this torch has no kernels for; None for all others.

    One that does not answer is another matter: `_describe` asks it again.
    """
    try:
        capability = _capability(kind, number)
        if _has_kernels(capability):
            return None
        name = torch.cuda.get_device_properties(number).name
    except RuntimeError:
        return None
    has = [each for each in torch.cuda.get_arch_list() if ARCHITECTURE.fullmatch(each)]
    why = f"torch {torch.__version__} has kernels for {', '.join(has)}"
    fix = ""
    for build, since, until in BUILDS:
        if since <= capability <= until:
            fix = f"pip install --force-reinstall torch --index-url {INDEX}/{build}"
    which = f"{kind}:{number} {name}, sm{capability[0]}{capability[1]}"
    return MissingKernels(which, why, fix)


def _has_kernels(capability: tuple[int, int]) -> bool:
    """Whether this torch has kernels for NVIDIA's capability; True where that is not said.

    A binary runs on its major and no lower minor ("sm_90a" on nothing else), and what is compiled
    by the driver ("compute_120") on every later card. AMD's names are others.
    """
    found = [ARCHITECTURE.fullmatch(each) for each in torch.cuda.get_arch_list()]
    known = [each for each in found if each]
    if capability == (0, 0) or not known:
        return True
    major, minor = capability
    for each in known:
        built_for = (int(each["major"]), int(each["minor"]))
        if each["exact"] and built_for == capability:
            return True
        if each["exact"]:
            continue
        if each["kind"] == "compute" and built_for <= capability:
            return True
        if each["kind"] == "sm" and built_for[0] == major and built_for[1] <= minor:
            return True
    return False


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
    gpu_fix: str = "",
    fixed_segments: str = "",
) -> Hardware:
    """A device of this machine, with the RAM beside it and the speeds that the table has for it."""
    ram = read_ram()
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
        speeds=read_cards().find_speeds(device, name, capability),
        identity=identity,
        capability=capability,
        gpu_unusable=gpu_unusable,
        gpu_fix=gpu_fix,
        multiply={scheme: way.by for scheme, way in ways.items()},
        multiply_why={scheme: way.why for scheme, way in ways.items() if way.why},
        pin_bytes=find_pin_limit(device, identity, ram_bytes=ram.total_bytes),
        expandable=device.startswith("cuda") and not fixed_segments,
        fixed_segments=fixed_segments,
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
        gpu_fix=why.fix,
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
    missing = _find_missing_kernels(kind, number)
    if missing:
        hint = f"{missing.fix}, or --device cpu" if missing.fix else "--device cpu"
        what = "this torch has no kernels for the card"
        raise DeviceUnusable(what, which=missing.which, why=missing.why, hint=hint)
    try:
        warm_up(device)
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
        fixed_segments=explain_fixed_segments(device),
    )


class NoGpu(NamedTuple):
    """Why the CPU is taken, and whether a GPU's driver is there all the same."""

    reason: str
    driver_found: bool = False
    fix: str = ""  # a command, where one is known


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

# Why segments are fixed that flux has asked to grow: what a notebook can mend.
USED_BEFORE = "CUDA was in use before flux was imported"

_warmed: set[str] = set()  # devices whose context has its size
_peaks_before: dict[str, int] = {}  # by device: the most bytes reserved in phases that are over


def warm_up(device: str) -> None:
    """Let a CUDA device compute a product, an attention and a convolution, once in a process.

    The driver loads kernels when they are first used, cuBLAS and cuDNN with theirs: only after that
    is the memory free that seems so. What fails here fails again where it can be told.
    """
    if _kind_of(device) != "cuda" or device in _warmed:
        return
    _warmed.add(device)
    with contextlib.suppress(Exception):
        dtype = torch.float16
        if torch.cuda.get_device_capability(device) >= BF16_SINCE:
            dtype = torch.bfloat16
        values = torch.ones(1, 8, 64, 64, dtype=dtype, device=device)
        torch.matmul(values, values)
        torch.nn.functional.scaled_dot_product_attention(values, values, values)
        weight = torch.ones(8, 8, 3, 3, dtype=dtype, device=device)
        torch.nn.functional.conv2d(values, weight, padding=1)
        del values, weight
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def explain_fixed_segments(device: str) -> str:
    """Why the allocator's segments cannot grow on a device; "" where they can, or there are none.

    The allocator itself is asked: a program that had used CUDA before it imported flux has another
    one than the environment says. Where it does not answer, they cannot.
    """
    if _kind_of(device) != "cuda":
        return ""
    if torch.version.hip or not is_supported():
        return "the allocator's segments cannot grow on this system"
    try:
        settings = torch.cuda.memory._snapshot()["allocator_settings"]
        if settings["expandable_segments"]:
            return ""
    except Exception:  # noqa: BLE001 - no public function tells it, so that anything may be raised
        return "the allocator does not say whether its segments can grow"
    if has_asked():
        return USED_BEFORE
    return f"{NAMES[0]} says how memory is allocated"


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


def count_refusals(device: str) -> int:
    """How often the device's allocator has had no room so far; 0 where it does not count."""
    ask = _find_function(device, "memory_stats")
    return ask(device).get("num_ooms", 0) if ask else 0


def synchronize(device: str) -> None:
    """Wait until the device has computed what it was given."""
    wait = _find_function(device, "synchronize")
    if wait and _kind_of(device) == "mps":
        wait()
    elif wait:
        wait(device)


def begin_phase(device: str) -> None:
    """Give back what the phase before left in the cache, and begin to count this one's peak.

    What is cached is in pieces that another phase cannot use, and would count as its own.
    """
    empty_cache(device)
    reserved_bytes = peak_memory(device).get("vram_bytes", 0)
    reset_peak(device)
    _peaks_before[device] = reserved_bytes


def join_free_memory(device: str, size_bytes: int) -> None:
    """Let a CUDA device's cache begin with one piece of so many bytes, where there is room for it.

    Blocks of many sizes that are asked for one by one get a piece of memory each, and large ones
    find none of these large enough later on; cut from one piece they leave no such gaps.
    """
    if _kind_of(device) == "cuda" and size_bytes:
        with contextlib.suppress(RuntimeError):
            torch.empty(size_bytes, dtype=torch.uint8, device=device)


def reset_peak(device: str) -> None:
    """Begin to count the allocator's peak anew."""
    _peaks_before.pop(device, None)
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
        peaks["vram_bytes"] = max(ask(device), _peaks_before.get(device, 0))
    return peaks


def peak_live_memory(device: str) -> int:
    """The most bytes that were allocated at once in this phase; 0 where nobody counts them.

    Unlike reserved ones they do not count what was cached, which is free to be used.
    """
    ask = _find_function(device, "max_memory_allocated")
    return ask(device) if ask else 0


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
