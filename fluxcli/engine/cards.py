"""What is known of cards by their names: reads presets/shapes/cards.toml for `plan.machine`.

Imports no torch: `flux plan --card` describes a card that is not here without loading it.
"""

import functools
import tomllib

from fluxcli.paths import BUNDLED
from fluxcli.plan import machine
from fluxcli.plan.machine import CardTable, Hardware


@functools.cache
def read_cards() -> CardTable:
    """The table of cards that comes with flux, read once."""
    text = (BUNDLED / "shapes" / "cards.toml").read_text(encoding="utf-8")
    parsed = tomllib.loads(text)
    return CardTable(
        rows=parsed["cards"], reached=parsed["efficiency"], disk_bytes=parsed["disk"] * 1e9
    )


def describe_card(text: str) -> Hardware:
    """The hardware with the card that `SIZE[:smNN]` describes, and with this computer's RAM.

    Raises `UsageError` for a text that describes none.
    """
    import psutil

    ram = psutil.virtual_memory()
    return machine.card(text, read_cards(), ram_bytes=ram.total, ram_free_bytes=ram.available)
