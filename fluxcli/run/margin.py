"""The margin of a card: how much of its memory a plan leaves alone because runs have run out of it.

One number of bytes for each card, by `Hardware.identity` and its memory, in margin.json in the
user's cache folder: what was learned where a container or a shell left it less teaches nothing of
the whole. It grows when memory runs out, up to a share of the card, and is forgotten a week after
that has happened last: what took the memory then may be gone. Deleting the file forgets it, too.
Where the file cannot be read or written nothing is remembered, and nothing is said. No torch.
"""

from fluxcli.learned import read_sizes, write_sizes
from fluxcli.plan.machine import Hardware
from fluxcli.plan.placement import GIB

FILE = "margin.json"
# The least that changes a placement: about four blocks of the smallest precision (nf4).
LEAST_GROWTH_BYTES = 256 << 20
# The most that one occasion may teach, of the card's memory: it may have been another program's.
MOST_GROWTH_SHARE = 0.125
MOST_SHARE = 0.25  # the most that all occasions together teach


def read_margin(hardware: Hardware) -> int:
    """The bytes that plans for this card leave alone; 0 where memory never ran out."""
    learned_bytes = read_sizes(FILE).get(_name(hardware), 0)
    return min(learned_bytes, int(hardware.total_bytes * MOST_SHARE))


def grow_margin(hardware: Hardware, missing_bytes: int) -> None:
    """Remember that `missing_bytes` were missing on this card, for this process and the next.

    They may be zero or less where the plan should have fitted: then it grows by a fixed step.
    """
    most_bytes = int(hardware.total_bytes * MOST_GROWTH_SHARE)
    growth_bytes = min(max(missing_bytes, LEAST_GROWTH_BYTES), most_bytes)
    margins = read_sizes(FILE)
    grown_bytes = margins.get(_name(hardware), 0) + growth_bytes
    margins[_name(hardware)] = min(grown_bytes, int(hardware.total_bytes * MOST_SHARE))
    write_sizes(FILE, margins)


def _name(hardware: Hardware) -> str:
    return f"{hardware.identity}, {hardware.total_bytes / GIB:.1f} GiB"
