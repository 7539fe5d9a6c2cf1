"""Whether torch can be imported at all: asked before any module that imports it at its top."""

import os

from fluxcli.errors import (
    DeviceUnusable,
    DoesNotFit,
    find_broken_library,
    name_package,
)
from quant.errors import is_out_of_memory

# What torch, diffusers and transformers take of a limit, without their threads. Measured with torch
# 2.13 for the CPU: 0.85 GB of addresses and 0.34 GB of data for a picture of the bundled model.
LIBRARY_BYTES = {"RLIMIT_AS": 1 << 30, "RLIMIT_DATA": 512 << 20}
POOLS = 2  # of threads, each of a thread a core: torch's and numpy's
STACK_BYTES = 8 << 20  # of a thread, where the limit does not say it


def check_torch() -> None:
    """Raise `DeviceUnusable` where torch cannot be imported, `DoesNotFit` where it has no room.

    A broken installation fails with ImportError, OSError and others.
    """
    check_limits()
    try:
        import torch  # noqa: F401
    except Exception as error:
        why = f"{type(error).__name__}: {str(error)[:120]}"
        if is_out_of_memory(error):
            hint = "close other programs, or: ulimit -v unlimited"
            raise DoesNotFit("torch does not fit into memory", why=why, hint=hint) from error
        library = name_package(find_broken_library(error) or "torch")
        hint = f"pip install --force-reinstall {library}"
        raise DeviceUnusable("torch cannot be imported", why=why, hint=hint) from error


def check_limits() -> None:
    """Raise `DoesNotFit` where limits of this process leave no room for the libraries.

    Those end the process with words of their own where they get no memory for themselves (OpenBLAS)
    or for a thread (libgomp), so they are asked before.
    """
    if os.name == "nt":
        return
    from fluxcli.engine.ram import read_own_limits

    for name, limit in read_own_limits().items():
        need_bytes = LIBRARY_BYTES[name] + POOLS * _count_threads() * _read_stack_bytes()
        if limit.free_bytes < need_bytes:
            raise DoesNotFit(
                "no room for torch and its threads",
                which=limit.limited_by,
                why=f"needs {need_bytes >> 20} MiB, {limit.free_bytes >> 20} MiB are free",
                hint=f"{limit.limited_by} unlimited",
            )


def _count_threads() -> int:
    """How many threads a library starts."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdecimal():
        return int(asked)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _read_stack_bytes() -> int:
    import resource  # only POSIX has it

    stack_bytes, _ = resource.getrlimit(resource.RLIMIT_STACK)
    return STACK_BYTES if stack_bytes == resource.RLIM_INFINITY else stack_bytes
