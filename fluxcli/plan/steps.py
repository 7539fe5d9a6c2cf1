"""What one denoising step moves and launches beside its products, by how weights are multiplied.

`ROWS` was counted on the real engine: FLUX.1 at 1024x1024 with 512 text tokens, in 16 bit, on a
card that is not there (`python -m tests.support.steps` prints it). A test compares the rows with
what the engine does now. What a step costs at another size, width or depth follows: activations
grow with tokens x width, a dequantized weight with its values, and launches with the blocks alone.
Stdlib only.
"""

from dataclasses import dataclass

from quant.spec import FAMILIES

TOKENS = 4608  # 4096 of the picture, 512 of the text
WIDTH = 3072
DOUBLE_NUMEL = 24 * WIDTH**2  # weights of a double block, without its modulation
SINGLE_NUMEL = 12 * WIDTH**2
SIXTEEN_BIT = "16 bit"


@dataclass(frozen=True)
class Passes:
    """Launches, and megabytes (10^6) that they read and write; products are not counted."""

    launches: int
    moved_mb: float


@dataclass(frozen=True)
class StepRow:
    """What one block of each kind does in a step."""

    double: Passes
    single: Passes


# What is in no block: embeddings, the last norm and layer, the scheduler.
OUTSIDE = Passes(60, 212.4)
ROWS = {
    SIXTEEN_BIT: StepRow(Passes(64, 2727.8), Passes(33, 2585.9)),
    "nf4": StepRow(Passes(98, 3361.3), Passes(46, 2907.4)),
    "fp8 scaled_mm": StepRow(Passes(136, 5715.3), Passes(51, 5162.6)),
    "fp8 scaled_mm per tensor": StepRow(Passes(160, 6734.9), Passes(57, 6068.7)),
    "fp8 dequantize": StepRow(Passes(88, 7031.4), Passes(39, 4737.7)),
    "int8 int_mm": StepRow(Passes(252, 10189.1), Passes(111, 9183.4)),
    "int8 dequantize": StepRow(Passes(88, 7031.4), Passes(39, 4737.7)),
    "Q8_0": StepRow(Passes(244, 5743.0), Passes(117, 4093.5)),
    "Q4_0": StepRow(Passes(484, 7554.9), Passes(229, 4999.5)),
    "Q4_K": StepRow(Passes(1324, 8652.0), Passes(621, 5548.0)),
    "Q5_K": StepRow(Passes(1624, 10747.0), Passes(761, 6595.5)),
    "Q6_K": StepRow(Passes(844, 9885.3), Passes(397, 6164.7)),
}
# Where activations are quantized, so that what they move more than 16 bit grows with tokens; in the
# other rows it grows with the weights.
MULTIPLIED = ("fp8 scaled_mm", "fp8 scaled_mm per tensor", "int8 int_mm")
# GGUF's forms that were not counted, by one that takes about as many passes.
ALIKE = {
    "Q4_1": "Q4_0",
    "Q5_0": "Q5_K",
    "Q5_1": "Q5_K",
    "Q2_K": "Q4_K",
    "Q3_K": "Q5_K",
    "IQ4_NL": "Q4_0",
    "IQ4_XS": "Q4_K",
}


def find_row(form: str, multiply: str) -> str:
    """The key in `ROWS` of weights in a form ("" for 16 bit) that are multiplied so."""
    scheme = FAMILIES.get(form, "")
    if not scheme:
        return SIXTEEN_BIT
    if scheme == "gguf":
        return ALIKE.get(form, form)
    key = f"{scheme} {multiply}"
    return key if key in ROWS else scheme


def launches_of(key: str, *, is_single: bool) -> int:
    """How many kernels a block launches in a step, all of whose weights are of one row."""
    row = ROWS[key]
    return row.single.launches if is_single else row.double.launches


def moved_bytes(
    key: str, *, is_single: bool, numel: int, tokens: int, width: int, element_bytes: int
) -> float:
    """Bytes that a block moves beside its products, all of whose weights are of one row.

    It has `numel` weights; `element_bytes` is the size of the compute dtype.
    """
    row, wide = ROWS[key], ROWS[SIXTEEN_BIT]
    counted = row.single if is_single else row.double
    of_activations = wide.single if is_single else wide.double
    counted_numel = SINGLE_NUMEL if is_single else DOUBLE_NUMEL
    per_value = element_bytes / 2 * tokens * width / (TOKENS * WIDTH)
    added_mb = counted.moved_mb - of_activations.moved_mb
    if key in MULTIPLIED:
        added_mb *= per_value
    else:
        added_mb *= numel / counted_numel
    return (of_activations.moved_mb * per_value + added_mb) * 1e6
