"""Several processes on one batch, as `accelerate launch` and torchrun start them.

All processes see the same rows; each draws every n-th of them on its own device, and one of them
says the summary of all. accelerate is imported only where a launcher has started several.
"""

import os
from collections.abc import Iterator, Sequence
from datetime import timedelta
from itertools import islice

from fluxcli.errors import BatchFailed, DeviceUnusable
from fluxcli.request.job import Row

VARIABLES = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
PATIENCE = timedelta(days=1)  # cards differ, and one process may have all the long rows


def count() -> int:
    """Return how many processes share the batch, as a launcher says it by all of its variables.

    A WORLD_SIZE alone is what some scheduler left: then there is one.
    """
    text = os.environ.get("WORLD_SIZE", "")
    if not text.isdecimal() or not all(os.environ.get(name) for name in VARIABLES):
        return 1
    return max(1, int(text))


class Share:
    """This process's part of the rows. `is_main` tells whether it speaks for all."""

    def __init__(self) -> None:
        """Find the other processes; raises `DeviceUnusable` where they do not answer."""
        self.is_main = True
        self._index = 0
        self._count = count()
        if self._count == 1:
            return
        from accelerate import PartialState

        try:
            # gloo in any case: a few numbers are shared, and NCCL would take memory of every card.
            state = PartialState(cpu=True, backend="gloo", timeout=PATIENCE)
        except (RuntimeError, ValueError) as error:
            why = str(error).splitlines()[0][:160]
            hint = "accelerate launch --num_processes 2 -m fluxcli ..."
            raise DeviceUnusable(
                "the processes do not find each other", why=why, hint=hint
            ) from error
        self.is_main = state.is_main_process
        self._index = state.process_index
        self._count = state.num_processes

    def take(self, rows: Iterator[Row]) -> Iterator[Row]:
        """Yield every n-th of the rows."""
        return islice(rows, self._index, None, self._count)

    def add_up(self, counts: Sequence[int]) -> list[int]:
        """Return the sums over all processes, once all have asked.

        Raises `BatchFailed` where one of them has ended before.
        """
        if self._count == 1:
            return list(counts)
        from accelerate.utils import gather_object

        try:
            gathered = gather_object([list(counts)])
        except RuntimeError as error:
            why = "its rows are not done"
            hint = "the same command with --resume draws what is left"
            raise BatchFailed("another process has ended", why=why, hint=hint) from error
        return [sum(column) for column in zip(*gathered, strict=True)]
