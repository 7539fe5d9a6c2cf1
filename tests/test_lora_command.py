"""LoRAs from the command line: where they are found, exit codes, what `flux lora` and inspect say,
merging.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fluxcli import paths
from fluxcli.errors import ExitCode, UsageError, WeightsUnavailable
from fluxcli.models import find as models
from fluxcli.models import loras as lora
from fluxcli.pictures.image import read_metadata
from fluxcli.request import presets
from fluxcli.request.settings import LoraRef
from quant.checkpoint import MANIFEST, Checkpoint, inspect
from tests.support.helpers import draw, engine_of, read_pixels, tiny
from tests.support.invariant import call
from tests.support.loras import write_lora, write_special

QUICK = (
    "-p",
    "tiny",
    "--steps",
    "2",
    "--size",
    "64",
    "--seed",
    "7",
    "--text-tokens",
    "16",
    "--device",
    "cpu",
)
PROMPT = "a red circle on a blue background"


@pytest.fixture(scope="module")
def checkpoint(tiny_folder: Path) -> Checkpoint:
    return inspect(tiny_folder)


@pytest.fixture(scope="module")
def style(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    every = ("transformer", "text_encoder", "text_encoder_2")
    return write_lora(
        tmp_path_factory.mktemp("style") / "style.safetensors", checkpoint, every, size=3
    )


def in_cache(repo: str, *files: str) -> Path:
    """An empty file of each name in a snapshot of the hub's cache."""
    snapshot = models.get_repository(repo) / "snapshots" / "abc"
    for file in files:
        (snapshot / file).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / file).touch()
    return snapshot


# --- where


def test_a_path_a_name_and_a_repository_are_found(style, tmp_path):
    own = paths.lora_folder()
    (own / "anime").mkdir(parents=True)
    (own / "anime" / "style.safetensors").write_bytes(style.read_bytes())
    snapshot = in_cache("org/one", "a.safetensors", "README.md")
    in_cache("org/two", "a.safetensors", "sub/b.safetensors")
    assert lora.locate(str(style)) == style
    assert (
        lora.locate("anime/style")
        == lora.locate("anime/style.safetensors")
        == own / "anime" / "style.safetensors"
    )
    assert lora.locate("org/one") == snapshot / "a.safetensors"
    assert lora.locate("org/two:sub/b.safetensors").name == "b.safetensors"
    with pytest.raises(UsageError, match=r"a\.safetensors b\.safetensors"):
        lora.locate("org/two")


def test_the_bundled_adapter_has_a_name_that_orders_keep_and_ones_own_goes_before_it(style):
    assert lora.locate("outline") == paths.BUNDLED / "lora" / "outline.safetensors"
    ref = LoraRef("outline")
    assert lora.make_absolute([ref]) == (ref,)
    paths.lora_folder().mkdir(parents=True)
    own = paths.lora_folder() / "outline.safetensors"
    own.write_bytes(style.read_bytes())
    assert lora.locate("outline") == own and lora.list_loras()["outline"] == own


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("org/three", "flux models download org/three"),
        ("org/two:c.safetensors", "download org/two:c.safetensors"),
        ("nowhere.safetensors", "flux lora list"),
        ("../x/y:z.safetensors", "flux lora list"),
        ("a/b/c", "flux lora list"),
    ],
)
def test_what_is_not_here_names_the_command_that_gets_it(name, hint):
    in_cache("org/two", "a.safetensors")
    with pytest.raises(WeightsUnavailable) as caught:
        lora.locate(name)
    assert hint in caught.value.hint


@pytest.mark.parametrize("name", ["turbo", "hyper"])
def test_presets_of_8_steps_name_their_adapter(name, config_folder):
    values = presets.merge({"preset": name}, config_folder, {}).values
    assert (values["steps"], values["guidance"], values["model"]) == (
        8,
        3.5,
        "black-forest-labs/FLUX.1-dev",
    )
    (ref,) = values["lora"]
    repo, file = ref.name.split(":")
    assert ref.scale == {"turbo": 1, "hyper": 0.125}[name]
    snapshot = in_cache(repo, file, "another.safetensors")
    assert lora.locate(f"{repo}:{file}") == snapshot / file
    assert (
        presets.merge({"preset": name, "lora": ("none",)}, config_folder, {}).values["lora"] == ()
    )


