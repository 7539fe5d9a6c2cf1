"""Read the data of weights from mapped safetensors files. Knows no scheme; headers were validated before."""

from collections.abc import Sequence

from quant.lazy import torch
from quant.weights import Piece, Weight


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
    return stacked([tensor[start:stop] for start, stop in piece.rows] or [tensor])


def stacked(tensors: "Sequence[torch.Tensor]") -> "torch.Tensor":
    """One below the other; a single tensor stays where it is (mapped, perhaps)."""
    import torch  # itself: torch.compile does not look through a lazy one

    return torch.cat(tuple(tensors)) if len(tensors) > 1 else tensors[0]
