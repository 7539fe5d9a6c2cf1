"""GGUF's blocks unpack as by the gguf package and by diffusers, on the CPU and on a card, where the
host does not wait, launches are few, and little is taken beside the result.
"""

import gguf
import numpy as np
import pytest
import torch
from diffusers.quantizers.gguf.utils import dequantize_functions
from gguf import GGMLQuantizationType
from torch._subclasses import FakeTensorMode

from fluxcli.plan import costs
from quant import gguf_blocks
from quant.tensor_info import GGUF_BITS
from tests.support import exports
from tests.support.allocator import Allocator
from tests.support.card import Card
from tests.support.card_driver import installed
from tests.support.simulate_cuda import CUDA_CARD, CardMemory, pretend_cuda
from tests.support.steps import StepCounter

TOTAL_BYTES = 24 << 30  # of the card
# The gguf package writes these; the others it only reads.
WRITTEN = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize(
    ("kind", "has_doubles"), [*((kind, True) for kind in GGUF_BITS), ("IQ4_XS", False)]
)
def test_blocks_unpack_as_the_gguf_package_unpacks_them(kind, has_doubles, monkeypatch):
    chosen, rows, columns = GGMLQuantizationType[kind], 7, 768
    if kind in WRITTEN:
        blocks = gguf.quantize(
            np.random.default_rng(3).standard_normal((rows, columns), np.float32), chosen
        )
    else:
        blocks = exports.random_blocks(chosen, rows * columns, seed=3).reshape(rows, -1)
    expected = torch.from_numpy(gguf.dequantize(blocks, chosen))
    monkeypatch.setattr(gguf_blocks, "WITHOUT_DOUBLES", () if has_doubles else ("cpu",))
    # All at once, two rows at a time and an odd one, each row by itself.
    for part in (1 << 20, 1536, 1):
        monkeypatch.setattr(gguf_blocks, "CPU_PART", part)
        for dtype in DTYPES:
            found = gguf_blocks.unpack(torch.from_numpy(blocks), kind, dtype)
            assert found.dtype == dtype and torch.equal(found, expected.to(dtype))


@pytest.mark.parametrize("kind", GGUF_BITS)
def test_any_bytes_unpack_bit_for_bit_as_in_diffusers_and_on_a_card_without_waiting(
    kind, monkeypatch
):
    """Scales are of any sign and size, and may be Inf or NaN."""
    block_values, block_bytes = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(0, 256, (64, 6 * block_bytes), dtype=torch.uint8, generator=generator)
    function = dequantize_functions[GGMLQuantizationType[kind]]
    wide = function(rows.view(-1, block_bytes), block_values, block_bytes, torch.float32)
    expected = wide.view(64, -1)
    for name in ("DEVICE_PART", "LEAN_PART"):
        monkeypatch.setattr(gguf_blocks, name, 40 * expected.shape[1])  # and 24 rows
    with installed(Card()) as card:
        on_card = rows.to("cuda:0")
        for dtype in DTYPES:
            card.take_counts()
            found = gguf_blocks.unpack(on_card, kind, dtype)
            assert not card.take_counts().waits
            for each in (found.cpu(), gguf_blocks.unpack(rows, kind, dtype)):
                assert_same_bits(each, expected.to(dtype))
        assert card.problems == []


# Of FLUX.1: a single block's first weight, its second one, and a double block's q, k and v.
WEIGHTS = [(21504, 3072), (3072, 15360), (9216, 3072)]


@pytest.mark.parametrize("kind", GGUF_BITS)
def test_unpacking_takes_few_launches_and_little_memory_on_a_card(kind, monkeypatch):
    """At most ten launches for each 64 MiB of a result in 16 bit, and no wait of the host."""
    memory = CardMemory(Allocator(TOTAL_BYTES))
    pretend_cuda(monkeypatch, memory.allocator, TOTAL_BYTES)
    for rows, columns in WEIGHTS:
        row_bytes = int(columns * GGUF_BITS[kind]) // 8
        memory.phase = f"{rows} x {columns}"
        with FakeTensorMode(), memory, StepCounter() as counter:
            packed = torch.empty(rows, row_bytes, dtype=torch.uint8, device=CUDA_CARD)
            result = gguf_blocks.unpack(packed, kind, torch.bfloat16)
            counts = counter.take()
            given_bytes = packed.nbytes + result.nbytes
        del packed, result
        assert counts.launches.total() <= 10 * -(-rows * columns // (32 << 20))
        assert not counts.syncs and not counts.copies
        beside_bytes = memory.live_bytes[memory.phase] - given_bytes
        assert beside_bytes <= costs.LOOKING_UP_BYTES.get(kind, costs.DEQUANTIZING_BYTES)


def assert_same_bits(found: torch.Tensor, expected: torch.Tensor) -> None:
    """They are equal, the signs of zeros included; any NaN is like any other."""
    bits = torch.int32 if expected.dtype == torch.float32 else torch.int16
    is_nan = expected.isnan()
    assert torch.equal(found.isnan(), is_nan) and is_nan.any() and not is_nan.all()
    assert torch.equal(found.view(bits)[~is_nan], expected.view(bits)[~is_nan])
