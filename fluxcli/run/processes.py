"""Several processes on one batch, as `accelerate launch` and torchrun start them: whose rows are whose, one summary.

The processes see the same rows; each draws every n-th of them on its own device.
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
    """How many processes share the batch, as a launcher says it by all of its variables."""
    text = os.environ.get("WORLD_SIZE", "")
    return max(1, int(text)) if text.isdecimal() and all(map(os.environ.get, VARIABLES)) else 1


class Share:
    """This process's part of the rows."""

    def __init__(self) -> None:
        self.is_main, self._index, self._count = True, 0, count()
        if self._count > 1:
            from accelerate import PartialState

            try:  # gloo in any case: what is shared is a few numbers, and NCCL would take memory of every card
                state = PartialState(cpu=True, backend="gloo", timeout=PATIENCE)
            except (RuntimeError, ValueError) as error:
                why = str(error).splitlines()[0][:160]
                raise DeviceUnusable("the processes do not find each other", why=why) from error
            self._index, self._count, self.is_main = state.process_index, state.num_processes, state.is_main_process

    def of(self, rows: Iterator[Row]) -> Iterator[Row]:
        """Every n-th of the rows."""
        return islice(rows, self._index, None, self._count)

    def total(self, counts: Sequence[int]) -> list[int]:
        """The sums over all processes; waits for them."""
        if self._count == 1:
            return list(counts)
        from accelerate.utils import gather_object

        try:
            return [sum(column) for column in zip(*gather_object([list(counts)]), strict=True)]
        except RuntimeError as error:
            hint = "the same command with --resume draws what is left"
            raise BatchFailed("another process has ended", why="its rows are not done", hint=hint) from error
