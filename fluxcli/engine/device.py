"""What this machine has: the one place that asks drivers and the operating system for devices, memory and speeds.

Imports torch inside functions only. Sizes are in bytes. `card` describes a machine that is not here, without torch.
"""

import contextlib
import os
import platform
import re
import shutil
import time
import tomllib
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

from fluxcli.errors import DeviceUnusable, NoSuchDevice, UsageError
from fluxcli.paths import BUNDLED
from fluxcli.plan.costs import CONTEXT_BYTES, Hardware, Speeds
from fluxcli.request.fields import parse_bytes
from fluxcli.run import lock
from quant.lazy import psutil, torch

FP8_SINCE, INT8_SINCE, BF16_SINCE = (8, 9), (7, 5), (8, 0)


def probe(device: str = "auto", *, measure: bool | None = None, sample: Path | None = None) -> Hardware:
    """Return the device that `device` (auto, cpu, cuda[:n], mps, xpu[:n]) names; raises `DeviceUnusable`.

    The speeds of an accelerator are measured for two seconds when it is first seen, or whenever `measure` says;
    `sample` is a large file on the disk of the weights.
    """
    kind, _, index = device.partition(":")
    counts, reason = _accelerators(), "--device"
    if kind == "auto":
        kind = next((name for name in counts if counts[name]), "cpu")
        reason = "the first accelerator found" if kind != "cpu" else _why_no_gpu()
    if device == "auto" and kind != "cpu":  # one card for each of the processes that share a batch
        index = str(int(os.environ.get("LOCAL_RANK") or 0) % counts[kind])
    if kind != "cpu" and int(index or 0) >= counts[kind]:
        exist = [f"{name}:{k}" for name, count in counts.items() for k in range(count)]
        why = f"usable are {' '.join(['cpu', *exist])}; {_why_no_gpu() if kind == 'cuda' else 'none of that kind'}"
        raise NoSuchDevice("no such device", which=device, why=why, hint="--device auto takes what is here")
    found = _found(kind, int(index or 0), reason)
    key = f"{found.identity} {found.name} torch {torch.__version__}"
    if measure or (measure is None and found.kind != "cpu" and key not in lock.read("speeds")):
        with contextlib.suppress(RuntimeError, MemoryError):  # on a card that is full
            lock.update("speeds", {key: _measured(found, sample)})
    try:
        return replace(found, speeds=Speeds(**lock.read("speeds")[key]))
    except (KeyError, TypeError):
        return found


def check_torch() -> None:
    """Raise `DeviceUnusable` where torch cannot be imported: a broken one fails with OSError and others, too."""
    try:
        import torch  # noqa: F401
    except Exception as error:
        why = f"{type(error).__name__}: {str(error)[:120]}"
        raise DeviceUnusable("torch cannot be imported", why=why, hint="pip install --force-reinstall torch") from error


def card(text: str) -> Hardware:
    """The hardware that `SIZE[:smNN]` describes, e.g. 12GiB:sm89; raises `UsageError`."""
    match = re.fullmatch(r"([^:]+)(?::sm(\d{2,3}))?", text)
    try:
        total = parse_bytes(match[1]) if match else 0
    except ValueError:
        total = 0
    if not total:
        raise UsageError("no such card", which=f"--card {text}", why="it is SIZE[:smNN]", hint="--card 12GiB:sm89")
    digits = match[2] or "89"
    capability = (int(digits[:-1]), int(digits[-1]))
    bf16, name = capability >= BF16_SINCE, f"a card of {match[1]}, sm{digits}"
    return _hardware("cuda:0", name, total, total, bf16, reason="--card", identity=text, capability=capability)


def _hardware(  # noqa: PLR0917
    device: str, name: str, total: int, free: int, bf16: bool, capability: tuple[int, int] = (0, 0), **more: str
) -> Hardware:  # fmt: skip
    ram, table = psutil.virtual_memory(), _table(device, name, capability)
    memory = {"total_bytes": total, "free_bytes": free, "ram_bytes": ram.total, "ram_free_bytes": ram.available}
    return Hardware(device, name, **memory, bf16=bf16, speeds=table, table=table, capability=capability, **more)


