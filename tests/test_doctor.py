"""`flux doctor`: every finding has a verdict, and what is not ok a fix; on machines that are here
and that are not.
"""

import importlib.metadata
import json
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import huggingface_hub
import psutil
import pytest
import torch
from huggingface_hub import constants

from fluxcli.cli import doctor
from fluxcli.engine import device as hardware
from fluxcli.errors import DeviceUnusable, ExitCode
from fluxcli.plan.machine import Hardware
from fluxcli.plan.placement import GIB
from tests.support.helpers import machine
from tests.support.invariant import assert_failed, call, files

TOKEN = "hf_abcdefghijklmnopqrstuvwxyz"
Usage = namedtuple("Usage", "total used free")
MACHINES = {
    "cpu": machine(16, "cpu", bf16=False, reason="no GPU was found"),
    "cpu beside a driver": machine(16, "cpu", reason="this torch is CPU-only", gpu_unusable=True),
    "old card": machine(6, bf16=False, sm=(7, 5)),
    "card": machine(24),
    "busy card": machine(24, free_bytes=2 * GIB),
    "apple": machine(32, "mps", sm=(0, 0)),
    "arc": machine(16, "xpu:0", sm=(0, 0)),
}


@pytest.fixture(autouse=True)
def here() -> Iterator[pytest.MonkeyPatch]:
    """A machine of a test, with nothing wrong beside; `here.undo()` leaves the real one."""
    with pytest.MonkeyPatch.context() as here:
        put(here, MACHINES["card"])
        here.setattr(torch.version, "cuda", "13.0")
        here.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 0, 10**12))
        here.setattr(
            psutil, "virtual_memory", lambda: SimpleNamespace(total=64 * GIB, available=60 * GIB)
        )
        here.setattr(constants, "HF_HUB_OFFLINE", True)
        here.setenv("HF_TOKEN", TOKEN)
        yield here


def put(here: pytest.MonkeyPatch, found: Hardware | Exception, smi: dict | None = None) -> None:
    """What the probe finds or raises, and what nvidia-smi says of drivers and holders."""

    def probe(device: str = "auto", **_: object) -> Hardware:
        if isinstance(found, Exception):
            raise found
        return found

    said = smi or {"driver_version": ["580.65"], "pid,process_name,used_memory": []}
    here.setattr(hardware, "probe", probe)
    here.setattr(doctor, "_nvidia", lambda fields, **_: said[fields])


def examined(**named: str) -> dict[str, doctor.Check]:
    return {check.name: check for check in doctor.examine(**named)}


def assert_sound(checks: list[doctor.Check]) -> None:
    """Names are unique, each has a verdict and something found; a fix is there exactly where it is
    not ok.
    """
    assert len({check.name for check in checks}) == len(checks)
    for check in checks:
        assert check.verdict in ("ok", "warn", "bad") and check.found, check
        assert bool(check.fix) == (check.verdict != "ok"), check


# --- every finding, everywhere


