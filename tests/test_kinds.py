"""Kinds of FLUX.1 are told apart by keys, channels and metadata, by a name only where nothing else
tells; and no kind takes a setting that it cannot honour.
"""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fluxcli.errors import ExitCode, UsageError
from fluxcli.models.abilities import ABILITIES, apply_kind, check_abilities
from fluxcli.request.fields import DEFAULTS, Order
from fluxcli.request.settings import FROM_PICTURES, coerce
from quant.checkpoint import Checkpoint, inspect
from quant.kinds import CHANNELS_OF, KINDS, find_kind, find_title
from tests.support.helpers import order
from tests.support.invariant import assert_failed, call

DEV = {"in_channels": 64, "guidance_embeds": True}


def kind_of(config: dict | None = None, pipeline: str = "", title: str = "", name: str = "") -> str:
    return find_kind(DEV | (config or {}), pipeline=pipeline, title=title, name=name).kind


def test_channels_and_guidance_tell_what_they_can():
    assert kind_of() == "dev"
    assert kind_of({"guidance_embeds": False}) == "schnell"
    assert kind_of({"in_channels": 384}, name="flux1-kontext-depth") == "fill"
    assert kind_of({"in_channels": 128}, pipeline="FluxKontextPipeline") == "canny"


@pytest.mark.parametrize("where", ["pipeline", "title", "name"])
def test_kontext_is_told_from_dev_by_index_metadata_or_name(where):
    said = {"pipeline": "FluxKontextPipeline"}.get(where, "FLUX.1-Kontext-dev")
    found = find_kind(DEV, **dict.fromkeys(("pipeline", "title", "name"), "") | {where: said})
    assert found.kind == "kontext"
    assert (
        found.told_by
        == {
            "pipeline": "its model_index.json",
            "title": "its metadata",
            "name": "its name",
        }[where]
    )


def test_canny_and_depth_are_told_apart_by_metadata_before_the_name():
    control = {"in_channels": 128}
    assert kind_of(control, title="FLUX.1 Depth [dev]", name="flux1-canny-dev") == "depth"
    assert kind_of(control, name="flux1-depth-dev.safetensors") == "depth"
    assert "may be depth" in find_kind(DEV | control, pipeline="", title="", name="x").told_by


def test_what_metadata_call_a_model_is_found():
    assert find_title({"modelspec.title": "FLUX.1 Kontext", "format": "pt"}) == "FLUX.1 Kontext"
    assert find_title({"general.name": "Flux.1 Kontext Dev"}) == "Flux.1 Kontext Dev"
    assert find_title({"_name_or_path": "black-forest-labs/FLUX.1-Depth-dev"}) != ""
    assert find_title({"format": "pt"}) == ""


# --- flags and kinds


@pytest.fixture(scope="module")
def checkpoint(tiny_folder: Path) -> Checkpoint:
    return inspect(tiny_folder)


def as_kind(checkpoint: Checkpoint, kind: str) -> Checkpoint:
    """The checkpoint, with the channels and the guidance of a kind."""
    transformer = checkpoint.components["transformer"]
    config = transformer.config | {
        "in_channels": CHANNELS_OF[kind],
        "guidance_embeds": kind != "schnell",
    }
    parts = checkpoint.components | {"transformer": replace(transformer, config=config)}
    return replace(checkpoint, components=parts, said_kind=kind)


# What each kind works on, and a value of each setting that is not its default.
NEEDED = {
    "fill": {"image": "a.png", "mask": "m.png"},
    "canny": {"control": "canny:a.png"},
    "depth": {"control": "depth:a.png"},
    "schnell": {"guidance": "none"},
}
VALUES = {
    "image": "a.png",
    "strength": "0.5",
    "mask": "m.png",
    "mask_invert": "true",
    "mask_feather": "4",
    "expand": "0,0,16,0",
    "reference": "a.png",
    "redux": "a.png:0.5",
    "redux_model": "ORG/REDUX",
    "control": "canny:a.png",
    "negative_prompt": "fog",
    "true_cfg": "2",
    "kind": "dev",
    "preview_every": "2",
}
# What a setting stands beside.
BESIDE = {
    "strength": ("image",),
    "mask": ("image",),
    "mask_invert": ("image", "mask"),
    "mask_feather": ("image", "mask"),
    "expand": ("image",),
    "true_cfg": ("negative_prompt",),
    "redux_model": ("redux",),
}


