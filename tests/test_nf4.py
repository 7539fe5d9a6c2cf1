"""NF4: equal to bitsandbytes where it promises that, closer to the weights where it searches."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant import nf4
from quant.spec import lay_out
from quant.tensor_info import TensorInfo

bnb = pytest.importorskip("bitsandbytes.functional")

EVEN = [(128, 192), (300, 64), (3, 70), (1, 2), (7, 18), (1, 8192), (513, 1024)]
ODD = [(3, 35), (1, 1), (5, 63), (9, 77), (64, 1)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def random(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0
) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


def drawn_from(name: str) -> torch.Tensor:
    torch.manual_seed(1)
    return {
        "normal": lambda: torch.randn(512, 1024),
        "laplace": lambda: torch.distributions.Laplace(0.0, 1.0).sample((512, 1024)),
        "student": lambda: torch.distributions.StudentT(4.0).sample((512, 1024)),
        "uniform": lambda: torch.rand(512, 1024) - 0.5,
    }[name]()


def mixed_sizes() -> torch.Tensor:
    """Blocks so different in size that some scales, rounded to the nearest level, are negative."""
    torch.manual_seed(1)
    return torch.randn(1024, 64) * torch.exp(2 * torch.randn(1024, 1))


def relative_error(weight: torch.Tensor, *, search: bool) -> float:
    decoded = nf4.dequantize(nf4.quantize(weight, search=search), weight.shape, torch.float32)
    return float((decoded - weight.float()).norm() / weight.float().norm().clamp(min=1e-30))


def scales_of(stored: dict[str, torch.Tensor]) -> torch.Tensor:
    maps = stored[".absmax"], stored[".nested_absmax"], stored[".nested_quant_map"]
    return nf4.dequantize_scales(*maps) + nf4.read_offset(stored)


def codes_of(stored: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack([stored[""] >> 4, stored[""] & 15], dim=1).view(-1).long()


def as_bitsandbytes(stored: dict[str, torch.Tensor]) -> tuple[torch.Tensor, bnb.QuantState]:
    parts = {suffix[1:]: tensor for suffix, tensor in stored.items() if suffix}
    return stored[""], bnb.QuantState.from_dict(parts, torch.device("cpu"))


def by_bitsandbytes(weight: torch.Tensor) -> tuple[torch.Tensor, dict]:
    packed, state = bnb.quantize_4bit(
        weight, blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    return packed, state.as_dict(packed=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", EVEN + ODD, ids=str)
def test_absmax_is_what_bitsandbytes_writes(shape, dtype):
    weight = random(shape, dtype)
    packed, state = by_bitsandbytes(weight)
    stored = nf4.quantize(weight, search=False)
    assert torch.equal(stored.pop(""), packed)
    blobs = stored.pop(nf4.STATE), state.pop(nf4.STATE[1:])
    assert bytes(blobs[0].tolist()).rstrip() == bytes(blobs[1].tolist())
    assert {suffix[1:] for suffix in stored} == set(state)
    assert all(torch.equal(tensor, state[suffix[1:]]) for suffix, tensor in stored.items())


@pytest.mark.parametrize("columns", [16, 64], ids=["remainder", "whole"])
def test_ties_are_decided_as_bitsandbytes_does(columns):
    values = bnb.get_4bit_type("nf4", device="cpu")
    midpoints = torch.cat([(values[:-1] + values[1:]) / 2, torch.ones(1)]).repeat(columns // 16)
    for absmax in random((100,), seed=4).abs():
        weight = (midpoints * absmax).view(1, columns)
        assert torch.equal(nf4.quantize(weight, search=False)[""], by_bitsandbytes(weight)[0])


@pytest.mark.parametrize("zeros", [(2, 64), (1, 3), (3, 50)], ids=str)
def test_zeros_are_what_bitsandbytes_writes(zeros):
    packed, state = by_bitsandbytes(torch.zeros(zeros))
    stored = nf4.quantize(torch.zeros(zeros), search=False)
    assert torch.equal(stored[""], packed)
    assert (
        nf4.read_offset(stored) == json.loads(bytes(state[nf4.STATE[1:]].tolist()))["nested_offset"]
    )


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", EVEN, ids=str)
def test_decodes_as_bitsandbytes_does(shape, dtype, search):
    stored = nf4.quantize(random(shape, dtype), search=search)
    decoded = nf4.dequantize(stored, shape, dtype)
    assert decoded.dtype == dtype
    expected = bnb.dequantize_4bit(*as_bitsandbytes(stored))
    # it turns such for old callers
    assert torch.equal(decoded, expected.t() if stored[""].shape[0] == 1 else expected)


@pytest.mark.parametrize("shape", [*ODD, (3, 70)], ids=str)
def test_odd_rows_decode_without_a_compiler(shape, monkeypatch):
    monkeypatch.setattr("bitsandbytes.backends.default.ops._dequantize_4bit_compute", None)
    stored = nf4.quantize(random(shape), search=True)
    numel = shape[0] * shape[1]
    expected = (
        stored[".quant_map"][codes_of(stored)[:numel]]
        * scales_of(stored).repeat_interleave(64)[:numel]
    )
    assert torch.equal(nf4.dequantize(stored, shape, torch.float32), expected.view(shape))


@pytest.mark.parametrize("shape", EVEN + ODD, ids=str)
def test_pieces_are_as_laid_out(shape):
    names = {"U8": torch.uint8, "F32": torch.float32}
    found = {
        suffix: (t.dtype, tuple(t.shape))
        for suffix, t in nf4.quantize(random(shape), search=True).items()
    }
    assert found == {
        info.name: (names[info.dtype], info.shape)
        for info in lay_out("nf4", TensorInfo("", "F32", shape))
    }


@pytest.mark.parametrize("search", [False, True])
def test_state_is_read_by_bitsandbytes(search):
    stored = nf4.quantize(random((64, 96), torch.bfloat16), search=search)
    blob = bytes(stored[nf4.STATE].tolist())
    _, state = as_bitsandbytes(stored)
    assert len(blob) == nf4.STATE_BYTES and blob.rstrip(b" ").endswith(b"}")
    assert (state.shape, state.dtype, state.blocksize, state.quant_type) == (
        (64, 96),
        torch.bfloat16,
        64,
        "nf4",
    )
    assert (state.state2.blocksize, state.state2.dtype) == (256, torch.float32)
    assert float(state.offset) == nf4.read_offset(stored)


@pytest.mark.parametrize(
    ("name", "absmax", "searched"),
    [
        ("normal", 0.093, 0.0855),
        ("laplace", 0.105, 0.098),
        ("student", 0.114, 0.109),
        ("uniform", 0.092, 0.076),
    ],
)
def test_errors(name, absmax, searched):
    weight = drawn_from(name)
    errors = relative_error(weight, search=False), relative_error(weight, search=True)
    assert errors[1] < errors[0] < absmax
    assert errors[1] < searched


@pytest.mark.parametrize("name", ["normal", "laplace", "student"])
def test_search_is_as_good_as_trying_hundred_scales(name):
    blocks = drawn_from(name).view(-1, 64)[:1024]
    values = bnb.get_4bit_type("nf4", device="cpu")
    least = torch.full((len(blocks),), torch.inf)
    for fraction in torch.linspace(0.7, 1.5, 101):
        scale = blocks.abs().amax(1, keepdim=True) * fraction
        nearest = values[torch.bucketize(blocks / scale, (values[:-1] + values[1:]) / 2)] * scale
        least = torch.minimum(least, (blocks - nearest).square().sum(1))
    assert relative_error(blocks, search=True) < 1.005 * float(least.sum().sqrt() / blocks.norm())


def test_searched_codes_are_nearest_to_what_is_read():
    weight = random((96, 64))
    stored = nf4.quantize(weight, search=True)
    readable = stored[".quant_map"] * scales_of(stored)[:, None]  # (blocks, 16)
    nearest = (weight[:, :, None] - readable[:, None]).abs().amin(2)
    decoded = nf4.dequantize(stored, weight.shape, torch.float32)
    assert torch.allclose((weight - decoded).abs(), nearest, atol=1e-8)


def test_sums_of_the_search_are_exact():
    steps = torch.randint(
        0, 2 * nf4.STEPS + 1, (512, 64), generator=torch.Generator().manual_seed(3)
    )
    steps[0], steps[1] = 0, 2 * nf4.STEPS
    table = nf4._make_search_table(torch.device("cpu"))
    sums = torch.nn.functional.embedding_bag(steps, table, mode="sum")
    assert torch.equal(sums.long(), table.long()[steps].sum(1))
    assert table.abs().amax() * 64 < 2**24


def test_scales_do_not_depend_on_threads_or_neighbours():
    weight, table = random((600, 64)), nf4._make_search_table(torch.device("cpu"))
    whole, threads = nf4._search_scales(weight, table), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = torch.cat([nf4._search_scales(part, table) for part in weight.split(7)])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(whole, alone)


@pytest.mark.parametrize("search", [False, True])
def test_blocks_of_zeros_stay_zeros(search):
    weight = random((600, 64))
    weight[::5] = 0
    decoded = nf4.dequantize(nf4.quantize(weight, search=search), weight.shape, torch.float32)
    assert decoded.isfinite().all() and not decoded[::5].any()
    assert not nf4.dequantize(
        nf4.quantize(torch.zeros(4, 64), search=search), (4, 64), torch.float32
    ).any()


def test_scales_are_never_negative():
    weight = mixed_sizes()
    assert scales_of(nf4.quantize(weight, search=False)).min() < 0  # as bitsandbytes does it
    assert scales_of(nf4.quantize(weight, search=True)).min() >= 0
    assert relative_error(weight, search=True) < relative_error(weight, search=False)


@pytest.mark.parametrize("search", [False, True])
def test_any_layout_of_memory(search):
    weight = random((128, 192))
    expected = nf4.quantize(weight, search=search)
    for same in (weight.t().contiguous().t(), torch.nn.Parameter(weight), weight.double()):
        assert all(
            torch.equal(tensor, expected[suffix])
            for suffix, tensor in nf4.quantize(same, search=search).items()
        )


def test_pieces_share_no_memory():
    stored = [
        *nf4.quantize(random((4, 64)), search=True).values(),
        *nf4.quantize(random((4, 64)), search=True).values(),
    ]
    assert len({tensor.untyped_storage().data_ptr() for tensor in stored}) == len(stored)


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_refused(value, search):
    weight = random((4, 64))
    weight[2, 5] = value
    with pytest.raises(ValueError, match="finite"):
        nf4.quantize(weight, search=search)


@pytest.mark.parametrize(
    ("suffix", "name"), [("", "packed"), (".absmax", ".absmax"), (".nested_absmax", ".nested")]
)
def test_pieces_of_another_size_are_refused(suffix, name):
    stored = nf4.quantize(random((300, 64)), search=False)
    with pytest.raises(ValueError, match=name):
        nf4.dequantize(stored | {suffix: stored[suffix][:-1]}, (300, 64), torch.float32)


def test_dtypes_that_bitsandbytes_leaves_unwritten_are_refused():
    with pytest.raises(ValueError, match="float64"):
        nf4.dequantize(nf4.quantize(random((2, 64)), search=False), (2, 64), torch.float64)


@settings(max_examples=60)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 200),
    dtype=st.sampled_from(DTYPES),
    spread=st.floats(0, 4),
    seed=st.integers(0, 999),
)
def test_search_never_loses(rows, columns, dtype, spread, seed):
    weight = (
        random((rows, columns), seed=seed).sign()
        * random((rows, columns), seed=seed + 1).abs() ** spread
    ).to(dtype)
    plain, searched = (relative_error(weight, search=search) for search in (False, True))
    assert searched <= plain + 0.002
    assert searched < 0.2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("search", [False, True])
def test_cuda_writes_what_the_cpu_writes(search):
    weight = random((513, 1024), torch.bfloat16)
    stored = nf4.quantize(weight.cuda(), search=search)
    decoded = nf4.dequantize(stored, weight.shape, torch.float32).cpu()
    expected = nf4.dequantize(nf4.quantize(weight, search=search), weight.shape, torch.float32)
    assert (decoded - expected).norm() < 1e-3 * expected.norm()
    table = nf4._make_search_table(weight.cuda().device)
    blocks = weight.view(-1, 64).float()
    assert torch.equal(
        nf4._search_scales(blocks.cuda(), table).cpu(), nf4._search_scales(blocks, table.cpu())
    )
