"""How much RAM a process may take: the machine's, its container's, its own limits."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from fluxcli.engine import check, device, ram
from fluxcli.errors import DoesNotFit
from fluxcli.plan.card import Ram

GIB = 1 << 30
V2_MOUNT = "30 23 0:26 {base} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNT = "35 31 0:32 {base} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
V1_CPU_MOUNT = "32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
STATISTICS = {
    2: "anon 5\nfile 900000000\ninactive_file {0}\nactive_file 0\n",
    1: "cache 900000000\ntotal_inactive_file 0\ntotal_active_file {0}\n",
}
FILES = {
    2: ("memory.max", "memory.current"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes"),
}


@pytest.fixture(autouse=True)
def computer(monkeypatch: pytest.MonkeyPatch) -> None:
    found = psutil.virtual_memory()._replace(total=64 * GIB, available=60 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: found)


def make_root(root: Path, groups: str, mounts: str) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(groups)
    (root / "proc/self/mountinfo").write_text("20 1 8:1 / / rw - ext4 /dev/sda rw\n" + mounts)
    return root


def set_limit(folder: Path, version: int, limit: object, used: int = 0, cached: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    name, usage = FILES[version]
    (folder / name).write_text(f"{limit}\n")
    (folder / usage).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(STATISTICS[version].format(cached))


def test_without_a_group_it_is_the_machine(tmp_path):
    assert ram.read_ram(tmp_path) == Ram(64 * GIB, 60 * GIB, "")
    root = make_root(tmp_path, "0::/\n", V2_MOUNT.format(base="/"))
    set_limit(root / "sys/fs/cgroup", 2, "max")
    assert ram.read_ram(root) == Ram(64 * GIB, 60 * GIB, "")


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("group", ["/", "/a", "/a/b/c"])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_the_least_limit_of_a_group_and_of_those_above_counts(version, group, depth, tmp_path):
    groups = f"0::{group}\n" if version == 2 else f"1:cpu:/x\n4:memory:{group}\n0::/\n"
    mounts = V2_MOUNT if version == 2 else V1_CPU_MOUNT + V1_MOUNT
    root = make_root(tmp_path, groups, mounts.format(base="/"))
    top = root / ("sys/fs/cgroup" if version == 2 else "sys/fs/cgroup/memory")
    parts = [part for part in group.split("/") if part]
    for k in range(len(parts) + 1):
        unlimited = "max" if version == 2 else 9223372036854771712
        set_limit(top.joinpath(*parts[:k]), version, unlimited, used=k)
    limited = top.joinpath(*parts[:depth])
    set_limit(limited, version, 4 * GIB, used=3 * GIB, cached=GIB)
    assert ram.read_ram(root) == Ram(4 * GIB, 2 * GIB, f"this container, {FILES[version][0]}")


@pytest.mark.parametrize("group", ["/docker/abc", "/", "/../../elsewhere", "/docker/abc/below"])
def test_a_mount_inside_a_container_begins_below_the_root_of_the_hierarchy(group, tmp_path):
    mounts = V1_MOUNT.format(base="/docker/abc")
    root = make_root(tmp_path, f"4:memory:{group}\n", mounts)
    set_limit(root / "sys/fs/cgroup/memory", 1, 2 * GIB, used=GIB)
    assert ram.read_ram(root) == Ram(2 * GIB, GIB, "this container, memory.limit_in_bytes")


def test_what_is_beyond_the_limit_already_leaves_nothing(tmp_path):
    root = make_root(tmp_path, "0::/\n", V2_MOUNT.format(base="/"))
    set_limit(root / "sys/fs/cgroup", 2, GIB, used=2 * GIB)
    assert ram.read_ram(root) == Ram(GIB, 0, "this container, memory.max")
    (root / "sys/fs/cgroup/memory.high").write_text(f"{GIB // 2}\n")
    assert ram.read_ram(root) == Ram(GIB // 2, 0, "this container, memory.high")


@pytest.mark.parametrize("text", ["", "nonsense", "0:", "\0", "4:memory:/\n" * 3])
def test_what_is_not_understood_is_no_limit(text, tmp_path):
    root = make_root(tmp_path, text, text)
    assert ram.read_ram(root).total_bytes == 64 * GIB


def test_the_device_the_plan_and_the_doctor_say_the_limit(tmp_path, monkeypatch):
    from fluxcli.cli import doctor

    root = make_root(tmp_path, "0::/\n", V2_MOUNT.format(base="/"))
    set_limit(root / "sys/fs/cgroup", 2, 4 * GIB, used=GIB)
    monkeypatch.setattr(ram.read_ram, "__defaults__", (root,))
    found = device.probe("cpu")
    assert (found.ram_bytes, found.ram_free_bytes) == (4 * GIB, 3 * GIB)
    assert found.total_bytes == 4 * GIB - device.LIBRARIES_BYTES
    assert device.free_memory("cpu") == 3 * GIB
    assert "memory.max" in found.ram_limit
    assert (
        "3.0 of 4.0 GiB free (limited by this container, memory.max)" in doctor._check_ram().found
    )


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's limits")
@pytest.mark.parametrize("name, flag", [("RLIMIT_AS", "ulimit -v"), ("RLIMIT_DATA", "ulimit -d")])
def test_limits_of_the_process_count(name, flag, monkeypatch, tmp_path):
    number = getattr(resource, name)
    known = resource.getrlimit
    limited = {number: (8 * GIB, 8 * GIB)}
    monkeypatch.setattr(resource, "getrlimit", lambda asked: limited.get(asked) or known(asked))
    found = ram.read_ram(tmp_path)
    assert found.total_bytes == 8 * GIB and found.limited_by == flag
    assert 0 < found.free_bytes < 8 * GIB
    limited[number] = (GIB // 4, GIB // 4)
    with pytest.raises(DoesNotFit, match="no room for torch") as raised:
        check.check_limits()
    assert raised.value.hint == f"{flag} unlimited"


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's limits")
def test_the_shells_own_limit_is_seen():
    code = "from fluxcli.engine.ram import read_ram; print(read_ram().total_bytes)"
    command = f"ulimit -v 4000000; exec {sys.executable} -c '{code}'"
    shown = subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert int(shown.stdout) == 4000000 * 1024
