"""Prompt embeddings on disk: as written or absent, whatever happened to the file."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from fluxcli import paths
from fluxcli.engine import prompt_cache as embeddings
from fluxcli.engine.prompt_cache import Embeddings, key_of, read, write
from tests.support.invariant import files
from tests.support.prompt_cache import DTYPES, KEY, OTHER, bits, forged, made, path_of, patient


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lost", ["", "the end of it", 'ü 🦊 "\\ \n\0', "\udcff"])
def test_what_is_written_is_read_bit_for_bit(dtype, lost):
    first = made(1, 5, dtype, lost)
    assert read(KEY) is None
    write(KEY, first)
    write(OTHER, made(2, 3, dtype))
    found = read(KEY)
    assert bits(found) == bits(first) and bits(read(OTHER)) == bits(made(2, 3, dtype))
    assert found.pooled.device.type == found.sequence.device.type == "cpu"
    write(KEY, made(3))  # replaces it
    assert bits(read(KEY)) == bits(made(3)) and len(embeddings.list_entries()) == 2


def test_parts_of_other_tensors_and_those_with_gradients_are_written_as_they_look():
    whole = torch.randn(3, 9, 8, requires_grad=True)
    given = Embeddings(whole[:1, 0], whole[1:2, ::2].transpose(1, 2))
    write(KEY, given)
    found = read(KEY)
    assert torch.equal(found.pooled, given.pooled) and torch.equal(found.sequence, given.sequence)


def test_tensors_outlive_their_file():
    write(KEY, made(tokens=4096))
    found = read(KEY)
    with path_of().open("r+b") as file:
        file.write(bytes(path_of().stat().st_size))
    assert bits(found) == bits(made(tokens=4096)) and read(KEY) is None
    found.pooled.zero_()  # and are the caller's own


# --- the key


values = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.text()
    | st.floats(allow_nan=False).map(lambda x: x + 0.0)
)
parts = st.dictionaries(
    st.sampled_from(["text", "dtype", "adapters", "torch"]), values | st.lists(st.lists(values))
)


@patient
@given(parts, parts)
def test_two_keys_are_equal_only_if_all_parts_are(one, other):
    assert (key_of(**one) == key_of(**other)) == (
        repr(sorted(one.items())) == repr(sorted(other.items()))
    )


@patient
@given(parts.filter(bool), st.data())
def test_any_part_that_differs_gives_another_key(one, data):
    name = data.draw(st.sampled_from(sorted(one)))
    value = data.draw(values.filter(lambda value: repr(value) != repr(one[name])))
    keys = {key_of(**one), key_of(**one | {name: value}), key_of(**one | {"more": value})}
    keys.add(key_of(**{key: each for key, each in one.items() if key != name}))
    assert len(keys) == 4 and all(
        len(key) == 64 and set(key) <= set("0123456789abcdef") for key in keys
    )


def test_the_key_knows_no_order_of_its_parts_and_is_the_same_in_every_process():
    assert key_of(text="ü", scales=(0.5, 1)) == key_of(scales=[0.5, 1], text="ü")
    assert KEY == "6addad6f3cf072cf569455d57cc80dc5fbc6364f6f6de778f1c03be91848d6ea"


def test_no_prompt_is_in_a_file_or_its_name():
    write(key_of(text="SECRET fox, SEEN tail"), made(lost="SEEN tail"))
    ((name, data),) = files(paths.cache_folder()).items()
    assert "SECRET" not in name and b"SECRET" not in data and b"SEEN tail" in data


# --- damage


def test_a_bit_that_flips_anywhere_is_no_entry():
    write(KEY, made(lost="the ünd"))
    path, whole = path_of(), path_of().read_bytes()
    for place in range(len(whole)):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            assert read(KEY) is None and not path.exists(), (place, bit)
    path.write_bytes(whole)
    assert bits(read(KEY)) == bits(made(lost="the ünd"))


def test_a_file_that_is_cut_or_longer_is_no_entry():
    write(KEY, made())
    path, whole = path_of(), path_of().read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        assert read(KEY) is None and not path.exists(), size
    for more in (b"\0", b" ", whole):
        path.write_bytes(whole + more)
        assert read(KEY) is None and not path.exists()


def test_bytes_that_move_within_a_file_are_no_entry():
    write(KEY, made())
    path, whole, luck = path_of(), path_of().read_bytes(), random.Random(1)
    for _ in range(500):
        start, stop, to = (luck.randrange(len(whole)) for _ in range(3))
        part = whole[min(start, stop) : max(start, stop) + 1]
        damaged = (whole[:to] + part + whole[to + len(part) :])[: len(whole)]
        path.write_bytes(damaged)
        assert (read(KEY) is None) == (damaged != whole) and path.exists() == (damaged == whole)


@pytest.mark.parametrize(
    "said, instead", [(b'"BF16"', b'"F16" '), (b"[1,4,8]", b"[1,8,4]"), (b"[1,8]", b"[8,1]")]
)
def test_the_same_bits_in_another_dtype_or_shape_are_no_entry(said, instead):
    write(KEY, made())
    whole = path_of().read_bytes()
    assert said in whole
    path_of().write_bytes(whole.replace(said, instead))
    assert read(KEY) is None


good = made(1)
WRONG = {
    "another key's": forged(OTHER, good),
    "more tensors": forged(KEY, good, more=torch.zeros(1)),
    "no description": save({"pooled": good.pooled, "sequence": good.sequence}),
    "one tensor": save(
        {"pooled": good.pooled}, {embeddings.DESCRIPTION: embeddings._describe(KEY, good)}
    ),
    "swapped": save(
        {"pooled": good.sequence, "sequence": good.pooled}, {embeddings.DESCRIPTION: "{}"}
    ),
    "nothing": b"",
    "a picture": b"\x89PNG\r\n\x1a\n" + bytes(100),
    "a deep header": (100_000).to_bytes(8, "little") + b"[" * 100_000,
    "a vast header": (2**63).to_bytes(8, "little") + b"{}",
    "a header of no object": (2).to_bytes(8, "little") + b"[]",
    "half bytes": (64).to_bytes(8, "little")
    + b'{"pooled":{"dtype":"F4","shape":[1,8],"data_offsets":[0,4]}}    0000',
}


@pytest.mark.parametrize("name", WRONG)
def test_another_file_in_the_place_is_no_entry(name):
    write(KEY, made())
    path_of().write_bytes(WRONG[name])
    assert read(KEY) is None and not path_of().exists()
    path_of().write_bytes(forged(KEY, good))  # the way to forge one is not what is refused
    assert bits(read(KEY)) == bits(good)
