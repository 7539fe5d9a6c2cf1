"""Compiled blocks: one graph a kind, whatever is drawn; the same pixels; nothing is lost where it
fails.

torch's "eager" way of running a graph stands for inductor, which takes a compiler and seconds.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fluxcli import paths
from fluxcli.engine import blocks, compiling
from fluxcli.engine.engine import Drawn, Engine
from fluxcli.events import Notice
from fluxcli.models.parts import resolve_parts
from fluxcli.pictures.image import read_metadata
from fluxcli.pictures.inputs import load_inputs
from fluxcli.plan import costs
from fluxcli.plan.placement import Placement
from fluxcli.plan.planner import COMPILED
from quant import kernels, linear
from quant.checkpoint import Checkpoint, inspect
from quant.single_file import assemble_checkpoint
from tests.support.controlnets import save_map
from tests.support.helpers import BAKED, draw, engine_of, order, picture_of, tiny
from tests.support.invariant import call
from tests.support.loras import write_lora, write_special

# 64x64 has as many tokens as the text, 16: lengths that are equal once are no constants.
SIZES = ({"width": 64, "height": 64}, {"width": 96, "height": 64}, {"width": 48, "height": 128})


@pytest.fixture(scope="module")
def checkpoint(tiny_folder: Path) -> Checkpoint:
    return inspect(tiny_folder)


@pytest.fixture(scope="module")
def graphs() -> Iterator[list[torch.fx.GraphModule]]:
    """The graphs that were made; a guard that fails is an error instead of another graph."""
    torch._dynamo.reset()
    made: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> Callable:
        made.append(graph)
        return graph.forward

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiling, "BACKEND", keep)
        with torch._dynamo.config.patch(error_on_recompile=True):
            yield made
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def loras(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Adapters on all layers, with two ranks, and one that changes norms."""
    folder = tmp_path_factory.mktemp("loras")
    paths = {name: folder / f"{name}.safetensors" for name in ("small", "large", "norms")}
    write_lora(paths["small"], checkpoint, rank=2, size=2)
    write_lora(paths["large"], checkpoint, rank=8, seed=3, size=2)
    write_special(paths["norms"], checkpoint)
    return {name: str(path) for name, path in paths.items()}


def compiled_engine(checkpoint: Checkpoint, placement: Placement | None = None) -> Engine:
    """An engine that compiles, with the usual placement or another one."""
    engine = engine_of(checkpoint, tiny(compile=True))
    if placement:
        plan = replace(engine.plan, placement=placement)
        engine = Engine(checkpoint, plan, engine.hardware)
    return engine


def test_sizes_steps_and_adapters_share_one_graph_a_kind_with_the_same_pixels(
    checkpoint, graphs, loras
):
    plain = engine_of(checkpoint)
    compiled = compiled_engine(checkpoint)
    adapters = ([], [loras["small"]], [loras["large"]])
    for size, steps, lora in (
        (SIZES[0], 2, adapters[0]),
        (SIZES[1], 3, adapters[1]),
        (SIZES[2], 2, adapters[2]),
        (SIZES[1], 2, adapters[0]),
        (SIZES[0], 3, adapters[2]),
    ):
        request = tiny(**size, steps=steps, lora=lora)
        _, pixels = draw(compiled, request)
        assert compiled.components.compiler.failure == ""
        assert np.array_equal(pixels, draw(plain, request)[1])
    assert len(graphs) == 2


def test_a_controlnet_shares_the_graphs(checkpoint, graphs, controlnet):
    """Its blocks are the transformer's: none is compiled again."""
    save_map(Path("map.png"))
    request = tiny(steps=2, control=[f"{controlnet('single')}:map.png:0.5"])
    parts = resolve_parts(request.request, checkpoint)
    together = parts.add_to(checkpoint)
    pixels = []
    for engine in (engine_of(together), compiled_engine(together)):
        picture = picture_of(engine, request)
        picture.controls = parts.controls
        picture.inputs = load_inputs(request.request)
        assert any(isinstance(event, Drawn) for event in engine.draw([picture]))
        pixels.append(picture.pixels)
    assert engine.components.compiler.failure == ""
    assert np.array_equal(*pixels)
    assert len(graphs) == 2


