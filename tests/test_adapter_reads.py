"""An adapter's header is read once a command: all others are handed what was found."""

from pathlib import Path

import pytest

from quant import lora
from quant.checkpoint import inspect
from tests.support.invariant import call
from tests.support.loras import write_lora

REQUEST = ("-p", "tiny", "--size", "64", "--steps", "2", "--seed", "7", "--text-tokens", "16", "-q")


@pytest.fixture
def adapter(tiny_folder: Path, tmp_path: Path) -> Path:
    return write_lora(tmp_path / "x.safetensors", inspect(tiny_folder), ("transformer",), rank=4)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every file that was read as an adapter, as often as it was."""
    found: list[Path] = []
    real = lora.read_whole_header

    def read_whole_header(path: Path) -> object:
        found.append(path)
        return real(path)

    monkeypatch.setattr(lora, "read_whole_header", read_whole_header)
    return found


@pytest.mark.parametrize(
    "command",
    [
        ("generate", "a fox", "-o", "a.png"),
        ("generate", "a fox", "-o", "a-{seed}.png", "--count", "2"),
        ("generate", "a fox", "--dry-run"),
        ("plan", "a fox"),
        ("plan", "a fox", "--precision", "nf4"),
    ],
    ids=" ".join,
)
def test_an_adapters_header_is_read_once_a_command(command, adapter, reads, capsys):
    path = adapter.rename("x.safetensors").absolute()
    result = call(capsys, *command, *REQUEST, "--lora", f"{path}:0.5")
    assert result.returncode == 0, result.stderr
    assert reads == [path]


def test_nor_for_each_row_of_a_batch(adapter, reads, capsys):
    Path("rows.csv").write_text("prompt,steps\na fox,1\na cat,1\na cat,2\n")
    result = call(capsys, "generate", "--from", "rows.csv", *REQUEST, "--lora", f"{adapter}:0.5")
    assert result.returncode == 0, result.stderr
    assert reads == [adapter]
