"""What a command says where it ends early: what of its results is written, and what makes the
others. Knows nothing of models.
"""

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Protocol

from fluxcli.cli import console
from fluxcli.errors import Terminated
from fluxcli.events import Event, Kept, Saved


class Ledger(Protocol):
    """What became of the results of a command."""

    @property
    def has_begun(self) -> bool:
        """Whether there is anything of them."""

    def describe(self) -> str:
        """Return what is written and what to type for the others; "" says nothing."""


@contextmanager
def explain_early_end(ledger: Ledger, *, quiet: bool) -> Iterator[None]:
    """Say what became of the results where an error or a signal ends the block.

    Nobody reads that after a pipe was closed, which is how `head` ends a command.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except (Exception, Terminated) as error:
        if not quiet and (ledger.has_begun or isinstance(error, Terminated)):
            text = ledger.describe()
            with suppress(OSError, ValueError):  # what ended the block is what counts
                if text:
                    console.say(text)
        raise


def count_written(written: int, total: int) -> str:
    """Return how many pictures of how many are there."""
    return f"{written} of {total} pictures are written"


class Written:
    """What became of the pictures of one order, by their seeds."""

    def __init__(self, seeds: Sequence[int]) -> None:
        """Expect pictures with these seeds, drawn in this order."""
        self._seeds = seeds
        self._saved: set[int] = set()
        self._kept: dict[int, str] = {}  # the files of latents

    def add(self, event: Event) -> None:
        """Learn what an event says of a picture."""
        match event:
            case Saved():
                self._saved.add(event.image.seed)
                self._kept.pop(event.image.seed, None)
            case Kept():
                self._kept[event.seed] = event.path

    @property
    def has_begun(self) -> bool:
        """Whether there is a file of any picture."""
        return bool(self._saved or self._kept)

    def describe(self) -> str:
        """Return how many are written and what to type for the others.

        That is nothing for one picture of which nothing is left.
        """
        decode = shlex.join(["flux", "decode", *self._kept.values()])
        if len(self._seeds) == 1:
            if not self._kept:
                return ""
            return f"the picture's latents are kept; what finishes it: {decode}"
        text = count_written(len(self._saved), len(self._seeds))
        ways = []
        if self._kept:
            text += f", the latents of {len(self._kept)} are kept"
            ways.append(decode)
        missing = [seed for seed in self._seeds if seed not in {*self._saved, *self._kept}]
        if missing:
            ways.append(f"the same command with --seed {missing[0]} -n {len(missing)}")
        if ways:
            text += f"; the others: {', and '.join(ways)}"
        return text
