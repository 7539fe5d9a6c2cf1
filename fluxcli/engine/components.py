"""The loaded components of one checkpoint: each placed as the plan says, and who leaves for whom.

Beside them lies what the phases keep from picture to picture: embeddings of prompts and modulation
tables. Owns the plan: it changes here alone, by `adopt` and `step_down`. Knows nothing of the order
of phases. Sizes are in bytes.
"""

import gc
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fluxcli.engine import device
from fluxcli.engine.compiling import BlockCompiler
from fluxcli.engine.loader import LoadedComponent
from fluxcli.engine.lora_hooks import attach
from fluxcli.engine.modulation import Condition, ModulationRow
from fluxcli.engine.pinned import learn_pin_limit
from fluxcli.engine.recent import Recent
from fluxcli.engine.redux import Looks
from fluxcli.engine.streaming import load_component
from fluxcli.engine.text import PromptEncoder
from fluxcli.errors import DoesNotFit, hint_for_memory
from fluxcli.events import Event, Notice, Phase
from fluxcli.plan import costs
from fluxcli.plan.costs import Workload
from fluxcli.plan.machine import Hardware
from fluxcli.plan.placement import GIB, MemoryPlan, Placement, make_candidate, step_down
from quant.checkpoint import COMPONENTS, Checkpoint, Component
from quant.lora import Adapter
from quant.spec import STREAMS, is_modulation

# The component whose weights are there before a phase computes, with the phase.
COMPUTES = {"transformer": "denoise", "vae": "decode"}
TABLES_BYTES = 256 << 20  # of modulation tables in RAM: four prompts at the published size


def _nbytes(table: Tensor) -> int:
    return table.nbytes