def _table(device: str, name: str, capability: tuple[int, int]) -> Speeds:
    """The speeds of a card by its name, or by its capability."""
    with (BUNDLED / "shapes" / "cards.toml").open("rb") as file:
        table = tomllib.load(file)
    cards, fallback = table["cards"], "cpu" if device == "cpu" else "gpu"
    by_name = next((key for key in cards if not key.startswith("sm") and re.search(rf"\b{key}\b", name)), "")
    known = [key for key in cards if key.startswith("sm") and capability >= (int(key[2:-1]), int(key[-1]))]
    found = cards[by_name or (known[0] if known else fallback)]
    capable = {"fp8": capability >= FP8_SINCE, "int8": capability >= INT8_SINCE}
    reached = {scheme: share * 1e12 for scheme, share in table["efficiency"].items()}
    rates = {scheme: found[scheme] * reached[scheme] for scheme, can in capable.items() if can and scheme in found}
    source = f"a table's {by_name}" if by_name else f"a table's guess for {known[0] if known else fallback}"
    return Speeds(found["wide"] * reached["wide"], rates, found["bus"] * 1e9, table["disk"] * 1e9, source)


def _accelerators() -> dict[str, int]:
    try:
        mps = torch.backends.mps.is_available()
        return {"cuda": torch.cuda.device_count(), "xpu": torch.xpu.device_count(), "mps": int(mps)}
    except RuntimeError as error:
        raise DeviceUnusable("the GPU driver does not answer", why=str(error)[:120]) from error


def _found(kind: str, number: int, reason: str) -> Hardware:
    if kind == "cpu":
        ram, name = psutil.virtual_memory(), platform.processor() or platform.machine()
        matrix_units = getattr(torch.cpu, "_is_amx_tile_supported", bool)()  # without: a quarter of float32's speed
        return _hardware("cpu", name, ram.total, ram.available, matrix_units, reason=reason, identity="cpu")
    if kind == "mps":
        total = torch.mps.recommended_max_memory()
        return _hardware("mps", "Apple GPU", total, total, True, reason=reason, identity="mps")
    device, module = f"{kind}:{number}", getattr(torch, kind)
    try:
        free, total = module.mem_get_info(number)
        found = module.get_device_properties(number)
        capability = torch.cuda.get_device_capability(number) if kind == "cuda" else (0, 0)
    except RuntimeError as error:
        raise DeviceUnusable("the device does not answer", which=device, why=str(error)[:120]) from error
    free = min(total, free + CONTEXT_BYTES + held_memory(device))  # asking has made the context
    bf16, identity = kind != "cuda" or capability >= BF16_SINCE, f"{kind} {getattr(found, 'uuid', number)}"
    return _hardware(device, found.name, total, free, bf16, capability, reason=reason, identity=identity)


def _why_no_gpu() -> str:
    driver = shutil.which("nvidia-smi") or os.path.exists("/proc/driver/nvidia/version")
    if driver and not torch.version.cuda:
        return "this torch is CPU-only beside an NVIDIA driver: install a CUDA build (pytorch.org, Get Started)"
    if driver and os.environ.get("CUDA_VISIBLE_DEVICES") is not None:
        return f"CUDA_VISIBLE_DEVICES is {os.environ['CUDA_VISIBLE_DEVICES']!r}"
    return "no GPU was found"


# --- speeds


