"""A lock for each device in the user's cache folder: one flux computes on it at a time.

Knows no torch. Times are in seconds.
"""

import re

from fluxcli.paths import cache_folder


class DeviceLock:
    """The advisory lock of a device. Where it cannot be kept, it is always free."""

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
