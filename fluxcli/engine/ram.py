"""The RAM that this process may take: the least of the machine's, its container's and its limits.

A container is a control group: version 1 (memory.limit_in_bytes) or 2 (memory.max), each with the
groups above it. A shell's limits are RLIMIT_AS and RLIMIT_DATA. Knows no torch. Sizes are in bytes.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import psutil

from fluxcli.plan.card import Ram

ROOT = Path("/")  # of /proc and /sys; tests have another


class Hierarchy(NamedTuple):
    """The files of one version of control groups, and the lines of memory.stat that name a cache
    of files, which gives way.
    """

    filesystem: str
    limits: tuple[str, ...]
    usage: str
    reclaimable: tuple[str, ...]


VERSION_1 = Hierarchy(
    "cgroup",
    ("memory.limit_in_bytes",),
    "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
)
VERSION_2 = Hierarchy(
    "cgroup2",
    ("memory.max", "memory.high"),
    "memory.current",
    ("inactive_file", "active_file"),
)


def read_ram(root: Path = ROOT) -> Ram:
    """The RAM of this machine, or what less of it this process may take."""
    machine = psutil.virtual_memory()
    found = Ram(machine.total, machine.available)
    for limit in (*_read_groups(root), *read_own_limits().values()):
        total_bytes = min(found.total_bytes, limit.total_bytes)
        limited_by = limit.limited_by if total_bytes < found.total_bytes else found.limited_by
        found = Ram(total_bytes, min(found.free_bytes, limit.free_bytes), limited_by)
    return found


# --- control groups


def _read_groups(root: Path) -> Iterator[Ram]:
    """The limits of this process's control groups and of those above them."""
    try:
        groups = (root / "proc/self/cgroup").read_text()
        mounts = (root / "proc/self/mountinfo").read_text()
    except (OSError, ValueError):  # no Linux
        return
    for line in groups.splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            yield from _read_group(root, VERSION_2, mounts=mounts, path=path)
        elif "memory" in controllers.split(","):
            yield from _read_group(root, VERSION_1, mounts=mounts, path=path)


def _read_group(root: Path, version: Hierarchy, *, mounts: str, path: str) -> Iterator[Ram]:
    """The limits of a group by its path in the hierarchy, and of the groups above it."""
    for line in mounts.splitlines():
        # ID PARENT DEVICE ROOT MOUNTPOINT OPTIONS ... - FILESYSTEM SOURCE OPTIONS
        fields, _, kind = line.partition(" - ")
        filesystem, _, options = kind.partition(" ")
        if filesystem != version.filesystem:
            continue
        if version is VERSION_1 and "memory" not in options.split(" ")[-1].split(","):
            continue
        base, mountpoint = fields.split(" ")[3:5]
        top = root / mountpoint.lstrip("/")
        for folder in _list_folders(path, base=base):
            limit = _read_limit(top / folder, version)
            if limit:
                yield limit


def _list_folders(path: str, *, base: str) -> list[str]:
    """A group's folder below the mount, and those above it.

    A mount inside a container begins at `base` of the hierarchy, which `path` may or may not
    begin with; a path that leads out of it is of no use.
    """
    group = PurePosixPath(path)
    if group.is_relative_to(base):
        group = group.relative_to(base)
    parts = [part for part in group.parts if part != "/"]
    if ".." in parts:
        parts = []
    return ["/".join(parts[:depth]) for depth in range(len(parts) + 1)]


def _read_limit(folder: Path, version: Hierarchy) -> Ram | None:
    """The limit that a group's files set; None where they set none."""
    limits = {name: _read_number(folder / name) for name in version.limits}
    given = {name: limit for name, limit in limits.items() if limit is not None}
    if not given:
        return None
    name, limit_bytes = min(given.items(), key=lambda each: each[1])
    used_bytes = _read_number(folder / version.usage) or 0
    statistics = _read_statistics(folder / "memory.stat")
    used_bytes -= sum(statistics.get(key, 0) for key in version.reclaimable)
    free_bytes = min(limit_bytes, max(0, limit_bytes - used_bytes))
    return Ram(limit_bytes, free_bytes, f"this container, {name}")


def _read_number(path: Path) -> int | None:
    """The number in a file; None for "max", and where there is none."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _read_statistics(path: Path) -> Mapping[str, int]:
    """The lines "NAME NUMBER" of a file."""
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except (OSError, ValueError):
        return {}
    return {line[0]: int(line[1]) for line in lines if len(line) == 2 and line[1].isdecimal()}


# --- limits of a process


def read_own_limits() -> dict[str, Ram]:
    """What the limits of this process leave it, by their names; those that are set."""
    if os.name == "nt":
        return {}
    import resource  # only POSIX has it

    memory = psutil.Process().memory_info()
    used_bytes = {"RLIMIT_AS": memory.vms, "RLIMIT_DATA": getattr(memory, "data", 0)}
    flags = {"RLIMIT_AS": "ulimit -v", "RLIMIT_DATA": "ulimit -d"}
    found = {}
    for name, flag in flags.items():
        limit_bytes, _ = resource.getrlimit(getattr(resource, name))
        if limit_bytes != resource.RLIM_INFINITY:
            found[name] = Ram(limit_bytes, max(0, limit_bytes - used_bytes[name]), flag)
    return found
