"""The stage: which components are loaded, each placed as the plan says, and which have to leave for another.

Knows the plan and the modules, neither requests nor phases. Sizes are in bytes.
"""

import gc
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace

from fluxcli.engine import device as hardware
from fluxcli.engine import modulation
from fluxcli.engine.lora_hooks import attach
from fluxcli.engine.streaming import load_component
from fluxcli.events import Event, Notice, Phase
from fluxcli.plan import costs
from fluxcli.plan.placement import GIB, MemoryPlan
from quant.checkpoint import Checkpoint, Component
from quant.lazy import Tensors, nn, torch
from quant.lora import Adapter
from quant.spec import is_modulation


class Stage:
    """The loaded components of one checkpoint under a plan, which may change as long as its precision stays."""

    def __init__(self, checkpoint: Checkpoint, plan: MemoryPlan) -> None:
        self.checkpoint, self.plan = checkpoint, plan
        self.row: modulation.ModulationRow | None = None  # that the transformer's norms look at
        self.modulation: Tensors = {}  # the weights, where the plan keeps them
        self._models: dict[str, nn.Module] = {}
        hardware.cap(plan.device, plan.budget_bytes)

    def adopt(self, plan: MemoryPlan) -> None:
        """Go on under another plan of the same precision. A streamed transformer stays if it takes no more."""
        before, now = self.plan.residency, plan.residency
        if "transformer" in self._models and before.denoise == now.denoise:
            now = replace(now, streamed=max(before.streamed, now.streamed, key=len))
        self.plan = replace(plan, residency=now)
        moved = (now.denoise, now.streamed) != (before.denoise, before.streamed)
        self.evict(*["transformer"] * moved, *["text_encoder_2"] * (now.encode != before.encode))
        if "modulation" not in now.keep:
            self.modulation.clear()
        hardware.cap(plan.device, plan.budget_bytes)

    def clear(self) -> None:
        """Drop everything: no lower rung keeps what there was room for."""
        self._models.clear()
        self.modulation.clear()
        self.free()

    def load(self, name: str, adapters: Sequence[Adapter] = ()) -> "Generator[Event, None, nn.Module]":
        """The component's module, placed as the plan says, with the adapters that act on it."""
        yield from self.make_room(name)
        if name not in self._models:
            yield Phase("load", name)
            options = {"dtype": self.dtype(name), "device": self.plan.device}
            component, since, is_main = self.checkpoint.components[name], time.perf_counter(), name == "transformer"
            model = load_component(
                component, blocks=self._passing(name, component), spec=self.plan.spec, **options,
                arena=is_main and self.plan.residency.denoise == "streamed",
                skip=is_modulation if is_main else lambda _: False,
            )  # fmt: skip
            if is_main:
                self.row = modulation.ModulationRow(model, component, **options)
            self._models[name] = model
            if unpinned := getattr(model, "unpinned_bytes", 0):
                yield Notice(f"the driver does not pin {unpinned / GIB:.1f} GiB of RAM: streaming is slower")
            if is_main and self.plan.spec:
                taken, to = time.perf_counter() - since, self.plan.precision
                yield Notice(f"packed to {to} in {taken:.1f} s while loading: flux quantize ... --to {to} saves that")
        self._adapt(name, tuple(adapter for adapter in adapters if adapter.numel(name)))
        return self._models[name]

    def _adapt(self, name: str, wanted: tuple[Adapter, ...]) -> None:
        """Attach these adapters instead of those of another request; the component's own tensors stay as they are."""
        model = self._models[name]
        attached, handles = getattr(model, "adapters", ((), ()))
        if attached != wanted:
            for handle in handles:
                handle.remove()
            model.adapters = (), ()
            options = {"dtype": self.dtype(name), "device": self.plan.device}
            model.adapters = wanted, attach(model, wanted, name, **options)

    def _passing(self, name: str, component: Component) -> list[str]:
        """The component's blocks that pass through the device instead of staying on it."""
        placed = self.plan.residency
        if name == "text_encoder_2":
            return costs.t5_block_names(component) if placed.encode == "sequential" else []
        if name != "transformer" or placed.denoise == "resident":
            return []
        blocks = costs.block_names(component)
        return blocks if placed.denoise == "sequential" else [blocks[i] for i in placed.streamed]

    def make_room(self, name: str) -> Iterator[Event]:
        """Evict what may not stay beside a component."""
        keep = self.plan.residency.keep
        if leaving := [other for other in self._models if other != name and not {other, name} <= set(keep)]:
            yield Phase("evict", " ".join(leaving))
            self.evict(*leaving)

    def evict(self, *names: str) -> None:
        if names:
            for name in names:
                self._models.pop(name, None)
            self.free()

    def free(self) -> None:
        """Give back what nothing holds any more, and count the peak of what comes next."""
        gc.collect()
        hardware.empty_cache(self.plan.device)
        hardware.reset_peak(self.plan.device)

    def dtype(self, name: str) -> "torch.dtype":
        return getattr(torch, self.plan.dtypes[name])