def asks(kind: str, setting: str) -> Order:
    """An order of a kind with what it needs and with one setting that is not its default."""
    said = NEEDED.get(kind, {}) | {name: VALUES[name] for name in BESIDE.get(setting, ())}
    return order("a fox", model="ORG/MODEL", **said | {setting: VALUES[setting]})


REFUSED = {
    ("image", "kontext"), ("strength", "kontext"), ("mask", "kontext"), ("mask_invert", "kontext"),
    ("mask_feather", "kontext"),
    *(("expand", kind) for kind in KINDS if kind != "fill"),
    *(("reference", kind) for kind in KINDS if kind != "kontext"),
    ("control", "fill"), ("control", "kontext"),
    *(("negative_prompt", kind) for kind in ("fill", "canny", "depth")),
    *(("true_cfg", kind) for kind in ("fill", "canny", "depth")),
}  # fmt: skip


def test_every_setting_of_pictures_is_walked():
    assert set(VALUES) == set(FROM_PICTURES) and {each.setting for each in ABILITIES} < set(VALUES)
    for name, text in VALUES.items():
        assert coerce(name, text, where="") != DEFAULTS[name]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("setting", [name for name in FROM_PICTURES if name != "kind"])
def test_a_setting_is_honoured_or_refused_with_what_can(setting, kind, checkpoint):
    model = as_kind(checkpoint, kind)
    wanted = asks(kind, setting).request
    if (setting, kind) not in REFUSED:
        check_abilities(wanted, model)
        return
    with pytest.raises(UsageError) as refused:
        check_abilities(wanted, model)
    error = refused.value
    assert error.exit_code == ExitCode.USAGE and "ORG/MODEL" in error.why
    named = re.findall(r"-p (\w+)", error.hint)
    assert named and set(named) <= set(KINDS), error.hint
    for each in named:
        assert (setting, each) not in REFUSED, error.hint


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_takes_every_setting_that_is_not_of_pictures(kind, checkpoint):
    others = {"steps": 3, "text_tokens": 16, "seed": 1, "count": 2, "precision": "bf16"}
    asked = order("a fox", **NEEDED.get(kind, {}) | others).request
    check_abilities(asked, as_kind(checkpoint, kind))


@pytest.mark.parametrize("kind", ["fill", "canny", "depth"])
def test_a_model_without_the_picture_that_it_works_on_says_which(kind, checkpoint):
    with pytest.raises(UsageError, match="needs a picture") as refused:
        check_abilities(order("a fox").request, as_kind(checkpoint, kind))
    assert refused.value.which in ("--image", "--control")
    assert "-p dev" in refused.value.hint


def test_fill_needs_a_mask_or_borders(checkpoint):
    model = as_kind(checkpoint, "fill")
    with pytest.raises(UsageError, match="needs a mask"):
        check_abilities(order("a fox", image="a.png").request, model)
    check_abilities(order("a fox", image="a.png", expand="0,0,16,0").request, model)


def test_no_negative_prompt_where_diffusers_pipelines_take_none(checkpoint):
    asked = order("a fox", image="a.png", control="canny:b.png", negative_prompt="")
    with pytest.raises(UsageError, match="take none"):
        check_abilities(asked.request, checkpoint)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("said", KINDS)
def test_a_kind_can_be_said_where_the_channels_allow_it(said, kind, checkpoint):
    model = replace(as_kind(checkpoint, kind), said_kind="")
    asked = order("a fox", kind=said).request
    is_of_guidance = said != "schnell" or not model.takes_guidance
    if CHANNELS_OF[said] == CHANNELS_OF[kind] and is_of_guidance:
        assert apply_kind(asked, model).kind == said
        return
    with pytest.raises(UsageError, match="another kind") as refused:
        apply_kind(asked, model)
    assert kind in refused.value.hint or CHANNELS_OF[kind] == 64


# --- on the command line


@pytest.fixture
def kontext(tiny_folder: Path) -> Path:
    """The bundled model as if it were Kontext."""
    folder = Path(shutil.copytree(tiny_folder, "model"))
    name_pipeline(folder, "FluxKontextPipeline")
    return folder


@pytest.fixture
def photo() -> str:
    Image.new("RGB", (64, 64), "red").save("photo.png")
    return "photo.png"


