"""The transformer's own forward computes the very numbers of diffusers', in every dtype.

Bits are compared on the CPU, whose products do not depend on how a step is written down.
"""

import copy
from pathlib import Path

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb

from fluxcli.engine import blocks, classes, denoise
from fluxcli.engine.streaming import load_component
from quant.checkpoint import inspect

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZE = (96, 64)
TEXT_TOKENS = 20


def make_inputs(dtype: torch.dtype) -> dict:
    """What diffusers' forward takes, for the bundled model."""
    generator = torch.Generator().manual_seed(0)
    positions = denoise.make_position_ids(SIZE)
    drawn = {
        "hidden_states": (1, len(positions), 64),
        "encoder_hidden_states": (1, TEXT_TOKENS, 128),
        "pooled_projections": (1, 96),
    }
    given = {name: torch.randn(shape, generator=generator) for name, shape in drawn.items()}
    given |= {"timestep": torch.tensor([0.7]), "guidance": torch.tensor([3.5])}
    given = {name: tensor.to(dtype) for name, tensor in given.items()}
    ids = {"img_ids": positions.to(dtype), "txt_ids": torch.zeros(TEXT_TOKENS, 3, dtype=dtype)}
    return given | ids


@pytest.fixture(scope="module")
def plain(tiny_folder: Path) -> torch.nn.Module:
    """diffusers' own model of the bundled weights."""
    return classes.transformer().from_pretrained(tiny_folder / "transformer").eval()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_a_forward_has_the_bits_of_diffusers(plain, dtype):
    """Of layers that are not fused, so that the products are the same ones."""
    model = copy.deepcopy(plain).to(dtype)
    given = make_inputs(dtype)
    expected = model(**given, return_dict=False)[0]
    blocks.install(model)
    assert torch.equal(model(**given)[0], expected)
    assert expected.isfinite().all() and expected.std() > 0.1


@torch.no_grad()
def test_every_layer_is_given_and_gives_what_it_does_in_diffusers(plain):
    """So that hooks of adapters see nothing that was changed in place before or too early."""

    def watch(model: torch.nn.Module) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """What each layer is given and gives, as rows, while the model computes."""
        seen = {}

        def keep(name: str, given: torch.Tensor, made: torch.Tensor) -> None:
            seen[name] = (given.flatten(0, -2).clone(), made.flatten(0, -2).clone())

        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear | torch.nn.RMSNorm):
                module.register_forward_hook(
                    lambda _, given, made, name=name: keep(name, given[0], made)
                )
        model(**make_inputs(torch.bfloat16))
        return seen

    expected = watch(copy.deepcopy(plain).to(torch.bfloat16))
    model = copy.deepcopy(plain).to(torch.bfloat16)
    blocks.install(model)
    found = watch(model)
    assert found.keys() == expected.keys()
    for name, pair in expected.items():
        assert all(map(torch.equal, found[name], pair)), name


@torch.no_grad()
def test_fused_layers_and_a_ready_rotation_have_the_bits_of_diffusers(plain, tiny_folder):
    given = make_inputs(torch.float32)
    component = inspect(tiny_folder).components["transformer"]
    model = load_component(component, dtype=torch.float32, device="cpu").module
    assert model.single_transformer_blocks[0].attn.fused_projections
    expected = plain(**given, return_dict=False)[0]
    positions = given.pop("img_ids")
    del given["txt_ids"]
    rotation = blocks.make_rotation(model, TEXT_TOKENS, positions)
    assert torch.equal(model(**given, rotation=rotation)[0], expected)


@torch.no_grad()
def test_a_forward_leaves_its_inputs_as_they_are(tiny_folder):
    component = inspect(tiny_folder).components["transformer"]
    model = load_component(component, dtype=torch.float32, device="cpu").module
    given = make_inputs(torch.float32)
    before = copy.deepcopy(given)
    first = model(**given)[0]
    assert all(torch.equal(given[name], tensor) for name, tensor in before.items())
    assert torch.equal(model(**given)[0], first)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(3, 32), (24, 128)], ids=str)
def test_the_rotation_has_the_bits_of_diffusers(plain, dtype, heads):
    count, channels = heads
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 37, count, channels, generator=generator).to(dtype)
    angles = torch.rand(37, channels // 2, generator=generator, dtype=torch.float64) * 100
    cosines = angles.cos().repeat_interleave(2, dim=1).float()
    sines = angles.sin().repeat_interleave(2, dim=1).float()
    expected = apply_rotary_emb(x, (cosines, sines), sequence_dim=1)
    rotation = torch.complex(angles.cos().float(), angles.sin().float())[:, None]
    assert torch.equal(blocks.rotate(x.clone(), rotation), expected)
