"""What tests of terminals share."""

import os
import select
import time


def read_until(terminal: int, word: bytes, within_s: float) -> bytes:
    """What a terminal shows until a word has come, the other end is closed or the time is over."""
    seen = b""
    end = time.monotonic() + within_s
    while word not in seen and time.monotonic() < end:
        if select.select([terminal], [], [], 0.2)[0]:
            try:
                seen += os.read(terminal, 1 << 16)
            except OSError:  # the other end is closed
                break
    return seen
