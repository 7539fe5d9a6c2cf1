"""Redux: pictures that look like others, as diffusers' FluxPriorReduxPipeline makes them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fluxcli.engine.engine import Engine
from fluxcli.errors import UsageError, WeightsUnavailable
from fluxcli.events import Phase
from fluxcli.models import find
from fluxcli.models.redux import PUBLISHED_REDUX, find_redux
from fluxcli.models.shapes import read_known_shapes
from fluxcli.request.fields import Order
from fluxcli.resolve import resolve_order
from fluxcli.run.saving import make_metadata
from quant.checkpoint import inspect
from quant.errors import CheckpointError
from quant.expected import list_shapes
from quant.redux import PUBLISHED_CONFIGS, count_tokens
from tests.support.helpers import tiny
from tests.support.pictures import (
    begin_picture,
    count_levels_apart,
    draw_by_diffusers,
    draw_from,
    make_engine,
    make_picture,
    make_prior,
)
from tests.support.redux import FILES, SMALL, write_redux, write_sparse

MOVED = 8  # of 255: by more than this a look moves a picture
SIGLIP = {name: each for name, each in SMALL["image_encoder"].items() if name != "architectures"}
TEXT_WIDTH = SMALL["image_embedder"]["txt_in_features"]


@pytest.fixture(scope="session")
def redux_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Redux for the bundled model, in the published layout."""
    folder = tmp_path_factory.mktemp("redux") / "redux"
    prior = make_prior(SIGLIP, TEXT_WIDTH)
    with torch.no_grad():
        prior.image_embedder.redux_down.weight.mul_(8)
    prior.save_pretrained(folder)
    return folder


def load_prior(folder: Path, model: Path | None = None) -> Any:
    """diffusers' pipeline over Redux of a folder, with the text encoders of a model."""
    from diffusers import FluxPipeline, FluxPriorReduxPipeline

    parts = {}
    if model:
        pipe = FluxPipeline.from_pretrained(
            model, transformer=None, vae=None, torch_dtype=torch.float32
        )
        names = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
        parts = {name: pipe.components[name] for name in names}
    return FluxPriorReduxPipeline.from_pretrained(folder, torch_dtype=torch.float32, **parts)


def redux_order(folder: Path, *redux: str, **changes: object) -> Order:
    """A small order of the bundled model, with as many text tokens as diffusers has here."""
    return tiny(redux=redux, redux_model=(str(folder),), text_tokens=512, **changes)


