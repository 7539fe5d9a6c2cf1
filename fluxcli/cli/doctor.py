"""`flux doctor`: checks of what a run needs: libraries, device, memory, disk, hub.

Each is ok, warn or bad, and says what to do where it is not ok. Asks without changing anything;
opens no connection unless the hub's token is there to be checked. Sizes are in bytes.
"""

import contextlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Annotated

import typer

import fluxcli
from fluxcli import paths
from fluxcli.cli import complete, console
from fluxcli.engine.check import check_torch
from fluxcli.errors import BadInputFile, ExitCode
from fluxcli.plan.machine import Hardware
from fluxcli.plan.placement import FRAGMENTS_SHARE, GIB
from fluxcli.request.settings import coerce
from fluxcli.run import client
from quant.errors import MissingLibrary
from quant.files import nearest
from quant.spec import DEQUANTIZE, ROTATED

LIBRARIES = (
    "torch",
    "diffusers",
    "transformers",
    "bitsandbytes",
    "optimum-quanto",
    "safetensors",
    "huggingface-hub",
)
# Not needed, but often there, and built for one version of torch alone.
BUILT_FOR_TORCH = ("torchvision", "torchaudio", "xformers")
ROOM_BYTES = 60e9  # a model with a baked variant
RAM_BYTES = 16 * GIB  # what loading is comfortable with
FREE_SHARE = 0.8  # of a card's memory: with less, somebody else holds much of it
# Above which check each group of them begins.
HEADS = {
    "flux": "flux",
    "torch": "Libraries",
    "device": "Device",
    "RAM": "Memory and disk",
    "hub": "Hub",
}
GATED = "black-forest-labs/FLUX.1-dev"


@dataclass(frozen=True)
class Check:
    """One finding; `fix` says what to do where it is not ok."""

    name: str
    verdict: str  # ok, warn or bad
    found: str
    fix: str = ""


