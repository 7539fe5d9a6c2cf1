"""The bundled model draws what a prompt says: held-out sentences through the engine, judged by
pixels.

The full figures are in training/README.md; samples here are small, so their limits leave room for
chance.
"""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fluxcli.request import presets
from fluxcli.request.fields import Order
from quant.checkpoint import inspect
from tests.support.helpers import draw, draw_all, engine_of
from training import check, data

LIMIT_BYTES = 12_000_000


def request_of(prompt: str, tmp_path: Path, **flags: object):
    settings = presets.merge({"preset": "tiny", "device": "cpu", **flags}, tmp_path, {})
    return Order.from_settings(prompt, settings.values)


def score(facts: list, tiny_folder: Path, tmp_path: Path, **flags: object) -> dict[str, float]:
    """The share of pictures that show each of the five words of their facts."""
    requests = [
        request_of(data.prompt(fact), tmp_path, seed=k, **flags) for k, fact in enumerate(facts)
    ]
    engine = engine_of(inspect(tiny_folder), requests[0])
    drawn = draw_all(engine, requests)
    seen = [
        check.check(Image.fromarray(pixels), fact)
        for pixels, fact in zip(drawn, facts, strict=True)
    ]
    return {name: sum(each[name] for each in seen) / len(seen) for name in check.ATTRIBUTES}


def test_at_its_default_size_it_draws_what_held_out_sentences_say(tiny_folder, tmp_path):
    right = score(data.held_out_facts(80), tiny_folder, tmp_path)
    assert min(right["background"], right["colour"]) >= 0.97
    assert right["position"] >= 0.95
    assert right["shape"] >= 0.92


@pytest.mark.parametrize(
    ("ratio", "size"),
    [
        ("16:9", 128),
        ("9:16", 256),
        *(
            pytest.param(*each, marks=pytest.mark.exhaustive)
            for each in (("9:16", 128), ("1:1", 256), ("16:9", 256))
        ),
    ],
)
def test_at_other_sizes_too(tiny_folder, tmp_path, ratio, size):
    right = score(
        data.held_out_facts(92)[80:], tiny_folder, tmp_path, aspect_ratio=ratio, image_size=size
    )
    assert min(right["background"], right["colour"], right["position"]) >= 0.85
    assert right["shape"] >= 0.6


def test_guidance_is_seen(tiny_folder, tmp_path):
    facts = data.held_out_facts(6)
    apart = []
    for fact in facts:
        low, high = (
            request_of(data.prompt(fact), tmp_path, seed=1, guidance=g) for g in ("1.0", "6.0")
        )
        engine = engine_of(inspect(tiny_folder), low)
        (_, first), (_, second) = draw(engine, low), draw(engine, high)
        apart.append(np.abs(first.astype(int) - second.astype(int)).mean())
    assert min(apart) > 0.5  # of 255, over all pixels, in every picture


def test_the_checker_finds_every_word_of_true_renders():
    rng = random.Random(5)
    for ratio in data.RATIOS:
        for size in (128, 256):
            facts = data.held_out_facts(40)
            pictures = data.render(facts, data.picture_size(size, ratio), rng)
            for fact, picture in zip(facts, pictures, strict=True):
                pixels = ((picture.permute(1, 2, 0).numpy() + 1) * 127.5).round().astype(np.uint8)
                assert all(check.check(Image.fromarray(pixels), fact).values()), (fact, ratio, size)


def test_the_checker_sees_each_wrong_word():
    rng = random.Random(6)
    fact = data.Fact("red", "star", "blue", "small", "top left")
    pixels = (
        (data.render([fact], (128, 128), rng)[0].permute(1, 2, 0).numpy() + 1) * 127.5
    ).astype(np.uint8)
    wrong = {
        "colour": "green",
        "shape": "circle",
        "background": "white",
        "size": "large",
        "position": "right",
    }
    for name, word in wrong.items():
        lie = data.Fact(**{**fact.__dict__, name: word})
        found = check.check(Image.fromarray(pixels), lie)
        assert not found[name]


def test_the_checker_and_the_renderer_share_no_code():
    source = Path(check.__file__).read_text()
    assert "import data" not in source
    assert "torch" not in source.replace("no torch", "")


def test_held_out_facts_are_never_trained_on():
    rng = random.Random(1)
    held = set(data.held_out_facts())
    assert len(held) >= 500
    assert not held & {data.training_fact(rng) for _ in range(5000)}


def test_it_is_small_and_in_the_published_layout(tiny_folder):
    files = [path for path in tiny_folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= LIMIT_BYTES
    checkpoint = inspect(tiny_folder)
    assert {
        w.info.dtype for part in checkpoint.components.values() for w in part.weights.values()
    } == {"BF16"}
    assert checkpoint.takes_guidance
    vae = checkpoint.components["vae"].config
    assert (vae["latent_channels"], len(vae["block_out_channels"])) == (16, 4)
    assert (
        json.loads((tiny_folder / "model_index.json").read_text())["_class_name"] == "FluxPipeline"
    )