class Components:
    """What the phases of one checkpoint share under a plan, whose precision never changes."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: MemoryPlan,
        hardware: Hardware,
        *,
        prompt_cache: bool = False,
    ) -> None:
        self.checkpoint = checkpoint
        self.plan = plan
        self.hardware = hardware
        self.loaded: dict[str, LoadedComponent] = {}
        self.compiler = BlockCompiler() if plan.compiled else None
        self.rows: dict[str, ModulationRow] = {}  # by component: what its norms look at
        # Of each component, where the plan keeps them.
        self.modulation_weights: dict[str, dict[str, Tensor]] = {}
        self.prompts = PromptEncoder(checkpoint, plan, hardware, on_disk=prompt_cache)
        self.looks = Looks(checkpoint, plan, hardware, on_disk=prompt_cache)
        self.tables: Recent[Condition, Tensor] = Recent(TABLES_BYTES, weigh=_nbytes)
        device.cap(plan.device, plan.budget_bytes)

    # --- the plan

    def adopt(
        self,
        plan: MemoryPlan,
        hardware: Hardware,
        *,
        checkpoint: Checkpoint | None = None,
        prompt_cache: bool = False,
    ) -> None:
        """Go on under another plan of the same precision; what it places elsewhere is dropped.

        `checkpoint` is the same model with what other requests add to it, None for what was. A
        transformer of which more blocks are streamed than the plan asks for stays as it is: it
        takes less of the device, and loading it again would take longer than it saves.
        """
        if checkpoint:
            self._take_parts(checkpoint, plan, hardware)
        before = self.plan.placement
        now = plan.placement
        if "transformer" in self.loaded and before.denoise == now.denoise:
            now = replace(now, streamed=max(before.streamed, now.streamed, key=len))
        self._place(replace(plan, placement=now))
        self.hardware = hardware
        self.prompts.on_disk = prompt_cache
        self.looks.on_disk = prompt_cache
        device.cap(plan.device, plan.budget_bytes)

    def step_down(self, phase: str, workload: Workload, *, failed: str) -> str:
        """Go to the next placement that takes less memory in a phase, and say in words which.

        `workload` is the largest one under way, `failed` what the allocator said. Everything is
        dropped. Where no placement takes less, the plan's margin is used, too; after that raises
        `DoesNotFit`.
        """
        self.clear()
        now = self.plan
        candidate = make_candidate(
            workload,
            self.checkpoint,
            self.hardware,
            precision=now.precision,
            spec=now.spec,
            dtypes=now.dtypes,
        )
        following = step_down(now, phase, candidate)
        if following is None and now.margin_bytes:
            budget_bytes = now.budget_bytes + now.margin_bytes
            self.plan = replace(now, budget_bytes=budget_bytes, margin_bytes=0)
            device.cap(now.device, budget_bytes)
            return f"with the {now.margin_bytes / GIB:.1f} GiB that were left free"
        if following is None:
            needs = now.peak_bytes[phase] / GIB
            free = device.free_memory(now.device) / GIB
            why = f"{phase} needs about {needs:.1f} GiB by plan, {free:.1f} GiB are free: {failed}"
            raise DoesNotFit(
                "out of memory, and no step down is left",
                which=now.device,
                why=why,
                hint=hint_for_memory(),
            )
        self.plan = following.plan
        return following.change

    def decode_whole(self) -> None:
        """Decode without tiles again.

        Tiles change pixels, so that only a picture for which memory ran out has them.
        """
        whole = replace(self.plan.placement, decode="alone")
        self.plan = replace(self.plan, placement=whole)

    def prepare_whole(self) -> None:
        """Encode pictures without tiles again, as `decode_whole`."""
        whole = replace(self.plan.placement, prepare="whole")
        self.plan = replace(self.plan, placement=whole)

    def _take_parts(self, checkpoint: Checkpoint, plan: MemoryPlan, hardware: Hardware) -> None:
        """Drop the parts that another request does not add, or adds others by the same names."""
        before = self.checkpoint.components
        self.checkpoint = checkpoint
        for name in list(before):
            if name in COMPONENTS:
                continue
            part = checkpoint.components.get(name)
            if part is None or part.fingerprint != before[name].fingerprint:
                self.evict(name)
                self.modulation_weights.pop(name, None)
        self.looks = Looks(checkpoint, plan, hardware, on_disk=self.looks.on_disk)

    def _place(self, plan: MemoryPlan) -> None:
        """Take the plan, and drop what it places elsewhere."""
        before = self.plan.placement
        now = plan.placement
        self.plan = plan
        if (now.denoise, now.streamed) != (before.denoise, before.streamed):
            self.evict("transformer")
        if now.encode != before.encode:
            self.evict("text_encoder_2")
        if now.controls != before.controls:
            self.evict(*(name for name in list(self.loaded) if costs.is_control(name)))
        if "modulation" not in now.keep:
            self.modulation_weights.clear()

    def find_kept_modulation(self, name: str) -> dict[str, Tensor] | None:
        """Where a component's modulation weights stay; None if the plan does not keep them."""
        if "modulation" in self.plan.placement.keep:
            return self.modulation_weights.setdefault(name, {})
        return None

    def dtype(self, name: str) -> torch.dtype:
        """What a component computes in."""
        return getattr(torch, self.plan.dtypes[name])

    # --- what is loaded

    def load(
        self, name: str, adapters: Sequence[Adapter] = (), *, phase: str = ""
    ) -> Generator[Event, None, Any]:
        """The component's module, placed as the plan says, with the adapters that act on it.

        It computes in `phase`, which only for the VAE is one of two. Yields what happens meanwhile:
        components leave for it, it is loaded.
        """
        yield from self.make_room(name)
        if name not in self.loaded:
            yield Phase("load", name)
            yield from self._load(name)
        self._attach(name, tuple(adapter for adapter in adapters if adapter.numel(name)))
        phase = phase or COMPUTES.get(name, "")
        if phase:
            self.join_free_memory(phase)
        return self.loaded[name].module

    def join_free_memory(self, phase: str) -> None:
        """Have what a phase needs beside weights in one piece, see `device.join_free_memory`."""
        device.join_free_memory(self.plan.device, self.plan.activation_bytes.get(phase, 0))

    def _load(self, name: str) -> Iterator[Event]:
        """Load a component where the plan wants it, and say what the user should know of that."""
        component = self.checkpoint.components[name]
        placed = self.plan.placement
        takes_steps = component.name in STREAMS
        spec = self.plan.find_spec(name)
        started_s = time.perf_counter()
        loaded = load_component(
            component,
            dtype=self.dtype(name),
            device=self.plan.device,
            spec=spec,
            skip=is_modulation if takes_steps else None,
            blocks=_find_passing_blocks(component, placed),
            from_arena=_comes_from_arena(name, placed),
            change_blocks=self.compiler.install if takes_steps and self.compiler else None,
        )
        taken_s = time.perf_counter() - started_s
        if takes_steps:
            self.rows[name] = ModulationRow(
                loaded.module, component, dtype=self.dtype(name), device=self.plan.device
            )
        self.loaded[name] = loaded
        learn_pin_limit(
            self.hardware,
            pinned_bytes=loaded.pinned_bytes,
            refused=loaded.unpinned_bytes > 0,
        )
        if loaded.unpinned_bytes:
            streamed_bytes = loaded.pinned_bytes + loaded.unpinned_bytes
            limit = f"{loaded.pinned_bytes / GIB:.1f} of {streamed_bytes / GIB:.1f} GiB of RAM"
            yield Notice(f"the driver pins {limit}: the rest passes through a buffer")
        if takes_steps and spec and not component.precision:
            to = self.plan.precision
            what = "" if name == "transformer" else f"{name} "
            saves = f"flux quantize ... --to {to} saves that"
            yield Notice(f"{what}quantized to {to} in {taken_s:.1f} s while loading: {saves}")

    def _attach(self, name: str, adapters: tuple[Adapter, ...]) -> None:
        """Make these adapters act instead of those of another request; the weights stay."""
        loaded = self.loaded[name]
        if loaded.adapters == adapters:
            return
        for handle in loaded.handles:
            handle.remove()
        loaded.handles = []
        loaded.adapters = ()  # if the next line fails, none acts
        loaded.handles = attach(
            loaded.module,
            adapters,
            name,
            places=loaded.places,
            dtype=self.dtype(name),
            device=self.plan.device,
        )
        loaded.adapters = adapters

    def make_room(self, name: str) -> Iterator[Event]:
        """Evict what may not stay beside a component."""
        placed = self.plan.placement
        leaving = [other for other in self.loaded if not placed.allows(name, other)]
        if leaving:
            yield Phase("evict", " ".join(leaving))
            self.evict(*leaving)

    def evict(self, *names: str) -> None:
        """Drop components, and give their memory back."""
        for name in names:
            self.loaded.pop(name, None)
        self._free()

    def count_bytes(self) -> int:
        """Return the bytes that the device's allocator holds; on the CPU those of the weights."""
        if self.hardware.kind != "cpu":
            return device.held_memory(self.plan.device)
        modules = [loaded.module for loaded in self.loaded.values()]
        tensors = [each for module in modules for each in (*module.parameters(), *module.buffers())]
        return sum(each.nbytes for each in tensors)

    def clear(self) -> None:
        """Drop everything: where memory ran out, nothing is kept that there was room for."""
        self.loaded.clear()
        self.modulation_weights.clear()
        self._free()

    def _free(self) -> None:
        gc.collect()  # modules and their hooks refer to each other
        device.empty_cache(self.plan.device)


def _comes_from_arena(name: str, placed: Placement) -> bool:
    """Whether the blocks of a component that pass through the device lie in RAM."""
    if costs.is_control(name):
        return placed.controls == "streamed"
    return name == "transformer" and placed.denoise == "streamed"


def _find_passing_blocks(component: Component, placed: Placement) -> list[str]:
    """The component's blocks that pass through the device instead of staying on it."""
    if component.name == "text_encoder_2" and placed.encode == "sequential":
        return costs.t5_block_names(component)
    if costs.is_control(component.name) and placed.controls != "resident":
        return costs.block_names(component)
    if component.name == "transformer" and placed.denoise == "sequential":
        return costs.block_names(component)
    if component.name == "transformer" and placed.denoise == "streamed":
        blocks = costs.block_names(component)
        return [blocks[index] for index in placed.streamed]
    return []
