"""On a CUDA device: plain diffusers opens the NF4 folder whole; fp8 and int8 multiply in 8 bit
there.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from fluxcli.engine import device as hardware
from fluxcli.engine.engine import Engine
from fluxcli.engine.streaming import load_component
from quant import codecs
from quant.checkpoint import KEEP_FILE, inspect
from quant.linear import FP8Linear, RotatedLinear, find_multiply, make_linear
from tests.support.helpers import BAKED, draw, plan_for, tiny
from tests.test_formats import apart, inputs
from tests.test_linear import OPERATORS, WHERE, noise

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    # Drivers and torch's CUDA builds have warnings of their own: to be read, no failures.
    pytest.mark.filterwarnings("default"),
]
BF16 = torch.bfloat16
# bfloat16 alone rounds 0.022 (transformer) and 0.017 (T5) away from float32, and CUDA's products of
# fused weights are other kernels than those of single ones; 16-bit weights are 0.13 and 0.42 away.
ROUNDING = 0.05


def needs(scheme: str) -> None:
    """Skip where the device does not multiply in the scheme.

    Its capability does not say that: torch has no row-wise product for fp8 on Windows.
    """
    if find_multiply(scheme, "cuda") == "dequantize":
        pytest.skip(f"this device has no {OPERATORS[scheme]}")


def on_cuda(values: dict) -> dict:
    return {
        key: value.cuda() if isinstance(value, torch.Tensor) else value
        for key, value in values.items()
    }


@torch.no_grad()
def velocity(model: torch.nn.Module) -> torch.Tensor:
    return model(**on_cuda(inputs(model.config, dtype=BF16)))[0].float()


@pytest.fixture
def folder(baked, tmp_path) -> Path:
    """The NF4 folder without the 16-bit original of the last layer, which diffusers does not know
    of.
    """
    copy = shutil.copytree(baked("nf4", **BAKED["nf4"]), tmp_path / "nf4")
    (copy / "transformer" / KEEP_FILE).unlink()
    return copy


def open_plainly(folder: Path) -> object:
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(folder, torch_dtype=BF16).to("cuda")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_diffusers_opens_the_nf4_folder_and_both_models_give_our_values(folder):
    import bitsandbytes

    pipe = open_plainly(folder)
    ours = {
        name: load_component(inspect(folder).components[name], dtype=BF16, device="cuda").module
        for name in ("transformer", "text_encoder_2")
    }
    for name, layers in (("transformer", 2 * 12 + 5 * 5 + 1), ("text_encoder_2", 12)):
        theirs = getattr(pipe, name)
        assert sum(isinstance(m, bitsandbytes.nn.Linear4bit) for m in theirs.modules()) == layers
    assert apart(velocity(ours["transformer"]), velocity(pipe.transformer)) < ROUNDING
    ids = torch.randint(0, 512, (1, 24), generator=torch.Generator().manual_seed(0)).cuda()
    with torch.no_grad():
        found, expected = ours["text_encoder_2"](ids)[0], pipe.text_encoder_2(ids)[0]
    assert apart(found.float(), expected.float()) < ROUNDING


def test_the_nf4_folder_gives_the_same_picture_in_plain_diffusers(folder):
    pipe = open_plainly(folder)
    request = tiny(device="cuda", steps=8, image_size=128)
    width, height = request.request.size
    reference = pipe(
        request.request.prompt,
        width=width,
        height=height,
        num_inference_steps=request.request.steps,
        guidance_scale=request.request.guidance,
        max_sequence_length=request.request.text_tokens,
        generator=torch.Generator("cpu").manual_seed(request.request.seed),
    ).images[0]
    checkpoint = inspect(folder)
    machine = hardware.probe("cuda")
    _, pixels = draw(Engine(*plan_for(request, [checkpoint], machine), machine), request)
    difference = np.abs(pixels.astype(int) - np.asarray(reference).astype(int))
    assert pixels.std() > 5 and difference.mean() < 6, difference.mean()


@pytest.mark.parametrize("dtype", [torch.float16, BF16], ids=str)
@pytest.mark.parametrize("rows", [1, 16, 17, 300])
@pytest.mark.parametrize("scheme", OPERATORS)
def test_8_bit_products_run_and_err_by_the_rounding_of_activations(
    scheme, rows, dtype, monkeypatch
):
    needs(scheme)
    assert find_multiply(scheme, "cuda") == find_multiply(scheme, "cuda:0")
    shapes = [(96, 64), (32, 64), (160, 64)]
    weights = [noise(*shape, seed=seed).cuda() for seed, shape in enumerate(shapes)]
    parts = [codecs.quantize(weight, scheme, name="w", where=WHERE).stored for weight in weights]
    w = torch.cat(
        [
            codecs.dequantize(part, scheme, s, torch.float32)
            for part, s in zip(parts, shapes, strict=True)
        ]
    )
    layer = make_linear(
        scheme, parts, shapes=shapes, bias=noise(288, seed=9).cuda().to(dtype), arithmetic=True
    )
    calls, original = [], getattr(torch, OPERATORS[scheme])
    monkeypatch.setattr(
        torch, OPERATORS[scheme], lambda *a, **k: calls.append(1) or original(*a, **k)
    )
    x = noise(rows, 64).cuda().to(dtype)
    exact = x.double() @ w.double().T + layer.bias.double()
    y = layer(x)
    assert calls == [1] and y.dtype == dtype
    assert 1e-3 < apart(y.double(), exact) < (0.015 if scheme == "int8" else 0.04)
    x[0] = 0
    assert torch.equal(layer(x)[0], layer.bias)


@pytest.mark.parametrize("scheme", OPERATORS)
def test_the_packed_transformer_gives_in_8_bit_what_it_gives_dequantized(baked, scheme):
    needs(scheme)
    folder = baked(scheme, **BAKED[scheme])
    model = load_component(
        inspect(folder).components["transformer"], dtype=BF16, device="cuda"
    ).module
    found = velocity(model)
    for layer in model.modules():
        if isinstance(layer, FP8Linear | RotatedLinear):
            layer.arithmetic = False
    assert 1e-4 < apart(found, velocity(model)) < 0.08


def test_the_packer_gives_on_cuda_what_it_gives_on_the_cpu():
    weight = noise(256, 320).to(BF16)
    for scheme in ("nf4", "fp8", "int8"):
        there = codecs.quantize(weight.cuda(), scheme, name="w", where=WHERE)
        here = codecs.quantize(weight, scheme, name="w", where=WHERE)
        values = codecs.dequantize(
            {k: t.cpu() for k, t in there.stored.items()}, scheme, (256, 320), torch.float32
        )
        expected = codecs.dequantize(here.stored, scheme, (256, 320), torch.float32)
        assert apart(values, expected) < 0.01
        assert there.relative_error == pytest.approx(here.relative_error, rel=0.01)
