"""Runs that share a prompt: the next one needs no encoder and draws the same."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fluxcli.engine import prompt_cache as embeddings
from quant.checkpoint import Checkpoint, inspect
from tests.support.batches import of
from tests.support.invariant import call
from tests.support.loras import write_lora


@pytest.fixture(scope="module")
def checkpoint(tiny_folder: Path) -> Checkpoint:
    return inspect(tiny_folder)


ENCODING = {"tokenizers", "text_encoder", "text_encoder_2"}


def loads(capsys, *arguments: str) -> tuple[set[str], str]:
    """(what a run of its own loads to encode, its pixels)."""
    result = call(
        capsys,
        "generate",
        *arguments,
        "-p",
        "tiny",
        "--size",
        "64",
        "--steps",
        "1",
        "--events",
        "-o",
        "o/",
    )
    assert result.returncode == 0, result.stderr
    events = [json.loads(line) for line in result.stdout.splitlines()]
    found = {event["detail"] for event in of(events, "phase") if event["name"] == "load"} & ENCODING
    return found, of(events, "saved")[0]["image"]["pixels_sha256"]


def entries() -> list[Path]:
    return sorted(embeddings.folder().glob("*.safetensors"))


@pytest.fixture
def encoded(capsys) -> Callable[[str], tuple[set[str], str]]:
    """A prompt that a run before has encoded; draws it with a seed."""
    assert loads(capsys, "a red circle", "--seed", "1")[0] == ENCODING and len(entries()) == 1
    return lambda seed: loads(capsys, "a red circle", "--seed", seed)


def test_the_next_run_of_a_prompt_needs_no_encoder_and_draws_the_same(encoded, capsys):
    found, drawn_again = encoded("2")
    assert found == set() and len(entries()) == 1
    (path,), before = entries(), entries()[0].read_bytes()
    assert loads(capsys, "a red circle", "--seed", "2", "--no-cache") == (ENCODING, drawn_again)
    path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    assert encoded("2") == (ENCODING, drawn_again) and path.read_bytes() == before
    path.write_bytes(before[: len(before) // 2])
    assert encoded("2") == (ENCODING, drawn_again)


def test_what_embeddings_depend_on_is_another_entry(encoded, capsys, checkpoint):
    write_lora(Path("reader.safetensors"), checkpoint, ("text_encoder",), size=3.0)
    write_lora(Path("painter.safetensors"), checkpoint, pattern=".*attn.to_q")
    other = ("--seed", "1", "--lora")
    assert (
        loads(capsys, "a red circle", *other, "painter.safetensors")[0] == set()
        and len(entries()) == 1
    )
    assert (
        loads(capsys, "a red circle", *other, "reader.safetensors")[0] == ENCODING
        and len(entries()) == 2
    )
    assert (
        loads(capsys, "a red circle", *other, "reader.safetensors:0.5")[0] == ENCODING
        and len(entries()) == 3
    )
    assert (
        loads(capsys, "a red circle", "--seed", "1", "--text-tokens", "16")[0] == ENCODING
        and len(entries()) == 4
    )
    assert loads(capsys, "A red circle", "--seed", "1")[0] == ENCODING and len(entries()) == 5


def test_another_model_with_the_same_encoders_has_the_same_entry(encoded, capsys, tiny_folder):
    shutil.copytree(tiny_folder, "other")
    index = Path("other/transformer/config.json")
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_note": "another"}))
    assert loads(capsys, "a red circle", "-m", "other", "--seed", "1")[0] == set()
    index = Path("other/tokenizer_2/special_tokens_map.json")
    index.write_text(index.read_text() + "\n" if index.exists() else "{}")
    assert (
        loads(capsys, "a red circle", "-m", "other", "--seed", "1")[0] == ENCODING
        and len(entries()) == 2
    )


def test_no_cache_writes_nothing(capsys):
    assert loads(capsys, "a red circle", "--seed", "1", "--no-cache")[0] == ENCODING
    assert not embeddings.folder().exists()
