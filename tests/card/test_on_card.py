"""The engine on the card that is not there: the CPU's pixels, no problem, no host that waits."""

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fluxcli.request.fields import Order
from quant.checkpoint import Checkpoint, inspect
from quant.single_file import assemble_checkpoint
from quant.spec import ROTATED
from tests.support import loras
from tests.support.controlnets import save_map
from tests.support.helpers import BAKED, tiny
from tests.support.on_card import draw_on_card, draw_on_cpu

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:bitsandbytes")

PLACEMENTS = ("none", "stream", "sequential")
QUANTIZED = (*BAKED, *ROTATED)
# By precision; quantized ones are baked.
FOLDERS = ("bf16", "fp16", "fp32", "nf4", "fp8", *ROTATED)
WHILE_LOADING = ("nf4", "fp8", "int8")
FILES = (  # dialects of tests/support/exports.py
    "bfl bf16",
    "comfy fp8",
    "comfy scaled",
    "gguf BF16",
    "gguf Q4_0",
    "gguf Q4_K",
    "gguf Q5_K",
    "gguf Q6_K",
    "gguf Q8_0",
    "nf4 v2",
)
EVERY = [
    *itertools.product((f"folder {name}" for name in FOLDERS), PLACEMENTS, ("", "adapters")),
    # Nothing is quantized anew for each step.
    *itertools.product((f"while loading {name}" for name in WHILE_LOADING), PLACEMENTS[:2], ("",)),
    *itertools.product((f"file {name}" for name in FILES), PLACEMENTS, ("",)),
    *itertools.product(("file gguf Q4_0", "file nf4 v2"), PLACEMENTS, ("adapters",)),
]
# Every kind of files once, each pair of precision, placement and adapters at least nearly.
IN_CI = {
    ("folder bf16", "stream", "adapters"),
    ("folder bf16", "none", ""),
    ("folder fp16", "sequential", ""),
    ("folder nf4", "none", "adapters"),
    ("folder fp8", "sequential", ""),
    ("folder int8", "sequential", "adapters"),
    ("folder w6a8", "none", ""),
    ("folder w4a8", "stream", "adapters"),
    ("while loading int8", "none", ""),
    ("while loading nf4", "stream", ""),
    ("file bfl bf16", "none", ""),
    ("file comfy scaled", "stream", ""),
    ("file comfy fp8", "none", ""),
    ("file gguf Q4_0", "stream", "adapters"),
    ("file gguf Q4_K", "none", ""),
    ("file gguf Q6_K", "stream", ""),
    ("file nf4 v2", "sequential", ""),
}


@pytest.fixture(scope="session")
def adapters(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Adapters of all layers of three components, and of norms and biases."""
    folder = tmp_path_factory.mktemp("adapters")
    checkpoint = inspect(tiny_folder)
    parts = ("transformer", "text_encoder", "text_encoder_2")
    every = loras.write_lora(folder / "every.safetensors", checkpoint, parts)
    special = loras.write_special(folder / "special.safetensors", checkpoint)
    return f"{every}:0.5", f"{special}:0.7"


@pytest.fixture(scope="session")
def open_files(baked, exported, tiny_folder) -> Callable[[str], Checkpoint]:
    """A checkpoint of files as `EVERY` calls them."""

    def open_kind(files: str) -> Checkpoint:
        kind, _, name = files.rpartition(" ") if files.startswith("while") else files.partition(" ")
        if kind == "file":
            path, _ = exported(name)
            return assemble_checkpoint(path, lambda lacking: tiny_folder)
        if kind == "folder" and name in QUANTIZED:
            return inspect(baked(name, **BAKED.get(name, {})))
        return inspect(tiny_folder)

    return open_kind


def order_for(files: str, placement: str, adapters: tuple[str, ...]) -> Order:
    """An order for these files, on a card."""
    precision = "auto" if files.startswith("file") else files.rpartition(" ")[2]
    return tiny(precision=precision, offload=placement, device="cuda", lora=adapters)


@pytest.mark.parametrize(
    "files, placement, with_adapters",
    [pytest.param(*case, marks=[] if case in IN_CI else pytest.mark.exhaustive) for case in EVERY],
)
def test_a_picture_on_the_card_is_the_cpus(files, placement, with_adapters, open_files, adapters):
    order = order_for(files, placement, adapters if with_adapters else ())
    run = draw_on_card(order, open_files(files))
    assert run.card.problems == []
    assert run.waits() == []
    assert list(run.steps[-1].attention) == [f"{run.dtype}, width 32, no mask"]
    assert np.array_equal(run.pixels, draw_on_cpu(order, run))


@pytest.mark.parametrize(
    ("precision", "placement"),
    [
        ("nf4", "stream"),
        pytest.param("bf16", "sequential", marks=pytest.mark.exhaustive),
        *(
            pytest.param(precision, placement, marks=pytest.mark.exhaustive)
            for precision in ("bf16", "fp8", *ROTATED)
            for placement in ("none", "stream")
        ),
    ],
)
def test_so_is_one_with_controlnets(precision, placement, tiny_folder, controlnet, tmp_path):
    """Two networks, whose blocks pass through the device as the transformer's do."""
    shown = save_map(tmp_path / "map.png")
    controls = (
        f"{controlnet('single')}:{shown}",
        f"kind={controlnet('union')},mode=1,image={shown}",
    )
    order = tiny(precision=precision, offload=placement, device="cuda", control=controls)
    run = draw_on_card(order, inspect(tiny_folder))
    levels = {"none": "resident", "stream": "streamed", "sequential": "sequential"}
    assert run.plan.placement.controls == levels[placement]
    assert run.card.problems == []
    assert run.waits() == []
    assert np.array_equal(run.pixels, draw_on_cpu(order, run))
