"""Modulation tables: equal to diffusers' own adaLN, keyed by all that they depend on."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fluxcli.engine import modulation
from fluxcli.engine.streaming import load_component
from quant.checkpoint import Checkpoint, inspect
from quant.spec import is_modulation
from tests.support.helpers import draw, engine_of, tiny

STEPS = torch.tensor([1000.0, 600.0, 250.0])


@pytest.fixture(scope="module")
def checkpoint(tiny_folder: Path) -> Checkpoint:
    return inspect(tiny_folder)


@pytest.fixture(scope="module")
def pooled(checkpoint) -> torch.Tensor:
    width = checkpoint.components["transformer"].config["pooled_projection_dim"]
    return torch.randn(1, width, generator=torch.Generator().manual_seed(0))


def conditioned(pooled, guidance=3.5, timesteps=STEPS):
    return modulation.make_condition(pooled, weights="w", guidance=guidance, timesteps=timesteps)


def test_rows_equal_what_diffusers_computes_step_by_step(checkpoint, pooled):
    component = checkpoint.components["transformer"]
    item = conditioned(pooled)
    table = modulation.make_tables(component, [item])[item]
    model = load_component(component, dtype=torch.float32, device="cpu").module
    for k, timestep in enumerate(STEPS):
        temb = model.time_text_embed(
            timestep[None] / 1000 * 1000, torch.tensor([3.5]) * 1000, pooled
        )
        at = 0
        for name in modulation.linear_names(component):
            norm = model.get_submodule(name.removesuffix(".linear"))
            expected = norm.linear(norm.silu(temb))[0]
            torch.testing.assert_close(
                table[k, at : at + len(expected)], expected, rtol=2e-6, atol=2e-6
            )
            at += len(expected)
        assert at == table.shape[1]


def test_the_key_holds_everything_a_table_depends_on(pooled):
    base = conditioned(pooled)
    assert conditioned(pooled.clone()) == base
    others = [
        conditioned(pooled + 1e-6),
        conditioned(pooled, guidance=3.6),
        conditioned(pooled, timesteps=STEPS[:2]),
        conditioned(pooled.to(torch.bfloat16)),
        modulation.make_condition(pooled, weights="v", guidance=3.5, timesteps=STEPS),
        replace(base, adapters=(("lora", 1.0),)),
        replace(base, adapters=(("lora", 0.5),)),
    ]
    assert len({base, *others}) == len(others) + 1


def test_many_prompts_in_one_pass_give_each_prompts_own_bits(checkpoint, pooled):
    component = checkpoint.components["transformer"]
    items = [conditioned(pooled), conditioned(pooled * 2), conditioned(pooled, timesteps=STEPS[:1])]
    together = modulation.make_tables(component, items)
    for item in items:
        alone = modulation.make_tables(component, [item])
        assert torch.equal(alone[item], together[item])


def test_after_condition_no_modulation_weight_has_storage_and_no_linear_runs(
    checkpoint, monkeypatch
):
    engine = engine_of(checkpoint)
    draw(engine, tiny())
    model = engine.components.loaded["transformer"].module
    owners = [name for name, _ in model.named_parameters() if is_modulation(name)]
    assert owners == []
    count = sum(p.numel() for p in model.parameters())
    whole = checkpoint.components["transformer"].numel
    assert count < 0.8 * whole  # a quarter of the transformer is gone
    calls = []
    original = torch.nn.functional.linear

    def spy(inputs, weight, bias=None):
        calls.append(inputs.shape[:-1].numel())
        return original(inputs, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", spy)
    draw(engine, tiny(seed=8))
    assert calls
    assert 1 not in calls  # modulation sees one row (1, width) of no picture


def test_every_norm_looks_at_one_static_row(checkpoint):
    engine = engine_of(checkpoint)
    draw(engine, tiny())
    model, row = (
        engine.components.loaded["transformer"].module,
        engine.components.rows["transformer"]._row,
    )
    views = [
        model.get_submodule(n)()
        for n in modulation.linear_names(checkpoint.components["transformer"])
    ]
    storage = {view.untyped_storage().data_ptr() for view in views}
    assert storage == {row.untyped_storage().data_ptr()}
    before = row.data_ptr()
    table = torch.arange(2 * row.shape[1], dtype=torch.float32).view(2, -1)
    engine.components.rows["transformer"].select(table, 1)
    assert row.data_ptr() == before
    assert torch.equal(torch.cat(views, dim=1), table[1:2])


def test_order_of_selection_decides_not_the_number_of_calls(checkpoint):
    """A forward that is repeated or skipped (step caches, retries) sees the same row."""
    engine = engine_of(checkpoint)
    _, expected = draw(engine, tiny())
    model = engine.components.loaded["transformer"].module
    forward = model.forward

    def twice(*args, **kwargs):
        forward(*args, **kwargs)
        return forward(*args, **kwargs)

    model.forward = twice
    _, pixels = draw(engine, tiny())
    assert (pixels == expected).all()
