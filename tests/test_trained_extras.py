"""The bundled LoRA and ControlNet, and the checker and the edge maps that judge them.

What they score is in training/README.md; here are their files, and that the judges see what is
there.
"""

import hashlib
import json
import random

import numpy as np
import pytest
import torch
from safetensors import safe_open

from fluxcli.paths import BUNDLED
from training import check, data, edges
from training.evaluate_pictures import input_pairs, repaints, to_image

SIZE = (128, 128)
LORA = BUNDLED / "lora" / "outline.safetensors"
CONTROLNET = BUNDLED / "control" / "edges"
OUTLINE_SHA256 = "0a7c4b9685e1cefd0c401fe643a9c27a4672c4fd8f0f288840e6ace3ad17c4f8"
EDGES_SHA256 = "8372c34539f040e2d184340d79edbf956def6b67b8f94bb79c812f00e2292e15"


@pytest.mark.parametrize("size", [(128, 128), (128, 80)])
def test_the_checker_sees_an_outline_where_there_is_one(size):
    facts = data.held_out_facts(40)
    for outlined in (True, False):
        pictures = data.render(facts, size, random.Random(3), outlined=outlined)
        for fact, picture in zip(facts, pictures, strict=True):
            seen = check.check_outlined(to_image(picture), fact)
            assert seen.pop("any outline") == outlined
            assert seen.pop("outline") == outlined
            assert all(seen.values()), (fact, seen)


def test_an_outline_has_a_colour_of_its_own():
    for fact in data.all_facts():
        assert data.outline_colour(fact) not in (fact.colour, fact.background)
    wrong = data.Fact("red", "circle", "black")  # outlined in white, not in black
    picture = data.render(
        [data.Fact("red", "circle", "blue")], SIZE, random.Random(1), outlined=True
    )
    seen = check.check_outlined(to_image(picture[0]), wrong)
    assert seen["any outline"] and not seen["outline"]


def test_an_edge_map_lies_on_the_edge():
    facts = data.held_out_facts(40)
    pictures = data.render(facts, SIZE, random.Random(4))
    distance = data.distances(facts, SIZE, random.Random(4))
    for lines in (edges.canny(pictures), edges.trace(distance, 1.5)):
        on_a_line = lines > 0.5
        assert (distance[on_a_line].abs() < 2.5).float().mean() > 0.99
        assert (on_a_line.sum((1, 2)) > 60).all()


def test_judged_maps_differ_from_their_prompts_and_from_one_another():
    pairs = edges.judged_pairs(200)
    assert len(pairs) == 200
    for pair in pairs:
        assert pair.said.held_out and pair.mapped.held_out and pair.shown.held_out
        assert pair.said.shape != pair.mapped.shape
        assert pair.said.position != pair.mapped.position
    some = [edges.fingerprint(edges.judged_map(pair, SIZE)) for pair in pairs[:20]]
    assert len(set(some)) == 20
    assert set(some) <= edges.judged_fingerprints(SIZE, 20)


def test_judged_inputs_are_held_out():
    for said, shown in input_pairs(40):
        assert said.held_out and shown.held_out
        assert said.shape != shown.shape and said.position != shown.position
    for each in repaints(5):
        painted = np.asarray(each.mask) > 0
        assert each.said.held_out and each.shown.held_out
        assert each.said.shape != each.shown.shape and each.said.colour != each.shown.colour
        assert 0.1 < painted.mean() < 0.75


def test_the_weights_are_the_published_ones():
    assert hashlib.sha256(LORA.read_bytes()).hexdigest() == OUTLINE_SHA256
    network = CONTROLNET / "diffusion_pytorch_model.safetensors"
    assert hashlib.sha256(network.read_bytes()).hexdigest() == EDGES_SHA256
    files = [path for path in BUNDLED.rglob("*.safetensors") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 14_000_000
    assert LORA.stat().st_size <= 700_000
    folder = [path for path in CONTROLNET.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in folder) <= 2_100_000


def test_the_weights_are_in_the_published_formats():
    with safe_open(LORA, "pt") as file:
        names = list(file.keys())
        assert {file.get_tensor(name).dtype for name in names} == {torch.bfloat16}
    assert len(names) == 98
    assert all(name.startswith("transformer.") and ".lora_" in name for name in names)
    config = json.loads((CONTROLNET / "config.json").read_text(encoding="utf-8"))
    assert config["_class_name"] == "FluxControlNetModel"
    assert (config["num_layers"], config["num_single_layers"]) == (1, 1)
    assert "_name_or_path" not in config
    with safe_open(CONTROLNET / "diffusion_pytorch_model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118
