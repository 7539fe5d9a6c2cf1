"""Where models are, and a download against a hub that refuses, is away, or delivers."""

import errno
import json
import os
import re
import shutil
from collections import namedtuple
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors

from fluxcli import models, state
from fluxcli.errors import ExitCode, FluxError, UsageError, WeightsUnavailable, exit_code_of
from quant.errors import WriteError
from quant.writer import check_room
from tests.invariant import assert_failed, call

DEV = "black-forest-labs/FLUX.1-dev"
COMMIT = "3de623fc3c33e44ffbe2bad470d0f45bccf2eb21"
TOKEN = "hf_secretsecretsecretsecretsecret"
REPOSITORY = {
    "model_index.json": 536,
    "scheduler/scheduler_config.json": 273,
    "tokenizer/vocab.json": 10**6,
    "tokenizer_2/spiece.model": 8 * 10**5,
    "text_encoder/model.safetensors": 246 * 10**6,
    "text_encoder_2/model.safetensors.index.json": 19_900,
    "text_encoder_2/model-00001-of-00002.safetensors": 5 * 10**9,
    "transformer/config.json": 378,
    "transformer/diffusion_pytorch_model-00001-of-00003.safetensors": 10**10,
    "vae/diffusion_pytorch_model.safetensors": 168 * 10**6,
}
WHOLE = (
    *(f"{part}/{file}" for part in ("text_encoder", "text_encoder_2", "transformer", "vae")
      for file in ("config.json", "model.safetensors")),
    "scheduler/scheduler_config.json", "tokenizer/vocab.json", "tokenizer_2/spiece.model", "model_index.json",
)  # fmt: skip
REFUSED = {
    "flux1-dev.safetensors": 23 * 10**9, "ae.safetensors": 3 * 10**8, "README.md": 9, "pipeline.py": 9,
    "transformer/model.py": 9, "text_encoder/pytorch_model.bin": 9, "vae/x.pt": 9, "tokenizer/tokenization.py": 9,
    ".gitattributes": 9, "dev_grid.jpg": 9,
}  # fmt: skip


