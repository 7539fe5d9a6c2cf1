"""Read the data of pieces from mapped safetensors files. Knows no scheme; headers were validated before."""

import contextlib
from typing import TYPE_CHECKING

from quant.weights import Piece, Weight

if TYPE_CHECKING:
    from pathlib import Path

    import torch


class Reader:
    """Maps each file once; `close` (or leaving the context) unmaps what no tensor holds any more."""

    def __init__(self) -> None:
        self._files: dict[Path, object] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self._files.clear()
        self._stack.close()

    def piece(self, piece: Piece) -> "torch.Tensor":
        """The piece's tensor on the CPU: mapped where it is one whole tensor or range, else a copy."""
        import torch
        from safetensors import safe_open

        if piece.file not in self._files:
            opened = safe_open(piece.file, framework="pt", device="cpu")
            self._files[piece.file] = self._stack.enter_context(opened)
        tensor = self._files[piece.file].get_tensor(piece.info.name)
        ranges = [tensor[start:stop] for start, stop in piece.rows] or [tensor]
        return ranges[0] if len(ranges) == 1 else torch.cat(ranges)

    def weight(self, weight: Weight) -> "dict[str, torch.Tensor]":
        """The tensors of a weight by suffix, as they are stored."""
        return {suffix: self.piece(piece) for suffix, piece in weight.pieces.items()}
