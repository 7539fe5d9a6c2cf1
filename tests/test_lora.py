"""Adapters at run time: FluxPipeline's pictures, on every precision and placement."""

import functools
import gc
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.counting import CARD, Counter
from fluxcli.engine.blocks import single_block
from fluxcli.engine.engine import Engine
from fluxcli.engine.lora_hooks import attach
from fluxcli.events import Phase
from fluxcli.request.fields import Order
from fluxcli.run.saving import make_metadata
from quant import lora
from quant.checkpoint import Checkpoint, Component, inspect
from quant.errors import CheckpointError
from quant.single_file import assemble_checkpoint
from quant.spec import QuantSpec
from tests.support.helpers import BAKED, ROOT, changed, draw, engine_of, picture_of, tiny
from tests.support.loras import (
    linear_layers,
    low_rank,
    peft_tensors,
    write_described,
    write_lora,
    write_special,
)
from tests.test_placement import WAYS, forward, inputs, place

BLOCKS = r"(single_)?transformer_blocks\.\d+\.(attn|ff|proj).*"
SPECS: dict[str, dict] = BAKED | {"w6a8": {}, "w4a8": {}}
MOVES = 10  # of 255: what a picture differs at least with an adapter that acts
MODULATION = r".*norm\w*\.linear|time_text_embed.*"


@pytest.fixture(scope="module")
def checkpoint(tiny_folder: Path) -> Checkpoint:
    return inspect(tiny_folder)


@pytest.fixture(scope="module")
def engine(checkpoint: Checkpoint) -> Engine:
    return engine_of(checkpoint)


@pytest.fixture(scope="module")
def files(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters by what they act on, each strong enough to change the picture."""
    folder, made = tmp_path_factory.mktemp("loras"), {}
    for name, components, pattern, size in (
        ("blocks", ("transformer",), BLOCKS, 3),
        ("ends", ("transformer",), "x_embedder|context_embedder|proj_out", 3),
        ("modulation", ("transformer",), MODULATION, 3),
        ("everything", ("transformer", "text_encoder"), ".*", 2),
        ("clip", ("text_encoder",), ".*", 20),
        ("t5", ("text_encoder_2",), ".*", 10),
    ):
        path = folder / f"{name}.safetensors"
        made[name] = write_lora(path, checkpoint, components, pattern, size=size, seed=len(made))
    made["special"] = write_special(folder / "special.safetensors", checkpoint)
    made["described"] = write_described(folder / "described.safetensors", checkpoint)
    return made


def using(files: dict[str, Path], **scales: float) -> Order:
    return tiny(lora=tuple(f"{files[name]}:{scale}" for name, scale in scales.items()))


def apart(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one.astype(int) - other.astype(int)).max())


# --- against FluxPipeline and peft


COMBINATIONS = [
    {"blocks": 1.0},
    {"ends": 1.0},
    {"modulation": 1.0},
    {"clip": 1.0},
    {"everything": 0.7},
    {"special": 1.0},
    {"described": 0.9},
    {"blocks": 0.5, "modulation": -0.8},
    {"everything": -0.4, "blocks": 0.6, "clip": 0.3},
]


@pytest.fixture(scope="module")
def expected(
    files: dict[str, Path], tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict:
    """FluxPipeline's pictures with each combination, made where diffusers imported peft."""
    asked = {
        str(scales): [[str(files[name]), scale] for name, scale in scales.items()]
        for scales in COMBINATIONS
    }
    out = tmp_path_factory.mktemp("pipeline") / "pictures.npz"
    command = [sys.executable, "-W", "ignore", "-m", "tests.support.loras"]
    command += [str(tiny_folder), str(out), json.dumps(asked)]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    return dict(np.load(out))


@pytest.mark.parametrize("scales", COMBINATIONS, ids=str)
def test_pictures_are_those_of_fluxpipeline_with_peft(scales, files, engine, expected):
    _, plain = draw(engine, tiny())
    _, pixels = draw(engine, using(files, **scales))
    assert apart(pixels, expected[str(scales)]) <= 1
    assert apart(pixels, plain) > MOVES


@pytest.mark.parametrize("name", ["t5", "clip", "everything"])
def test_pictures_are_those_of_a_model_with_the_adapter_in_its_weights(
    name, files, engine, tiny_folder, tmp_path
):
    """diffusers loads no adapter of T5."""
    import shutil

    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    stored = load_file(files[name])
    for part in ("transformer", "text_encoder", "text_encoder_2"):
        (path,) = (folder / part).glob("*.safetensors")
        tensors = load_file(path)
        for key in [key for key in stored if key.startswith(f"{part}.") and "lora_A" in key]:
            layer = key.removeprefix(f"{part}.").removesuffix(".lora_A.weight")
            tensors[f"{layer}.weight"] = (
                tensors[f"{layer}.weight"].float()
                + stored[key.replace("lora_A", "lora_B")] @ stored[key]
            )
        save_file(tensors, path)
    _, pixels = draw(engine, using(files, **{name: 1.0}))
    _, merged = draw(engine_of(inspect(folder)), tiny())
    assert apart(pixels, merged) <= 1
    assert apart(pixels, draw(engine, tiny())[1]) > MOVES


# --- the base


def digest(model: nn.Module) -> str:
    """Of the model's tensors, but for the static row of its modulation."""
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not tensor.is_meta}
    found = hashlib.sha256()
    for name, tensor in tensors.items():
        found.update(
            name.encode() + tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        )
    return found.hexdigest()


