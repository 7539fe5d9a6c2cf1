"""Headers of safetensors files: the library's are read, every defect is refused at once."""

import json
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import numpy as reference

from quant.errors import CheckpointError
from quant.header import file_identity, read_header, read_whole_header
from quant.tensor_info import DTYPE_BITS

patient = settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
DTYPES = {
    "F32": np.float32,
    "F16": np.float16,
    "I64": np.int64,
    "U8": np.uint8,
    "BOOL": np.bool_,
    "F64": np.float64,
}
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)
TENSORS = st.dictionaries(
    st.text(min_size=1, max_size=20), st.tuples(st.sampled_from([*DTYPES]), SHAPES), min_size=1
)
GOLDEN = (
    b'\x59\0\0\0\0\0\0\0{"__metadata__":{"format":"pt"},'
    b'"a":{"dtype":"BF16","shape":[2,2],"data_offsets":[0,8]}} '
    b"\1\2\3\4\5\6\7\x08"
)


def file_of(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def tensor(
    dtype: object = "F32", shape: object = (2,), start: object = 0, stop: object = 8
) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def refusal(path: Path) -> str:
    began = time.perf_counter()
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError) as caught:
            read_header(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - began < 1 and peak < 32 << 20
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    return f"{caught.value} | {caught.value.hint}"


def test_golden_bytes(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(GOLDEN)
    (found,) = read_header(path).values()
    assert (found.name, found.dtype, found.shape, found.nbytes, found.numel) == (
        "a",
        "BF16",
        (2, 2),
        8,
        4,
    )


@patient
@given(TENSORS.filter(lambda tensors: "__metadata__" not in tensors))
def test_what_the_reference_library_writes_is_read(tmp_path, tensors):
    arrays = {name: np.ones(shape, DTYPES[dtype]) for name, (dtype, shape) in tensors.items()}
    path = tmp_path / "x.safetensors"
    reference.save_file(arrays, path, metadata={"format": "np"})
    found = read_header(path)
    assert {name: (info.dtype, info.shape) for name, info in found.items()} == tensors
    assert all(
        info.nbytes == arrays[name].nbytes and info.numel == arrays[name].size
        for name, info in found.items()
    )
    data = path.read_bytes()[
        -sum(array.nbytes for array in arrays.values()) or len(path.read_bytes()) :
    ]
    for name, info in found.items():
        assert data[info.start : info.stop] == arrays[name].tobytes()


def test_tensors_without_elements_may_stand_in_any_order(tmp_path):
    header = {
        "a": tensor(),
        "none": tensor(shape=[0], stop=0),
        "end": tensor(shape=[3, 0], start=8, stop=8),
    }
    (tmp_path / "x").write_bytes(file_of(header, b"x" * 8))
    assert {name: info.numel for name, info in read_header(tmp_path / "x").items()} == {
        "none": 0,
        "a": 2,
        "end": 0,
    }


OTHER_FILES = {
    b"": "0 bytes",
    b"abc": "3 bytes",
    b"PK\x03\x04" + b"x" * 40: "pickle",
    b"\x80\x02}q\0." + b"x" * 40: "pickle",
    b"<!DOCTYPE html><html>": "web page",
    b"\n  <html><body>404</body>": "web page",
    b'{"error":"Unauthorized","message":"log in first"}': "JSON text",
    b"\xef\xbb\xbf<!DOCTYPE html>": "web page",
    b"Entry not found": "a text: Entry not found",
    b"\x1f\x8b\x08\0" + b"x" * 40: "archive",
    bytes(64): "begins with zeros",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0": "git-lfs pointer",
    b"\xff" * 64: "claims",
    (100_000_001).to_bytes(8, "little") + b"{}": "claims",
    (1).to_bytes(8, "little") + b"{": "claims",
    (99).to_bytes(8, "little") + b"{}": "claims",
    b"8 bytes\x01\x02\x03": "claims",
}


@pytest.mark.parametrize("data, word", OTHER_FILES.items(), ids=[*OTHER_FILES.values()])
def test_another_kind_of_file_is_refused_by_its_kind(data, word, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(data)
    assert word in refusal(tmp_path / "x.safetensors")


DEFECTS = {
    "no JSON": file_of(b"{nope"),
    "bad UTF-8": file_of(b'{"\xff":1}'),
    "a list": file_of([]),
    "deep": file_of(b"[" * 100_000),
    "no tensors": file_of({}),
    "only metadata": file_of({"__metadata__": {"format": "pt"}}),
    "a name twice": file_of(b'{"a":%b,"a":%b}' % ((json.dumps(tensor()).encode(),) * 2), b"x" * 8),
    "no dict": file_of({"a": 3}, b"x" * 8),
    "no dtype": file_of({"a": {"shape": [2], "data_offsets": [0, 8]}}, b"x" * 8),
    "three offsets": file_of({"a": tensor() | {"data_offsets": [0, 4, 8]}}, b"x" * 8),
    "unknown dtype": file_of({"a": tensor("F32X")}, b"x" * 8),
    "a dtype of GGUF": file_of({"a": tensor("Q8_0", (32,), stop=34)}, b"x" * 34),
    "dtype a list": file_of({"a": tensor(["F32"])}, b"x" * 8),
    "negative shape": file_of({"a": tensor(shape=[-2])}, b"x" * 8),
    "half a surrogate pair": file_of(b'{"\\ud800":%b}' % json.dumps(tensor()).encode(), b"x" * 8),
    "a name of 100 KB": file_of({"a" * 100_000: tensor()}, b"x" * 8),
    "a list in the metadata": file_of({"__metadata__": {"a": []}, "a": tensor()}, b"x" * 8),
    "text behind the end": file_of(b'{"a":%b} x' % json.dumps(tensor()).encode(), b"x" * 8),
    "no comma": file_of(b'{"a":%b "b":3}' % json.dumps(tensor()).encode(), b"x" * 8),
    "objects in an entry": file_of({"a": tensor() | {"b": {}}}, b"x" * 8),
    "two negatives": file_of({"a": tensor(shape=[-2, -1])}, b"x" * 8),
    "overflowing shape": file_of({"a": tensor(shape=[2**32, 2**32])}, b"x" * 8),
    "huge shape": file_of({"a": tensor(shape=[2**62, 4])}, b"x" * 8),
    "many dimensions": file_of({"a": tensor(shape=[2**40] * 5000)}, b"x" * 8),
    "float shape": file_of({"a": tensor(shape=[2.0])}, b"x" * 8),
    "boolean shape": file_of({"a": tensor(shape=[True, 2])}, b"x" * 8),
    "text shape": file_of({"a": tensor(shape="ab")}, b"x" * 8),
    "wrong size": file_of({"a": tensor(stop=4)}, b"x" * 4),
    "backwards": file_of({"a": tensor(start=8, stop=0)}, b"x" * 8),
    "gap at the start": file_of({"a": tensor(start=4, stop=12)}, b"x" * 12),
    "gap": file_of({"a": tensor(), "b": tensor(start=9, stop=17)}, b"x" * 17),
    "overlap": file_of({"a": tensor(), "b": tensor(start=4, stop=12)}, b"x" * 12),
    "truncated": file_of({"a": tensor()}, b"x" * 7),
    "too long": file_of({"a": tensor()}, b"x" * 9),
}


@pytest.mark.parametrize("data", DEFECTS.values(), ids=DEFECTS)
def test_a_defect_is_refused_in_bounded_time_and_memory(data, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    refusal(path)


def test_a_header_of_the_formats_own_size_is_read_in_bounded_memory(tmp_path):
    tags = json.dumps({"fox": 1} | {f"tag {n}": n for n in range(2000)})
    texts = {"ss_tag_frequency": tags * 800, "ss_epoch": 3, "note": None, "format": "pt"}
    header = file_of({"__metadata__": texts, "a": tensor()}, b"x" * 8)
    assert 20 << 20 < len(header) < 100_000_000
    path = tmp_path / "x.safetensors"
    path.write_bytes(header)
    tracemalloc.start()
    try:
        found = read_whole_header(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.metadata == {"format": "pt"} and list(found.tensors) == ["a"]
    assert peak < 2 * len(header)


@pytest.mark.parametrize("part", [b"[],", b'"a":{},', b"[", b'"",', b'{"a":' * 9])
def test_a_hostile_header_of_the_formats_own_size_is_refused_at_once(part, tmp_path):
    text = b"{" + part * (90_000_000 // len(part)) + b"}"
    path = tmp_path / "x.safetensors"
    path.write_bytes(file_of(text, b"x" * 8))
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="corrupt safetensors header"):
            read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 2 * len(text)
    finally:
        tracemalloc.stop()


def test_a_huge_file_with_a_huge_header_is_refused_unread(tmp_path):
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write((1 << 40).to_bytes(8, "little"))
        file.truncate(1 << 41)  # sparse
    assert "claims" in refusal(path)


@patient
@given(st.data())
def test_no_damage_is_a_crash(tmp_path, data):
    whole = bytearray(GOLDEN)
    for place, value in data.draw(
        st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)), max_size=3)
    ):
        whole[place] = value
    path = tmp_path / "x.safetensors"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    try:
        found = read_header(path)
    except CheckpointError as error:
        assert str(path) in str(error)
    else:
        assert sum(info.nbytes for info in found.values()) == 8


def test_what_is_no_file_is_refused(tmp_path, monkeypatch):
    import os

    assert "not a weight file" in refusal(tmp_path)
    assert "No such file" in refusal(tmp_path / "none")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "fifo")
        assert "not a weight file" in refusal(tmp_path / "fifo")
    (tmp_path / "x").write_bytes(GOLDEN)
    monkeypatch.setattr(
        Path, "open", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied"))
    )
    assert "Permission denied" in refusal(tmp_path / "x")


def test_every_dtype_of_the_reference_library_is_known():
    sizes = {
        name: np.dtype(kind).itemsize * 8
        for name, kind in reference._TYPES.items()
        if name in DTYPE_BITS
    }
    assert set(reference._TYPES) <= set(DTYPE_BITS)
    assert sizes == {name: DTYPE_BITS[name] for name in sizes}


def test_a_file_is_identified_by_size_start_and_end(tmp_path):
    path = tmp_path / "x"
    for size in (0, 1, 4095, 4096, 4097, 1 << 20):
        path.write_bytes(bytes(size))
        empty = file_identity(path)
        assert empty == file_identity(path) and len(empty) <= 8 + 64 * 4096
        for place in {0, size - 1} if size else ():
            path.write_bytes(bytes(place) + b"\1" + bytes(size - place - 1))
            assert file_identity(path) != empty
        path.write_bytes(bytes(size + 1))
        assert file_identity(path) != empty


@pytest.mark.parametrize("length", [0x0280, 0x0380, 0x0480, 0x0580, 0x4B50])
def test_a_header_whose_length_begins_like_a_pickle_is_no_pickle(tmp_path, length):
    text = json.dumps({"x": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).ljust(length)
    path = tmp_path / "x.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + text.encode() + b"\0")
    assert list(read_header(path)) == ["x"]
