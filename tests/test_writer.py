"""Files written tensor by tensor are as large as predicted, aligned, and read by safetensors."""

import json
import math
import os
import stat
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import _TYPES as TYPES
from safetensors.torch import load_file

from quant.header import read_header
from quant.tensor_info import DTYPE_BITS, TensorInfo
from quant.writer import SafetensorsWriter

patient = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
SHAPES = st.lists(st.integers(0, 7), max_size=3).map(tuple)
DTYPES = st.sampled_from([name for name in DTYPE_BITS if name in TYPES and name != "BOOL"])
NAMES = st.text(min_size=1, max_size=20).filter(lambda name: name != "__metadata__")
TENSORS = st.dictionaries(NAMES, st.tuples(DTYPES, SHAPES), min_size=1, max_size=6)
METADATA = {"format": "pt", "é": '{"a": 1}'}


def write(path: Path, data: dict[str, tuple[str, tuple[int, ...], bytes]]) -> SafetensorsWriter:
    """Write tensors given by name as (dtype, shape, bytes); added last first."""
    writer = SafetensorsWriter(
        path, [TensorInfo(n, dtype, shape) for n, (dtype, shape, _) in data.items()], METADATA
    )
    for name, (_, _, content) in reversed(data.items()):
        writer.add(name, memoryview(content))
    writer.finish()
    return writer


def with_bytes(tensors: dict) -> dict:
    sizes = {n: math.prod(shape) * DTYPE_BITS[dtype] // 8 for n, (dtype, shape) in tensors.items()}
    return {
        name: (*tensors[name], bytes(k % 251 for k in range(size))) for name, size in sizes.items()
    }


@patient
@given(TENSORS.map(with_bytes))
def test_what_is_written_is_what_the_reference_library_reads(tmp_path, data):
    path = tmp_path / "x.safetensors"
    path.unlink(missing_ok=True)
    writer = write(path, data)
    assert path.stat().st_size == writer.nbytes and writer.find_damage() == ""
    read = load_file(path)
    laid_out = {name: (TYPES[dtype], shape) for name, (dtype, shape, _) in data.items()}
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in read.items()} == laid_out
    assert all(
        bytes(t.view(-1).view(torch.uint8).tolist()) == data[n][2]
        for n, t in read.items()
        if t.numel()
    )
    with safe_open(path, "pt") as file:
        assert file.metadata() == METADATA
    start = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    for info in read_header(path).values():
        assert (start + info.start) % (DTYPE_BITS[info.dtype] // 8) == 0
    assert start % 8 == 0


@patient
@given(TENSORS)
def test_the_size_is_known_before_the_first_byte(tmp_path, tensors):
    infos = [TensorInfo(name, dtype, shape) for name, (dtype, shape) in tensors.items()]
    writer = SafetensorsWriter(tmp_path / "absent" / "x", infos, {})
    assert (
        8 + sum(info.nbytes for info in infos) < writer.nbytes
        and not (tmp_path / "absent").exists()
    )


DATA = {
    "a": ("F32", (3,), bytes(range(12))),
    "b": ("U8", (5,), b"hello"),
    "c": ("BF16", (2, 2), bytes(range(8))),
}


def test_any_byte_that_changes_is_found(tmp_path):
    path = tmp_path / "x.safetensors"
    writer = write(path, DATA)
    whole = path.read_bytes()
    infos = list(read_header(path).values())
    start = len(whole) - infos[-1].stop
    for info in infos:
        for place in range(start + info.start, start + info.stop):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            assert writer.find_damage() == info.name
    renamed = json.loads(whole[8:start])
    renamed["x"] = renamed.pop("a")
    path.write_bytes(
        whole[:8]
        + json.dumps(renamed, separators=(",", ":")).encode().ljust(start - 8)
        + whole[start:]
    )
    assert writer.find_damage() == "the header"


@pytest.mark.skipif(os.name == "nt", reason="POSIX file modes")
@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_the_mode_is_that_of_the_umask(mask, tmp_path):
    before = os.umask(mask)
    try:
        write(tmp_path / "x", DATA)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o666 & ~mask


def test_a_file_that_is_there_is_never_written_over(tmp_path):
    (tmp_path / "x").write_bytes(b"old")
    with pytest.raises(FileExistsError):
        write(tmp_path / "x", DATA)
    assert (tmp_path / "x").read_bytes() == b"old"


@pytest.mark.parametrize("step", [1, 3, 10**6])
def test_writes_that_stop_short_are_continued(step, tmp_path, monkeypatch):
    class Short:
        def __init__(self, file: object) -> None:
            self.file = file

        def write(self, data: memoryview) -> int:
            return self.file.write(data[:step])

        def __getattr__(self, name: str) -> object:
            return getattr(self.file, name)

    real = open
    monkeypatch.setattr("builtins.open", lambda *a, **options: Short(real(*a, **options)))
    assert write(tmp_path / "x", DATA).find_damage() == ""


def test_the_same_tensors_give_the_same_bytes_in_whatever_order_they_come(tmp_path):
    write(tmp_path / "x", DATA)
    writer = SafetensorsWriter(
        tmp_path / "y", [TensorInfo(n, d, s) for n, (d, s, _) in DATA.items()], METADATA
    )
    for name in ("c", "a", "b"):
        writer.add(name, memoryview(DATA[name][2]))
    writer.finish()
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()
