"""What flux asks of torch's allocator, and what it does with what it is told."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from fluxcli.engine import device, segments
from fluxcli.plan.machine import CONTEXT_BYTES
from fluxcli.plan.placement import GIB
from tests.support.allocator import Allocator, ExpandableAllocator
from tests.support.helpers import machine

OLD, NEW = segments.NAMES
MIB = 2**20


@pytest.fixture
def linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "is_supported", lambda: True)
    monkeypatch.setattr(segments, "_is_for_amd", lambda: False)
    monkeypatch.setattr(device, "is_supported", lambda: True)


@pytest.mark.parametrize(
    ("before", "old", "new"),
    [
        ({}, "expandable_segments:True", "expandable_segments:True"),
        ({OLD: "max_split_size_mb:64"}, "max_split_size_mb:64,expandable_segments:True", None),
        ({NEW: "max_split_size_mb:64"}, None, "max_split_size_mb:64,expandable_segments:True"),
        ({OLD: "a:1", NEW: "b:2"}, "a:1,expandable_segments:True", "b:2,expandable_segments:True"),
        ({OLD: "expandable_segments:False"}, "expandable_segments:False", ""),
        ({NEW: "backend:cudaMallocAsync"}, "", "backend:cudaMallocAsync"),
    ],
)
def test_the_users_own_value_stays(before, old, new, linux):
    environment = dict(before)
    segments.ask_for_expandable_segments(environment)
    assert environment.get(OLD, "") == (new if old is None else old)
    assert environment.get(NEW, "") == (old if new is None else new)
    assert segments.has_asked(environment) == (
        "expandable_segments:True" in environment.get(OLD, "")
    )


def test_nothing_is_asked_inside_windows(monkeypatch):
    monkeypatch.setattr(segments.platform, "release", lambda: "5.15.90.1-microsoft-standard-WSL2")
    environment: dict[str, str] = {}
    segments.ask_for_expandable_segments(environment)
    assert not environment


@pytest.mark.parametrize(
    "module", ["fluxcli.run.session", "fluxcli.run.saving", "fluxcli.engine.check"]
)
def test_it_is_asked_before_torch_is_imported(module):
    code = (
        "import os, sys\n"
        "os.environ.pop('PYTORCH_CUDA_ALLOC_CONF', 0)\n"
        "os.environ.pop('PYTORCH_ALLOC_CONF', 0)\n"
        "class Torch:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch':\n"
        "            print(os.environ.get('PYTORCH_CUDA_ALLOC_CONF'), flush=True); os._exit(0)\n"
        "sys.meta_path.insert(0, Torch())\n"
        "import fluxcli.engine.segments as segments\n"
        "segments.is_supported = lambda: True\n"
        f"import {module}\n"
        "import torch\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "expandable_segments:True", run.stderr


def test_the_allocator_itself_says_whether_its_segments_grow(linux, monkeypatch):
    answers = {"expandable_segments": True}
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", lambda *_: {"allocator_settings": answers})
    monkeypatch.setattr(torch.version, "hip", None)
    assert device.explain_fixed_segments("cuda:0") == ""
    answers["expandable_segments"] = False
    monkeypatch.setenv(OLD, "expandable_segments:True")
    assert "before flux was imported" in device.explain_fixed_segments("cuda:0")
    monkeypatch.setenv(OLD, "expandable_segments:False")
    monkeypatch.delenv(NEW, raising=False)
    assert OLD in device.explain_fixed_segments("cuda:0")
    answers.clear()
    assert "does not say" in device.explain_fixed_segments("cuda:0")
    assert device.explain_fixed_segments("xpu:0") == device.explain_fixed_segments("cpu") == ""


def test_a_card_that_others_are_on_keeps_a_reserve():
    empty = machine(24)
    assert empty.usable_bytes == 24 * GIB
    assert replace(empty, free_bytes=20 * GIB).usable_bytes == 20 * GIB - int(24 * GIB * 0.04)
    small = replace(machine(4), free_bytes=3 * GIB)
    assert small.usable_bytes == 3 * GIB - 256 * MIB
    assert replace(small, free_bytes=0).usable_bytes == 0
    assert replace(small, device="xpu:0").usable_bytes == 3 * GIB


def test_a_phase_begins_with_an_empty_cache_and_the_runs_peak_is_kept(monkeypatch):
    allocator = Allocator()
    for name, answer in {
        "empty_cache": allocator.empty_cache,
        "reset_peak_memory_stats": lambda _: allocator.reset_peak(),
        "max_memory_reserved": lambda _: allocator.peak_reserved_bytes,
        "max_memory_allocated": lambda _: allocator.peak_allocated_bytes,
    }.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(device, "_peaks_before", {})
    allocator.free(allocator.allocate(300 * MIB))
    device.begin_phase("cuda:0")
    assert allocator.reserved_bytes == device.peak_live_memory("cuda:0") == 0
    kept = allocator.allocate(100 * MIB)
    assert device.peak_live_memory("cuda:0") == 100 * MIB
    assert device.peak_memory("cuda:0")["vram_bytes"] == 300 * MIB
    device.reset_peak("cuda:0")
    assert device.peak_memory("cuda:0")["vram_bytes"] == 100 * MIB
    allocator.free(kept)


# --- the model of the allocator


def test_native_segments_are_rounded_split_merged_and_given_back():
    allocator = Allocator()
    small = [allocator.allocate(size) for size in (1, 600, 0)]
    assert allocator.reserved_bytes == 2 * MIB and allocator.allocated_bytes == 512 + 1024
    middle = allocator.allocate(3 * MIB)
    assert allocator.reserved_bytes == 22 * MIB
    large = allocator.allocate(11 * MIB)  # what is left of the 20 MiB
    assert allocator.reserved_bytes == 22 * MIB
    larger = allocator.allocate(13 * MIB)
    assert allocator.reserved_bytes == 36 * MIB
    for block in (large, *small):
        allocator.free(block)
    allocator.empty_cache()
    assert allocator.reserved_bytes == 34 * MIB  # `middle` holds its segment
    allocator.free(middle)
    allocator.free(larger)
    allocator.empty_cache()
    assert allocator.reserved_bytes == allocator.allocated_bytes == 0


def test_a_gap_is_lost_to_native_segments_and_not_to_those_that_grow():
    reserved = []
    for kind in (Allocator, ExpandableAllocator):
        allocator = kind()
        blocks = [allocator.allocate(100 * MIB) for _ in range(3)]
        allocator.free(blocks[2])
        allocator.allocate(200 * MIB)
        reserved.append(allocator.reserved_bytes)
        allocator.free(blocks[0])
        allocator.empty_cache()
        assert allocator.reserved_bytes <= 320 * MIB
    assert reserved == [500 * MIB, 400 * MIB]


def test_at_the_cap_what_is_cached_goes_first():
    for kind in (Allocator, ExpandableAllocator):
        allocator = kind(300 * MIB)
        allocator.free(allocator.allocate(200 * MIB))
        kept = allocator.allocate(240 * MIB)
        assert allocator.reserved_bytes <= 300 * MIB
        with pytest.raises(torch.OutOfMemoryError):
            allocator.allocate(80 * MIB)
        allocator.free(kept)
        assert allocator.allocate(280 * MIB)


def test_what_is_missing_counts_what_was_live(monkeypatch, micro):
    """A phase that took more than its plan teaches by how much."""
    from fluxcli.engine.engine import EnginePhase
    from fluxcli.engine.picture import Picture
    from quant.checkpoint import inspect
    from tests.support.helpers import engine_of, tiny

    checkpoint = inspect(micro)
    engine = engine_of(checkpoint)
    calls = []

    def fail(_: object, pictures: list) -> object:
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("no room")
        yield from ()

    monkeypatch.setattr(device, "peak_live_memory", lambda _: 5 * GIB)
    monkeypatch.setattr(engine, "_available_bytes", lambda: 2 * GIB)
    phase = EnginePhase("denoise", fail)
    engine._under_way = [Picture(tiny().request, ())]
    list(engine._survive(phase, engine._under_way))
    (happened,) = engine.out_of_memory
    assert happened.missing_bytes == CONTEXT_BYTES + 3 * GIB