def test_a_flag_that_the_model_cannot_honour_is_exit_2(kontext, photo, drawn, capsys):
    said = ("generate", "a fox", "-p", "tiny", "-m", str(kontext), "--image", photo)
    error = assert_failed(call(capsys, *said), ExitCode.USAGE)
    assert "--image" in error and "Kontext" in error and "-p dev" in error
    assert call(capsys, *said, "--kind", "dev", "-o", "x.png").returncode == 0
    refused = call(capsys, *said, "--kind", "fill")
    assert "--kind dev or kontext" in assert_failed(refused, ExitCode.USAGE)
    assert len(drawn) == 1


def test_inspect_says_the_kind_and_what_tells_it(kontext, tiny_folder, capsys):
    (weights,) = (tiny_folder / "transformer").glob("*.safetensors")
    state = load_file(weights)
    save_file(state, "plain.safetensors", {"modelspec.title": "FLUX.1 Kontext"})
    save_file(state, "my-kontext.safetensors")
    wide = state | {"x_embedder.weight": torch.ones(state["x_embedder.weight"].shape[0], 384)}
    save_file(wide, "kontext-fill.safetensors")
    told = {
        str(kontext): ("kontext", "its model_index.json"),
        "plain.safetensors": ("kontext", "its metadata"),
        "my-kontext.safetensors": ("kontext", "its name"),
        "kontext-fill.safetensors": ("fill", "its 384 channels"),
    }
    for path, (kind, told_by) in told.items():
        described = json.loads(call(capsys, "inspect", path).stdout)
        assert described["model"] == {"kind": kind, "told_by": told_by}, path


def test_inspect_knows_redux_by_its_keys(capsys):
    shapes = {"redux_up": (12288, 1152), "redux_down": (4096, 12288)}
    state = {}
    for name, shape in shapes.items():
        state[f"{name}.weight"] = torch.ones(shape, dtype=torch.float8_e4m3fn).to(torch.bfloat16)
        state[f"{name}.bias"] = torch.ones(shape[0], dtype=torch.bfloat16)
    save_file(state, "x.safetensors")
    described = json.loads(call(capsys, "inspect", "x.safetensors").stdout)
    assert described["kind"] == "Redux" and list(described["components"]) == ["image_embedder"]
    assert described["needs"][0] == "image_encoder" and "--redux" in described["needs"][1]
    assert described["problems"] == []


def name_pipeline(folder: Path, pipeline: str) -> None:
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": pipeline}))


def test_a_bake_remembers_the_kind_whatever_index_is_beside_it(copy, capsys):
    name_pipeline(copy, "FluxKontextPipeline")
    assert call(capsys, "quantize", str(copy), "baked", "--to", "int8", "-q").returncode == 0
    name_pipeline(Path("baked"), "FluxPipeline")
    assert inspect(Path("baked")).kind == "kontext"


@pytest.mark.parametrize(
    "option, needed",
    [
        (["--strength", "0.5"], "--image or --mask"),
        (["--strength", "0"], "--image or --mask"),
        (["--mask", "photo.png"], "--image or --reference"),
        (["--mask-invert"], "--mask"),
        (["--mask-feather", "3"], "--mask or --expand"),
        (["--expand", "0,0,16,0"], "--image"),
        (["--redux-model", "x"], "--redux"),
        (["--true-cfg", "3"], "--negative-prompt"),
    ],
)
def test_an_option_without_what_it_acts_on_is_exit_2(option, needed, photo, drawn, capsys):
    error = assert_failed(call(capsys, "generate", "a fox", "-p", "tiny", *option), ExitCode.USAGE)
    assert f"{option[0]} does nothing here: it needs {needed}." in error and not drawn


def test_a_setting_of_a_file_waits_for_what_it_acts_on(config_folder, photo, drawn, capsys):
    config_folder.mkdir(parents=True)
    (config_folder / "config.toml").write_text("strength = 0.3\ntrue_cfg = 2.5\n")
    assert call(capsys, "generate", "a fox", "-p", "tiny").returncode == 0
    assert call(capsys, "generate", "a fox", "-p", "tiny", "--image", photo).returncode == 0
    plain, begun = (each.request for each in drawn)
    assert (plain.strength, plain.true_cfg) == (None, None)
    assert (begun.strength, begun.true_cfg) == (0.3, None)
