"""What is remembered between runs in the user's cache folder: speeds, memory peaks; and a lock for each device.

Everything here may be lost or unwritable: then it is measured again, or not remembered. Knows no torch.
"""

import contextlib
import json
import os
import re
from collections.abc import Mapping

from fluxcli.paths import cache_folder
from fluxcli.pictures import names as output


def read(name: str) -> dict:
    """The JSON object of that name, {} where there is none that can be read."""
    try:
        value = json.loads((cache_folder() / f"{name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def update(name: str, entries: Mapping[str, object]) -> None:
    """Add entries to the object of that name; a reader sees it before or after. Nothing happens where that fails."""
    path = cache_folder() / f"{name}.json"
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        output.write_atomically(path, json.dumps(read(name) | entries, indent=1).encode(), place=os.replace)


def peaks() -> dict[str, dict[str, int]]:
    """Memory peaks that runs have measured, by `plan.learned_key`, then by phase and level."""
    found = {key: value for key, value in read("peaks").items() if isinstance(value, dict)}
    return {key: {k: v for k, v in value.items() if isinstance(v, int)} for key, value in found.items()}


class DeviceLock:
    """The advisory lock of a device: one flux computes on it at a time. Where it cannot be kept, it is always free."""

    def __init__(self, identity: str) -> None:
        from filelock import FileLock

        self._folder = cache_folder() / "locks"
        self._lock = FileLock(self._folder / f"{re.sub(r'[^A-Za-z0-9]+', '-', identity)}.lock")

    def acquire(self, wait_s: float = 0) -> bool:
        """Take the lock; returns whether that was possible within so many seconds."""
        from filelock import Timeout

        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=wait_s)
        except Timeout:
            return False
        except OSError:  # nowhere to put it: advisory means that the run goes on
            pass
        return True

    def release(self) -> None:
        self._lock.release()