# --- flux generate, replay


def test_a_picture_says_its_adapters_and_replay_finds_a_changed_one(flux, style, tmp_path):
    (tmp_path / "work" / "mine.safetensors").write_bytes(style.read_bytes())
    made = flux("generate", PROMPT, *QUICK, "--lora", "mine.safetensors:0.8", "-o", "x.png")
    plain = flux("generate", PROMPT, *QUICK, "-o", "plain.png")
    assert made.returncode == plain.returncode == 0, made.stderr
    one, other = (
        read_pixels(tmp_path / "work" / name).astype(int) for name in ("x.png", "plain.png")
    )
    assert np.abs(one - other).max() > 10
    metadata, path = (
        read_metadata(tmp_path / "work" / "x.png"),
        str(tmp_path / "work" / "mine.safetensors"),
    )
    assert metadata["request"]["lora"] == [f"{path}:0.8"]
    assert list(metadata["lora"]) == [path] and metadata["lora"][path].endswith(" x 0.8")
    again = flux("replay", "x.png", "--check", "--device", "cpu")
    assert (again.returncode, again.stdout) == (0, "x.png: identical\n"), again.stderr
    tensors = load_file(path)
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, path)
    changed = flux("replay", "x.png", "--check", "--device", "cpu")
    assert (
        changed.returncode == 1
        and "the adapter mine.safetensors was " in changed.stderr
        and "mine.safetensors" in changed.stderr
    )


def test_faults_have_their_exit_codes_before_torch_is_imported(flux, style, tmp_path):
    work = tmp_path / "work"
    (work / "x.pt").write_bytes(b"PK\3\4" + bytes(100))
    (work / "cut.safetensors").write_bytes(style.read_bytes()[:-9])
    save_file(
        {"lora_unet_input_blocks_1.lora_down.weight": torch.ones(2, 2)}, work / "sdxl.safetensors"
    )
    for text, code, words in (
        ("x.pt", 4, "pickle"),
        ("cut.safetensors", 4, "truncated"),
        ("sdxl.safetensors", 4, "SDXL"),
        ("nowhere.safetensors", 3, "no such LoRA"),
        ("org/name", 3, "not here"),
        (f"{style}:nan", 2, "SCALE"),
        (f"{style}:inf", 2, "SCALE"),
        ("", 2, "SCALE"),
    ):
        run = flux("generate", PROMPT, *QUICK, "--lora", text, "-o", "x.png")
        assert run.returncode == code and words in run.stderr, (text, run.stderr)
        assert "Traceback" not in run.stderr and not (work / "x.png").exists()
    # a file of that name
    assert flux("generate", PROMPT, *QUICK, "--lora", f"{style}:heavy").returncode == 3


# --- flux lora, flux inspect


def test_list_and_info_say_what_is_there(flux, style, tmp_path):
    paths.lora_folder().mkdir(parents=True)
    (paths.lora_folder() / "mine.safetensors").write_bytes(style.read_bytes())
    snapshot = in_cache("org/many", "other.safetensors", "not-a-lora.safetensors")
    (snapshot / "other.safetensors").write_bytes(style.read_bytes())
    save_file({"x.weight": torch.ones(2)}, snapshot / "not-a-lora.safetensors")
    rows = json.loads(flux("lora", "list", "--json").stdout)
    assert [row["name"] for row in rows] == ["outline", "mine", "org/many:other.safetensors"]
    assert all(lora.locate(row["name"]) == Path(row["path"]) for row in rows)
    assert "diffusers/peft, rank [4]" in flux("lora", "list").stdout
    info, inspected = (
        flux("lora", "info", "mine"),
        flux("inspect", str(paths.lora_folder() / "mine.safetensors")),
    )
    assert info.returncode == inspected.returncode == 0 and info.stdout == inspected.stdout
    found = json.loads(info.stdout)
    assert (found["kind"], found["format"], found["rank"], found["alpha"]) == (
        "a LoRA",
        "diffusers/peft",
        [4],
        [4.0],
    )
    assert (
        set(found["targets"]) == {"transformer", "text_encoder", "text_encoder_2"}
        and not found["problems"]
    )
    assert found["bytes"] == style.stat().st_size
    assert "single_transformer_blocks.N.proj_mlp" in found["layers"]