def model_in(dialect: str, exported: Callable, tiny_folder: Path) -> tuple[Checkpoint, Order]:
    """The bundled model, and a request: to be packed while loading, or of a single file."""
    if " " in dialect:
        return assemble_checkpoint(exported(dialect)[0], lambda _: tiny_folder), tiny()
    return inspect(tiny_folder), tiny(precision=dialect)


def loaded_modules(engine: Engine) -> dict[str, torch.nn.Module]:
    return {name: loaded.module for name, loaded in engine.components.loaded.items()}


@pytest.mark.parametrize("dialect", ["fp32", *BAKED, "gguf Q8_0", "nf4 v1"])
def test_switching_adapters_loads_nothing_and_leaves_the_base_as_it_was(
    dialect, files, exported, tiny_folder
):
    checkpoint, request = model_in(dialect, exported, tiny_folder)
    engine, precision = engine_of(checkpoint, request), request.resources.precision
    _, plain = draw(engine, request)
    models = loaded_modules(engine)
    assert {"transformer", "text_encoder", "text_encoder_2"} <= set(models)
    before = {name: digest(model) for name, model in models.items()}
    pictures = []
    for names in (("blocks",), ("everything", "t5"), ("modulation",), ("blocks",)):
        asked = changed(using(files, **dict.fromkeys(names, 0.5)), precision=precision)
        events, pixels = draw(engine, asked)
        assert {
            event.detail for event in events if isinstance(event, Phase) and event.name == "load"
        } <= {"tokenizers"}
        assert {name: digest(model) for name, model in loaded_modules(engine).items()} == before
        assert apart(pixels, plain) > MOVES
        pictures.append(pixels)
    assert np.array_equal(pictures[0], pictures[3]) and not np.array_equal(pictures[0], pictures[1])
    assert np.array_equal(draw(engine, request)[1], plain)
    assert all(loaded_modules(engine)[name] is model for name, model in models.items())
    assert {name: digest(model) for name, model in models.items()} == before


@pytest.mark.parametrize("dialect", ["fp32", *BAKED, "gguf Q4_0"])
def test_scale_0_is_no_adapter_bit_for_bit(dialect, files, exported, tiny_folder):
    checkpoint, request = model_in(dialect, exported, tiny_folder)
    engine, precision = engine_of(checkpoint, request), request.resources.precision
    _, plain = draw(engine, request)
    _, off = draw(engine, changed(using(files, everything=0, t5=0), precision=precision))
    _, on = draw(engine, changed(using(files, everything=1e-1, t5=1), precision=precision))
    assert np.array_equal(off, plain)
    assert apart(on, plain) > MOVES


def test_the_same_adapter_again_computes_nothing_anew_and_another_scale_does(files, engine):
    draw(engine, using(files, everything=0.5))
    kinds = []
    for scale in (0.5, 0.6):
        events, _ = draw(engine, using(files, everything=scale))
        kinds.append({event.name for event in events if isinstance(event, Phase)} - {"load"})
    assert kinds == [{"denoise", "decode"}, {"encode", "condition", "denoise", "decode"}]
    # acts on neither prompt nor modulation
    events, _ = draw(engine, using(files, everything=0.6, blocks=0.1))
    assert {event.name for event in events if isinstance(event, Phase)} - {"load"} == {
        "denoise",
        "decode",
    }