class Hub:
    """A hub with one repository: `info` and `snapshot` raise what is set; calls are written down."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.repository, self.calls = REPOSITORY | REFUSED, []
        self.info: Exception | None = None
        self.snapshot: Exception | None = None
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: SimpleNamespace(model_info=self.model_info))
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot_download)

    def model_info(self, model: str, **_: object) -> SimpleNamespace:
        if self.info:
            raise self.info
        return SimpleNamespace(sha=COMMIT)

    def snapshot_download(self, model: str, *, revision, allow_patterns, ignore_patterns, dry_run=False):
        def matches(name: str, patterns: list[str]) -> bool:
            return any(fnmatch(name, pattern) for pattern in patterns)

        names = [n for n in self.repository if matches(n, allow_patterns) and not matches(n, ignore_patterns)]
        self.calls.append((revision, dry_run, names))
        if dry_run:
            size = self.repository
            return [SimpleNamespace(filename=n, file_size=size[n], will_download=True) for n in names]
        if self.snapshot:
            raise self.snapshot
        return "/somewhere/snapshots/" + revision


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**13, 0, 10**13))
    return Hub(monkeypatch)


def http_error(kind: type, status: int) -> Exception:
    response = SimpleNamespace(headers={"authorization": TOKEN}, request=None, status_code=status)
    return kind(f"{status} Client Error for url https://huggingface.co/api\n(Request ID: x)", response=response)


def download(model: str = DEV) -> tuple[Path, list[str]]:
    said: list[str] = []
    return models.download(model, say=said.append), said


def in_cache(model: str, *commits: str, main: str | None = None, whole: bool = True) -> Path:
    root = models.hub_cache() / f"models--{model.replace('/', '--')}"
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


def test_a_download_is_one_commit_and_only_the_files_that_are_used(hub):
    path, said = download()
    assert path == Path(f"/somewhere/snapshots/{COMMIT}")
    (planned_at, dry, planned), (taken_at, real, taken) = hub.calls
    assert (dry, real) == (True, False) and planned_at == taken_at == COMMIT
    assert planned == taken == list(REPOSITORY)
    assert "non-commercial" in said[0] and COMMIT[:12] in said[1] and "15.4 GB" in said[1]


def test_a_free_licence_is_no_warning(hub):
    assert len(download("black-forest-labs/FLUX.1-schnell")[1]) == 1


def test_a_disk_that_is_too_small_is_refused_before_the_first_byte(hub, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**10, 0, 10**10))
    with pytest.raises(WriteError, match=r"needs 15\.42 GB, 10\.00 GB are free") as caught:
        download()
    assert exit_code_of(caught.value) == ExitCode.OUTPUT
    assert "HF_HOME" in caught.value.hint and [dry for _, dry, _ in hub.calls] == [True]


def test_a_repository_in_another_layout_is_refused_before_the_first_byte(hub):
    hub.repository = {name: size for name, size in hub.repository.items() if name != "model_index.json"}
    with pytest.raises(WeightsUnavailable, match="model_index"):
        download()
    assert [dry for _, dry, _ in hub.calls] == [True]


REFUSALS = {
    "gated": (lambda: http_error(errors.GatedRepoError, 403), 3, ["gated", f"huggingface.co/{DEV}", "hf auth login"]),
    "missing": (lambda: http_error(errors.RepositoryNotFoundError, 404), 3, ["no such model", "hf auth login"]),
    "revision": (lambda: http_error(errors.RevisionNotFoundError, 404), 3, ["404"]),
    "busy": (lambda: http_error(errors.HfHubHTTPError, 429), 3, ["429"]),
    "down": (lambda: http_error(errors.HfHubHTTPError, 503), 3, ["503", "again"]),
    "offline": (lambda: errors.OfflineModeIsEnabled("Cannot reach: offline mode is enabled"), 3, ["offline"]),
    "no entry": (lambda: errors.LocalEntryNotFoundError("not in the cache"), 3, ["not in the cache"]),
    "no network": (lambda: ConnectionError("refused"), 3, ["out of reach", "again"]),
    "no name": (lambda: errors.HFValidationError("bad repo id"), 3, ["no such model"]),
    "full": (lambda: OSError(errno.ENOSPC, "No space left on device"), 6, ["No space left"]),
    "read-only": (lambda: PermissionError(errno.EACCES, "Permission denied"), 6, ["Permission denied"]),
}


@pytest.mark.parametrize("where", ["info", "snapshot"])
@pytest.mark.parametrize("make, code, words", REFUSALS.values(), ids=REFUSALS)
def test_what_a_hub_raises_is_explained(make, code, words, where, hub, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    setattr(hub, where, make())
    with pytest.raises(FluxError) as caught:
        download()
    message = f"{caught.value} | {caught.value.hint}"
    assert caught.value.exit_code == code and all(word in message for word in words)
    setattr(hub, where, make())
    result = call(capsys, "models", "download", "schnell")
    assert TOKEN not in message + result.stderr + result.stdout and result.stdout == ""
    assert result.returncode == code and result.stderr.count("flux: error:") == 1


@pytest.mark.parametrize("model", ["dev", "a/b/c", "../x/y", "a/..", "-x/y", "a b/c", "", "https://huggingface.co/a/b"])
def test_what_is_no_hub_id_is_a_usage_error_and_no_request(model, hub):
    hub.info = AssertionError("asked the hub")
    with pytest.raises(UsageError):
        download(model)


def test_an_unknown_exception_stays_a_bug(hub):
    hub.info = KeyError("sha")
    with pytest.raises(KeyError):
        download()


@pytest.mark.parametrize("name, asked", [("dev", DEV), ("krea", "black-forest-labs/FLUX.1-Krea-dev"), ("a/b", "a/b")])
def test_a_presets_name_or_a_hub_id_is_downloaded(name, asked, hub, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(models, "download", lambda model, say: seen.append(model) or Path("/x"))
    result = call(capsys, "models", "download", name)
    assert (seen, result.returncode, result.stdout) == ([asked], 0, "/x\n")


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


@pytest.mark.parametrize("model", [DEV, "bundled/none", "./none", "a/../b", "none"])
def test_a_model_that_is_absent_is_exit_3_with_what_to_do(model):
    with pytest.raises(WeightsUnavailable) as caught:
        models.locate(model)
    assert caught.value.exit_code == ExitCode.WEIGHTS and "flux " in caught.value.hint


@pytest.mark.parametrize("cached", [0, 1])
def test_weights_that_are_absent_or_half_here_are_named_with_both_ways_on(cached):
    in_cache(DEV, *["half"][:cached], whole=False)
    with pytest.raises(WeightsUnavailable, match="incomplete" if cached else "are not here") as caught:
        models.locate(DEV)
    assert f"flux models download {DEV}" in caught.value.hint and "-p tiny" in caught.value.hint


def test_a_file_is_no_model_folder(tmp_path):
    (tmp_path / "flux.safetensors").write_bytes(b"")
    with pytest.raises(UsageError, match="folder"):
        models.locate(str(tmp_path / "flux.safetensors"))


@pytest.mark.parametrize(
    "environment, folder",
    [({"HF_HUB_CACHE": "/c"}, "/c"), ({"HF_HOME": "/h"}, "/h/hub"), ({"XDG_CACHE_HOME": "/x"}, "/x/huggingface/hub")],
)
def test_the_cache_is_where_the_hubs_own_library_has_it(environment, folder):
    assert models.hub_cache(environment) == Path(folder)


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
        assert f"flux models download {DEV}" in caught.value.hint


@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"])
def test_the_cache_is_where_huggingface_hub_has_it(variable, tmp_path, monkeypatch):
    monkeypatch.setenv("SOMEWHERE", str(tmp_path / "elsewhere"))
    monkeypatch.setenv(variable, "$SOMEWHERE/hub")
    assert models.hub_cache() == tmp_path / "elsewhere" / "hub"


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
    folder = models.baked_folder() / (name or f"x-{to}")
    folder.mkdir(parents=True)
    path = folder / "flux-manifest.json"
    path.write_text(json.dumps({"model": model, "recipe": {"to": to}}) if manifest is None else manifest)
    os.utime(path, (at, at))
    return folder


def test_folders_are_what_was_baked_from_a_model_then_the_model_itself(tiny_folder):
    assert models.folders("bundled/tiny") == [tiny_folder]
    made = {bake("bundled/tiny", to) for to in ("nf4", "int8", "fp8")}
    bake("bundled/other", "nf4", "other")
    *baked, last = models.folders("bundled/tiny")
    assert (set(baked), len(baked), last) == (made, 3, tiny_folder)


def test_of_several_of_a_precision_the_first_by_name_counts_whenever_it_was_made():
    bake("bundled/tiny", "nf4", "x-nf4-small", at=3)
    plain = bake("bundled/tiny", "nf4", "x-nf4", at=2)
    bake("bundled/tiny", "nf4", "y", at=4)
    assert models.baked("bundled/tiny") == {"nf4": plain}


def test_where_only_a_baked_variant_is_here_it_is_all_there_is():
    with pytest.raises(WeightsUnavailable):
        models.folders(DEV)
    folder = bake(DEV, "nf4")
    assert models.folders(DEV) == [folder]


@pytest.mark.parametrize(
    "manifest",
    ["", "{", "[]", "3", "{}", "\udcff", '{"model": "bundled/tiny"}', '{"model": "bundled/tiny", "recipe": 3}',
     '{"model": "bundled/tiny", "recipe": {"to": ["x"]}}', '{"model": {}, "recipe": {"to": "nf4"}}'],
)  # fmt: skip
def test_a_manifest_that_is_damaged_is_no_variant(manifest, tiny_folder):
    bake("", "", "x", manifest="").joinpath("flux-manifest.json").write_text(manifest, errors="surrogateescape")
    assert models.folders("bundled/tiny") == [tiny_folder]


def test_a_bake_that_goes_on_or_was_killed_is_no_variant(tiny_folder):
    bake("bundled/tiny", "nf4", "tiny-nf4.tmp-123-0123abcd")
    bake("bundled/tiny", "fp8", "tiny-fp8.tmp-123-0123abcd.old")
    folder = bake("bundled/tiny", "int8")
    (folder / "flux-manifest.json").unlink()
    (folder / "flux-manifest.json").symlink_to("gone")
    assert models.baked("bundled/tiny") == {} and models.folders("bundled/tiny") == [tiny_folder]


@pytest.mark.parametrize(
    "environment, folder", [({"XDG_DATA_HOME": "/d"}, "/d/flux/models"), ({}, "~/.local/share/flux/models")]
)
def test_baked_models_are_in_the_users_data_folder(environment, folder, monkeypatch):
    monkeypatch.setattr(state.sys, "platform", "linux")
    assert models.baked_folder(environment) == Path(folder).expanduser()
    monkeypatch.setattr(state.sys, "platform", "darwin")
    if not environment:
        assert models.baked_folder({}) == Path("~/Library/Application Support/flux/models").expanduser()
