"""What a step launches, and moves beside its products, by how weights are multiplied.

`ROWS` was counted on the real engine: FLUX.1 at 1024x1024 with 512 text tokens, in 16 bit, on a
card that is not there (`python -m tests.support.steps` prints it). A test compares the rows with
what the engine does now. What a step costs at another size, width or depth follows: activations
grow with tokens x width, a dequantized weight with its values, and launches with the blocks alone.
Stdlib only.
"""

from dataclasses import dataclass

from quant.spec import FAMILIES, KITCHEN

TOKENS = 4608  # 4096 of the picture, 512 of the text
WIDTH = 3072
DOUBLE_NUMEL = 24 * WIDTH**2  # weights of a double block, without its modulation
SINGLE_NUMEL = 12 * WIDTH**2
SIXTEEN_BIT = "16 bit"


@dataclass(frozen=True)
class Passes:
    """What kernels do: products are among the launches, but not among the bytes."""

    launches: int
    moved_mb: float  # 10^6 bytes that are read or written


@dataclass(frozen=True)
class StepRow:
    """What one block of each kind does in a step."""

    double: Passes
    single: Passes


# What is in no block: embeddings, the last norm and layer, the scheduler.
OUTSIDE = Passes(13, 214.5)
ROWS = {
    SIXTEEN_BIT: StepRow(Passes(40, 1814.8), Passes(19, 1420.4)),
    "nf4": StepRow(Passes(64, 2441.3), Passes(25, 1733.7)),
    "fp8 scaled_mm": StepRow(Passes(72, 2310.7), Passes(27, 1845.3)),
    "fp8 scaled_mm per tensor": StepRow(Passes(104, 3840.0), Passes(35, 3204.5)),
    "fp8 dequantize": StepRow(Passes(64, 6118.4), Passes(25, 3572.2)),
    "int8 int_mm": StepRow(Passes(104, 4909.5), Passes(38, 4120.0)),
    "w6a8 int_mm": StepRow(Passes(168, 7715.0), Passes(54, 5518.6)),
    "w4a8 int_mm": StepRow(Passes(136, 6396.9), Passes(46, 4863.5)),
    "int8 dequantize": StepRow(Passes(56, 2912.9), Passes(23, 2109.5)),
    "w6a8 dequantize": StepRow(Passes(120, 5718.4), Passes(39, 3508.0)),
    "w4a8 dequantize": StepRow(Passes(88, 4400.3), Passes(31, 2852.9)),
    # Of int8, w6a8 and w4a8 alike: their products' own passes are inside of a kernel.
    KITCHEN: StepRow(Passes(30, 1024.4), Passes(10, 740.9)),
    "nvfp4": StepRow(Passes(222, 4660.7), Passes(72, 2843.3)),
    "mxfp8": StepRow(Passes(92, 3548.9), Passes(37, 2287.5)),
    "Q8_0": StepRow(Passes(56, 2565.1), Passes(25, 1795.6)),
    "Q4_0": StepRow(Passes(80, 3471.0), Passes(34, 2248.6)),
    "Q4_1": StepRow(Passes(72, 3088.8), Passes(31, 2057.5)),
    "Q5_0": StepRow(Passes(148, 4886.6), Passes(55, 2956.3)),
    "Q5_1": StepRow(Passes(136, 4504.4), Passes(51, 2765.2)),
    "Q2_K": StepRow(Passes(96, 3672.8), Passes(40, 2349.4)),
    "Q3_K": StepRow(Passes(160, 5091.9), Passes(59, 3059.0)),
    "Q4_K": StepRow(Passes(104, 3403.8), Passes(43, 2214.9)),
    "Q5_K": StepRow(Passes(160, 4508.0), Passes(59, 2767.0)),
    "Q6_K": StepRow(Passes(160, 5008.7), Passes(59, 3017.4)),
    "IQ4_NL": StepRow(Passes(112, 3938.2), Passes(43, 2482.1)),
    "IQ4_XS": StepRow(Passes(160, 5244.1), Passes(59, 3135.1)),
}
# The row that has what moves with the activations, and so grows with tokens, where that is not 16
# bit's. What a row moves beyond it grows with the weights.
ACTIVATIONS = {
    "fp8 scaled_mm": "fp8 scaled_mm",
    "fp8 scaled_mm per tensor": "fp8 scaled_mm per tensor",
    "int8 int_mm": "int8 int_mm",
    "w6a8 int_mm": "int8 int_mm",
    "w4a8 int_mm": "int8 int_mm",
    KITCHEN: KITCHEN,
}


def find_row(form: str, multiply: str) -> str:
    """The key in `ROWS` of weights in a form ("" for 16 bit) that are multiplied so."""
    scheme = FAMILIES.get(form, "")
    if not scheme:
        return SIXTEEN_BIT
    if scheme == "gguf":
        return form
    if multiply.startswith(KITCHEN):
        return KITCHEN
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
    row, of_activations = ROWS[key], ROWS[ACTIVATIONS.get(key, SIXTEEN_BIT)]
    counted_mb = row.single.moved_mb if is_single else row.double.moved_mb
    activations = of_activations.single if is_single else of_activations.double
    counted_numel = SINGLE_NUMEL if is_single else DOUBLE_NUMEL
    per_value = element_bytes / 2 * tokens * width / (TOKENS * WIDTH)
    of_weights_mb = (counted_mb - activations.moved_mb) * numel / counted_numel
    return (activations.moved_mb * per_value + of_weights_mb) * 1e6
