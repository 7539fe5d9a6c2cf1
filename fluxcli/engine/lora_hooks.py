"""Low-rank adapters on layers of whatever class, packed, fused, streamed or not: what they add is added to outputs.

The layers' own tensors are neither changed nor copied: the adapter's lie in hooks, on the device that computes.
Knows modules and `quant.lora`, nothing of requests or plans.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

from quant.codecs import Reader
from quant.lazy import Tensor, Tensors, nn, torch
from quant.lora import BIAS, DOWN, NORM, UP, Adapter
from quant.spec import is_modulation

Places = Mapping[str, tuple[str, int]]  # the layers of a model: names in a module, and the first row of its output


def attach(
    module: "nn.Module", adapters: Iterable[Adapter], component: str, *, dtype: "torch.dtype", device: str,
    places: Places | None = None,
) -> list:  # fmt: skip
    """Make the module's layers add what the adapters say, in their order; handles whose `remove` undoes it.

    `places` None: all layers but modulation's are where their names say, or fused. Raises `CheckpointError` for NaN.
    """
    if places is None:
        names = [name for name, _ in module.named_modules() if not is_modulation(f"{name}.weight")]
        places = {name: (name, 0) for name in names} | getattr(module, "fused", {})
    hooks = []  # all read before the first acts
    for adapter in adapters:
        reader = Reader()
        for part in adapter.active_parts(component):
            here: dict[str, list] = {}  # columns of each layer's output, and rows of B
            for name, (start, stop) in part.layers.items():
                if name in places:
                    layer, at = places[name]
                    here.setdefault(layer, []).append((slice(at, at + stop - start), slice(start, stop)))
            stored = reader.read_checked(part.stored) if here else {}
            tensors = {kind: tensor.to(device, dtype) for kind, tensor in stored.items()}
            for layer, spans in here.items():
                hooks.append((layer, _hook(tensors, adapter.scale * part.factor, spans)))
    return [module.get_submodule(layer).register_forward_hook(hook) for layer, hook in hooks]


def _hook(tensors: Tensors, scale: float, spans: Sequence[tuple[slice, slice]]) -> Callable:
    """A forward hook that adds to columns of the output, in place; or that gives another norm's output."""
    import torch  # itself: torch.compile does not look through a lazy one

    def other_norm(module: torch.nn.Module, inputs: tuple, _: Tensor) -> Tensor:
        return torch.nn.functional.rms_norm(inputs[0], tensors[NORM].shape, tensors[NORM], module.eps)

    def add(_: torch.nn.Module, inputs: tuple, output: Tensor) -> None:
        low = inputs[0].reshape(-1, tensors[DOWN].shape[1]) @ tensors[DOWN].T  # (M, r)
        for columns, rows in spans:
            added = output.view(-1, output.shape[-1])[:, columns].addmm_(low, tensors[UP][rows].T, alpha=scale)
            if BIAS in tensors:
                added.add_(tensors[BIAS][rows], alpha=scale)

    return other_norm if NORM in tensors else add
