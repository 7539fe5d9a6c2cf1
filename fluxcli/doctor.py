"""Checks of everything a run rests on: driver, device, memory, disk, hub, libraries. Each ok, warn or bad, with a fix.

Asks without changing anything; opens no connection unless the hub's token is there to be checked.
"""

import importlib.metadata
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

from fluxcli import hardware, models, state
from fluxcli.costs import Hardware
from fluxcli.residency import GIB
from quant.lazy import psutil, torch
from quant.writer import nearest

LIBRARIES = ("torch", "diffusers", "transformers", "bitsandbytes", "optimum-quanto", "safetensors", "huggingface-hub")
ROOM_BYTES, RAM_BYTES = 60e9, 16 * GIB  # a model with a baked variant; what loading is comfortable with
GATED = "black-forest-labs/FLUX.1-dev"


@dataclass(frozen=True)
class Check:
    """One finding; `fix` says what to do where it is not ok."""

    name: str
    verdict: str  # ok, warn or bad
    found: str
    fix: str = ""


def examine(device: str = "auto") -> Iterator[Check]:
    """Yield every check, cheapest first."""
    yield from _versions()
    try:
        machine = hardware.probe(device, measure=False)
    except Exception as error:  # noqa: BLE001 - a broken torch raises anything
        fix = getattr(error, "hint", "") or "install the driver, and a torch build for it"
        yield Check("device", "bad", f"{type(error).__name__}: {error}"[:200], fix)
    else:
        yield from _device(machine)
        yield from _memory(machine)
        yield _packer(machine)
    yield _disk()
    yield _hub()


def _versions() -> Iterator[Check]:
    for name in LIBRARIES:
        try:
            yield Check(name, "ok", importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Check(name, "bad", "not installed", f"pip install {name}")


def _device(machine: Hardware) -> Iterator[Check]:
    """The device, its driver, and what each precision does on it."""
    if machine.kind == "cpu":
        fix = "" if "no GPU" in machine.reason else "pytorch.org, Get Started, has the build for your driver"
        yield Check(
            "device", "warn", f"cpu, {machine.name}: {machine.reason}", fix or "a GPU makes it a hundred times faster"
        )
    else:
        driver = _nvidia("driver_version") if machine.kind == "cuda" else []
        sm = f", sm{machine.capability[0]}{machine.capability[1]}" if machine.kind == "cuda" else ""
        runtime = f", driver {driver[0]}, torch for CUDA {torch.version.cuda}" if driver else ""
        yield Check("device", "ok", f"{machine.device}, {machine.name}{sm}{runtime}")
    if machine.bf16:
        yield Check("bf16", "ok", "computed")
    else:
        yield Check("bf16", "warn", "slow here: another dtype is taken", "none needed; cards since sm80 have it")
    from quant.linear import path_of

    for scheme in ("fp8", "int8"):
        path = path_of(scheme, machine.device)
        known = machine.kind != "cpu" and path != "dequantize"
        yield Check(scheme, "ok", f"computed ({path})" if known else "a smaller form of the weights, not a faster one")


def _memory(machine: Hardware) -> Iterator[Check]:
    total, free = machine.total_bytes / GIB, machine.free_bytes / GIB
    if machine.kind != "cpu":
        holders = (
            [f"pid {line}" for line in _nvidia("pid,process_name,used_memory", apps=True)]
            if machine.kind == "cuda"
            else []
        )
        busy = free < total * 0.8
        held = f"; held by {', '.join(holders)}" if busy and holders else ""
        yield Check(
            "VRAM", "warn" if busy else "ok", f"{free:.1f} of {total:.1f} GiB free{held}", "close what holds it" * busy
        )
    ram, swap = psutil.virtual_memory(), psutil.swap_memory()
    low = ram.total < RAM_BYTES
    found = f"{ram.available / GIB:.1f} of {ram.total / GIB:.1f} GiB free, swap or page file {swap.total / GIB:.1f} GiB"
    yield Check("RAM", "warn" if low else "ok", found, "--offload sequential, or nf4 baked: both hold little" * low)


def _disk() -> Check:
    cache = nearest(models.hub_cache())
    free = shutil.disk_usage(cache).free
    writable = os.access(cache, os.W_OK) and os.access(nearest(state.cache_folder()), os.W_OK)
    found = f"{free / 1e9:.0f} GB free in {cache}{'' if writable else ', which is read-only'}"
    fix = "HF_HOME moves the hub's cache; dev takes 34 GB, each baked variant 10 to 20"
    enough = writable and free > ROOM_BYTES
    return Check("disk", "ok" if enough else "warn", found, "" if enough else fix)


def _packer(machine: Hardware) -> Check:
    """bitsandbytes with the library that fits this device."""
    try:
        from bitsandbytes.cextension import lib

        native = type(lib).__name__
        broken = "Mock" in native or (machine.kind == "cuda" and "Cuda" not in native)
    except Exception as error:  # noqa: BLE001 - whatever a broken binary raises
        return Check("nf4", "bad", f"bitsandbytes: {str(error)[:80]}", "pip install --force-reinstall bitsandbytes")
    if broken:
        return Check(
            "nf4", "warn", f"bitsandbytes has no library for {machine.device}", "python -m bitsandbytes explains"
        )
    return Check("nf4", "ok", f"bitsandbytes' library is {native}")


def _hub() -> Check:
    """The token, and whether the licence of the gated model is accepted: only the hub knows that."""
    try:
        from huggingface_hub import HfApi, constants, get_token

        if not (token := get_token()):
            return Check("hub", "warn", "no token: gated models cannot be downloaded", "hf auth login")
        if constants.HF_HUB_OFFLINE:
            return Check("hub", "ok", "a token is there; offline, so whether the licence is accepted cannot be known")
        HfApi().auth_check(GATED, token=token)
    except Exception as error:  # noqa: BLE001 - its errors, every one of the network, and that of its absence
        kind = type(error).__name__
        if kind in ("GatedRepoError", "RepositoryNotFoundError"):
            fix = f"accept its licence at huggingface.co/{GATED}"
            return Check("hub", "warn", f"a token without access to {GATED}", fix)
        return Check("hub", "warn", f"the hub was not reached ({kind})", "try again online")
    return Check("hub", "ok", f"a token with access to {GATED}")


def _nvidia(fields: str, *, apps: bool = False) -> list[str]:
    """Lines of nvidia-smi, [] where it is not there."""
    query = f"--query-{'compute-apps' if apps else 'gpu'}={fields}"
    try:
        run = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in run.stdout.splitlines() if line.strip()]
