"""Processes that benchmarks time and watch: seconds, and the peaks of their memory as /proc has
them.

Memory is in bytes: RssAnon is what a process has made itself, VmRSS all that is resident, mapped
files too. Knows nothing of flux.
"""

import os
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

SAMPLE_S = 0.05
MEMORY = ("RssAnon", "VmRSS")


def time_command(command: Sequence[str]) -> tuple[float, str]:
    """(wall seconds, stdout) of one process; raises CalledProcessError where it fails."""
    environment = dict(os.environ)
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # else modules are compiled in each process
    start = time.perf_counter()
    run = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return time.perf_counter() - start, run.stdout


def forget(files: Sequence[Path]) -> None:
    """Take the files out of the page cache."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_memory(pid: int) -> dict[str, int]:
    """Bytes of RssAnon and VmRSS of a process; empty where it has ended."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return {}
    found = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name in MEMORY:
            found[name] = int(value.split()[0]) * 1024
    return found


def watch(
    process: subprocess.Popen, each: Callable[[dict[str, int]], None] | None = None
) -> dict[str, int]:
    """Sample the memory of a process until it ends; returns the peaks. `each` sees every sample."""
    peaks = dict.fromkeys(MEMORY, 0)
    while process.poll() is None:
        sample = read_memory(process.pid)
        for name, value in sample.items():
            peaks[name] = max(peaks[name], value)
        if each:
            each(sample)
        time.sleep(SAMPLE_S)
    return peaks


def to_gib(memory: dict[str, int]) -> dict[str, float]:
    """The same in GiB, for people."""
    return {name: round(value / 2**30, 2) for name, value in memory.items()}
