"""A device guard for "cuda" in a torch that was built without CUDA: the CPU's own, which does
nothing.

Without one, `tensor[0]` and `float(tensor)` fail on a tensor that only says that it is on a card,
on FakeTensors, too: "PyTorch is not linked with support for cuda devices".
"""

import ctypes
from pathlib import Path

import torch

REGISTRY = "_ZN3c104impl26device_guard_impl_registryE"  # c10::impl::device_guard_impl_registry
KINDS = 32  # more than the registry has
CPU = 0  # of c10::DeviceType
CUDA = 1


def install() -> None:
    """Put the CPU's guard into CUDA's place of c10's registry, unless there is one."""
    library = "c10.dll" if hasattr(ctypes, "WinDLL") else "libc10.so"
    folder = Path(torch.__file__).parent / "lib"
    registry = (ctypes.c_void_p * KINDS).in_dll(ctypes.CDLL(str(folder / library)), REGISTRY)
    if not registry[CUDA]:
        registry[CUDA] = registry[CPU]
