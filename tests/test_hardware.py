"""The probe: what exists is used, what does not is named, and why."""

import pytest
import torch

from fluxcli import hardware
from fluxcli.errors import DeviceUnusable


def test_auto_takes_the_cpu_where_nothing_else_is(monkeypatch):
    monkeypatch.setattr(hardware, "_accelerators", lambda: {"cuda": 0, "xpu": 0, "mps": 0})
    found = hardware.probe()
    assert found.device == found.kind == "cpu"
    assert found.total_bytes >= found.free_bytes > 0
    assert found.reason


@pytest.mark.parametrize("device", ["cuda", "cuda:3", "mps", "xpu:1"])
def test_a_device_that_is_not_there_names_what_is(monkeypatch, device):
    monkeypatch.setattr(hardware, "_accelerators", lambda: {"cuda": 0, "xpu": 0, "mps": 0})
    with pytest.raises(DeviceUnusable, match="usable are cpu") as caught:
        hardware.probe(device)
    assert caught.value.exit_code == 8
    assert caught.value.hint


def test_a_cpu_only_torch_beside_an_nvidia_driver_is_said(monkeypatch):
    monkeypatch.setattr(hardware, "_accelerators", lambda: {"cuda": 0, "xpu": 0, "mps": 0})
    monkeypatch.setattr(hardware.shutil, "which", lambda name: "/bin/nvidia-smi")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "CPU-only beside an NVIDIA driver" in hardware.probe().reason
    with pytest.raises(DeviceUnusable, match="CUDA build"):
        hardware.probe("cuda")


def test_an_empty_cuda_visible_devices_is_said(monkeypatch):
    monkeypatch.setattr(hardware, "_accelerators", lambda: {"cuda": 0, "xpu": 0, "mps": 0})
    monkeypatch.setattr(hardware.shutil, "which", lambda name: "/bin/nvidia-smi")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(DeviceUnusable, match="CUDA_VISIBLE_DEVICES is ''"):
        hardware.probe("cuda:0")


def test_a_card_without_bfloat16_is_told_apart(monkeypatch):
    monkeypatch.setattr(hardware, "_accelerators", lambda: {"cuda": 2, "xpu": 0, "mps": 0})
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: (7 * 2**30, 8 * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: f"card {number}")
    for capability, bf16 in (((7, 5), False), ((8, 6), True), ((12, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number, c=capability: c)
        found = hardware.probe("cuda:1")
        assert (found.device, found.name, found.bf16) == ("cuda:1", "card 1", bf16)
        assert (found.free_bytes, found.total_bytes) == (7 * 2**30, 8 * 2**30)
    with pytest.raises(DeviceUnusable, match="cuda:0 cuda:1"):
        hardware.probe("cuda:2")


def test_a_driver_that_does_not_answer_is_the_devices_fault(monkeypatch):
    def broken() -> int:
        raise RuntimeError("no driver\nlong text")

    monkeypatch.setattr(torch.cuda, "device_count", broken)
    with pytest.raises(DeviceUnusable, match="driver does not answer"):
        hardware.probe()


def test_the_memory_peak_is_of_this_process():
    assert 50 << 20 < hardware.peak_memory("cpu")["rss_bytes"] < 64 << 30
