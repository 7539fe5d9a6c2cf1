"""Where models are: bundled, in a folder, in the hub's cache or a mirror, or made by quantize."""

import json
import os
import re
from pathlib import Path

import pytest

from fluxcli import paths
from fluxcli.errors import ExitCode, UsageError, WeightsUnavailable
from fluxcli.models import find as models
from quant.dialects import from_ldm
from quant.errors import WriteError
from quant.files import check_room
from quant.weights import Weight
from tests.support.invariant import assert_failed, call

DEV = "black-forest-labs/FLUX.1-dev"
WHOLE = (
    *(
        f"{part}/{file}"
        for part in ("text_encoder", "text_encoder_2", "transformer", "vae")
        for file in ("config.json", "model.safetensors")
    ),
    "scheduler/scheduler_config.json",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "tokenizer_2/spiece.model",
    "model_index.json",
)


def in_cache(model: str, *commits: str, main: str | None = None, whole: bool = True) -> Path:
    root = paths.hub_cache_folder() / f"models--{model.replace('/', '--')}"
    for k, commit in enumerate(commits):
        snapshot = root / "snapshots" / commit
        for name in WHOLE if whole else WHOLE[:-1]:
            (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            (snapshot / name).write_text("{}")
        os.utime(root / "snapshots" / commit, (k, k))
    if main:
        (root / "refs").mkdir()
        (root / "refs" / "main").write_text(main)
    return root / "snapshots"


def test_the_bundled_model_needs_no_download(capsys, tiny_folder):
    result = call(capsys, "models", "download", "tiny")
    assert result.returncode == 0 and Path(result.stdout.strip()) == tiny_folder


def test_nothing_is_downloaded_for_a_name_that_is_none(capsys):
    assert "ORG/NAME" in assert_failed(call(capsys, "models", "download", "dave"), ExitCode.USAGE)


def test_a_model_is_a_folder_or_bundled_or_in_the_cache(tmp_path, tiny_folder, monkeypatch):
    (tmp_path / "mine").mkdir()
    assert models.locate(str(tmp_path / "mine")) == tmp_path / "mine"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert models.locate("~/mine") == tmp_path / "mine"
    assert models.locate("bundled/tiny") == tiny_folder
    snapshots = in_cache(DEV, "old", "new")
    assert models.locate(DEV) == snapshots / "new"


def test_the_cached_snapshot_that_main_names_goes_before_newer_ones():
    snapshots = in_cache(DEV, "old", "new", main="old\n")
    assert models.locate(DEV) == snapshots / "old"


def test_the_mirror_goes_after_the_cache_and_must_be_complete(tmp_path, monkeypatch):
    monkeypatch.setenv("FLUX_MIRROR", str(tmp_path))
    for name in WHOLE:
        with pytest.raises(WeightsUnavailable):
            models.locate(DEV)
        (tmp_path / DEV / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / DEV / name).write_text("{}")
    assert models.locate(DEV) == tmp_path / DEV
    snapshots = in_cache(DEV, "c0ffee")
    assert models.locate(DEV) == snapshots / "c0ffee"


@pytest.mark.parametrize("model", [DEV, "bundled/none", "./none", "a/../b", "none"])
def test_a_model_that_is_absent_is_exit_3_with_what_to_do(model):
    with pytest.raises(WeightsUnavailable) as caught:
        models.locate(model)
    assert caught.value.exit_code == ExitCode.WEIGHTS and "flux " in caught.value.hint


@pytest.mark.parametrize("cached", [0, 1])
def test_weights_that_are_absent_or_half_here_are_named_with_both_ways_on(cached):
    in_cache(DEV, *["half"][:cached], whole=False)
    with pytest.raises(
        WeightsUnavailable, match="incomplete" if cached else "are not here"
    ) as caught:
        models.locate(DEV)
    assert "flux models download dev (34 GB, gated" in caught.value.hint
    assert "-p tiny" in caught.value.hint


def test_a_file_of_another_kind_is_no_model(tmp_path):
    (tmp_path / "notes.txt").write_bytes(b"")
    with pytest.raises(UsageError, match="folder"):
        models.locate(str(tmp_path / "notes.txt"))


@pytest.mark.parametrize(
    "environment, folder",
    [
        ({"HF_HUB_CACHE": "/c"}, "/c"),
        ({"HF_HOME": "/h"}, "/h/hub"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/huggingface/hub"),
    ],
)
def test_the_cache_is_where_the_hubs_own_library_has_it(environment, folder):
    assert paths.hub_cache_folder(environment) == Path(folder)


def test_a_cache_that_does_not_exist_yet_has_the_disk_of_its_parent(tmp_path):
    check_room(tmp_path / "not" / "yet", 1, hint="")
    with pytest.raises(WriteError, match=re.escape(f"({tmp_path})")):
        check_room(tmp_path / "not" / "yet", 1 << 60, hint="")


def test_an_interrupted_download_says_so_and_how_to_go_on(tiny_folder):
    (snapshot,) = in_cache(DEV, "half").iterdir()
    for part in ("vae", "text_encoder_2"):
        next((snapshot / part).glob("*.safetensors")).unlink()
        with pytest.raises(WeightsUnavailable, match="incomplete") as caught:
            models.locate(DEV)
        assert "flux models download dev (34 GB, gated" in caught.value.hint


@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"])
def test_the_cache_is_where_huggingface_hub_has_it(variable, tmp_path, monkeypatch):
    monkeypatch.setenv("SOMEWHERE", str(tmp_path / "elsewhere"))
    monkeypatch.setenv(variable, "$SOMEWHERE/hub")
    assert paths.hub_cache_folder() == tmp_path / "elsewhere" / "hub"


@pytest.mark.parametrize("model", ["bundled/..", "bundled/../..", "x" * 5000, "a\0b"])
def test_a_strangers_model_name_opens_nothing(model):
    with pytest.raises(WeightsUnavailable):
        models.locate(model)


@pytest.mark.parametrize("model", ["", "//host/share", "\\\\host\\share"])
def test_no_share_of_another_machine_is_opened(model):
    with pytest.raises(UsageError):
        models.locate(model)


def bake(model: str, to: str, name: str = "", *, at: int = 0, manifest: str | None = None) -> Path:
    """A folder in the user's models with nothing but a manifest."""
    folder = paths.baked_folder() / (name or f"x-{to}")
    folder.mkdir(parents=True)
    path = folder / "flux-manifest.json"
    path.write_text(
        json.dumps({"model": model, "recipe": {"to": to}}) if manifest is None else manifest
    )
    os.utime(path, (at, at))
    return folder


def test_folders_are_what_was_baked_from_a_model_then_the_model_itself(tiny_folder):
    assert models.list_folders("bundled/tiny") == [tiny_folder]
    made = {bake("bundled/tiny", to) for to in ("nf4", "int8", "fp8")}
    bake("bundled/other", "nf4", "other")
    *baked, last = models.list_folders("bundled/tiny")
    assert (set(baked), len(baked), last) == (made, 3, tiny_folder)


def test_of_several_of_a_precision_the_first_by_name_counts_whenever_it_was_made():
    bake("bundled/tiny", "nf4", "x-nf4-small", at=3)
    plain = bake("bundled/tiny", "nf4", "x-nf4", at=2)
    bake("bundled/tiny", "nf4", "y", at=4)
    assert models.list_baked("bundled/tiny") == {"nf4": plain}


def test_where_only_a_baked_variant_is_here_it_is_all_there_is():
    with pytest.raises(WeightsUnavailable):
        models.list_folders(DEV)
    folder = bake(DEV, "nf4")
    assert models.list_folders(DEV) == [folder]


@pytest.mark.parametrize(
    "manifest",
    [
        "",
        "{",
        "[]",
        "3",
        "{}",
        "\udcff",
        '{"model": "bundled/tiny"}',
        '{"model": "bundled/tiny", "recipe": 3}',
        '{"model": "bundled/tiny", "recipe": {"to": ["x"]}}',
        '{"model": {}, "recipe": {"to": "nf4"}}',
    ],
)
def test_a_manifest_that_is_damaged_is_no_variant(manifest, tiny_folder):
    bake("", "", "x", manifest="").joinpath("flux-manifest.json").write_text(
        manifest, errors="surrogateescape"
    )
    assert models.list_folders("bundled/tiny") == [tiny_folder]


def test_a_bake_that_goes_on_or_was_killed_is_no_variant(tiny_folder):
    bake("bundled/tiny", "nf4", "tiny-nf4.tmp-123-0123abcd")
    bake("bundled/tiny", "fp8", "tiny-fp8.tmp-123-0123abcd.old")
    folder = bake("bundled/tiny", "int8")
    (folder / "flux-manifest.json").unlink()
    (folder / "flux-manifest.json").symlink_to("gone")
    assert models.list_baked("bundled/tiny") == {} and models.list_folders("bundled/tiny") == [
        tiny_folder
    ]


@pytest.mark.parametrize(
    "environment, folder",
    [({"XDG_DATA_HOME": "/d"}, "/d/flux/models"), ({}, "~/.local/share/flux/models")],
)
def test_baked_models_are_in_the_users_data_folder(environment, folder, monkeypatch):
    monkeypatch.setattr(paths.sys, "platform", "linux")
    assert paths.baked_folder(environment) == Path(folder).expanduser()
    monkeypatch.setattr(paths.sys, "platform", "darwin")
    if not environment:
        assert (
            paths.baked_folder({}) == Path("~/Library/Application Support/flux/models").expanduser()
        )


def test_a_block_number_of_5000_digits_is_a_name_like_another():
    names = [
        "decoder.up.0.block.0.conv1.weight",
        "decoder.up.3.block.0.conv1.weight",
        f"decoder.up.{'9' * 5000}.x",
    ]
    found = from_ldm({name: Weight(name, (1, 1), "", {}) for name in names})
    assert names[2] in found and found.keys() >= {
        f"decoder.up_blocks.{k}.resnets.0.conv1.weight" for k in (0, 3)
    }
