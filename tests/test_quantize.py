"""`flux quantize`: what it takes and refuses, where the result goes, what is printed, and what a
Ctrl-C leaves.
"""

import json
import os
import select
import shutil
import signal
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from fluxcli import paths
from fluxcli.engine import device as hardware
from fluxcli.errors import ExitCode, Terminated
from fluxcli.models import find as models
from fluxcli.request import presets
from quant.checkpoint import KEEP_FILE, MANIFEST, inspect
from quant.recipe import FILE_SCHEMES
from quant.single_file import inspect_transformer as inspect_file
from quant.spec import BAKEABLE
from tests.support.helpers import ROOT
from tests.support.invariant import assert_failed, call, files

FAST = ("--scales", "absmax", "-q")
USAGE = namedtuple("usage", "total used free")


@pytest.fixture
def bundled(micro: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The preset tiny with the micro model in place of the bundled one."""
    folder = tmp_path / "presets"
    shutil.copytree(ROOT / "presets", folder, ignore=shutil.ignore_patterns("tiny"))
    shutil.copytree(micro, folder / "tiny")
    monkeypatch.setattr(presets, "BUNDLED", folder)
    monkeypatch.setattr(models, "BUNDLED", folder)
    return folder / "tiny"


@pytest.fixture(scope="session")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformer in one file as BFL publishes it, one block of each kind, 128 wide."""
    import torch

    from tests.test_dialects import SMALL, published

    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("single") / "flux1-small.safetensors"
    shapes = published(SMALL, guidance=True)
    save_file(
        {name: torch.randn(shape, dtype=torch.bfloat16) / 8 for name, shape in shapes.items()}, path
    )
    return path


@pytest.fixture
def dev(tiny_folder: Path) -> Path:
    """The bundled model in the hub's cache, as FLUX.1-dev."""
    snapshot = (
        paths.hub_cache_folder() / "models--black-forest-labs--FLUX.1-dev" / "snapshots" / "c0ffee"
    )
    return Path(shutil.copytree(tiny_folder, snapshot))


def written(path: Path, given: dict[str, int]) -> dict[str, int]:
    """The sizes on disk of the weight files that a result names."""
    return {file: (path / file if path.is_dir() else path).stat().st_size for file in given}


# --- sources and destinations


def test_a_preset_goes_to_the_users_models_where_generate_finds_it(capsys):
    result = call(capsys, "quantize", "tiny", "--to", "nf4", "--scales", "absmax")
    path = paths.baked_folder() / "tiny-nf4"
    assert (result.returncode, result.stdout) == (0, f"{path}\n") and path.is_relative_to(
        os.environ["XDG_DATA_HOME"]
    )
    assert inspect(path).components["transformer"].precision == "nf4"
    manifest = json.loads((path / MANIFEST).read_text())
    assert (manifest["model"], manifest["recipe"]["to"], manifest["verified"]) == (
        "bundled/tiny",
        "nf4",
        True,
    )
    plan = json.loads(
        call(
            capsys, "generate", "x", "-p", "tiny", "--precision", "nf4", "--dry-run", "--json"
        ).stdout
    )
    assert plan["plan"]["precision"] == "nf4" and plan["plan"]["spec"] is None
    assert any("stored" in reason for reason in plan["plan"]["reasons"])
    assert_failed(call(capsys, "quantize", "tiny", "--to", "nf4", *FAST), ExitCode.OUTPUT)


def test_small_and_kept_and_one_file_have_names_of_their_own(capsys):
    folder = paths.baked_folder()
    for options, name in (
        (("--to", "nf4"), "tiny-nf4"),
        (("--to", "nf4", "--modulation", "nf4"), "tiny-nf4-small"),
        (("--to", "fp8", "--layout", "bfl"), "tiny-fp8-bfl.safetensors"),
        (("--to", "int8"), "tiny-int8"),
        (
            ("--to", "fp8", "--layout", "comfy", "--modulation", "fp8"),
            "tiny-fp8-small-comfy.safetensors",
        ),
    ):
        result = call(capsys, "quantize", "tiny", *options, "--dry-run", "--json", "-q")
        assert json.loads(result.stdout)["path"] == str(folder / name)
    assert not folder.exists()


@pytest.mark.parametrize("to", BAKEABLE)
def test_a_folder_becomes_a_folder_of_exactly_the_predicted_bytes(to, micro, capsys):
    arguments = (
        "quantize",
        str(micro),
        "out",
        "--to",
        to,
        "--json",
        *(FAST if to == "nf4" else ("-q",)),
    )
    predicted = call(capsys, *arguments, "--dry-run")
    assert predicted.returncode == 0 and files(Path()) == {}
    result = call(capsys, *arguments)
    assert result.returncode == 0 and result.stderr == predicted.stderr == ""
    said, made = json.loads(predicted.stdout), json.loads(result.stdout)
    assert said["bytes"] == made["bytes"] == written(Path("out"), said["bytes"])
    assert said["total_bytes"] == sum(said["bytes"].values())
    old, new = files(micro), files(Path("out"))
    assert {f for f in new if f.endswith(".safetensors") and old.get(f) != new[f]} == set(
        said["bytes"]
    )
    assert json.loads(Path("out", MANIFEST).read_text())["model"] == str(micro)
    part = inspect(Path("out")).components["transformer"]
    assert (
        said["packed"].items()
        >= {name: w.scheme for name, w in part.weights.items() if w.scheme}.items()
    )
    assert (f"transformer/{KEEP_FILE}" in said["bytes"]) == (to == "nf4")


def test_the_json_says_what_was_made(micro, capsys):
    arguments = (
        "quantize",
        str(micro),
        "out",
        "--to",
        "nf4",
        "--keep",
        "transformer_blocks.0.attn.to_q",
        "--json",
    )
    result = call(capsys, *arguments, "--text-encoder", "keep", "--no-verify", *FAST)
    made = json.loads(result.stdout)
    assert set(made) == {
        "path",
        "bytes",
        "total_bytes",
        "recipe",
        "layout",
        "packed",
        "kept",
        "seconds",
        "verified",
    }
    assert (
        made["path"] == str(Path("out").absolute())
        and made["layout"] == "diffusers"
        and made["seconds"] > 0
    )
    recipe = made["recipe"]
    assert (recipe["to"], recipe["text_encoder"], recipe["modulation"], recipe["scales"]) == (
        "nf4",
        "keep",
        "keep",
        "absmax",
    )
    assert recipe["keep"] == ["transformer_blocks.0.attn.to_q"] and recipe["policy"] == 1
    packed = {
        "proj_out.weight",
        "transformer_blocks.0.attn.to_k.weight",
        "transformer_blocks.0.attn.to_v.weight",
    }
    assert (
        made["packed"] == dict.fromkeys(packed, "nf4")
        and "transformer_blocks.0.attn.to_q.weight" in made["kept"]
    )
    assert (
        made["verified"] is False
        and json.loads(Path("out", MANIFEST).read_text())["verified"] is False
    )


def test_a_dry_run_lists_bytes_and_says_what_the_modulation_costs(micro, capsys):
    result = call(capsys, "quantize", str(micro), "out", "--to", "fp8", "--dry-run")
    *parts, total = result.stdout.splitlines()
    assert sum(int(line.split()[0].replace(",", "")) for line in parts) == int(
        total.split()[0].replace(",", "")
    )
    assert "bytes to write to" in total and "are copied" in total and files(Path()) == {}
    assert (
        "--modulation keep (chosen)" in result.stderr
        and "--modulation fp8: transformer" in result.stderr
    )
    assert result.stderr.count("each new prompt reads") == 2 and "\x1b" not in result.stderr
    assert all(line.startswith("flux: ") for line in result.stderr.splitlines())


def test_without_a_scheme_it_takes_what_the_plan_takes_and_says_why(capsys, monkeypatch):
    arguments = ("quantize", "tiny", "x", "--dry-run", "--json")
    message = assert_failed(call(capsys, *arguments), ExitCode.USAGE)
    assert "hint: --to int8" in message and "no scheme is chosen" in message
    monkeypatch.setenv("FLUX_PRECISION", "w6a8")
    result = call(capsys, *arguments)
    assert json.loads(result.stdout)["recipe"]["to"] == "w6a8"
    assert "flux: --to w6a8, as " in result.stderr


def test_without_a_scheme_a_single_file_is_fp8_in_bfls_layout_and_else_refused(single, capsys):
    result = call(capsys, "quantize", str(single), "--layout", "bfl", "--dry-run", "--json")
    assert json.loads(result.stdout)["recipe"]["to"] == "fp8"
    result = call(capsys, "quantize", str(single), "--layout", "comfy", "--dry-run")
    assert "hint: --to int8" in assert_failed(result, ExitCode.USAGE)


def test_a_bake_that_takes_minutes_is_announced(micro, capsys, monkeypatch):
    monkeypatch.setattr("quant.recipe.COPY_GB_S", 1e-6)
    arguments = ("quantize", str(micro), "out", "--to", "w4a8", "--dry-run")
    assert " on two CPU cores" in call(capsys, *arguments).stderr
    monkeypatch.undo()
    assert " on two CPU cores" not in call(capsys, *arguments).stderr


def test_a_single_file_gives_every_file_layout(single, capsys):
    for kind, to in (("bfl", "fp8"), *(("comfy", to) for to in FILE_SCHEMES["comfy"])):
        target = Path("out") / f"{kind}-{to}.safetensors"
        arguments = (
            "quantize",
            str(single),
            str(target),
            "--to",
            to,
            "--layout",
            kind,
            "--json",
        )
        said = json.loads(call(capsys, *arguments, "--dry-run").stdout)
        assert not target.exists()
        result = call(capsys, *arguments)
        assert result.returncode == 0, result.stderr
        made = json.loads(result.stdout)
        assert said["bytes"] == made["bytes"] == {target.name: target.stat().st_size}
        part = inspect_file(target)
        assert part.precision == to and part.numel == inspect_file(single).numel
        assert json.loads(Path(f"{target}.json").read_text())["model"] == str(single)
    assert "GB/s" in result.stderr


def test_a_single_file_takes_encoders_and_vae_of_the_published_model(single, dev, capsys):
    result = call(capsys, "quantize", str(single), "--to", "int8", "-q")
    path = paths.baked_folder() / "flux1-small-int8"
    assert (result.stdout, result.stderr) == (f"{path}\n", "")
    found = inspect(path).components
    assert (
        found["transformer"].config["num_layers"] == 1 and found["transformer"].precision == "int8"
    )
    vae = next((dev / "vae").glob("*.safetensors"))
    assert (path / "vae" / vae.name).read_bytes() == vae.read_bytes()


def test_a_single_file_without_the_published_model_says_how_to_go_on(single, capsys):
    message = assert_failed(call(capsys, "quantize", str(single), "--to", "nf4"), ExitCode.WEIGHTS)
    assert "flux models download dev" in message and "--layout bfl" in message


def test_a_model_of_the_hub_is_named_as_such(dev, capsys):
    for source in ("dev", "black-forest-labs/FLUX.1-dev"):
        said = json.loads(
            call(capsys, "quantize", source, "--to", "int8", "--dry-run", "--json", "-q").stdout
        )
        assert said["path"] == str(paths.baked_folder() / "FLUX.1-dev-int8")


# --- refusals


WRONG = {
    "no --to": ["tiny"],
    "--to": ["tiny", "--to", "nf5"],
    "--text-encoder": ["tiny", "--to", "nf4", "--text-encoder", "w4a8"],
    "--modulation": ["tiny", "--to", "nf4", "--modulation", "fp8"],
    "--modulation int8": ["tiny", "--to", "int8", "--modulation", "int8"],
    "--scales": ["tiny", "--to", "nf4", "--scales", "best"],
    "--layout": ["tiny", "--to", "nf4", "--layout", "gguf"],
    "nf4 bfl": ["tiny", "x.safetensors", "--to", "nf4", "--layout", "bfl"],
    "int8 bfl": ["tiny", "x.safetensors", "--to", "int8", "--layout", "bfl"],
    "nf4 comfy": ["tiny", "x.safetensors", "--to", "nf4", "--layout", "comfy"],
    "--modulation w4a8": ["tiny", "--to", "w4a8", "--modulation", "w4a8"],
    "scales of int8": ["tiny", "--to", "int8", "--scales", "absmax"],
    "T5 in a file": [
        "tiny",
        "x.safetensors",
        "--to",
        "fp8",
        "--layout",
        "bfl",
        "--text-encoder",
        "fp8",
    ],
    "no such name": ["tiny", "--to", "nf4", "--keep", "transformer_blocks.99.*"],
    "one of two": ["tiny", "--to", "nf4", "--keep", "*attn*", "--keep", "nothing"],
    "extension": ["tiny", "x.bin", "--to", "fp8", "--layout", "bfl"],
    "no extension": ["tiny", "x", "--to", "fp8", "--layout", "comfy"],
    "source": ["{source}", "{source}", "--to", "nf4"],
    "in the source": ["{source}", "{source}/transformer/x", "--to", "nf4"],
    "around the source": ["{source}", "{source}/..", "--to", "nf4", "--force"],
    "roundabout": ["tiny", "{source}/../tiny/.", "--to", "nf4", "--force"],
    "the cache": ["tiny", "{cache}", "--to", "nf4"],
    "in the cache": ["tiny", "{cache}/models--x/y", "--to", "nf4"],
    "a file in the cache": ["tiny", "{cache}/x.safetensors", "--to", "fp8", "--layout", "bfl"],
    "empty source": ["", "--to", "nf4"],
    "share": ["//host/model", "--to", "nf4"],
    "device": ["tiny", "x", "--to", "nf4", "--device", "gpu"],
    "option": ["tiny", "--to", "nf4", "--bits", "4"],
    "words": ["tiny", "a", "b", "--to", "nf4"],
}


@pytest.mark.parametrize("arguments", WRONG.values(), ids=WRONG)
def test_what_cannot_be_asked_for_is_exit_2_and_writes_nothing(
    arguments, tiny_folder, capsys, tmp_path
):
    places = {"source": tiny_folder, "cache": paths.hub_cache_folder()}
    before, given = files(tmp_path), [text.format(**places) for text in arguments]
    assert_failed(call(capsys, "quantize", *given, "-q"), ExitCode.USAGE)
    assert files(tmp_path) == before and not list(tiny_folder.parent.glob("*.tmp-*"))


def test_a_link_to_the_source_is_the_source(tiny_folder, capsys):
    Path("link").symlink_to(tiny_folder)
    for target in ("link", "link/new"):
        message = assert_failed(
            call(capsys, "quantize", "tiny", target, "--to", "nf4", "--force"), ExitCode.USAGE
        )
        assert "the source" in message
    assert Path("link").is_symlink()


def test_what_is_quantized_already_is_refused(baked, capsys):
    folder = baked("int8")
    message = assert_failed(
        call(capsys, "quantize", str(folder), "x", "--to", "fp8"), ExitCode.INPUT_FILE
    )
    assert "quantized already" in message and "16-bit" in message and files(Path()) == {}


@pytest.mark.parametrize("source", ["dev", "a/b", "nowhere/at/all", "x" * 5000])
def test_a_model_that_is_not_here_is_exit_3(source, capsys):
    assert "hint: " in assert_failed(
        call(capsys, "quantize", source, "--to", "nf4"), ExitCode.WEIGHTS
    )


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04" + b"\x00" * 60, b"GGUF" + b"\x03" * 60, b"<html>" + b"x" * 60]
)
def test_a_source_that_is_no_safetensors_file_is_exit_4(content, capsys):
    Path("x.safetensors").write_bytes(content)
    assert_failed(call(capsys, "quantize", "x.safetensors", "--to", "nf4"), ExitCode.INPUT_FILE)