@pytest.mark.parametrize("name", MACHINES)
def test_what_is_not_ok_has_a_fix_whatever_the_machine(name, here):
    put(here, MACHINES[name])
    for room, ram, token in product((10**9, 10**12), (8 * GIB, 64 * GIB), ("", TOKEN)):
        here.setattr(shutil, "disk_usage", lambda _, free=room: Usage(10**12, 0, free))
        here.setattr(
            psutil,
            "virtual_memory",
            lambda total=ram: SimpleNamespace(total=total, available=total // 2),
        )
        here.setenv("HF_TOKEN", token)
        checks = list(doctor.examine())
        assert_sound(checks)
        by_name = {check.name: check.verdict for check in checks}
        assert (by_name["disk"], by_name["RAM"], by_name["hub"]) == (
            "ok" if room > 10**11 else "warn",
            "ok" if ram > 20 * GIB else "warn",
            "ok" if token else "warn",
        )


def test_this_very_machine_is_examined_and_nothing_is_changed(here, capsys, tmp_path):
    here.undo()
    before = files(tmp_path)
    result = call(capsys, "doctor", "--device", "cpu", "--json")
    checks = [doctor.Check(**check) for check in json.loads(result.stdout)["checks"]]
    assert_sound(checks)
    assert result.stderr == "" and files(tmp_path) == before
    assert (result.returncode == 0) == all(check.verdict != "bad" for check in checks)


def test_text_and_json_say_the_same(capsys):
    text, found = call(capsys, "doctor"), json.loads(call(capsys, "doctor", "--json").stdout)
    assert set(found) == {"checks"} and text.stderr == ""
    rows = [row for row in text.stdout.splitlines() if row.startswith(" ")]
    heads = [row for row in text.stdout.splitlines() if row not in rows]
    assert heads == [f"{head}:" for head in doctor.HEADS.values()]
    for check in found["checks"]:
        row = rows.pop(0)
        assert (
            row.split()[0] == check["verdict"]
            and check["name"] in row
            and row.endswith(check["found"])
        )
        assert not check["fix"] or rows.pop(0).strip() == check["fix"]
    assert rows == []


# --- the device


def test_a_card_is_named_with_driver_capability_and_what_it_computes():
    found = examined()
    assert found["device"] == doctor.Check(
        "device", "ok", "cuda:0, a test, sm89, driver 580.65, torch for CUDA 13.0"
    )
    assert [found[name].found for name in ("bf16", "fp8", "int8")] == [
        "computed",
        "computed (scaled_mm)",
        "computed (int_mm)",
    ]
    assert found["VRAM"] == doctor.Check("VRAM", "ok", "24.0 of 24.0 GiB free")


def test_who_holds_the_memory_is_named_where_little_is_free(here):
    holders = {
        "driver_version": ["580.65"],
        "pid,process_name,used_memory": ["77, /bin/game, 20000 MiB", "8, x, 9"],
    }
    put(here, machine(24, free_bytes=int(3.5 * GIB)), holders)
    check = examined()["VRAM"]
    assert check.verdict == "warn" and "3.5 of 24.0 GiB" in check.found
    assert "pid 77, /bin/game, 20000 MiB" in check.found and "pid 8, x" in check.found
    put(here, machine(24), holders)
    assert examined()["VRAM"].found == "24.0 of 24.0 GiB free"


def test_a_precision_that_a_card_only_unpacks_is_not_called_computed(here):
    unpacked = {"fp8": "dequantize", "int8": "dequantize"}
    why = {"int8": "CUBLAS_STATUS_NOT_SUPPORTED"}
    put(here, replace(MACHINES["old card"], multiply=unpacked, multiply_why=why))
    found = examined()
    unpacked_here = "saves memory, not time: unpacked here, because "
    assert found["fp8"].found == unpacked_here + "its products need sm89"
    assert found["int8"].found == unpacked_here + "CUBLAS_STATUS_NOT_SUPPORTED"
    assert found["bf16"].verdict == "ok" and "sm75" in found["device"].found
    assert all("computed" not in found[name].found for name in ("bf16", "fp8", "int8"))


def test_a_card_that_torch_has_no_kernels_for_is_named_with_the_command_that_mends_it(here):
    reason = "not cuda:0 GTX 1060, sm61: torch 2.13.0+cu130 has kernels for sm_75"
    fix = "pip install --force-reinstall torch"
    put(here, replace(MACHINES["cpu"], reason=reason, gpu_unusable=True, gpu_fix=fix))
    check = examined()["device"]
    assert (check.verdict, check.fix) == ("warn", fix) and reason in check.found


def test_fp8_that_is_multiplied_per_tensor_says_why(here):
    ways = {"fp8": "scaled_mm per tensor", "int8": "int_mm"}
    why = {"fp8": "Rowwise scaling is not currently supported"}
    put(here, replace(MACHINES["card"], multiply=ways, multiply_why=why))
    found = examined()["fp8"].found
    assert found.startswith("computed (scaled_mm per tensor): multiplied per tensor here, because")
    assert found.endswith(why["fp8"])


def test_nvidia_smi_is_asked_for_lines_and_its_absence_is_none(here):
    here.undo()
    asked = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess:
        asked.append(command)
        raise [FileNotFoundError(command[0]), subprocess.TimeoutExpired(command, 10)][
            len(asked) % 2
        ]

    here.setattr(doctor.subprocess, "run", run)
    assert doctor._nvidia("driver_version") == doctor._nvidia("pid", apps=True) == []
    assert [command[1] for command in asked] == [
        "--query-gpu=driver_version",
        "--query-compute-apps=pid",
    ]
    done = subprocess.CompletedProcess([], 0, "1, a, 2 MiB\n\n 3, b, 4 MiB\n", "")
    here.setattr(doctor.subprocess, "run", lambda *_, **__: done)
    assert doctor._nvidia("pid", apps=True) == ["1, a, 2 MiB", "3, b, 4 MiB"]


@pytest.mark.parametrize(
    "error",
    [
        DeviceUnusable("no such device", which="cuda:3", hint="--device auto takes what is here"),
        DeviceUnusable("the GPU driver does not answer"),
        ImportError("libtorch.so: cannot open"),
        OSError("libcuda"),
        RuntimeError("CUDA out of memory"),
    ],
    ids=repr,
)
def test_a_device_that_cannot_be_asked_is_bad_and_the_rest_is_examined(error, here, capsys):
    put(here, error)
    result = call(capsys, "doctor", "--json")
    checks = [doctor.Check(**check) for check in json.loads(result.stdout)["checks"]]
    assert_sound(checks)
    by_name = {check.name: check for check in checks}
    assert result.returncode == ExitCode.DEVICE and result.stderr == ""
    assert by_name["device"].verdict == "bad" and str(error) in by_name["device"].found
    assert {"torch", "disk", "hub"} <= set(by_name) and "VRAM" not in by_name


def test_a_device_that_is_no_device_is_exit_2(capsys):
    assert "--device" in assert_failed(call(capsys, "doctor", "--device", "gpu"), ExitCode.USAGE)


# --- libraries, disk, hub


@pytest.mark.parametrize("name", doctor.LIBRARIES)
def test_a_missing_library_is_bad_and_exit_8_with_the_command(name, here, capsys):
    real = importlib.metadata.version

    def version(wanted: str) -> str:
        if wanted == name:
            raise importlib.metadata.PackageNotFoundError(wanted)
        return real(wanted)

    here.setattr(importlib.metadata, "version", version)
    result = call(capsys, "doctor", "--json")
    bad = [check for check in json.loads(result.stdout)["checks"] if check["verdict"] == "bad"]
    assert result.returncode == ExitCode.DEVICE
    assert bad == [
        {"name": name, "verdict": "bad", "found": "not installed", "fix": f"pip install {name}"}
    ]


def test_a_broken_bitsandbytes_is_bad_and_one_for_another_device_a_warning(here):
    assert examined()["nf4"].verdict == ("ok" if torch.cuda.is_available() else "warn")
    put(here, MACHINES["cpu"])
    assert examined()["nf4"].verdict == "ok"
    here.setitem(sys.modules, "bitsandbytes.cextension", None)
    assert examined()["nf4"].verdict == "bad"


def test_a_cache_that_cannot_be_written_is_said(here):
    here.setattr(doctor.os, "access", lambda path, mode: False)
    check = examined()["disk"]
    assert check.verdict == "warn" and "read-only" in check.found and "HF_HOME" in check.fix


def test_offline_with_a_token_whether_the_licence_is_accepted_cannot_be_known(here):
    here.setattr(
        huggingface_hub.HfApi, "auth_check", lambda *_, **__: pytest.fail("opened a connection")
    )
    check = examined()["hub"]
    assert check.verdict == "ok" and "offline" in check.found and "cannot be known" in check.found
    here.setenv("HF_TOKEN", "")
    assert "hf auth login" in examined()["hub"].fix


class GatedRepoError(Exception):
    """As the hub's own, whose making needs a response."""


@pytest.mark.parametrize(
    ("error", "verdict", "word"),
    [
        (None, "ok", "with access"),
        (GatedRepoError(TOKEN), "warn", "accept its licence"),
        (ConnectionError(TOKEN), "warn", "ConnectionError"),
        (OSError(f"Bearer {TOKEN}"), "warn", "not reached"),
    ],
)
def test_the_hub_is_asked_for_the_licence_and_the_token_is_never_printed(
    error, verdict, word, here, capsys
):
    asked = []

    def auth_check(self: object, model: str, *, token: str) -> None:
        asked.append((model, token))
        if error:
            raise error

    here.setattr(constants, "HF_HUB_OFFLINE", False)
    here.setattr(huggingface_hub.HfApi, "auth_check", auth_check)
    for option in ("--json", "--device=auto"):
        result = call(capsys, "doctor", option)
        assert TOKEN not in result.stdout + result.stderr and word in result.stdout
    assert asked == [(doctor.GATED, TOKEN)] * 2 and examined()["hub"].verdict == verdict
