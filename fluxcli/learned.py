"""What runs have learned of this machine's devices: numbers of bytes that the next run may know.

Each kind is a JSON file of its own in the user's cache folder, and is forgotten a week after it was
last written: what was so then may have gone. Deleting the file forgets it, too. Where a file cannot
be read or written nothing is remembered, and nothing is said. Stdlib only.
"""

import contextlib
import json
import os
import time
from collections.abc import Mapping

from fluxcli.paths import cache_folder
from quant.files import read_small_file, write_atomically

MAX_BYTES = 1 << 20  # of a file
FORGOTTEN_AFTER_S = 7 * 24 * 3600.0


def read_sizes(file: str) -> dict[str, int]:
    """The numbers of bytes in a file, by device; what is no number of bytes is left out."""
    path = cache_folder() / file
    try:
        if time.time() - path.stat().st_mtime > FORGOTTEN_AFTER_S:
            return {}
        found = json.loads(read_small_file(path, MAX_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {key: size for key, size in found.items() if type(size) is int and size >= 0}


def write_sizes(file: str, sizes: Mapping[str, int]) -> None:
    """Keep these numbers of bytes in place of the file's."""
    path = cache_folder() / file
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(sizes, indent=1).encode(), place=os.replace)
