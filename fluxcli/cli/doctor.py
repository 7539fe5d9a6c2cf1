"""Checks of everything a run rests on: driver, device, memory, disk, hub, libraries. Each ok, warn or bad, with a fix.

Asks without changing anything; opens no connection unless the hub's token is there to be checked.
"""

import importlib.metadata
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Annotated

import typer

from fluxcli import paths
from fluxcli.cli import console
from fluxcli.errors import ExitCode
from fluxcli.plan.machine import Hardware
from fluxcli.plan.placement import GIB
from fluxcli.request.settings import coerce
from quant.files import nearest

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


def doctor_command(
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda[:n], mps or xpu[:n].")] = "auto",
    json_output: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> int:
    """Check driver, device, memory, disk, hub and libraries: ok, warn or bad, each with a fix (exit 8: one is bad)."""
    checks = []
    for check in examine(coerce("device", device, where="--device")):
        checks.append(check)
        if not json_output:
            console.data(f"{check.verdict:<4}  {check.name:<15} {check.found}")
            if check.fix:
                console.data(f"{'':<22}{check.fix}")
    if json_output:
        console.data_json({"checks": [asdict(check) for check in checks]})
    is_bad = any(check.verdict == "bad" for check in checks)
    return ExitCode.DEVICE if is_bad else ExitCode.OK


def examine(device: str = "auto") -> Iterator[Check]:
    """Yield every check, cheapest first."""
    yield from _versions()
    try:
        from fluxcli.engine import device as hardware

        machine = hardware.probe(device)
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


def _or_warn(name: str, good: bool, found: str, fix: str) -> Check:
    return Check(name, "ok", found) if good else Check(name, "warn", found, fix)


def _device(machine: Hardware) -> Iterator[Check]:
    """The device, its driver, and what each precision does on it."""
    import torch

    from quant.linear import find_multiply

    cpu, cuda = machine.kind == "cpu", machine.kind == "cuda"
    if cpu:
        fix = "a GPU makes it a hundred times faster"
        if machine.gpu_unusable:
            fix = "pytorch.org, Get Started: the build for your driver"
        yield Check("device", "warn", f"cpu, {machine.name}: {machine.reason}", fix)
    else:
        driver = _nvidia("driver_version") if cuda else []
        sm = f", sm{machine.capability[0]}{machine.capability[1]}" if cuda else ""
        runtime = f", driver {driver[0]}, torch for CUDA {torch.version.cuda}" if driver else ""
        yield Check("device", "ok", f"{machine.device}, {machine.name}{sm}{runtime}")
    found = "computed" if machine.bf16 else "slow here: another dtype is taken"
    yield _or_warn("bf16", machine.bf16, found, "none needed; cards since sm80 have it")
    for scheme in ("fp8", "int8"):
        path = find_multiply(scheme, machine.device)
        computed = not cpu and path != "dequantize"
        found = f"computed ({path})" if computed else "a smaller form of the weights, not a faster one"
        yield Check(scheme, "ok", found)


def _memory(machine: Hardware) -> Iterator[Check]:
    import psutil

    if machine.kind != "cpu":
        free = machine.free_bytes >= machine.total_bytes * 0.8
        holders = [] if free or machine.kind != "cuda" else _nvidia("pid,process_name,used_memory", apps=True)
        held = f"; held by {', '.join(f'pid {line}' for line in holders)}" if holders else ""
        found = f"{machine.free_bytes / GIB:.1f} of {machine.total_bytes / GIB:.1f} GiB free{held}"
        yield _or_warn("VRAM", free, found, "close what holds it")
    ram, swap = psutil.virtual_memory(), psutil.swap_memory()
    found = f"{ram.available / GIB:.1f} of {ram.total / GIB:.1f} GiB free, swap or page file {swap.total / GIB:.1f} GiB"
    yield _or_warn("RAM", ram.total >= RAM_BYTES, found, "--offload sequential, or nf4 baked: both hold little")


def _disk() -> Check:
    cache = nearest(paths.hub_cache_folder())
    free = shutil.disk_usage(cache).free
    writable = os.access(cache, os.W_OK) and os.access(nearest(paths.cache_folder()), os.W_OK)
    found = f"{free / 1e9:.0f} GB free in {cache}{'' if writable else ', which is read-only'}"
    fix = "HF_HOME moves the hub's cache; dev takes 34 GB, each baked variant 10 to 20"
    return _or_warn("disk", writable and free > ROOM_BYTES, found, fix)


def _packer(machine: Hardware) -> Check:
    """bitsandbytes with the library that fits this device."""
    try:
        from bitsandbytes.cextension import lib
    except Exception as error:  # noqa: BLE001 - whatever a broken binary raises
        return Check("nf4", "bad", f"bitsandbytes: {str(error)[:80]}", "pip install --force-reinstall bitsandbytes")
    native = type(lib).__name__
    fits = "Mock" not in native and (machine.kind != "cuda" or "Cuda" in native)
    found = f"bitsandbytes' library for {machine.device} is {native if fits else 'missing'}"
    return _or_warn("nf4", fits, found, "python -m bitsandbytes explains")


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
    command = ["nvidia-smi", f"--query-{'compute-apps' if apps else 'gpu'}={fields}", "--format=csv,noheader"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in run.stdout.splitlines() if line.strip()]
