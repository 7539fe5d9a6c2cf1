"""adaLN modulation as tables: every shift, scale and gate of a run, computed before its first step.

The modulation linears (27 % of FLUX.1's parameters) see only the embedding of timestep, guidance
and pooled prompt, never the picture (Peebles & Xie 2022, "Scalable Diffusion Models with
Transformers", adaLN). So one pass over their weights, read from the file one by one and dropped,
gives the whole run's values. In the loop each norm holds a view of one static row; `select` copies
a step's row into it before a forward. The loop names the row of each step; nothing counts the
forwards, so one that is repeated or skipped (by a step cache, say) does not shift the rows.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fluxcli.engine import classes
from fluxcli.engine.loader import Place, make_reader, read_tensors
from fluxcli.engine.lora_hooks import attach
from quant.checkpoint import Component
from quant.expected import check_keys
from quant.lora import Adapter
from quant.spec import is_modulation

EMBEDDING = "time_text_embed."
LINEAR_WEIGHT = ".linear.weight"


@dataclass(frozen=True)
class Condition:
    """One prompt's run by everything its table depends on: equal conditions mean equal tables."""

    weights: str  # the checkpoint's fingerprint
    digest: str  # of the pooled prompt embedding
    guidance: float | None
    timesteps: tuple[float, ...]  # sigmas x 1000, as the scheduler gives them
    pooled: Tensor = field(compare=False)  # (1, P)
    adapters: tuple[Adapter, ...] = ()  # those that act on the modulation


def make_condition(
    pooled: Tensor,
    *,
    weights: str,
    guidance: float | None,
    timesteps: Tensor,
    first_step: int = 0,
    adapters: Sequence[Adapter] = (),
) -> Condition:
    """Make the condition of one prompt; `pooled` (1, P) and `timesteps` (S,) in 0 to 1000.

    Those before `first_step` are of no step.
    """
    acting = [
        adapter
        for adapter in adapters
        if any(part.modulates for part in adapter.active_parts("transformer"))
    ]
    return Condition(
        weights=weights,
        digest=make_digest(pooled),
        guidance=guidance,
        timesteps=tuple(timesteps.tolist()[first_step:]),
        pooled=pooled,
        adapters=tuple(acting),
    )


def make_digest(tensor: Tensor) -> str:
    """A tensor's dtype, device and 16 hex digits for its values."""
    values = hashlib.sha256(tensor.float().cpu().numpy().tobytes()).hexdigest()
    return f"{tensor.dtype} {tensor.device} {values[:16]}"


def linear_names(transformer: Component) -> list[str]:
    """The names of the modulation linears, sorted: a table's columns are in their order."""
    return sorted(
        name.removesuffix(".weight")
        for name in transformer.weights
        if name.endswith(LINEAR_WEIGHT) and is_modulation(name)
    )


def row_width(transformer: Component) -> int:
    """Numbers of all shifts, scales and gates of one step."""
    return sum(_linear_widths(transformer))


def _linear_widths(transformer: Component) -> list[int]:
    return [transformer.weights[f"{name}.weight"].shape[0] for name in linear_names(transformer)]


@torch.no_grad()
def make_tables(
    transformer: Component,
    conditions: Sequence[Condition],
    *,
    keep: dict[str, Tensor] | None = None,
) -> dict[Condition, Tensor]:
    """One pass over the modulation weights: a table for each condition, in RAM.

    A table (S, sum of outputs) has a row for each step. With `keep` the weights stay in it, for the
    next pass. Each condition's rows are multiplied by themselves: float32 products depend on the
    number of rows.
    """
    dtype = conditions[0].pooled.dtype
    device = str(conditions[0].pooled.device)
    activated = {
        condition: functional.silu(_embed(transformer, condition)) for condition in conditions
    }  # (S, D) each
    reader = make_reader(device)
    outputs: dict[Condition, list[Tensor]] = {condition: [] for condition in conditions}
    for name in linear_names(transformer):
        names = [f"{name}.weight", f"{name}.bias"]
        if keep is not None and names[0] in keep:
            tensors = keep
        else:
            tensors = read_tensors(transformer, names, dtype=dtype, device=device, reader=reader)
        if keep is not None:
            keep.update(tensors)
        weight = tensors[names[0]]
        bias = tensors[names[1]]
        for condition in conditions:
            outputs_count, inputs_count = weight.shape
            layer = nn.Linear(inputs_count, outputs_count, device="meta")
            layer.weight = nn.Parameter(weight, requires_grad=False)
            layer.bias = nn.Parameter(bias, requires_grad=False)
            attach(
                layer,
                condition.adapters,
                "transformer",
                places={name: Place("", 0)},
                dtype=dtype,
                device=device,
            )
            outputs[condition].append(layer(activated[condition]).cpu())  # (S, 2, 3 or 6 x D)
    return {condition: torch.cat(parts, dim=1) for condition, parts in outputs.items()}


