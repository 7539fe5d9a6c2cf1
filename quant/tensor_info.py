"""What a header says of one tensor: name, dtype, shape and place. Knows no file. Stdlib only.

dtypes have the names of safetensors; GGUF's blocks have those of GGUF.
"""

import math
from dataclasses import dataclass

# Bounds for what a header may claim; no tensor of a real file comes near them.
MAX_RANK = 8
MAX_DIMENSION = 1 << 48

DTYPE_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "F64": 64,
    "I64": 64,
    "U64": 64,
    "C64": 64,
}
# GGUF's block types, and how many bits a value takes in each, scales of the block included.
GGUF_BITS = {
    "Q4_0": 4.5,
    "Q4_1": 5.0,
    "Q5_0": 5.5,
    "Q5_1": 6.0,
    "Q8_0": 8.5,
    "Q2_K": 2.625,
    "Q3_K": 3.4375,
    "Q4_K": 4.5,
    "Q5_K": 5.5,
    "Q6_K": 6.5625,
    "IQ4_NL": 4.5,
    "IQ4_XS": 4.25,
}


def gguf_block_values(dtype: str) -> int:
    """How many values one block of a GGUF type holds: 256 in most, 32 in the older ones."""
    return 256 if dtype.endswith(("_K", "_XS")) else 32


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file, or of a file that is yet to be written.

    `start` and `stop` are its first byte and the one after its last. They count from the end of
    the header in a safetensors file, from the first byte of the file in a GGUF.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int = 0

    @property
    def stop(self) -> int:
        return self.start + self.nbytes

    @property
    def nbytes(self) -> int:
        """The bytes of its data in the file."""
        bits = DTYPE_BITS.get(self.dtype) or GGUF_BITS[self.dtype]
        return int(self.numel * bits) // 8

    @property
    def numel(self) -> int:
        """How many values it has: 1 without dimensions, 0 where one of them is 0."""
        return math.prod(self.shape)
