"""The plan: bytes from headers, precision by what the device has, a reason for each decision."""

from dataclasses import replace
from pathlib import Path

import pytest

from fluxcli.errors import DoesNotFit, UsageError
from fluxcli.hardware import Hardware
from fluxcli.plan import GIB, check_guidance, make_plan, modulation_numel, phase_peaks
from quant.checkpoint import Checkpoint, Component, inspect
from quant.header import TensorInfo
from quant.weights import Piece, Weight
from tests.helpers import tiny


@pytest.fixture(scope="module")
def checkpoint(tiny_folder: Path) -> Checkpoint:
    return inspect(tiny_folder)


def machine(gib: float, device: str = "cuda:0", *, bf16: bool = True) -> Hardware:
    size = int(gib * GIB)
    return Hardware(device, "test", size, size, size, bf16, "a test")


def bf16(name: str, numel: int) -> Weight:
    return Weight(name, (numel,), "", {"": Piece(Path(), TensorInfo(name, "BF16", (numel,)))})


@pytest.fixture(scope="module")
def full_size(checkpoint) -> Checkpoint:
    """The published model's sizes without its files: one tensor stands for each kind of weight."""
    configs = {
        "text_encoder": {}, "text_encoder_2": {},
        "transformer": {"num_attention_heads": 24, "attention_head_dim": 128, "guidance_embeds": True},
        "vae": {"block_out_channels": [128, 256, 512, 512]},
    }  # fmt: skip
    sizes = {
        "text_encoder": {"w": 123_060_480}, "text_encoder_2": {"w": 4_762_310_656}, "vae": {"w": 83_819_683},
        "transformer": {"blocks.weight": 8_632_000_000, "norm.linear.weight": 3_269_408_320},
    }  # fmt: skip
    parts = {
        name: Component(name, Path(), configs[name], {key: bf16(key, n) for key, n in t.items()})
        for name, t in sizes.items()
    }
    return Checkpoint(Path(), parts, {})


@pytest.mark.parametrize(
    ("hardware", "expected"),
    [
        (machine(24), "bfloat16"),
        (machine(24, bf16=False), "float16"),
        (machine(16, "cpu", bf16=False), "float32"),
        (machine(16, "cpu"), "bfloat16"),
    ],
)
def test_precision_follows_the_device_and_says_why(checkpoint, hardware, expected):
    plan = make_plan(tiny(), checkpoint, hardware)
    assert plan.dtypes["transformer"] == expected
    assert any(expected in reason for reason in plan.reasons)
    if expected == "float16":  # T5 and the VAE overflow in float16
        assert {plan.dtypes[name] for name in ("text_encoder", "text_encoder_2", "vae")} == {"float32"}


def test_modulation_is_the_share_that_leaves(checkpoint):
    transformer = checkpoint.components["transformer"]
    assert 0.2 < modulation_numel(transformer) / transformer.numel < 0.4


def test_the_full_size_model_in_16_bit_fits_24_gib_and_not_16(full_size):
    request = tiny(image_size=1024, steps=28, text_tokens=512)
    plan = make_plan(request, full_size, machine(24))
    assert 16.0 < plan.peak_bytes["denoise"] / GIB < 17.5
    assert plan.peak_bytes["decode"] / GIB < 18.5
    assert plan.keep == ("transformer", "vae")
    with pytest.raises(DoesNotFit, match="GiB"):
        make_plan(request, full_size, machine(16))


def test_a_cpu_without_room_for_float32_takes_bfloat16_and_says_slowly(full_size):
    plan = make_plan(tiny(image_size=256), full_size, machine(24, "cpu", bf16=False))
    assert plan.dtypes["transformer"] == "bfloat16"
    assert any("slowly" in reason for reason in plan.reasons)


def test_more_pixels_steps_and_tokens_never_need_less(full_size):
    dtypes = dict.fromkeys(full_size.components, "bfloat16")
    grid = [
        (tiny(image_size=a, steps=b, text_tokens=c), tiny(image_size=a + 256, steps=b + 4, text_tokens=c + 64))
        for a in (256, 1024) for b in (4, 28) for c in (64, 256)
    ]  # fmt: skip
    for small, large in grid:
        low, high = phase_peaks(small, full_size, dtypes, ()), phase_peaks(large, full_size, dtypes, ())
        assert all(low[phase] <= high[phase] for phase in low)
        assert low["decode"] < high["decode"]


def test_guidance_that_does_nothing_or_is_missing_is_refused(checkpoint):
    schnell = {**checkpoint.components["transformer"].config, "guidance_embeds": False}
    part = replace(checkpoint.components["transformer"], config=schnell)
    without = replace(checkpoint, components={**checkpoint.components, "transformer": part})
    with pytest.raises(UsageError, match="without effect"):
        check_guidance(tiny(guidance=3.5), without)
    with pytest.raises(UsageError, match="needs a guidance"):
        check_guidance(tiny(guidance=None), checkpoint)
    check_guidance(tiny(guidance=None), without)
    check_guidance(tiny(guidance=0.0), checkpoint)


def test_what_stays_loaded_is_counted(checkpoint):
    dtypes = dict.fromkeys(checkpoint.components, "float32")
    alone, together = (phase_peaks(tiny(), checkpoint, dtypes, keep) for keep in ((), tuple(checkpoint.components)))
    encoders = sum(4 * checkpoint.components[name].numel for name in ("text_encoder", "text_encoder_2"))
    assert together["denoise"] - alone["denoise"] == encoders
    assert make_plan(tiny(), checkpoint, machine(16, "cpu", bf16=False)).peak_bytes == together