@pytest.mark.parametrize(
    ("precision", "level"),
    [
        ("nf4", "streamed"),
        ("fp8", "sequential"),
        ("w4a8", "streamed"),
        ("gguf Q4_0", "sequential"),
        pytest.param("int8", "streamed", marks=pytest.mark.exhaustive),
        pytest.param("w6a8", "sequential", marks=pytest.mark.exhaustive),
    ],
)
def test_packed_and_passing_blocks_share_the_graphs(
    precision, level, tiny_folder, baked, exported, graphs, loras
):
    if precision.startswith("gguf"):
        packed = assemble_checkpoint(exported(precision)[0], lambda _: tiny_folder)
    else:
        packed = inspect(baked(precision, **BAKED.get(precision, {})))
    blocks = range(0, len(costs.block_names(packed.components["transformer"])), 2)
    placement = Placement(
        denoise=level, decode="alone", streamed=tuple(blocks) if level == "streamed" else ()
    )
    compiled = compiled_engine(packed, placement)
    request = tiny(**SIZES[1], steps=2, lora=[loras["small"]])
    _, pixels = draw(compiled, request)
    assert compiled.components.compiler.failure == ""
    assert np.array_equal(pixels, draw(engine_of(packed), request)[1])
    assert len(graphs) <= 2


def test_blocks_whose_norms_an_adapter_changes_are_computed_as_without(checkpoint, graphs, loras):
    compiled = compiled_engine(checkpoint)
    for lora in ([loras["norms"]], []):
        request = tiny(steps=2, lora=lora)
        _, pixels = draw(compiled, request)
        assert compiled.is_compiled
        assert np.array_equal(pixels, draw(engine_of(checkpoint), request)[1])


def test_kernels_are_operators_of_the_graphs(baked, graphs, monkeypatch):
    """As on a card, but by comfy-kitchen's eager back end: the pixels are those without graphs."""
    packed = inspect(baked("int8"))
    multiply = linear.Multiplication(f"{kernels.PREFIX}eager")
    monkeypatch.setitem(linear.PROBED, ("int8", "cpu"), multiply)
    monkeypatch.setattr(blocks, "choose_backend", lambda *_, **__: kernels.Choice("eager"))
    request = tiny(**SIZES[1], steps=2, precision="int8")
    _, expected = draw(engine_of(packed, request), request)
    torch._dynamo.reset()  # these graphs are others, which no test of shared ones may meet
    before = len(graphs)
    compiled = engine_of(packed, tiny(**SIZES[1], steps=2, precision="int8", compile=True))
    with torch._dynamo.config.patch(error_on_recompile=False):
        _, pixels = draw(compiled, request)
    assert compiled.components.compiler.failure == "" and np.array_equal(pixels, expected)
    made = graphs[before:]
    assert len(made) == 2
    for graph in made:
        called = " ".join(str(node.target) for node in graph.graph.nodes)
        assert "flux.rms_rope" in called and "flux.adaln" in called


# --- where it fails


def use(monkeypatch: pytest.MonkeyPatch, backend: object) -> None:
    """Compile by this back end from now on, and nothing of what was compiled before counts."""
    torch._dynamo.reset()
    monkeypatch.setattr(compiling, "BACKEND", backend)


def break_compiler(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object) -> None:
        raise error

    use(monkeypatch, fail)


def test_what_cannot_be_compiled_is_drawn_without_and_said_once(checkpoint, monkeypatch):
    expected = draw(engine_of(checkpoint), tiny(steps=2))[1]
    break_compiler(monkeypatch, RuntimeError("no C++ compiler was found\nand so on"))
    engine = compiled_engine(checkpoint)
    assert engine.is_compiled
    events, pixels = draw(engine, tiny(steps=2))
    again, _ = draw(engine, tiny(steps=2, seed=8))
    said = [event.message for event in events if isinstance(event, Notice)]
    assert sum("not compiled" in each and "no C++ compiler" in each for each in said) == 1
    assert not any(isinstance(event, Notice) for event in again)
    assert np.array_equal(pixels, expected) and not engine.is_compiled