# --- every precision, wherever the blocks are


@dataclass(frozen=True)
class Resident:
    """A precision's component, how it is loaded, and its results with all on the device."""

    component: Component
    dtype: torch.dtype
    spec: QuantSpec | None
    plain: torch.Tensor  # (1, 64, 64), without adapters
    expected: torch.Tensor  # (1, 64, 64), with them


@pytest.fixture(scope="module")
def adapters(checkpoint: Checkpoint, files: dict[str, Path]) -> list[lora.Adapter]:
    return [
        lora.read_adapter(files[name], checkpoint.components, scale=0.6)
        for name in ("blocks", "everything")
    ]


@pytest.fixture(scope="module")
def resident(
    checkpoint: Checkpoint, adapters: list, baked: Callable, exported: Callable, tiny_folder: Path
) -> Callable[[str], Resident]:
    """The resident results of a precision, computed once."""

    @functools.cache
    def of(precision: str) -> Resident:
        to, _, packs = precision.partition(" ")
        component, spec = checkpoint.components["transformer"], None
        if to == "packed":
            spec = QuantSpec(packs, **SPECS[packs])
        elif packs:
            whole = assemble_checkpoint(exported(precision)[0], lambda _: tiny_folder)
            component = whole.components["transformer"]
        elif to in SPECS:
            component = inspect(baked(to, **SPECS[to])).components["transformer"]
        dtype = torch.bfloat16 if to == "bf16" else torch.float32
        given = inputs(dtype)
        model = place(component, (), dtype=dtype, spec=spec)
        plain = forward(model, given)
        attach(model.module, adapters, "transformer", places=model.places, dtype=dtype, device=CARD)
        return Resident(component, dtype, spec, plain, forward(model, given))

    return of


PLACED = ["fp32", "bf16", *BAKED, *(f"packed {to}" for to in BAKED), "gguf Q4_0", "nf4 v2"]
OFTEN = ["two", "all from their file"]
# Beside int8, with which they share their layers.
RARE = ["w6a8", "w4a8", "packed w6a8", "packed w4a8"]


@pytest.mark.parametrize(
    ("precision", "way"),
    [
        *((precision, way) for precision in PLACED for way in OFTEN),
        *(("nf4", way) for way in ("odd", "all", "two from their file")),
        ("w4a8", "two"),
        *(
            pytest.param(precision, way, marks=pytest.mark.exhaustive)
            for precision in RARE
            for way in WAYS
            if (precision, way) != ("w4a8", "two")
        ),
        *(
            pytest.param(precision, way, marks=pytest.mark.exhaustive)
            for precision in PLACED
            for way in ("odd", "all", "two from their file")
            if precision != "nf4"
        ),
    ],
)
def test_every_placement_gives_the_resident_result_bit_for_bit(resident, adapters, precision, way):
    wanted = resident(precision)
    plain, expected = wanted.plain, wanted.expected
    assert (expected - plain).abs().max() > 0.1 * plain.abs().max()
    blocks, arena = WAYS[way]
    given = inputs(wanted.dtype)
    model = place(wanted.component, blocks, arena=arena, dtype=wanted.dtype, spec=wanted.spec)
    for _ in range(2):
        handles = attach(
            model.module,
            adapters,
            "transformer",
            places=model.places,
            dtype=wanted.dtype,
            device=CARD,
        )
        for _ in range(2):
            assert torch.equal(forward(model, given), expected)
        for handle in handles:
            handle.remove()
        assert torch.equal(forward(model, given), plain)