def test_another_models_file_is_named(capsys):
    import torch

    save_file({"model.diffusion_model.input_blocks.0.0.bias": torch.ones(4)}, "x.safetensors")
    assert "SDXL" in assert_failed(
        call(capsys, "quantize", "x.safetensors", "--to", "nf4"), ExitCode.INPUT_FILE
    )


def test_weights_that_are_not_finite_leave_nothing(micro, capsys):
    folder = Path(shutil.copytree(micro, "copy"))
    (path,) = (folder / "transformer").glob("*.safetensors")
    tensors = load_file(path)
    tensors["transformer_blocks.0.attn.to_q.weight"][3, 3] = float("nan")
    save_file(tensors, path)
    message = assert_failed(
        call(capsys, "quantize", "copy", "out/x", "--to", "fp8", "-q"), ExitCode.INPUT_FILE
    )
    assert "to_q.weight" in message and list(Path("out").iterdir()) == []


@pytest.mark.parametrize("options", [(), ("--dry-run",), ("--force",)])
def test_a_disk_that_is_too_small_is_refused_before_the_first_byte(
    options, micro, capsys, monkeypatch
):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: USAGE(10**6, 0, 10**6))
    result = call(capsys, "quantize", str(micro), "out/x", "--to", "nf4", *options, *FAST)
    assert "0.00 GB are free" in assert_failed(result, ExitCode.OUTPUT) and not Path("out").exists()