def test_memory_that_ends_while_compiling_steps_down_as_ever(checkpoint, monkeypatch):
    break_compiler(monkeypatch, torch.OutOfMemoryError("CUDA out of memory"))
    engine = compiled_engine(checkpoint)
    model = engine.components
    with pytest.raises(Exception, match="out of memory"):
        draw(engine, tiny(steps=2))
    assert model.compiler.failure == ""


# --- the setting


def test_it_is_a_setting_like_any_other_and_stands_in_the_metadata(capsys, monkeypatch, checkpoint):
    arguments = ("generate", "a red circle", "-p", "tiny", "--steps", "1", "--size", "64")
    use(monkeypatch, "eager")
    assert call(capsys, *arguments, "--seed", "1", "-o", "with.png", "--compile").returncode == 0
    assert call(capsys, *arguments, "--seed", "1", "-o", "without.png").returncode == 0
    made, plain = (read_metadata(Path(name)) for name in ("with.png", "without.png"))
    assert (made["request"]["compile"], made["compute"]["compiled"]) == (True, True)
    assert plain["request"]["compile"] is False and "compiled" not in plain["compute"]
    assert made["pixels_sha256"] == plain["pixels_sha256"]
    assert order(**{"compile": "true"}).resources.compile
    assert COMPILED in call(capsys, "plan", "-p", "tiny", "--compile", "--json").stdout
    assert COMPILED not in call(capsys, "plan", "-p", "tiny", "--json").stdout
    result = call(capsys, "replay", "without.png", "--compile", "--check")
    assert result.returncode == 0 and "compiled then: no, here: yes" in result.stderr


def test_a_picture_that_fell_back_counts_as_done(checkpoint, monkeypatch, capsys):
    Path("rows.jsonl").write_text('{"prompt": "a red circle", "seed": 1, "compile": true}\n')
    arguments = ("generate", "-p", "tiny", "--steps", "1", "--size", "64", "--from", "rows.jsonl")
    break_compiler(monkeypatch, RuntimeError("no compiler"))
    assert call(capsys, *arguments, "-o", "out/").returncode == 0
    use(monkeypatch, "eager")
    result = call(capsys, *arguments, "-o", "out/", "--resume")
    assert result.returncode == 0 and len(list(Path("out").iterdir())) == 1


def test_compilers_keep_what_they_make_in_the_users_cache_and_it_can_be_cleared(
    monkeypatch, capsys
):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    compiling._choose_caches()
    folder = paths.compiled_folder() / "inductor"
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(folder) and folder.is_dir()
    assert os.environ["TRITON_CACHE_DIR"] == "/elsewhere"
    (folder / "kernel.so").write_bytes(bytes(3 << 20))
    assert json.loads(call(capsys, "cache", "--json").stdout)["compiled_bytes"] == 3 << 20
    assert "deleted 3.0 MiB that --compile made" in call(capsys, "cache", "--clear").stderr
    assert not paths.compiled_folder().exists()


@pytest.mark.exhaustive
@pytest.mark.parametrize("precision", ["fp32", "nf4", "fp8"])
def test_inductor_gives_the_same_picture_within_one_level(
    precision, checkpoint, baked, monkeypatch, loras
):
    """In fp8 a last bit can become a step where activations are rounded: less than fp8 costs."""
    use(monkeypatch, "inductor")
    packed = checkpoint if precision == "fp32" else inspect(baked(precision, **BAKED[precision]))
    compiled = compiled_engine(packed)
    plain = engine_of(packed)
    exact = engine_of(checkpoint)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size, lora in zip(SIZES, ([], [loras["small"]], [loras["large"]]), strict=True):
            request = tiny(**size, lora=lora)
            pixels = draw(compiled, request)[1].astype(int)
            expected = draw(plain, request)[1].astype(int)
            assert compiled.components.compiler.failure == ""
            difference = np.abs(pixels - expected)
            if precision == "fp8":
                rounded = np.abs(expected - draw(exact, request)[1])
                assert difference.mean() < rounded.mean()
            else:
                assert difference.max() <= 1
