"""Read the data of weights from mapped safetensors files. Knows no scheme; headers were validated before."""

from typing import TYPE_CHECKING

from quant.weights import Piece, Weight

if TYPE_CHECKING:
    import torch


class Reader(dict):
    """Opened files by path, each mapped when it is first read, for as long as a tensor of it lives."""

    def __missing__(self, path: object) -> object:
        from safetensors import safe_open

        return self.setdefault(path, safe_open(path, framework="pt", device="cpu"))

    def weight(self, weight: Weight) -> "dict[str, torch.Tensor]":
        """The tensors of a weight by suffix, as they are stored."""
        return {suffix: rows_of(self[p.file].get_tensor(p.info.name), p) for suffix, p in weight.pieces.items()}


def rows_of(tensor: "torch.Tensor", piece: Piece) -> "torch.Tensor":
    """The piece's rows of the tensor that holds it, where it is not the whole."""
    import torch

    ranges = [tensor[start:stop] for start, stop in piece.rows] or [tensor]
    return torch.cat(ranges) if len(ranges) > 1 else ranges[0]