def test_a_device_that_is_not_here_is_refused(micro, capsys, monkeypatch):
    monkeypatch.setattr(
        hardware, "_count_accelerators", lambda: dict.fromkeys(("cuda", "xpu", "mps"), 0)
    )
    result = call(capsys, "quantize", str(micro), "x", "--to", "nf4", "--device", "cuda", "-q")
    assert "usable are cpu" in assert_failed(result, ExitCode.DEVICE) and files(Path()) == {}
    assert (
        call(
            capsys, "quantize", str(micro), "x", "--to", "nf4", "--device", "auto", *FAST
        ).returncode
        == 0
    )


# --- what is there already


@pytest.mark.parametrize("kind", ["diffusers", "bfl"])
def test_a_checkpoint_that_is_there_is_replaced_only_with_force(kind, micro, single, capsys):
    source, target = (micro, Path("x")) if kind == "diffusers" else (single, Path("x.safetensors"))
    arguments = ("quantize", str(source), str(target), "--to", "fp8", "--layout", kind, "-q")
    assert call(capsys, *arguments).returncode == 0
    before = files(Path())
    message = assert_failed(
        call(capsys, *arguments, "--keep", "*ff*" if kind == "bfl" else "*q*"), ExitCode.OUTPUT
    )
    assert "--force" in message and files(Path()) == before
    assert (
        call(capsys, *arguments, "--force", "--keep", "*ff*" if kind == "bfl" else "*q*").returncode
        == 0
    )
    assert set(files(Path())) == set(before) and files(Path()) != before


