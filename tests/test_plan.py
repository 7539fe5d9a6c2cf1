"""The plan: bytes from headers, precision by what the device has, a reason for each decision."""

import functools
import json
from dataclasses import replace
from pathlib import Path

import pytest

from fluxcli import hardware, models
from fluxcli.cli import generate
from fluxcli.errors import DoesNotFit, ExitCode, UsageError
from fluxcli.hardware import Hardware
from fluxcli.plan import GIB, check_guidance, make_plan, modulation_numel, phase_peaks, weight_bytes
from quant.checkpoint import Checkpoint, Component, inspect
from quant.header import TensorInfo
from quant.spec import SCHEMES, QuantSpec
from quant.weights import Piece, Weight
from tests.helpers import BAKED, tiny
from tests.invariant import assert_failed, call


@pytest.fixture(scope="module")
def checkpoint(tiny_folder: Path) -> Checkpoint:
    return inspect(tiny_folder)


def machine(gib: float, device: str = "cuda:0", *, bf16: bool = True) -> Hardware:
    size = int(gib * GIB)
    return Hardware(device, "test", size, size, size, bf16, "a test")


def bf16(name: str, numel: int) -> Weight:
    shape = (numel,) if numel % 64 else (numel // 64, 64)
    return Weight(name, shape, "", {"": Piece(Path(), TensorInfo(name, "BF16", shape))})


@pytest.fixture(scope="module")
def full_size(checkpoint) -> Checkpoint:
    """The published model's sizes without its files: few tensors stand for each kind of weight."""
    configs = {
        "text_encoder": {}, "text_encoder_2": {},
        "transformer": {"num_attention_heads": 24, "attention_head_dim": 128, "guidance_embeds": True},
        "vae": {"block_out_channels": [128, 256, 512, 512]},
    }  # fmt: skip
    sizes = {
        "text_encoder": {"w": 123_060_480}, "vae": {"w": 83_819_683},
        "text_encoder_2": {"encoder.block.0.layer.0.SelfAttention.q.weight": 3_754_310_656, "wo": 1_008_000_000},
        "transformer": {f"transformer_blocks.{k}.ff.weight": 172_640_000 for k in range(50)}
        | {f"transformer_blocks.{k}.norm1.linear.weight": 81_735_208 for k in range(40)},
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


# --- precision


@pytest.mark.parametrize("to, gib", [("nf4", 7.5), ("fp8", 10.5), ("int8", 10.5)])
def test_a_precision_that_is_asked_for_is_packed_while_loading_and_smaller(to, gib, full_size):
    request = tiny(image_size=1024, steps=28, text_tokens=512)
    plan, wide = (
        make_plan(replace(request, precision=to), full_size, machine(24)),
        make_plan(request, full_size, machine(24)),
    )
    assert (plan.precision, plan.spec.to, wide.precision, wide.spec) == (to, to, "bf16", None)
    assert plan.spec.text_encoder == ("nf4" if to == "nf4" else "keep")
    assert plan.peak_bytes["denoise"] / GIB < gib < wide.peak_bytes["denoise"] / GIB
    assert all(plan.peak_bytes[phase] <= wide.peak_bytes[phase] for phase in wide.peak_bytes)
    assert any(to in reason and "flux quantize" in reason for reason in plan.reasons)
    assert json.loads(json.dumps(plan.to_json()))["spec"]["to"] == to


def test_a_model_that_does_not_fit_is_told_of_nf4_unless_it_is_that(full_size):
    request = tiny(image_size=1024, steps=28, text_tokens=512, precision="nf4")
    assert make_plan(request, full_size, machine(9)).precision == "nf4"
    with pytest.raises(DoesNotFit) as caught:
        make_plan(request, full_size, machine(6))
    assert "--precision" not in caught.value.hint
    with pytest.raises(DoesNotFit) as caught:
        make_plan(replace(request, precision="auto"), full_size, machine(9))
    assert "--precision nf4" in caught.value.hint


@pytest.mark.parametrize("to", SCHEMES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_price_of_a_precision_is_that_of_its_files(to, dtype, checkpoint, baked):
    stored = inspect(baked(to, **BAKED[to]))
    for name, part in checkpoint.components.items():
        spec = QuantSpec(to, **BAKED[to])
        assert weight_bytes(part, dtype, spec) == weight_bytes(stored.components[name], dtype)
    plan = make_plan(tiny(), stored, machine(24))
    assert (plan.precision, plan.spec) == (to, None) and any("stored" in reason for reason in plan.reasons)
    assert make_plan(tiny(precision=to), stored, machine(24)) == plan


@pytest.mark.parametrize(
    "asked, there", [("bf16", "nf4"), ("fp32", "int8"), ("fp16", "fp8"), ("nf4", "fp8"), ("fp8", "nf4")]
)
def test_a_precision_that_the_weights_do_not_have_is_refused(asked, there, baked, capsys):
    folder = baked(there, **BAKED[there])
    result = call(capsys, "generate", "x", "-p", "tiny", "-m", str(folder), "--precision", asked, "-q")
    message = assert_failed(result, ExitCode.USAGE)
    assert asked in message and there in message and "--precision auto" in message


@pytest.fixture
def variants(baked) -> dict[str, Path]:
    """What was baked from the bundled model, in the user's model folder."""
    models.baked_folder().mkdir(parents=True)
    for to in SCHEMES:
        (models.baked_folder() / f"tiny-{to}").symlink_to(baked(to, **BAKED[to]))
    return {to: models.baked_folder() / f"tiny-{to}" for to in SCHEMES}


def chosen(monkeypatch: pytest.MonkeyPatch, size_bytes: int, precision: str = "auto") -> str:
    """The precision of the plan on a device of this size, "" where nothing fits."""
    monkeypatch.setattr(hardware, "probe", lambda _: machine(size_bytes / GIB))
    try:
        checkpoint, plan = generate._prepare(tiny(precision=precision))
    except DoesNotFit:
        return ""
    assert checkpoint.components["transformer"].precision == ("" if plan.precision == "bf16" else plan.precision)
    assert (plan.precision == "bf16" or precision != "auto") or any("does not fit" in why for why in plan.reasons)
    return plan.precision


def test_auto_takes_the_model_itself_where_it_fits_else_the_best_that_was_baked(variants, monkeypatch):
    monkeypatch.setattr(generate, "inspect", functools.cache(inspect))
    by_size = [chosen(monkeypatch, kib << 10) for kib in range(2_000, 12_000, 50)]
    found = [name for k, name in enumerate(by_size) if not k or name != by_size[k - 1]]
    assert found == ["", "nf4", "fp8", "bf16"]  # more memory is never less precision
    variants["fp8"].unlink()
    assert "int8" in [chosen(monkeypatch, kib << 10) for kib in range(2_000, 12_000, 50)]


def test_a_precision_that_is_asked_for_takes_no_other(variants, monkeypatch):
    for precision in (*SCHEMES, "bf16"):
        assert chosen(monkeypatch, 1 << 30, precision) == precision
        assert chosen(monkeypatch, 1 << 20, precision) == ""
    for path in variants.values():
        path.unlink()
    monkeypatch.setattr(hardware, "probe", lambda _: machine(1))
    assert generate._prepare(tiny(precision="nf4"))[1].spec == QuantSpec("nf4", "nf4")


def test_where_nothing_fits_the_error_is_that_of_the_best(variants, monkeypatch, capsys):
    monkeypatch.setattr(hardware, "probe", lambda _: machine(0.001))
    result = call(capsys, "generate", "x", "-p", "tiny", "-q")
    assert "--precision nf4" in assert_failed(result, ExitCode.DOES_NOT_FIT)