def test_the_list_shows_no_escapes_of_a_file(capsys):
    paths.lora_folder().mkdir(parents=True)
    save_file(
        {"lora_unet_x\x1b]0;owned\x07.lokr_w1": torch.ones(2, 2)},
        paths.lora_folder() / "evil\x1b[2J.safetensors",
    )
    shown = call(capsys, "lora", "list")
    assert (
        shown.returncode == 0
        and "evil\\x1b[2J" in shown.stdout
        and not set("\x1b\x07") & set(shown.stdout)
    )


def test_info_takes_a_scale_as_lora_does(style, capsys):
    plain, scaled = (call(capsys, "lora", "info", f"{style}{scale}") for scale in ("", ":0.8"))
    assert plain.returncode == scaled.returncode == 0 and plain.stdout == scaled.stdout


def test_inspect_names_adapters_that_cannot_be_used(flux, tmp_path):
    save_file({"lora_unet_x.lokr_w1": torch.ones(2, 2)}, tmp_path / "x.safetensors")
    run = flux("inspect", str(tmp_path / "x.safetensors"))
    assert run.returncode == 4
    found = json.loads(run.stdout)
    assert found["kind"] == "a LoRA" and "lokr" in found["problems"][0]


# --- flux quantize --lora


@pytest.mark.parametrize("file", ["style", "special"])
def test_merged_is_what_the_adapter_does_at_run_time(
    file, style, checkpoint, tiny_folder, tmp_path
):
    """In float32 with nothing packed, within rounding of the picture; text encoders too."""
    import shutil

    from quant.bake import bake
    from quant.recipe import make_recipe
    from quant.spec import QuantSpec

    path = style if file == "style" else write_special(tmp_path / "special.safetensors", checkpoint)
    wide = Path(shutil.copytree(tiny_folder, tmp_path / "wide"))
    for weights in wide.rglob("*.safetensors"):
        save_file({name: tensor.float() for name, tensor in load_file(weights).items()}, weights)
    source = inspect(wide)
    adapters = lora.resolve_loras([LoraRef(str(path), 0.6)], source.components)
    recipe = make_recipe(source, QuantSpec("nf4", keep=("*",), scales="absmax"), adapters=adapters)
    assert list(bake(recipe, tmp_path / "merged", origin={}))
    engine = engine_of(source)
    _, plain = draw(engine, tiny())
    _, pixels = draw(engine, tiny(lora=(f"{path}:0.6",)))
    _, merged = draw(engine_of(inspect(tmp_path / "merged")), tiny())
    assert np.abs(merged.astype(int) - pixels).max() <= 1
    assert np.abs(merged.astype(int) - plain).max() > 10


