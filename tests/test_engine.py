"""The engine: phases in order, seeds that mean pictures, nothing that is not finite."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fluxcli.engine import device as hardware
from fluxcli.engine.engine import Denoised, Drawn, Engine, EnginePhase
from fluxcli.engine.picture import Picture
from fluxcli.engine.recent import Recent
from fluxcli.errors import NotFinite
from fluxcli.events import Notice, Phase, Saved, Step
from fluxcli.pictures import names as output
from fluxcli.pictures.image import hash_pixels, read_metadata
from fluxcli.plan.placement import Placement
from quant.checkpoint import Checkpoint, inspect
from tests.support.helpers import draw, engine_of, picture_of, read_pixels, run, tiny


@pytest.fixture(scope="module")
def checkpoint(tiny_folder: Path) -> Checkpoint:
    return inspect(tiny_folder)


@pytest.fixture(scope="module")
def engine(checkpoint: Checkpoint):
    return engine_of(checkpoint)


def phases(events: list) -> list[str]:
    names = [event.name for event in events if isinstance(event, Phase)]
    return [name for k, name in enumerate(names) if k == 0 or names[k - 1] != name]


def test_phases_come_in_order_and_each_component_loads_once(checkpoint):
    events, _ = draw(engine_of(checkpoint), tiny())
    named = [name for name in phases(events) if name != "load"]
    assert list(dict.fromkeys(named)) == ["encode", "condition", "denoise", "decode"]
    loads = [event.detail for event in events if isinstance(event, Phase) and event.name == "load"]
    assert loads == ["tokenizers", "text_encoder", "text_encoder_2", "transformer", "vae"]
    assert [event.index for event in events if isinstance(event, Step)] == [1, 2, 3]


def test_a_new_seed_encodes_conditions_and_loads_nothing(engine):
    draw(engine, tiny())
    events, _ = draw(engine, tiny(seed=8))
    assert phases(events) == ["denoise", "decode"]


def test_a_new_guidance_makes_new_tables_but_no_new_embeddings(engine):
    draw(engine, tiny())
    events, _ = draw(engine, tiny(guidance=5.0))
    assert phases(events) == ["condition", "denoise", "decode"]


def test_encoders_leave_when_the_plan_does_not_keep_them(checkpoint):
    engine = engine_of(checkpoint)
    apart = replace(engine.plan, placement=Placement(keep=("transformer", "vae")))
    engine.adopt(apart, engine.hardware)
    draw(engine, tiny())
    assert set(engine.components.loaded) == {"transformer", "vae"}


def test_same_request_same_pixels_and_another_seed_other_pixels(checkpoint, engine):
    _, first = draw(engine, tiny())
    _, again = draw(engine_of(checkpoint), tiny())
    _, other = draw(engine, tiny(seed=8))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_picture_k_of_count_is_the_picture_of_that_seed_alone(engine, tmp_path):
    request = tiny(count=3, output=f"{tmp_path}/")
    target = output.parse_target(request.output)
    saved = [event.image for event in run(engine, request, target) if isinstance(event, Saved)]
    assert [image.seed for image in saved] == [7, 8, 9]
    for image in saved:
        _, alone = draw(engine, tiny(seed=image.seed))
        assert hash_pixels(alone) == image.pixels_sha256


def test_a_saved_picture_says_how_to_make_it_again(engine, checkpoint, tmp_path):
    from fluxcli.request.fields import Order

    request = tiny(seed=-1, count=2, output=f"{tmp_path}/")
    target = output.parse_target(request.output)
    for event in run(engine, request, target):
        if isinstance(event, Saved):
            path = Path(event.image.path)
            metadata = read_metadata(path)
            _, again = draw(engine, Order.from_json(metadata["request"]))
            assert np.array_equal(again, read_pixels(path))
            assert metadata["model"]["fingerprint"] == checkpoint.fingerprint
            assert metadata["pixels_sha256"] == event.image.pixels_sha256


def test_the_random_seed_is_reported(engine, tmp_path):
    request = tiny(seed=-1, output=f"{tmp_path}/")
    target = output.parse_target(request.output)
    seeds = {
        next(e.image.seed for e in run(engine, request, target) if isinstance(e, Saved))
        for _ in range(2)
    }
    assert len(seeds) == 2
    assert min(seeds) >= 0


def test_a_prompt_beyond_the_text_tokens_names_what_is_lost(engine):
    prompt = "a red circle on a blue background with a yellow star on a black background"
    events, _ = draw(engine, tiny(prompt=prompt, text_tokens=8))
    (notice,) = [event.message for event in events if isinstance(event, Notice)]
    assert "8 T5 tokens" in notice
    assert "black background" in notice


def test_nan_in_the_latents_is_an_error_and_no_file(checkpoint, tmp_path):
    engine = engine_of(checkpoint)
    draw(engine, tiny())
    engine.components.loaded["transformer"].module.proj_out.weight.data[0, 0] = float("nan")
    request = tiny(output=f"{tmp_path}/out/")
    target = output.parse_target(request.output)
    with pytest.raises(NotFinite):
        list(run(engine, request, target))
    assert not (tmp_path / "out").exists()


def test_a_vae_that_overflows_is_run_once_more_in_float32(checkpoint):
    engine = engine_of(checkpoint)
    half = replace(engine.plan, dtypes=engine.plan.dtypes | {"vae": "bfloat16"})
    engine.adopt(half, engine.hardware)
    draw(engine, tiny())
    vae, calls = engine.components.loaded["vae"].module, []
    real = vae.decode

    def decode(latents, **options):
        calls.append(latents.dtype)
        (decoded,) = real(latents, **options)
        return (decoded * float("inf"),) if len(calls) % 2 else (decoded,)

    vae.decode = decode
    events, pixels = draw(engine, tiny())
    assert any("float32" in event.message for event in events if isinstance(event, Notice))
    assert calls == [torch.bfloat16, torch.float32]
    assert next(vae.parameters()).dtype == torch.bfloat16  # the next picture starts as this one did
    assert np.array_equal(pixels, draw(engine, tiny())[1])
    vae.decode = lambda latents, **_: (real(latents, return_dict=False)[0] * float("nan"),)
    with pytest.raises(NotFinite, match="float32"):
        draw(engine, tiny())


def test_closing_the_generator_stops_within_a_step(engine):
    drawing = engine.draw([picture_of(engine, tiny(steps=50))])
    for event in drawing:
        if isinstance(event, Step) and event.index == 2:
            break
    drawing.close()
    with pytest.raises(StopIteration):
        next(drawing)
    assert torch.is_grad_enabled()


def test_an_engine_of_other_phases_hands_each_picture_over_as_it_has_its_pixels(checkpoint):
    """The last phase takes picture by picture; who takes a picture may free its pixels."""
    said = []

    def note(name: str):
        def run(_: object, pictures: list) -> Iterator[Notice]:
            said.append((name, [picture.request.seed for picture in pictures]))
            yield Notice(name)
            for picture in pictures:
                picture.pixels = np.zeros((4, 4, 3), np.uint8) if name == "paint" else None

        return EnginePhase(name, run)

    plan, here = engine_of(checkpoint).plan, hardware.probe("cpu")
    engine = Engine(checkpoint, plan, here, phases=[note("think"), note("paint")])
    for event in engine.draw([Picture(tiny(seed=seed).request) for seed in (1, 2)]):
        if isinstance(event, Drawn):
            assert event.picture.pixels is not None
            event.picture.pixels = None
            said.append(("drawn", [event.picture.request.seed]))
    assert said == [
        ("think", [1, 2]),
        ("paint", [1]),
        ("drawn", [1]),
        ("paint", [2]),
        ("drawn", [2]),
    ]


@pytest.mark.parametrize(
    "keep, load_s, denoise_s, expected",
    [
        (("transformer", "vae"), 60.0, 6.0, True),  # the VAE stays beside the transformer
        ((), 60.0, 601.0, True),  # loading again takes less than a tenth of a picture
        ((), 60.0, 599.0, False),
        (("vae",), 60.0, 6.0, False),
    ],
)
def test_a_picture_is_decoded_before_the_next_one_where_that_is_cheap(
    keep, load_s, denoise_s, expected, checkpoint
):
    engine = engine_of(checkpoint)
    apart = replace(
        engine.plan,
        placement=Placement(keep=keep, decode="alone"),
        seconds=engine.plan.seconds | {"load": load_s, "denoise": denoise_s},
    )
    engine.adopt(apart, engine.hardware)
    said = []
    for event in engine.draw([picture_of(engine, tiny(seed=seed)) for seed in (1, 2)]):
        if isinstance(event, Denoised):
            said.append((event.picture.request.seed, event.decoded_next))
        if isinstance(event, Drawn):
            said.append(event.picture.request.seed)
    if expected:
        assert said == [(1, True), 1, (2, True), 2]
    else:
        assert said == [(1, False), (2, False), 1, 2]


def test_recent_values_stay_and_the_last_one_always_does():
    recent = Recent(10, weigh=len)
    for key, value in (("a", "xxxx"), ("b", "xxxx")):
        recent.keep(key, value)
    assert recent.get("a") == "xxxx" and recent.get("z") is None
    recent.keep("c", "xxx")  # b was used longest ago
    assert "b" not in recent and {key for key in "abc" if key in recent} == {"a", "c"}
    recent.keep("d", "x" * 11)
    assert [key for key in "abcd" if key in recent] == ["d"]


def test_the_frugal_imports_leave_out_what_a_picture_never_uses():
    """And torch.compile's machinery is still there for who asks."""
    import subprocess
    import sys

    from tests.support.helpers import ROOT

    code = (
        "import sys; from fluxcli.engine import classes\n"
        "classes.transformer(); classes.vae(); classes.clip(); classes.t5()\n"
        "classes.scheduler(); classes.clip_tokenizer(); classes.t5_tokenizer()\n"
        "from pathlib import Path; from quant.checkpoint import inspect\n"
        "from tests.support.helpers import draw, engine_of, tiny\n"
        "draw(engine_of(inspect(Path('presets/tiny'))), tiny())\n"
        "print(sorted({'sympy', 'torch._dynamo', 'torch.distributed.tensor'} & set(sys.modules)))\n"
        "import torch; assert torch.distributed.is_available()\n"
        "compiled = torch.compile(lambda x: x + 1, backend='eager')\n"
        "print(compiled(torch.ones(1)).item(), 'sympy' in sys.modules)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert run.stdout.split("\n")[:2] == ["[]", "2.0 True"]
