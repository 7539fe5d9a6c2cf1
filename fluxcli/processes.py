"""Several processes on one batch, as `accelerate launch` and torchrun start them: whose rows are whose, one summary.

The processes see the same rows; each draws every n-th of them on its own device.
"""

import os
from collections.abc import Iterator, Sequence
from itertools import islice

from fluxcli.job import Row


def count() -> int:
    """How many processes share the batch."""
    text = os.environ.get("WORLD_SIZE", "")
    return max(1, int(text)) if text.isdecimal() else 1


class Share:
    """This process's part of the rows."""

    def __init__(self) -> None:
        self.is_main, self._index, self._count = True, 0, count()
        if self._count > 1:
            import torch
            from accelerate import PartialState

            state = PartialState(cpu=not torch.cuda.is_available())
            self._index, self._count, self.is_main = state.process_index, state.num_processes, state.is_main_process

    def of(self, rows: Iterator[Row]) -> Iterator[Row]:
        """Every n-th of the rows."""
        return islice(rows, self._index, None, self._count)

    def total(self, counts: Sequence[int]) -> list[int]:
        """The sums over all processes; waits for them."""
        if self._count == 1:
            return list(counts)
        from accelerate.utils import gather_object

        return [sum(column) for column in zip(*gather_object([list(counts)]), strict=True)]