FOREIGN: dict[str, tuple[Callable[[Path], object], str]] = {
    "folder": (lambda path: (path.mkdir(), (path / "a").write_bytes(b"mine")), "diffusers"),
    "file": (lambda path: path.write_bytes(b"mine"), "diffusers"),
    "weights": (lambda path: path.write_bytes(b"mine"), "bfl"),
    "folder for a file": (lambda path: path.mkdir(), "bfl"),
    "dangling link": (lambda path: path.symlink_to("nowhere"), "diffusers"),
}


@pytest.mark.parametrize("make, kind", FOREIGN.values(), ids=FOREIGN)
def test_what_flux_did_not_make_is_never_replaced(make, kind, micro, single, capsys):
    target, source = Path("x.safetensors"), single if kind == "bfl" else micro
    make(target)
    before = files(Path())
    for force in ((), ("--force",)):
        result = call(
            capsys,
            "quantize",
            str(source),
            str(target),
            "--to",
            "fp8",
            "--layout",
            kind,
            "-q",
            *force,
        )
        assert "did not make" in assert_failed(result, ExitCode.OUTPUT)
    assert files(Path()) == before and os.path.lexists(target)


def test_an_empty_folder_is_taken_with_force(micro, capsys):
    Path("x").mkdir()
    arguments = ("quantize", str(micro), "x", "--to", "int8", "-q")
    assert_failed(call(capsys, *arguments), ExitCode.OUTPUT)
    assert call(capsys, *arguments, "--force").returncode == 0 and Path("x", MANIFEST).is_file()


