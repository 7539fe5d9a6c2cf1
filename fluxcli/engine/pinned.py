"""RAM that the driver has pinned, so that a device copies from it while it computes.

How much the driver pins is asked of nobody: ranges are registered one by one until it refuses, and
what was reached then is remembered for the card and the machine (`fluxcli.learned`). Only plans
read it: each run tries anew. Sizes are in bytes.
"""

import contextlib
import os
import weakref

import torch
from torch import Tensor

from fluxcli.engine.segments import is_inside_windows
from fluxcli.learned import read_sizes, write_sizes
from fluxcli.plan.machine import Hardware
from quant.linear import take_driver_error

FILE = "pinned.json"
GIB = 2**30
# What is planned with until a driver has refused. Windows pins about half of the RAM; in WSL 2 the
# wall was met at 0.5 GiB (microsoft/WSL #14078) and between 0.75 and 1.0 GiB.
WINDOWS_SHARE = 0.4
WSL_BYTES = 512 << 20


def pin(memory: Tensor, size_bytes: int, device: str) -> bool:
    """Register a tensor's first bytes with the driver until it goes; False where that refuses.

    torch's own pinned allocator would round up to a power of 2. Devices other than CUDA's need no
    pinned memory.
    """
    if not device.startswith("cuda"):
        return True
    with torch.cuda.device(device):
        failed = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), size_bytes, 0))
        if failed:
            take_driver_error(device)
            return False
    weakref.finalize(memory, _unpin, memory.data_ptr(), device)
    return True


def _unpin(address: int, device: str) -> None:
    # On a device that has failed every call raises; there is nothing left to give back then.
    with contextlib.suppress(RuntimeError), torch.cuda.device(device):
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaHostUnregister(address)


# --- how much the driver pins


def find_pin_limit(device: str, identity: str, *, ram_bytes: int) -> int | None:
    """Bytes of RAM that the driver pins for a device; None where no limit is known.

    That is what was reached when it refused last, else what is known of the system.
    """
    if not device.startswith("cuda"):
        return None
    learned_bytes = read_sizes(FILE).get(_name(identity, ram_bytes))
    if learned_bytes is not None:
        return learned_bytes
    if os.name == "nt":
        return int(ram_bytes * WINDOWS_SHARE)
    if is_inside_windows():
        return WSL_BYTES
    return None


def learn_pin_limit(hardware: Hardware, *, pinned_bytes: int, refused: bool) -> None:
    """Remember what the driver has pinned, if it refused more or that is more than was planned."""
    known_bytes = hardware.pin_bytes
    if refused or (known_bytes is not None and pinned_bytes > known_bytes):
        sizes = read_sizes(FILE)
        sizes[_name(hardware.identity, hardware.ram_bytes)] = pinned_bytes
        write_sizes(FILE, sizes)


def _name(identity: str, ram_bytes: int) -> str:
    return f"{identity}, {ram_bytes / GIB:.1f} GiB of RAM"