def test_quantize_merges_and_makes_no_variant_of_the_plain_model(flux, style):
    run = flux("quantize", "tiny", "--to", "fp8", "--lora", f"{style}:0.5")
    assert run.returncode == 0, run.stderr
    folder = Path(run.stdout.strip())
    assert folder.name == "tiny+style-fp8"
    manifest = json.loads((folder / MANIFEST).read_text())
    (entry,) = manifest["lora"]
    assert entry["scale"] == 0.5 and entry["path"] == str(style) and len(entry["sha256"]) == 64
    assert models.list_baked("bundled/tiny") == {}
    packed, plain = inspect(folder), flux("quantize", "tiny", "--to", "fp8")
    assert set(models.list_baked("bundled/tiny")) == {"fp8"} and plain.returncode == 0
    one, other = (
        draw(engine_of(inspect(Path(each))), tiny(precision="fp8"))[1].astype(int)
        for each in (packed.folder, plain.stdout.strip())
    )
    assert np.abs(one - other).max() > 10
    both = flux("quantize", "tiny", "--to", "fp8", "--layout", "bfl", "--lora", str(style))
    assert both.returncode == 0 and "have no place" in both.stderr  # the file has no encoders
    assert os.path.basename(both.stdout.strip()) == "tiny+style-fp8-bfl.safetensors"


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        ("layer.0.SelfAttention.q", "diff_b"),
        ("layer.0.SelfAttention.q", "lora_B.bias"),
        ("layer.0.layer_norm", "diff_b"),
    ],
)
def test_a_bias_is_not_merged_where_the_layer_has_none(layer, kind, flux, tmp_path):
    name = f"text_encoder_2.encoder.block.0.{layer}"
    tensors = {f"{name}.{kind}": torch.ones(128)}
    if kind == "lora_B.bias":
        tensors |= {f"{name}.lora_A.weight": torch.ones(2, 128)}
        tensors |= {f"{name}.lora_B.weight": torch.ones(128, 2)}
    # One that has a bias, which alone would be merged.
    other = "transformer.single_transformer_blocks.1.proj_out.diff_b"
    save_file({other: torch.ones(128)}, tmp_path / "good.safetensors")
    save_file({**tensors, other: torch.ones(128)}, tmp_path / "x.safetensors")
    good = str(tmp_path / "good.safetensors")
    assert flux("quantize", "tiny", "--to", "fp8", "--lora", good).returncode == 0
    run = flux("quantize", "tiny", "--to", "fp8", "--lora", str(tmp_path / "x.safetensors"))
    assert run.returncode == ExitCode.INPUT_FILE
    assert f"{name}.{kind}" in run.stderr and other not in run.stderr
    # At scale 0 it adds nothing.
    off = f"{tmp_path / 'x.safetensors'}:0"
    assert flux("quantize", "tiny", "--to", "int8", "--lora", off).returncode == 0


def used(flux, *arguments: str, **environment: str) -> list[str]:
    run = flux(*arguments, "--dry-run", "--json", "-q", **environment)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)["request"]["lora"]


def test_one_file_is_one_adapter_however_it_is_named(flux, style, tmp_path):
    os.link(style, "a.safetensors")
    os.link(style, "none.safetensors")
    generate, here = ("generate", "x", "-p", "tiny"), Path.cwd()
    assert used(
        flux, *generate, "--lora", "a.safetensors:0.5", FLUX_LORA=f"{here}/a.safetensors"
    ) == [f"{here}/a.safetensors:0.5"]
    assert used(flux, *generate, "--lora", "none", FLUX_LORA="a.safetensors") == []


def test_under_another_preset_replay_keeps_what_was_said(flux, style, config_folder):
    for name in ("a", "b"):
        os.link(style, f"{name}.safetensors")
    (config_folder / "presets").mkdir(parents=True)
    mine = config_folder / "presets" / "mine.toml"
    mine.write_text('extends = "tiny"\nsteps = 1\nlora = ["a.safetensors"]\n')
    here = Path.cwd()
    assert (
        flux("generate", "x", "-p", "mine", "--lora", "b.safetensors:0.3", "-o", "m.png").returncode
        == 0
    )
    assert used(flux, "replay", "m.png", "-p", "tiny") == [f"{here}/b.safetensors:0.3"]
    assert flux("generate", "x", "-p", "mine", "--lora", "none", "-o", "n.png").returncode == 0
    assert used(flux, "replay", "n.png", "-p", "mine") == []
    mine.unlink()  # a picture of a preset that is gone is made again by itself
    assert flux("replay", "m.png", "--check").stdout.endswith("identical\n")


@pytest.mark.parametrize(
    "name", ["//host/share/x.safetensors", "x" * 5000, "~nobody-here/x", "no/such.safetensors"]
)
def test_names_that_no_file_has_are_exit_3(name, flux):
    run = flux("generate", "x", "-p", "tiny", "--lora", name)
    assert run.returncode == ExitCode.WEIGHTS and run.stderr.startswith("flux: error: no such LoRA")
