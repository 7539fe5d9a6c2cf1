"""What notices claim is what the engine used."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fluxcli.engine import device
from fluxcli.models.loras import describe_unmatched
from fluxcli.paths import config_folder
from fluxcli.run.session import Session
from quant.checkpoint import Checkpoint, inspect
from quant.lora import read_adapter
from tests.support.helpers import draw, engine_of, machine, tiny
from tests.support.invariant import call

SPAN = "transformer.transformer_blocks.0.attn.to_out.0"
PAIR = {f"{SPAN}.lora_A.weight": torch.ones(4, 128), f"{SPAN}.lora_B.weight": torch.ones(128, 4)}
QUICK = ("-p", "tiny", "--size", "64", "--steps", "1", "--text-tokens", "24", "--json")


@pytest.fixture(scope="module")
def checkpoint(tiny_folder: Path) -> Checkpoint:
    return inspect(tiny_folder)


def test_an_alpha_that_is_not_known_is_taken_for_the_rank(checkpoint, tmp_path):
    """As the notice has it: the picture is that of an adapter whose own alpha is its rank."""
    pixels = []
    for name, more in (("plain", {}), ("own", {f"{SPAN}.alpha": torch.tensor(4.0)})):
        path = tmp_path / name / "x.safetensors"
        path.parent.mkdir()
        save_file(PAIR | more, path)
        config = {"r": 64, "lora_alpha": 16}  # of another file, by its rank
        (path.parent / "adapter_config.json").write_text(json.dumps(config))
        notices = read_adapter(path, checkpoint.components).notices
        assert bool(notices) == (not more)
        pixels.append(draw(engine_of(checkpoint), tiny(lora=(str(path),)))[1])
    assert (pixels[0] == pixels[1]).all()


def test_layers_that_have_no_place_change_nothing(checkpoint, tmp_path):
    other = {key.replace("blocks.0", "blocks.77"): tensor.clone() for key, tensor in PAIR.items()}
    save_file(PAIR, tmp_path / "plain.safetensors")
    save_file(PAIR | other, tmp_path / "more.safetensors")
    paths = [str(tmp_path / name) for name in ("plain.safetensors", "more.safetensors")]
    plain, more = [draw(engine_of(checkpoint), tiny(lora=(path,)))[1] for path in paths]
    assert (plain == more).all()
    said = list(describe_unmatched([read_adapter(Path(paths[1]), checkpoint.components)]))
    assert len(said) == 1 and "1 of 2 layers have no place" in said[0]


def test_what_is_announced_and_what_a_preset_hides_is_what_drew(capsys, tmp_path):
    config_folder().mkdir(parents=True, exist_ok=True)
    (config_folder() / "config.toml").write_text("guidance = 9.0\n")
    result = call(capsys, "generate", "a red circle", *QUICK, "--seed", "5")
    assert result.returncode == 0, result.stderr
    (about,) = [json.loads(line) for line in result.stdout.splitlines()]
    request, plan = about["request"], about["plan"]
    assert "config.toml's guidance: " in result.stderr and request["guidance"] != 9.0
    announced = f"64x64, 1 step, seed 5, {request['model']} on {plan['device']}"
    assert f"{announced} in {plan['precision']}" in result.stderr


def test_lost_text_is_the_end_of_the_prompt(checkpoint):
    engine = engine_of(checkpoint)
    prompt = " ".join(["a red circle"] * 12)
    events, _ = draw(engine, tiny(prompt=prompt, text_tokens=16))
    (said,) = [event.message for event in events if "; lost: " in getattr(event, "message", "")]
    lost = said.partition("; lost: ")[2].strip("'")
    assert prompt.endswith(lost.strip()) and lost


def test_a_notebook_that_used_cuda_before_is_told_once(monkeypatch):
    here = machine(8, fixed_segments=device.USED_BEFORE)
    monkeypatch.setattr(device, "probe", lambda *_: here)
    session = Session()
    told = []
    for size in (64, 128):
        notices = session.prepare(tiny(image_size=size), lock=False)
        told += [notice.message for notice in notices if "before flux" in notice.message]
    assert len(told) == 1 and "8% of memory are left for gaps" in told[0]
