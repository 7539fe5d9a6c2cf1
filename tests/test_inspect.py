"""`flux inspect` on weights: what a file or folder is; exit 4 and a reason where it is unusable."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fluxcli.errors import ExitCode
from quant.checkpoint import COMPONENTS, TOKENIZERS, inspect
from quant.spec import BAKEABLE
from tests.support.helpers import BAKED
from tests.support.invariant import assert_failed, call, files
from tests.test_dialects import SMALL, published

PART_KEYS = {"dialect", "precision", "parameters", "bytes", "tensors", "loads", "truncated"}


@pytest.fixture
def copy(tiny_folder: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, "model"))


@pytest.fixture
def single() -> Path:
    """A transformer as BFL publishes it, 128 wide."""
    shapes = published(SMALL, guidance=True)
    save_file(
        {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()},
        "flux1.safetensors",
    )
    return Path("flux1.safetensors")


def described(capsys, path: Path, code: int = 0) -> dict:
    """What `flux inspect PATH` prints; nothing else, no file changed."""
    before = files(path) if path.is_dir() else path.read_bytes()
    result = call(capsys, "inspect", str(path))
    assert (result.returncode, result.stderr) == (code, ""), result.stderr
    assert before == (files(path) if path.is_dir() else path.read_bytes())
    return json.loads(result.stdout)


@pytest.mark.parametrize("to", ["", "nf4", "fp8", "int8"])
def test_a_model_folder_is_whole(to, tiny_folder, baked, capsys):
    folder = baked(to, **BAKED[to]) if to else tiny_folder
    found = described(capsys, folder)
    assert set(found) == {"path", "kind", "model", "components", "needs", "problems"}
    assert found["model"] == {"kind": "dev", "told_by": "its 64 channels and its guidance input"}
    assert (found["kind"], found["needs"], found["problems"]) == ("model folder", [], [])
    parts, source = found["components"], inspect(tiny_folder).components
    assert list(parts) == list(COMPONENTS)
    for name, part in parts.items():
        assert set(part) == PART_KEYS and part["truncated"] is False
        by = "bitsandbytes" if part["precision"] == "nf4" else "flux"
        packed = f", {part['precision']} by {by}" * (part["precision"] in BAKEABLE)
        assert part["dialect"] == f"diffusers{packed}"
        assert part["parameters"] == source[name].numel  # packed or not
        there, needed = map(int, part["loads"].split(" of "))
        assert there == needed
    packed = BAKED[to].get("text_encoder", "BF16") if to else "BF16"
    expected = {
        "transformer": to or "BF16",
        "text_encoder_2": packed,
        "text_encoder": "BF16",
        "vae": "BF16",
    }
    assert {name: part["precision"] for name, part in parts.items()} == expected
    assert not to or parts["transformer"]["bytes"] < 0.7 * source["transformer"].nbytes


@pytest.mark.parametrize("name", COMPONENTS)
def test_the_folder_of_one_part_is_that_part_and_needs_the_others(name, baked, capsys):
    found = described(capsys, baked("nf4", **BAKED["nf4"]) / name)
    assert (found["kind"], list(found["components"]), found["problems"]) == (
        "part of a model",
        [name],
        [],
    )
    assert found["needs"] and set(found["components"][name]) == PART_KEYS


def test_a_file_of_bfl_is_a_transformer_and_needs_the_rest(single, capsys):
    found = described(capsys, single)
    assert set(found) == {"path", "kind", "model", "needs", "problems"} | PART_KEYS
    assert found["model"]["kind"] == "dev"
    assert (found["kind"], found["dialect"], found["precision"]) == ("transformer", "BFL", "BF16")
    assert {"text_encoder", "text_encoder_2", "vae"} <= set(found["needs"]) and found[
        "problems"
    ] == []
    there, needed = found["loads"].split(" of ")
    shapes = published(SMALL, guidance=True).values()
    assert there == needed and found["parameters"] == sum(
        torch.Size(shape).numel() for shape in shapes
    )


def test_a_file_of_bfl_in_fp8_is_known_by_its_header(single, capsys):
    result = call(
        capsys, "quantize", str(single), "fp8.safetensors", "--to", "fp8", "--layout", "comfy", "-q"
    )
    assert result.returncode == 0
    found, source = described(capsys, Path("fp8.safetensors")), described(capsys, single)
    assert (found["precision"], found["parameters"]) == ("fp8", source["parameters"])
    assert found["loads"] == source["loads"] and found["bytes"] < source["bytes"]


@pytest.mark.parametrize(
    "kind, name",
    [
        ("FLUX.2", "double_stream_modulation_img.lin.weight"),
        ("SDXL", "conditioner.embedders.0.x"),
        ("a VAE", "decoder.up.0.x"),
        ("its first key is ", "something.else"),
    ],
)
def test_a_file_of_another_kind_is_named_and_counted(kind, name, capsys):
    save_file({name: torch.ones(3, 5, dtype=torch.float16), "x": torch.ones(2)}, "x.safetensors")
    found = described(capsys, Path("x.safetensors"))
    assert kind in found["kind"] and (found["tensors"], found["parameters"]) == (2, 17)
    assert found["truncated"] is False and found["needs"] and found["problems"] == []


def test_a_transformers_file_of_diffusers_is_a_transformer(tiny_folder, capsys):
    (path,) = (tiny_folder / "transformer").glob("*.safetensors")
    found = described(capsys, path)
    assert (found["kind"], found["dialect"]) == ("transformer", "diffusers")
    assert found["precision"] == "BF16" and found["loads"] == "154 of 154"
    assert found["needs"][:3] == ["text_encoder", "text_encoder_2", "vae"]
    assert found["parameters"] == inspect(tiny_folder).components["transformer"].numel


# --- what is unusable


def test_tensors_without_values_are_a_problem(capsys):
    save_file({f"a{n}": torch.ones(0) for n in range(4000)}, "x.safetensors")
    assert "hold no values" in assert_failed(call(capsys, "inspect", "x.safetensors"), 4)


def test_what_a_model_folder_does_not_use_is_listed(tiny_folder, capsys):
    model = Path(shutil.copytree(tiny_folder, "model"))
    weights = model / "text_encoder" / "model.safetensors"
    more = {"vision_model.post_layernorm.weight": torch.ones(8), "logit_scale": torch.ones(())}
    save_file(load_file(weights) | more, weights)
    found = described(capsys, model)
    assert found["components"]["text_encoder"]["unused"] == sorted(more)
    assert found["problems"] == [] and "unused" not in found["components"]["vae"]


def test_every_problem_of_a_model_folder_is_listed(tiny_folder, capsys):
    model = Path(shutil.copytree(tiny_folder, "model"))
    weights = model / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    del tensors["decoder.conv_in.bias"]
    save_file(tensors | {"decoder.conv_out.bias": torch.ones(4)}, weights)
    config = model / "transformer" / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"axes_dims_rope": [4, 4, 4]}))
    result = call(capsys, "inspect", str(model))
    problems = json.loads(result.stdout)["problems"]
    assert result.returncode == 4 and len(problems) == 2
    assert "axes_dims_rope" in problems[0] and "decoder.conv_in.bias" in problems[1]


FILES = {
    "empty": (b"", "only 0 bytes"),
    "short": (b"\x01\x02", "only 2 bytes"),
    "pickle": (b"PK\x03\x04" + b"\0" * 99, "refusing a pickle"),
    "old pickle": (b"\x80\x02}q\x00" + b"\xff" * 99, "refusing a pickle"),
    "GGUF": (b"GGUF\x03\0\0\0" + b"\0" * 99, "corrupt GGUF file"),
    "page": (b"<!DOCTYPE html>" + b" " * 99, "a web page"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
    "nothing in it": (b"\x02\0\0\0\0\0\0\0{}", "no tensors"),
    "no JSON": (b"\x04\0\0\0\0\0\0\0{{{{", "corrupt"),
}


@pytest.mark.parametrize("suffix", ["safetensors", "gguf", "ckpt", "bin", "PT"])
@pytest.mark.parametrize("content, word", FILES.values(), ids=FILES)
def test_a_file_that_is_none_is_exit_4(content, word, suffix, capsys):
    Path(f"x.{suffix}").write_bytes(content)
    assert word in assert_failed(call(capsys, "inspect", f"x.{suffix}"), ExitCode.INPUT_FILE)


def test_a_truncated_file_says_how_much_is_there(single, capsys):
    single.write_bytes(single.read_bytes()[:-1000])
    message = assert_failed(call(capsys, "inspect", str(single)), ExitCode.INPUT_FILE)
    assert "truncated" in message and "download it again" in message


def test_a_folder_without_anything_is_exit_4(capsys):
    Path("empty").mkdir()
    assert_failed(call(capsys, "inspect", "empty"), ExitCode.INPUT_FILE)


@pytest.mark.parametrize("command", ["inspect", "replay", "decode"])
@pytest.mark.parametrize("path", ["nowhere.safetensors", "nowhere", "nowhere.png"])
def test_a_file_that_is_not_there_is_a_usage_error(command, path, capsys):
    assert "no such file" in assert_failed(call(capsys, command, path), ExitCode.USAGE)


def test_a_file_that_lacks_a_tensor_is_a_problem(single, capsys):
    tensors = load_file(single)
    del tensors["single_blocks.0.linear2.bias"]
    save_file(tensors, single)
    found = described(capsys, single, ExitCode.INPUT_FILE)
    there, needed = map(int, found["loads"].split(" of "))
    assert there == needed - 1 and f"only {there} of its {needed}" in found["problems"][0]


def cut(folder: Path, part: str) -> None:
    (path,) = (folder / part).glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-10])


def lose(folder: Path, part: str) -> None:
    (path,) = (folder / part).glob("*.safetensors")
    tensors = load_file(path)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, path)


def say(folder: Path, file: str, **values: object) -> None:
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | values))


DAMAGE: dict[str, tuple[Callable[[Path], object], str, list[str]]] = {
    "no T5": (
        lambda f: shutil.rmtree(f / "text_encoder_2"),
        "text_encoder_2 is missing",
        ["text_encoder_2"],
    ),
    "no tokenizer": (
        lambda f: shutil.rmtree(f / TOKENIZERS[0]),
        "tokenizer is missing",
        ["tokenizer"],
    ),
    "no scheduler": (
        lambda f: shutil.rmtree(f / "scheduler"),
        "scheduler is missing",
        ["scheduler"],
    ),
    "truncated": (lambda f: cut(f, "vae"), "vae: weight file is truncated", []),
    "a tensor less": (lambda f: lose(f, "transformer"), "transformer: only 153 of its 154", []),
    "no config": (
        lambda f: (f / "vae" / "config.json").unlink(),
        "vae: no vae in the model folder",
        [],
    ),
    "another class": (
        lambda f: say(f, "vae/config.json", _class_name="VQModel"),
        "vae: wrong class",
        [],
    ),
    "hostile": (
        lambda f: say(f, "transformer/config.json", num_layers=10**9),
        "transformer: impossible config",
        [],
    ),
    "other channels": (
        lambda f: say(f, "transformer/config.json", in_channels=96),
        "transformer: another kind",
        [],
    ),
    "another pipeline": (
        lambda f: say(f, "model_index.json", _class_name="Flux2Pipeline"),
        "Flux2Pipeline",
        [],
    ),
    "other scheduler": (
        lambda f: say(f, "scheduler/scheduler_config.json", use_karras_sigmas=True),
        "use_karras_sigmas",
        [],
    ),
    "empty scheduler": (
        lambda f: (f / "scheduler" / "scheduler_config.json").unlink(),
        "no scheduler",
        [],
    ),
}


@pytest.mark.parametrize("damage, word, needs", DAMAGE.values(), ids=DAMAGE)
def test_a_folder_with_a_defect_is_exit_4_and_lists_it_beside_what_is_well(
    damage, word, needs, copy, capsys
):
    damage(copy)
    found = described(capsys, copy, ExitCode.INPUT_FILE)
    assert len(found["problems"]) == 1 and word in found["problems"][0] and found["needs"] == needs
    assert len(found["components"]) >= 3
    assert_failed(
        call(capsys, "generate", "x", "-p", "tiny", "-m", str(copy), "-q"), ExitCode.INPUT_FILE
    )


def test_every_defect_is_listed(copy, capsys):
    shutil.rmtree(copy / "tokenizer_2")
    cut(copy, "transformer")
    cut(copy, "text_encoder")
    found = described(capsys, copy, ExitCode.INPUT_FILE)
    assert len(found["problems"]) == 3 and set(found["components"]) == {"text_encoder_2", "vae"}


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"_class_name": "UNet2DConditionModel"},
        {"architectures": ["LlamaForCausalLM"]},
        {"architectures": 5},
        {"architectures": {"a": 1}},
        {"_class_name": ["x"]},
        {"_class_name": {}, "architectures": []},
    ],
    ids=str,
)
def test_the_folder_of_another_models_part_is_named(config, copy, capsys):
    (copy / "transformer" / "config.json").write_text(json.dumps(config))
    message = assert_failed(call(capsys, "inspect", str(copy / "transformer")), ExitCode.INPUT_FILE)
    assert "not a part of FLUX.1" in message


@pytest.mark.parametrize("text", ["", "[]", "{", '"x"', "\udcff"])
def test_a_folder_whose_config_is_no_json_is_exit_4(text, copy, capsys):
    (copy / "vae" / "config.json").write_text(text, errors="surrogateescape")
    assert_failed(call(capsys, "inspect", str(copy / "vae")), ExitCode.INPUT_FILE)
    found = described(capsys, copy, ExitCode.INPUT_FILE)
    assert [p.split(":")[0] for p in found["problems"]] == ["vae"]
