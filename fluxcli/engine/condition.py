"""The second phase: timestep, guidance and pooled prompt become modulation tables.

All tables that a group of pictures lacks are made in one pass over the modulation's weights (see
`modulation`); a table is kept for the next picture with the same prompt, guidance and steps.
"""

from collections.abc import Iterator, Sequence

from fluxcli.engine import denoise, modulation
from fluxcli.engine.components import Components
from fluxcli.engine.modulation import Condition
from fluxcli.engine.picture import Picture
from fluxcli.events import Event, Phase


def run(components: Components, pictures: Sequence[Picture]) -> Iterator[Event]:
    """Give each picture that is not denoised its `table` (steps, sum of outputs)."""
    waiting = [picture for picture in pictures if not picture.denoised]
    conditions = {picture: _condition_of(components, picture) for picture in waiting}
    distinct = dict.fromkeys(conditions.values())
    tables = {condition: components.tables.get(condition) for condition in distinct}
    missing = [condition for condition, table in tables.items() if table is None]
    if missing:
        yield from components.make_room("transformer")
        yield Phase("condition")
        components.join_free_memory("condition")
        made = modulation.make_tables(
            components.checkpoint.components["transformer"],
            missing,
            keep=components.kept_modulation,
        )
        for condition, table in made.items():
            components.tables.keep(condition, table)
        tables |= made
    for picture, condition in conditions.items():
        picture.table = tables[condition]


def _condition_of(components: Components, picture: Picture) -> Condition:
    """What the picture's table depends on."""
    assert picture.embeddings, "a phase was left out"
    pooled = picture.embeddings.pooled
    return modulation.make_condition(
        pooled.to(components.plan.device, components.dtype("transformer")),
        weights=components.checkpoint.fingerprint,
        guidance=picture.request.guidance,
        timesteps=denoise.make_scheduler(components.checkpoint, picture.request).timesteps,
        adapters=picture.adapters,
    )