def test_pictures_are_those_of_diffusers(tiny_folder, redux_folder):
    """With a prompt and without, of one picture and of two, and weakened; all of them different."""
    from diffusers import FluxPipeline

    images = [make_picture(Path("a.png"), (90, 50)), make_picture(Path("b.png"), (40, 70))]
    prior = load_prior(redux_folder, tiny_folder)
    pipe = FluxPipeline.from_pretrained(tiny_folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    prompt = "a red circle on a blue background"

    def encode(*chosen: int) -> tuple[torch.Tensor, torch.Tensor]:
        return prior([images[each] for each in chosen], prompt, return_dict=False)

    sequence, pooled = encode(0)
    weak = torch.cat([sequence[:, :512], sequence[:, 512:] * 0.5], dim=1)
    zeros = torch.cat([torch.zeros_like(sequence[:, :512]), sequence[:, 512:]], dim=1)
    cases = [
        (redux_order(redux_folder, "a.png"), (sequence, pooled)),
        (redux_order(redux_folder, "a.png", prompt=""), (zeros, torch.zeros_like(pooled))),
        (redux_order(redux_folder, "a.png:0.5"), (weak, pooled)),
        (redux_order(redux_folder, "b.png"), encode(1)),
        (redux_order(redux_folder, "a.png", "b.png"), encode(0, 1)),
    ]
    engine = make_engine(inspect(tiny_folder), cases[0][0])
    drawn = [draw_from(engine, tiny(text_tokens=512))]  # what it draws without
    for order, embeddings in cases:
        given = dict(zip(("prompt_embeds", "pooled_prompt_embeds"), embeddings, strict=True))
        expected = draw_by_diffusers(pipe, order, prompt=None, **given)
        pixels = draw_from(engine, order)
        assert count_levels_apart(pixels, expected) <= 1
        assert expected.std() > 1
        assert all(count_levels_apart(pixels, other) > MOVED for other in drawn)
        drawn.append(pixels)


def list_loads(engine: Engine, order: Order) -> list[str]:
    """What an engine loads for an order."""
    return [
        event.detail
        for event in engine.draw([begin_picture(engine, order)])
        if isinstance(event, Phase) and event.name == "load"
    ]


def test_a_look_is_kept_in_memory_and_on_disk(tiny_folder, redux_folder):
    make_picture(Path("a.png"), (90, 50))
    checkpoint = inspect(tiny_folder)
    order = redux_order(redux_folder, "a.png", steps=1, prompt="")
    engine = make_engine(checkpoint, order, prompt_cache=True)
    assert list_loads(engine, order)[:2] == ["image_encoder", "image_embedder"]
    weaker = redux_order(redux_folder, "a.png:0.3", steps=1, prompt="")
    assert "image_encoder" not in list_loads(engine, weaker)
    pixels = draw_from(engine, order)
    another = make_engine(checkpoint, order, prompt_cache=True)
    assert "image_encoder" not in list_loads(another, order)
    assert count_levels_apart(draw_from(another, order), pixels) == 0
    make_picture(Path("a.png"), (91, 50))
    assert "image_encoder" in list_loads(another, order)


def test_metadata_name_what_looked_at_the_picture(tiny_folder, redux_folder):
    make_picture(Path("a.png"), (90, 50))
    order = redux_order(redux_folder, "a.png")
    described = []
    for each in (order, tiny()):
        engine = make_engine(inspect(tiny_folder), each)
        described.append(make_metadata(engine, each, begin_picture(engine, each))["model"])
    model, plain = described
    assert model["parts"].keys() == {"image_encoder", "image_embedder"}
    assert plain == {name: model[name] for name in ("name", "fingerprint")}


def test_the_prompt_may_be_left_out_only_with_redux(tiny_folder, redux_folder):
    make_picture(Path("a.png"), (90, 50))
    assert resolve_order("", {"redux": ("a.png",)}).request.prompt == ""
    with pytest.raises(UsageError, match="the prompt is empty"):
        resolve_order("", {})


# --- where its weights are


def publish(folder: Path) -> Path:
    """Put Redux into the hub's cache; returns its folder there."""
    snapshot = find.get_repository(PUBLISHED_REDUX) / "snapshots" / "abc"
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(folder)
    return snapshot


@pytest.fixture
def blank(tmp_path: Path) -> Path:
    """A small Redux without values."""
    return write_redux(tmp_path / "redux")


def test_redux_is_found_in_the_hubs_cache_and_elsewhere(tiny_folder, blank):
    transformer = inspect(tiny_folder).components["transformer"]
    with pytest.raises(WeightsUnavailable) as caught:
        find_redux((), transformer)
    assert "flux models download redux" in caught.value.hint
    apart = [str(blank / name) for name in ("image_encoder", "image_embedder")]
    assert find_redux(apart, transformer).keys() == {"image_encoder", "image_embedder"}
    snapshot = publish(blank)
    found = find_redux((), transformer)
    assert {part.folder.parent for part in found.values()} == {snapshot}
    assert count_tokens(found["image_encoder"]) == 16
    # What the user names comes first, what it lacks from the cache.
    found = find_redux(apart[1:], transformer)
    assert found["image_embedder"].folder == blank.resolve() / "image_embedder"
    assert found["image_encoder"].folder.parent == snapshot


def test_an_embedder_of_another_width_is_refused(tiny_folder, blank, tmp_path):
    transformer = inspect(tiny_folder).components["transformer"]
    publish(blank)
    for widths, why in (((32, 64), "takes 128"), ((16, TEXT_WIDTH), "gives 32")):
        folder = tmp_path / "x{}-{}".format(*widths)
        folder.mkdir()
        config = dict(zip(("redux_dim", "txt_in_features"), widths, strict=True))
        config["_class_name"] = "ReduxImageEncoder"
        (folder / "config.json").write_text(json.dumps(config))
        write_sparse(folder / FILES["image_embedder"], list_shapes("image_embedder", config))
        with pytest.raises(CheckpointError, match=why):
            find_redux([str(folder)], transformer)
    with pytest.raises(CheckpointError, match="no part of Redux"):
        find_redux([str(tiny_folder / "vae")], transformer)


def test_single_files_are_the_published_parts(tmp_path):
    """ComfyUI's names for them; a file of other shapes is refused by its header."""
    dev = read_known_shapes()
    assert dev

    def write(name: str, file: str, prefix: str = "", layers: int | None = None) -> str:
        config = dict(PUBLISHED_CONFIGS[name])
        if layers:
            config["num_hidden_layers"] = layers
        path = tmp_path / file
        shapes = list_shapes(name, config)
        write_sparse(path, {prefix + key: shape for key, shape in shapes.items()})
        return str(path)

    embedder = write("image_embedder", "flux1-redux-dev.safetensors")
    siglip = write("image_encoder", "sigclip_vision_patch14_384.safetensors", "vision_model.")
    found = find_redux([embedder, siglip], dev.components["transformer"])
    assert count_tokens(found["image_encoder"]) == 729
    assert found["image_embedder"].numel == 64_503_808
    short = write("image_encoder", "short.safetensors", "vision_model.", layers=3)
    with pytest.raises(CheckpointError, match="missing tensors"):
        find_redux([embedder, short], dev.components["transformer"])
    save_file({"vae.x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="no part of Redux"):
        find_redux([str(tmp_path / "x.safetensors")], dev.components["transformer"])


def test_damaged_parts_are_refused_by_their_headers(tiny_folder, blank):
    transformer = inspect(tiny_folder).components["transformer"]
    config = blank / "image_encoder" / "config.json"
    said = json.loads(config.read_text())
    for change, why in (
        ({"num_hidden_layers": 3}, "missing tensors"),
        ({"num_attention_heads": 5}, "heads do not divide"),
        ({"image_size": 7}, "no patch of 14 px"),
        ({"architectures": ["Dinov2Model"]}, "Dinov2Model"),
        ({"hidden_size": 1 << 40}, "impossible config"),
    ):
        config.write_text(json.dumps(said | change))
        with pytest.raises(CheckpointError, match=why):
            find_redux([str(blank)], transformer)
    config.unlink()
    with pytest.raises(WeightsUnavailable):  # what it lacks is looked for in the hub's cache
        find_redux([str(blank)], transformer)
