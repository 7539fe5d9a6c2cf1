"""Heavy libraries by name, each imported when something of it is first used: the command line starts without them."""

import importlib
from typing import TypeAlias

Tensor: TypeAlias = "torch.Tensor"  # for annotations
Tensors: TypeAlias = "dict[str, torch.Tensor]"  # the pieces of a weight by suffix, or values by name


class Lazy:
    """Stands for a module of that name."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> object:
        return getattr(importlib.import_module(self._name), attribute)


torch, nn, functional = Lazy("torch"), Lazy("torch.nn"), Lazy("torch.nn.functional")
np, psutil, Image = Lazy("numpy"), Lazy("psutil"), Lazy("PIL.Image")
