"""What is known of cards by their names: reads presets/shapes/cards.toml for `plan`.

Imports no torch: `flux plan --card` describes a card that is not here without loading it.
"""

import functools
import tomllib

from fluxcli.paths import BUNDLED
from fluxcli.plan.card import Ram, card
from fluxcli.plan.machine import CardTable, Hardware


@functools.cache
def read_cards() -> CardTable:
    """The table of cards that comes with flux, read once."""
    text = (BUNDLED / "shapes" / "cards.toml").read_text(encoding="utf-8")
    parsed = tomllib.loads(text)
    return CardTable(
        rows=parsed["cards"],
        reached=parsed["efficiency"],
        published=parsed["published"],
        pageable_bytes=parsed["pageable"] * 1e9,
        host_copy_bytes=parsed["host_copy"] * 1e9,
        disk_bytes=parsed["disk"] * 1e9,
        launch_s=parsed["launch"] * 1e-6,
    )


def describe_card(text: str, ram: Ram | None = None) -> Hardware:
    """The hardware with the card that `text` describes, beside this computer's RAM or another.

    Raises `UsageError` for a text that describes none, see `plan.card`.
    """
    from fluxcli.engine.ram import read_ram

    return card(text, read_cards(), ram or read_ram())