def doctor_command(
    device: Annotated[
        str,
        typer.Option(
            "--device",
            help="auto, cpu, cuda[:n], mps or xpu[:n].",
            metavar="NAME",
            autocompletion=complete.offer_devices,
        ),
    ] = "auto",
    json_output: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> int:
    """Check libraries, device, memory, disk and hub: ok, warn or bad, each with a fix.

    It begins with the versions and folders that a report of a bug needs.

    Exit code 8 means that one of them is bad.
    """
    checks = []
    for check in examine(coerce("device", device, where="--device")):
        checks.append(check)
        if not json_output:  # at once: the hub may take its time
            _show(check)
    if json_output:
        console.data_json({"checks": [asdict(check) for check in checks]})
    is_bad = any(check.verdict == "bad" for check in checks)
    return ExitCode.DEVICE if is_bad else ExitCode.OK


def examine(device: str = "auto") -> Iterator[Check]:
    """Yield every check, cheapest first; a device that cannot be asked is one that is bad."""
    yield from _describe_installation()
    for name in LIBRARIES:
        yield _check_library(name)
    for name in BUILT_FOR_TORCH:
        yield from _check_unused(name)
    try:
        check_torch()
        from fluxcli.engine.device import probe

        hardware = probe(device)
    except Exception as error:  # noqa: BLE001 - a broken torch raises anything
        fix = getattr(error, "hint", "") or "install the driver, and a torch build for it"
        yield Check("device", "bad", f"{type(error).__name__}: {error}"[:200], fix=fix)
    else:
        yield from _check_imports()
        yield _check_device(hardware)
        yield from _check_precisions(hardware)
        if hardware.kind != "cpu":
            yield _check_vram(hardware)
        if hardware.pin_bytes is not None:
            yield _describe_pin_limit(hardware)
        yield _check_bitsandbytes(hardware)
    yield _check_ram()
    yield _check_disk()
    yield _check_hub()


def _show(check: Check) -> None:
    """Print one check; above the first of a group its head."""
    if check.name in HEADS:
        console.data(f"{HEADS[check.name]}:")
    verdict = console.paint(check.verdict, console.COLOURS[check.verdict], sys.stdout)
    padding = " " * (4 - len(check.verdict))
    lines = [f"  {verdict}{padding}  {check.name:<16} {console.spell_out(check.found)}"]
    if check.fix:
        lines.append(f"{'':<25}{console.spell_out(check.fix)}")
    for line in lines:
        console.write_line(line)


def _describe_installation() -> Iterator[Check]:
    """What is installed, and which folders it uses: what a report of a bug begins with."""
    yield Check("flux", "ok", f"{fluxcli.__version__} in {paths.HERE}")
    yield Check("Python", "ok", f"{platform.python_version()}, {platform.platform()}")
    settings = paths.config_folder() / "config.toml"
    found = str(settings) if settings.is_file() else f"{settings}, which is not there"
    yield Check("settings", "ok", found)
    yield Check("cache", "ok", str(paths.cache_folder()))
    if client.AVAILABLE:
        socket = client.locate_socket()
        found = f"one is up: {socket}" if os.path.exists(socket) else "none is running"
        yield Check("worker", "ok", found)


def _warn_unless(good: bool, name: str, *, found: str, fix: str) -> Check:
    """The check that is ok, or else a warning with a fix."""
    if good:
        return Check(name, "ok", found)
    return Check(name, "warn", found, fix=fix)


def _check_library(name: str) -> Check:
    import importlib.metadata  # here, since `flux --help` imports this module

    try:
        return Check(name, "ok", importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Check(name, "bad", "not installed", fix=f"pip install {name}")


def _check_unused(name: str) -> Iterator[Check]:
    """A library that no picture uses, where it is installed and cannot be imported.

    It is imported in a process of its own, for one that was built for another torch may crash.
    """
    import importlib.util

    if importlib.util.find_spec(name) is None:
        return
    command = [sys.executable, "-c", f"import {name}"]
    with contextlib.suppress(subprocess.TimeoutExpired):
        run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        if run.returncode:
            why = (run.stderr.strip().splitlines() or ["it crashes"])[-1][:120]
            fix = f"pip uninstall {name}, if nothing else needs it"
            yield Check(name, "warn", f"cannot be imported, flux does without: {why}", fix=fix)


def _check_imports() -> Iterator[Check]:
    """What the classes of models are imported from, where that fails."""
    from fluxcli.engine import classes

    try:
        classes.transformer()
        classes.t5()
    except MissingLibrary as error:
        yield Check("imports", "bad", str(error), fix=error.hint)


# --- the device


def _check_device(hardware: Hardware) -> Check:
    """The device, with a card's capability and driver."""
    import torch

    if hardware.kind == "cpu":
        fix = "a GPU makes it a hundred times faster"
        if hardware.gpu_unusable:
            fix = hardware.gpu_fix or "pytorch.org, Get Started: the build for your driver"
        return Check("device", "warn", f"cpu, {hardware.name}: {hardware.reason}", fix=fix)
    found = f"{hardware.device}, {hardware.name}"
    if hardware.kind == "cuda":
        major, minor = hardware.capability
        found += f", sm{major}{minor}"
        drivers = _nvidia("driver_version")
        if drivers:
            found += f", driver {drivers[0]}, torch for CUDA {torch.version.cuda}"
    return Check("device", "ok", found)


def _check_precisions(hardware: Hardware) -> Iterator[Check]:
    """What each precision does on the device: computed in it, or only stored in it."""
    found = "computed" if hardware.bf16 else "slow here, so fp16 or fp32 is taken in its place"
    yield Check("bf16", "ok", found)
    for scheme in ("fp8", *ROTATED):
        multiply = hardware.find_multiply(scheme)
        why = hardware.explain_multiply(scheme)
        found = f"computed ({multiply})"
        if multiply == DEQUANTIZE:
            found = f"saves memory, not time: {why}"
        elif hardware.kind == "cpu":
            found = f"saves memory, not time, although it is computed ({multiply})"
        elif why:
            found += f": {why}"
        yield Check(scheme, "ok", found)


def _check_bitsandbytes(hardware: Hardware) -> Check:
    """The library of nf4, which has another binary for each kind of device."""
    try:
        from bitsandbytes.cextension import lib
    except Exception as error:  # noqa: BLE001 - whatever a broken binary raises
        found = f"bitsandbytes: {str(error)[:80]}"
        return Check("nf4", "bad", found, fix="pip install --force-reinstall bitsandbytes")
    # It says what it has loaded by the class alone: a mock where the binary is missing.
    native = type(lib).__name__
    fits = "Mock" not in native
    if hardware.kind == "cuda":
        fits = "Cuda" in native
    what = native if fits else "missing"
    return _warn_unless(
        fits,
        "nf4",
        found=f"saves memory, not time; bitsandbytes' library for {hardware.device}: {what}",
        fix="python -m bitsandbytes explains",
    )


def _nvidia(fields: str, *, apps: bool = False) -> list[str]:
    """Lines of nvidia-smi about the cards, or about the processes on them; [] without it."""
    query = "--query-compute-apps" if apps else "--query-gpu"
    command = ["nvidia-smi", f"{query}={fields}", "--format=csv,noheader"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in run.stdout.splitlines() if line.strip()]


# --- memory and disk


def _check_vram(hardware: Hardware) -> Check:
    """A card's memory; where little is free, who holds it."""
    is_free = hardware.free_bytes >= hardware.total_bytes * FREE_SHARE
    found = f"{hardware.free_bytes / GIB:.1f} of {hardware.total_bytes / GIB:.1f} GiB free"
    if not is_free and hardware.kind == "cuda":
        holders = _nvidia("pid,process_name,used_memory", apps=True)
        if holders:
            found += "; held by " + ", ".join(f"pid {line}" for line in holders)
    if hardware.fixed_segments:
        share = f"{FRAGMENTS_SHARE * 100:.0f} %"
        found += f"; {share} are left for gaps: {hardware.fixed_segments}"
    return _warn_unless(is_free, "VRAM", found=found, fix="close what holds it")


def _describe_pin_limit(hardware: Hardware) -> Check:
    """How much RAM the driver pins, which streamed weights are copied from fastest."""
    assert hardware.pin_bytes is not None
    found = f"the driver pins about {hardware.pin_bytes / GIB:.1f} GiB; streaming goes on beyond it"
    return Check("pinned RAM", "ok", found)


def _check_ram() -> Check:
    import psutil

    from fluxcli.engine.ram import read_ram

    ram = read_ram()
    swap = psutil.swap_memory()
    found = f"{ram.free_bytes / GIB:.1f} of {ram.total_bytes / GIB:.1f} GiB free"
    if ram.limited_by:
        found += f" (limited by {ram.limited_by})"
    found += f", swap or page file {swap.total / GIB:.1f} GiB"
    fix = "--offload sequential, or nf4 baked: both hold little"
    return _warn_unless(ram.total_bytes >= RAM_BYTES, "RAM", found=found, fix=fix)


def _check_disk() -> Check:
    """Room for models in the hub's cache, and whether both caches can be written."""
    cache = nearest(paths.hub_cache_folder())
    free_bytes = shutil.disk_usage(cache).free
    own_cache = nearest(paths.cache_folder())
    is_writable = os.access(cache, os.W_OK) and os.access(own_cache, os.W_OK)
    found = f"{free_bytes / 1e9:.0f} GB free in {cache}"
    if not is_writable:
        found += ", which is read-only"
    fix = "HF_HOME moves the hub's cache; dev takes 34 GB, each baked variant 10 to 20"
    return _warn_unless(is_writable and free_bytes > ROOM_BYTES, "disk", found=found, fix=fix)


# --- the hub


def _check_hub() -> Check:
    """The token, and whether the gated model's licence is accepted: only the hub knows that."""
    try:
        return _ask_hub()
    except BadInputFile as error:
        return Check("hub", "warn", str(error), fix=error.hint)
    except Exception as error:  # noqa: BLE001 - its errors, every one of the network, its absence
        kind = type(error).__name__
        if kind in ("GatedRepoError", "RepositoryNotFoundError"):
            fix = f"accept its licence at huggingface.co/{GATED}"
            return Check("hub", "warn", f"a token without access to {GATED}", fix=fix)
        return Check("hub", "warn", f"the hub was not reached ({kind})", fix="try again online")


def _ask_hub() -> Check:
    """Raises the hub's own errors, for a token without access among others."""
    from huggingface_hub import HfApi, constants, get_token

    from fluxcli.models.hub import check_hub_files

    check_hub_files(paths.hub_cache_folder())
    token = get_token()
    if not token:
        found = "no token: gated models cannot be downloaded"
        return Check("hub", "warn", found, fix="hf auth login")
    if constants.HF_HUB_OFFLINE:
        found = "a token is there; offline, so whether the licence is accepted cannot be known"
        return Check("hub", "ok", found)
    HfApi().auth_check(GATED, token=token)
    return Check("hub", "ok", f"a token with access to {GATED}")