# --- a process of its own


@pytest.mark.serial
@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c_leaves_nothing_and_ends_by_the_signal(commands):
    process = commands.start("-m", "fluxcli", "quantize", "tiny", "out/x", "--to", "nf4")
    until = time.monotonic() + 60
    while (
        not list(Path().glob("out/x.tmp-*/new/transformer/*.safetensors"))
        and time.monotonic() < until
    ):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=20)
    assert process.returncode == -signal.SIGINT and stdout == "" and files(Path()) == {}
    assert "Traceback" not in stderr and "error" not in stderr and "\x1b" not in stderr
    assert list(Path("out").iterdir()) == []
    line = f"flux: nothing was written to {Path('out/x').absolute()}; the same command starts again"
    assert stderr.splitlines().count(line) == 1


@pytest.mark.parametrize("is_placed", [True, False])
def test_ctrl_c_says_that_nothing_is_written_only_while_that_is_so(
    is_placed, micro, capsys, monkeypatch
):
    def stop(_: object, path: Path, **__: object) -> None:
        if is_placed:
            path.mkdir()
        raise Terminated(signal.SIGINT)

    monkeypatch.setattr("fluxcli.cli.quantize._bake", stop)
    with pytest.raises(Terminated):
        call(capsys, "quantize", str(micro), "x", "--to", "int8")
    assert ("nothing was written" in capsys.readouterr().err) != is_placed


@pytest.mark.parametrize("kind, expected", [("xterm", True), ("dumb", False)])
def test_a_terminal_sees_speed_and_time_left(kind, expected, micro, capsys, monkeypatch):
    pty = pytest.importorskip("pty")
    monkeypatch.setenv("TERM", kind)
    monkeypatch.delenv("NO_COLOR", raising=False)
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w", buffering=1) as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        result = call(capsys, "quantize", str(micro), "out", "--to", "int8")
        monkeypatch.undo()
        assert result.stdout.rstrip().endswith("out")
        text = ""
        while select.select([ours], [], [], 0.2)[0]:
            text += os.read(ours, 1 << 16).decode(errors="replace")
    os.close(ours)
    assert ("\x1b" in text) == expected
    assert not expected or ("GB/s" in text and "s left" in text and "quantize " in text)
    assert "GB in " in text