@pytest.mark.parametrize("to", [None, *SPECS])
def test_a_layer_adds_the_product_to_what_it_gives_alone(checkpoint, tmp_path, baked, to):
    """On rows of a fused layer, with two adapters in their order."""
    component = (
        inspect(baked(to, **SPECS[to])).components["transformer"]
        if to
        else checkpoint.components["transformer"]
    )
    model, shapes = (
        place(component, ()),
        linear_layers(checkpoint, "transformer", r"single_.*\.0\.(attn.to_k|proj_mlp)"),
    )
    pairs = [low_rank(shapes, seed=seed) for seed in (1, 2)]
    for n, each in enumerate(pairs):
        save_file(peft_tensors("transformer", each), tmp_path / f"{n}.safetensors")
    adapters = [
        lora.read_adapter(tmp_path / f"{n}.safetensors", checkpoint.components, scale=n + 0.5)
        for n in (0, 1)
    ]
    layer, x = model.module.single_transformer_blocks[0].proj_in, torch.randn(1, 5, 128)
    with torch.no_grad():
        plain = layer(x)
        attach(
            model.module,
            adapters,
            "transformer",
            places=model.places,
            dtype=torch.float32,
            device=CARD,
        )
        added = layer(x) - plain
        for name, columns in (("attn.to_k", slice(128, 256)), ("proj_mlp", slice(384, None))):
            (a, b), (c, d) = (each[f"single_transformer_blocks.0.{name}"] for each in pairs)
            assert torch.allclose(
                added[..., columns], 0.5 * x @ a.T @ b.T + 1.5 * x @ c.T @ d.T, atol=2e-4
            )
            added[..., columns] = 0
    assert not added.any()


def test_blocks_with_adapters_compile_without_a_break(checkpoint, files, monkeypatch):
    torch._dynamo.reset()  # what other tests compiled counts towards its limit
    component, given = checkpoint.components["transformer"], inputs()
    adapters = [lora.read_adapter(files["blocks"], checkpoint.components, scale=0.5)]
    model = place(component, ())
    plain = forward(model, given)
    attach(
        model.module, adapters, "transformer", places=model.places, dtype=torch.float32, device=CARD
    )
    expected = forward(model, given)
    kind = single_block()
    monkeypatch.setattr(
        kind, "forward", torch.compile(kind.forward, backend="eager", fullgraph=True)
    )
    model = place(component, (2, 3, 4, 6))
    attach(
        model.module, adapters, "transformer", places=model.places, dtype=torch.float32, device=CARD
    )
    for _ in range(2):
        assert torch.equal(forward(model, given), expected)
    assert not torch.allclose(expected, plain, rtol=0.1)


def test_an_adapter_takes_its_own_bytes_and_those_of_the_small_product(checkpoint, files):
    """Nothing of the size of an output."""
    adapter, component = (
        lora.read_adapter(files["blocks"], checkpoint.components),
        checkpoint.components["transformer"],
    )
    counter = Counter()
    with torch.no_grad(), counter:
        given, model = inputs(), place(component, ())
        forward(model, given)
        bare, before = counter.live[True], counter.peaks.pop("")
        handles = attach(
            model.module,
            [adapter],
            "transformer",
            places=model.places,
            dtype=torch.float32,
            device=CARD,
        )
        held = counter.live[True] - bare
        counter.peaks.clear()
        forward(model, given)
        peak = counter.peaks[""]
        for handle in handles:
            handle.remove()
        del handle, handles
        gc.collect()
        assert counter.live[True] == bare
    assert held == adapter.numel("transformer") * 4
    assert peak - before <= held + 4 * 80 * 4 * 2  # 80 tokens, rank 4


# --- what goes wrong


def test_an_adapter_that_is_not_finite_leaves_nothing_behind(files, engine, tmp_path):
    """The next request on the same engine draws what it drew before."""
    good = using(files, blocks=1.0)
    _, before = draw(engine, good)
    bad = {name: tensor.clone() for name, tensor in load_file(files["ends"]).items()}
    next(iter(bad.values())).fill_(float("nan"))
    save_file(bad | load_file(files["blocks"]), tmp_path / "nan.safetensors")
    with pytest.raises(CheckpointError, match="not finite"):
        draw(engine, changed(good, lora=(f"{tmp_path}/nan.safetensors:1.0",)))
    assert np.array_equal(draw(engine, good)[1], before)
    assert apart(draw(engine, tiny())[1], before) > MOVES


def test_a_picture_is_described_though_its_adapter_is_gone(files, checkpoint, tmp_path):
    path = shutil.copy(files["blocks"], tmp_path / "x.safetensors")
    request, engine = tiny(lora=(f"{path}:1.0",)), engine_of(checkpoint)
    picture = picture_of(engine, request)
    list(engine.draw([picture]))
    Path(path).unlink()
    (identity,) = make_metadata(engine, request, picture)["lora"].values()
    assert identity == f"{lora.read_adapter(files['blocks'], checkpoint.components).identity} x 1.0"
