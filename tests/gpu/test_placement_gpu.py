"""On a CUDA card: streams and pinned memory change nothing in the result, and the allocator stays
within the plan.
"""

from contextlib import suppress

import numpy as np
import pytest
import torch

from fluxcli.engine import device as hardware
from fluxcli.engine.engine import Engine
from fluxcli.engine.pinned import pin
from quant.checkpoint import inspect
from tests.support.helpers import BAKED, draw, plan_for, tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # Drivers and torch's CUDA builds have warnings of their own: to be read, no failures.
    pytest.mark.filterwarnings("default"),
]


@pytest.mark.parametrize("precision", ["bf16", *BAKED])
@pytest.mark.parametrize("offload", ["stream", "sequential"])
def test_streams_and_pinned_memory_give_the_resident_pixels(precision, offload, tiny_folder, baked):
    checkpoint = inspect(
        baked(precision, **BAKED[precision]) if precision in BAKED else tiny_folder
    )
    machine = hardware.probe("cuda")
    pictures = []
    for way in ("none", offload):
        request = tiny(precision=precision, offload=way, device="cuda", steps=6)
        engine = Engine(*plan_for(request, [checkpoint], machine), machine)
        pictures.append(draw(engine, request)[1])
    assert np.array_equal(*pictures)


def test_the_arena_is_pinned_exactly_and_let_go_of():
    arena = torch.empty(3_000_000, dtype=torch.uint8)
    assert pin(arena, 2_999_808, "cuda:0")
    assert arena.is_pinned()
    address = arena.data_ptr()
    del arena
    assert int(torch.cuda.cudart().cudaHostUnregister(address)) != 0  # it was unregistered already
    with suppress(RuntimeError):  # the driver reports that call's error to the next kernel
        torch.zeros(1, device="cuda:0")


def test_a_capped_allocator_fails_instead_of_spilling():
    hardware.cap("cuda:0", 1 << 30)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(2 << 30, dtype=torch.uint8, device="cuda:0")
    finally:
        hardware.cap("cuda:0", 1 << 50)
