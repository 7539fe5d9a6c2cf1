"""adaLN modulation as tables: every shift, scale and gate of a run, computed before its first step.

The modulation linears (27 % of FLUX.1's parameters) see only the embedding of timestep, guidance and pooled prompt,
never the picture (Peebles & Xie 2022, "Scalable Diffusion Models with Transformers", adaLN). So one pass over their
weights, read from the file one by one and dropped, gives the whole run's values. In the loop each norm holds a view
of one static row; `select` copies a step's row into it before a forward. No forward is ever counted.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from fluxcli.engine import classes
from fluxcli.engine.loader import check_keys, read_tensors
from fluxcli.engine.lora_hooks import attach
from quant.checkpoint import Component
from quant.lazy import Tensor, functional, nn, torch
from quant.lora import Adapter
from quant.spec import is_modulation


@dataclass(frozen=True)
class Condition:
    """One prompt's run by everything its table depends on: equal conditions mean equal tables."""

    weights: str  # the checkpoint's fingerprint
    digest: str  # of the pooled prompt embedding
    guidance: float | None
    timesteps: tuple[float, ...]  # sigmas x 1000, as the scheduler gives them
    pooled: Tensor = field(compare=False)  # (1, P)
    adapters: tuple[Adapter, ...] = ()  # those that act on the modulation


def condition(
    pooled: Tensor, *, weights: str, guidance: float | None, timesteps: Tensor, adapters: Sequence[Adapter] = ()
) -> Condition:
    """Make the condition of one prompt; `pooled` (1, P) and `timesteps` (S,) in 0 to 1000."""
    acting = (each for each in adapters if any(part.modulates for part in each.active_parts("transformer")))
    return Condition(weights, digest_of(pooled), guidance, tuple(timesteps.tolist()), pooled, tuple(acting))


def digest_of(tensor: Tensor) -> str:
    """A tensor's dtype, device and 16 hex digits for its values."""
    values = hashlib.sha256(tensor.float().cpu().numpy().tobytes()).hexdigest()
    return f"{tensor.dtype} {tensor.device} {values[:16]}"


def linear_names(transformer: Component) -> list[str]:
    """Prefixes of the modulation linears, in file order of their names."""
    suffix = ".linear.weight"
    return sorted(n.removesuffix(".weight") for n in transformer.weights if n.endswith(suffix) and is_modulation(n))


def row_width(transformer: Component) -> int:
    """Numbers of all shifts, scales and gates of one step."""
    return sum(transformer.weights[f"{name}.weight"].shape[0] for name in linear_names(transformer))


def make_tables(
    transformer: Component, conditions: Sequence[Condition], *, keep: "dict[str, torch.Tensor] | None" = None
) -> dict[Condition, Tensor]:
    """One pass over the modulation weights: a table (S, sum of outputs) per condition, rows in step order, in RAM.

    With `keep` the weights stay in it, for the next pass. Each condition's rows are multiplied by themselves: float32
    products depend on the number of rows.
    """
    with torch.no_grad():
        activated = [functional.silu(_time_text_embedding(transformer, item)) for item in conditions]  # (S, D)
        parts: list[list[torch.Tensor]] = [[] for _ in conditions]
        at, where = conditions[0].pooled, str(conditions[0].pooled.device)
        for name in linear_names(transformer):
            names = [f"{name}.weight", f"{name}.bias"]
            pair = keep if keep and names[0] in keep else read_tensors(transformer, names, dtype=at.dtype, device=where)
            if keep is not None:
                keep |= pair
            for item, rows, outputs in zip(conditions, activated, parts, strict=True):
                layer = nn.Module()
                layer.forward = partial(functional.linear, weight=pair[names[0]], bias=pair[names[1]])
                attach(layer, item.adapters, "transformer", dtype=at.dtype, device=where, places={name: ("", 0)})
                outputs.append(layer(rows).cpu())  # (S, 2, 3 or 6 x D)
        return {item: torch.cat(outputs, dim=1) for item, outputs in zip(conditions, parts, strict=True)}


def _time_text_embedding(transformer: Component, item: Condition) -> Tensor:
    """temb (S, D) of every step, by diffusers' own embedding module."""
    config, pooled = transformer.config, item.pooled
    width = config["num_attention_heads"] * config["attention_head_dim"]
    module = classes.time_text_embed(guidance=item.guidance is not None)(width, config["pooled_projection_dim"])
    prefix = "time_text_embed."
    stored = [name for name in transformer.weights if name.startswith(prefix)]
    tensors = read_tensors(transformer, stored, dtype=pooled.dtype, device=str(pooled.device))
    state = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    check_keys(transformer, expected, {name: tuple(tensor.shape) for name, tensor in state.items()})
    module.load_state_dict(state, assign=True)
    steps = torch.tensor(item.timesteps).to(pooled) / 1000 * 1000  # diffusers' rounding
    inputs = [steps]
    if item.guidance is not None:
        inputs.append(torch.full_like(steps, item.guidance, dtype=torch.float32).to(pooled.dtype) * 1000)
    places = {f"{prefix}{name}": (name, 0) for name, _ in module.named_modules()}
    attach(module, item.adapters, "transformer", dtype=pooled.dtype, device=str(pooled.device), places=places)
    return module(*inputs, pooled.expand(len(steps), -1))


class ModulationRow:
    """The static row (1, sum of outputs) that a transformer's norms look at."""

    def __init__(self, model: "nn.Module", transformer: Component, *, dtype: "torch.dtype", device: str) -> None:
        """Put views of a fresh row where `model` had its modulation linears and time embedding (still on meta)."""
        names = linear_names(transformer)
        sizes = [transformer.weights[f"{name}.weight"].shape[0] for name in names]
        self._row = torch.zeros(1, sum(sizes), dtype=dtype, device=device)
        for name, view in zip(names, self._row.split(sizes, dim=1), strict=True):
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, _constant(view))
        temb = torch.zeros(1, model.inner_dim, dtype=dtype, device=device)  # no norm looks at it any more
        model.time_text_embed = _constant(temb)

    def select(self, table: "torch.Tensor", step: int) -> None:
        """Make the next forward that of row `step` (from 0) of `table`."""
        self._row.copy_(table[step : step + 1])


def _constant(value: "torch.Tensor") -> "nn.Module":
    class Constant(nn.Module):
        """Returns its tensor whatever it is given; holds no weight."""

        def forward(self, *_: object) -> "torch.Tensor":
            return value

    return Constant()
