"""A row of a job with its plan: the pictures it asks for, and how many of them go through a phase together."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from fluxcli.engine import modulation
from fluxcli.engine.picture import Picture
from fluxcli.events import GeneratedImage
from fluxcli.pictures import names as output
from fluxcli.pictures.latents import Latents
from fluxcli.plan.costs import DTYPE_BYTES
from fluxcli.plan.machine import Hardware
from fluxcli.plan.placement import MemoryPlan
from fluxcli.request.fields import Order
from fluxcli.request.job import Row
from fluxcli.run.saving import Destination
from quant.checkpoint import Checkpoint
from quant.errors import ExplainedError
from quant.lora import Adapter

MAX_WINDOW = 16  # pictures that go through a phase together: what is lost when a run is killed
WINDOW_SHARE = 0.1  # of the free RAM, for their tables


class Prepared(NamedTuple):
    """What a request is drawn with, and what else could serve it."""

    checkpoint: Checkpoint
    plan: MemoryPlan
    hardware: Hardware
    adapters: tuple[Adapter, ...]
    alternatives: tuple[Checkpoint, ...]  # every checkpoint of the model


@dataclass
class Planned:
    """A row with its plan, what else could serve it, and its pictures as they come."""

    row: Row
    order: Order  # with its seed
    target: output.Target
    prepared: Prepared
    left: int  # pictures that were not skipped
    images: list[GeneratedImage] = field(default_factory=list)

    @property
    def checkpoint(self) -> Checkpoint:
        return self.prepared.checkpoint

    @property
    def plan(self) -> MemoryPlan:
        return self.prepared.plan

    @property
    def machine(self) -> Hardware:
        return self.prepared.hardware

    @property
    def others(self) -> tuple[Checkpoint, ...]:
        return self.prepared.alternatives

    @property
    def basis(self) -> tuple:
        """What one engine has: rows that differ in it never share a window."""
        plan = self.plan
        where, dtypes = self.checkpoint.components["transformer"].folder, tuple(plan.dtypes.items())
        return self.checkpoint.fingerprint, where, plan.device, plan.precision, plan.spec, dtypes

    def pictures(self, resume: Latents | None) -> Iterator[tuple[Picture, Destination]]:
        """The row's pictures, and where each goes."""
        count, seeded = self.order.output.count, self.row.order.request.seed >= 0
        for k in range(count):
            one = self.order.picture(k)
            picture = Picture(one.request, self.prepared.adapters, position=k + 1, total=count)
            if resume:
                picture.tokens, picture.step = resume.tokens, resume.step
            yield picture, Destination(one, self.target, k + 1, self.row.number, seeded)

    def refused(self) -> ExplainedError | None:
        """Why the row's file cannot be written."""
        try:
            output.check_writable(self.target, self.order, self.row.number)
        except ExplainedError as error:
            return error
        return None


def window_size(rows: Sequence[Planned]) -> int:
    """How many pictures of these rows go through a phase together: by the RAM that their tables take."""
    width = modulation.row_width(rows[0].checkpoint.components["transformer"])
    plan, steps = rows[0].plan, max(planned.order.request.steps for planned in rows)
    table = steps * width * DTYPE_BYTES[plan.dtypes["transformer"]]
    return max(1, min(MAX_WINDOW, int(rows[0].machine.ram_free_bytes * WINDOW_SHARE) // table))