def _embed(transformer: Component, condition: Condition) -> Tensor:
    """The embedding (S, D) of timestep, guidance and prompt, by diffusers' own module."""
    config = transformer.config
    pooled = condition.pooled
    device = str(pooled.device)
    width = config["num_attention_heads"] * config["attention_head_dim"]
    kind = classes.time_text_embed(guidance=condition.guidance is not None)
    module = kind(width, config["pooled_projection_dim"])
    _fill_embedding(module, transformer, dtype=pooled.dtype, device=device)
    attach(
        module,
        condition.adapters,
        "transformer",
        places={f"{EMBEDDING}{name}": Place(name, 0) for name, _ in module.named_modules()},
        dtype=pooled.dtype,
        device=device,
    )
    steps = torch.tensor(condition.timesteps).to(pooled) / 1000 * 1000  # diffusers' rounding
    inputs = [steps]
    if condition.guidance is not None:
        guidance = torch.full_like(steps, condition.guidance, dtype=torch.float32)
        inputs.append(guidance.to(pooled.dtype) * 1000)
    return module(*inputs, pooled.expand(len(steps), -1))


def _fill_embedding(
    module: nn.Module, transformer: Component, *, dtype: torch.dtype, device: str
) -> None:
    """Give diffusers' embedding its weights; `CheckpointError` unless keys and shapes agree."""
    stored = [name for name in transformer.weights if name.startswith(EMBEDDING)]
    tensors = read_tensors(transformer, stored, dtype=dtype, device=device)
    state = {name.removeprefix(EMBEDDING): tensor for name, tensor in tensors.items()}
    check_keys(
        transformer.name,
        transformer.folder,
        expected={name: tuple(tensor.shape) for name, tensor in module.state_dict().items()},
        found={name: tuple(tensor.shape) for name, tensor in state.items()},
    )
    module.load_state_dict(state, assign=True)


class ModulationRow:
    """The static row (1, sum of outputs) that a transformer's norms look at."""

    def __init__(
        self, model: Any, transformer: Component, *, dtype: torch.dtype, device: str
    ) -> None:
        """Put views of a new row in place of `model`'s modulation linears.

        These, and the time embedding that fed them, may be on meta: they are never computed.
        """
        widths = _linear_widths(transformer)
        self._row = torch.zeros(1, sum(widths), dtype=dtype, device=device)
        self._factors = torch.ones_like(self._row)  # 1 + the row
        # (1, width) each, whose strides do not tell how long the row is: a compiled block's graph
        # serves a transformer and ControlNets.
        views = [view[None] for view in self._row[0].split(widths)]
        factors = [factor[None] for factor in self._factors[0].split(widths)]
        for name, view, factor in zip(linear_names(transformer), views, factors, strict=True):
            norm: Any = model.get_submodule(name.rpartition(".")[0])
            norm.silu = nn.Identity()
            norm.linear = Constant(view)
            norm.add_one = Constant(factor)
        # No norm looks at the time embedding any more; the forward hands it on all the same.
        temb = torch.zeros(1, model.inner_dim, dtype=dtype, device=device)
        model.time_text_embed = Constant(temb)

    def select(self, table: Tensor, step: int) -> None:
        """Make the next forward that of row `step` (from 0) of `table`."""
        self._row.copy_(table[step : step + 1])
        torch.add(self._row, 1, out=self._factors)


class Constant(nn.Module):
    """Returns its tensor whatever it is given; the tensor is neither parameter nor buffer."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self._value = value

    def forward(self, *_: object) -> Tensor:
        return self._value