def _measured(hardware: Hardware, sample: Path | None) -> dict:
    """About two seconds of products, copies and reads: the fields of `Speeds`."""
    from quant.linear import make_linear, path_of

    device, rows, columns = hardware.device, 4608, 3072 if hardware.kind != "cpu" else 768
    dtype = torch.bfloat16 if hardware.bf16 else torch.float32 if hardware.kind == "cpu" else torch.float16
    inputs, weight = (torch.ones(n, columns, dtype=dtype, device=device) for n in (rows, 4 * columns))
    work = 2 * rows * weight.numel()
    rates = {}
    for scheme, kind in (("fp8", torch.float8_e4m3fn), ("int8", torch.int8)):
        if path_of(scheme, device) != "dequantize":
            pieces = {"": weight.to(kind), "_scale": weight[:, 0].float()}
            layer = make_linear(scheme, [pieces], [tuple(weight.shape)], None, arithmetic=True)
            rates[scheme] = work / _seconds(lambda layer=layer: layer(inputs), device)
    wide = work / _seconds(lambda: inputs @ weight.T, device)
    host = torch.empty(128 << 20, dtype=torch.uint8, pin_memory=hardware.kind == "cuda")
    target = torch.empty_like(host, device=device, pin_memory=False)
    bus = host.numel() / _seconds(lambda: target.copy_(host, non_blocking=True), device)
    disk = read_speed(sample) if sample else hardware.table.disk_bytes
    return asdict(Speeds(wide, rates, bus, disk, "measured here"))


def _seconds(run: Callable[[], object], device: str) -> float:
    """Median seconds of a call, after one that does not count."""
    at = []
    for _ in range(6):
        run()
        synchronize(device)
        at.append(time.perf_counter())
    return sorted(after - before for before, after in pairwise(at))[2]


def read_speed(path: Path, size: int = 128 << 20) -> float:
    """Bytes per second of reading the start of a file from its disk (from memory, where it cannot be dropped there)."""
    with path.open("rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, size, os.POSIX_FADV_DONTNEED)
        started = time.perf_counter()
        count = len(file.read(size))
    return count / max(1e-6, time.perf_counter() - started)


# --- memory


def cap(device: str, budget_bytes: int) -> None:
    """Make the allocator fail beyond the budget (the context beside it): a driver that spills into RAM never would."""
    if not device.startswith("cpu"):
        at = () if device == "mps" else (device,)
        total = _ask(device, "mem_get_info", *at, default=(0, 0))[1] or _ask(device, "recommended_max_memory")
        share = min(1.0, max(0, budget_bytes - CONTEXT_BYTES) / total)
        _ask(device, "set_per_process_memory_fraction", share, *at)


def free_memory(device: str) -> int:
    """Bytes that are free on the device now (of RAM, where it is the same)."""
    return _ask(device, "mem_get_info", device, default=(psutil.virtual_memory().available,))[0]


def held_memory(device: str) -> int:
    """Bytes of the device that this process's allocator holds; 0 on a CPU."""
    return _ask(device, "memory_reserved", device, default=0)


def synchronize(device: str) -> None:
    """Wait until the device has computed what it was given."""
    _ask(device, "synchronize", *([] if device == "mps" else [device]))


def reset_peak(device: str) -> None:
    """Begin to count the allocator's peak anew."""
    _ask(device, "reset_peak_memory_stats", device)


def empty_cache(device: str) -> None:
    """Give freed blocks back to the device's driver."""
    _ask(device, "empty_cache")


def peak_memory(device: str) -> dict[str, int]:
    """The process's memory peaks so far, in bytes: resident RAM, and the device's allocator where there is one."""
    if os.name == "nt":
        peaks = {"rss_bytes": psutil.Process().memory_info().peak_wset}
    else:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peaks = {"rss_bytes": peak if platform.system() == "Darwin" else peak * 1024}
    reserved = _ask(device, "max_memory_reserved", device)
    return peaks if reserved is None else peaks | {"vram_bytes": reserved}


def _ask(device: str, function: str, *arguments: object, default: object = None) -> object:
    """What the function of torch's module for the device says; `default` for a CPU, or where there is none."""
    kind = device.partition(":")[0]
    module = None if kind == "cpu" else getattr(torch, kind)
    return getattr(module, function, lambda *_: default)(*arguments)
