"""A ratchet of one denoising step: its launches, bytes and synchronizations in every precision are
those of golden_steps.txt, which a change in either direction has to update.

`tests.support.steps` says what is counted, and how.
"""

import pytest

from tests.support.helpers import ROOT
from tests.support.steps import (
    FLUX1,
    HEADER,
    ROWS,
    Depth,
    count_blocks,
    count_step,
    describe_row,
)

# Kinds of GGUF in which FLUX.1 is hardly published, and what does as int8 does.
RARE = [f"gguf-{kind}" for kind in ("Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "IQ4_NL", "IQ4_XS")]
RARE += ["w6a8-kernels", "w4a8-kernels", "nvfp4", "mxfp8"]
# What no change may exceed: launches, and GB that a step moves beside its products.
LIMITS = {
    "bf16": (1650, 95),
    "nf4": (2300, 120),
    "fp8": (2450, 160),
    "int8": (3600, 260),
    "gguf-Q4_K": (4500, 220),
    "gguf-Q8_0": (3000, 180),
}
GOLDEN = ROOT / "tests" / "golden_steps.txt"
UPDATE = "if that is meant: .venv/bin/python -m tests.support.steps > tests/golden_steps.txt"


def golden_lines() -> dict[str, str]:
    """The table's lines by their rows' names."""
    header, *lines = GOLDEN.read_text(encoding="utf-8").splitlines()
    assert header == HEADER, UPDATE
    return {line.split()[0]: line for line in lines}


def test_the_table_has_every_row():
    assert list(golden_lines()) == list(ROWS), UPDATE


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.exhaustive if name in RARE else ()) for name in ROWS],
)
def test_a_step_does_what_the_table_says(name):
    found = describe_row(name, count_blocks(ROWS[name]))
    assert found == golden_lines()[name], f"\n{found}\nis counted; {UPDATE}"


def test_a_step_is_linear_in_depth():
    deeper = Depth(3, 3)
    row = ROWS["nf4"]
    assert count_step(row, deeper) == count_blocks(row).extrapolate(deeper)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ROWS)
def test_the_whole_model_does_what_shallow_ones_tell(name):
    row = ROWS[name]
    assert count_step(row, FLUX1) == count_blocks(row).extrapolate(FLUX1)


def test_no_step_waits_and_the_usual_ones_are_within_their_limits():
    lines = golden_lines()
    for name, line in lines.items():
        assert line.split()[-3] == "0", name
    for name, (most_launches, most_gb) in LIMITS.items():
        fields = lines[name].split()
        launches, other_gb = int(fields[1]), float(fields[-5])
        assert launches <= most_launches and other_gb <= most_gb, name


def test_a_controlnets_block_launches_two_more_than_the_transformers():
    """A product makes a residual of its output, which is scaled; no step waits for it."""
    row = ROWS["bf16"]
    shallow = count_step(row, Depth(1, 1), network=Depth(1, 0))
    block = count_step(row, Depth(1, 1), network=Depth(2, 0)) - shallow
    transformers = golden_lines()["bf16"].split(" 19 x ")[1].split()[0]
    assert block.launches.total() == int(transformers) + 2
    assert not shallow.syncs and not shallow.copies
