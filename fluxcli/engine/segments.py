"""torch's allocator is asked for segments that can grow, before torch is imported.

Without them what one phase leaves behind lies in pieces that the next one cannot use: at the cap of
an 8 GiB card that costs blocks (docs/memory.md). The setting is part of an environment variable
that has two names: torch 2.9.1 reads the older one alone (pytorch/pytorch#183387), others prefer
one of them. Both are set, and what the user has set stays. Stdlib only.
"""

import os
import platform
import sys
from collections.abc import Mapping, MutableMapping

NAMES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
OPTION = "expandable_segments"


def has_asked(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the environment asks for them now, by flux or by the user."""
    return any(f"{OPTION}:true" in environment.get(name, "").lower() for name in NAMES)


def is_inside_windows() -> bool:
    """Whether this Linux runs in WSL, or in a container there."""
    return "microsoft" in platform.release().lower()


def is_supported() -> bool:
    """Whether drivers of this system map memory page by page: on Linux, but not inside Windows."""
    return sys.platform == "linux" and not is_inside_windows()


def _is_for_amd() -> bool:
    """Whether this torch is AMD's build, which would warn that it does not know the option."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return "rocm" in version("torch")
    except PackageNotFoundError:
        return False


def ask_for_expandable_segments(environment: MutableMapping[str, str] = os.environ) -> None:
    """Add the option to both variables, unless one of them has it or names another allocator.

    Where the user has set one of them, both get its options: torch reads only one.
    """
    said = [environment.get(name, "") for name in NAMES]
    is_decided = any(OPTION in value or "backend" in value for value in said)
    if is_decided or not is_supported() or _is_for_amd():
        return
    either = said[0] or said[1]
    for name, value in zip(NAMES, said, strict=True):
        options = [value or either, f"{OPTION}:True"]
        environment[name] = ",".join(option for option in options if option)
