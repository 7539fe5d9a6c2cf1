"""The third phase: timestep, guidance and pooled prompt become modulation tables.

All tables that a group of pictures lacks are made in one pass over the modulation's weights of each
component that takes steps (see `modulation`); a table is kept for the next picture with the same
prompt, guidance and steps.
"""

from collections.abc import Generator, Iterator, Sequence

from torch import Tensor

from fluxcli.engine import denoise, modulation
from fluxcli.engine.components import Components
from fluxcli.engine.controls import list_networks
from fluxcli.engine.modulation import Condition
from fluxcli.engine.picture import Picture
from fluxcli.engine.prompt_cache import Embeddings
from fluxcli.events import Event, Phase

# What a ControlNet for [dev] is told beside [schnell], whose requests have no guidance.
DEV_GUIDANCE = 3.5


def run(components: Components, pictures: Sequence[Picture]) -> Iterator[Event]:
    """Give each picture that is not denoised its `tables` (steps taken, sum of outputs)."""
    waiting = [picture for picture in pictures if not picture.denoised]
    for name in _list_names(waiting):
        conditions = {
            picture: _condition_of(components, picture, name, picture.embeddings)
            for picture in waiting
            if name in list_stepping(picture)
        }
        negative = {}
        if name == "transformer":
            negative = {
                picture: _condition_of(components, picture, name, picture.negative_embeddings)
                for picture in waiting
                if picture.negative_embeddings
            }
        tables = yield from _make_tables(
            components, name, [*conditions.values(), *negative.values()]
        )
        for picture, condition in conditions.items():
            picture.tables[name] = tables[condition]
        for picture, condition in negative.items():
            picture.negative_table = tables[condition]


def list_stepping(picture: Picture) -> list[str]:
    """The components that compute in a picture's steps: ControlNets, and the transformer."""
    return [*list_networks(picture.controls), "transformer"]


def _list_names(pictures: Sequence[Picture]) -> list[str]:
    return list(dict.fromkeys(name for picture in pictures for name in list_stepping(picture)))


def _make_tables(
    components: Components, name: str, conditions: Sequence[Condition]
) -> Generator[Event, None, dict[Condition, Tensor]]:
    """The table of each condition of a component: those that are known, and the others made."""
    tables: dict[Condition, Tensor] = {}
    missing = []
    for condition in dict.fromkeys(conditions):
        table = components.tables.get(condition)
        if table is None:
            missing.append(condition)
        else:
            tables[condition] = table
    if missing:
        yield from components.make_room(name)
        yield Phase("condition")
        components.join_free_memory("condition")
        made = modulation.make_tables(
            components.checkpoint.components[name],
            missing,
            keep=components.find_kept_modulation(name),
        )
        for condition, table in made.items():
            components.tables.keep(condition, table)
        tables |= made
    return tables


def _condition_of(
    components: Components, picture: Picture, name: str, embeddings: Embeddings | None
) -> Condition:
    """What a component's table for the picture depends on, with these embeddings of a prompt."""
    assert embeddings, "a phase was left out"
    component = components.checkpoint.components[name]
    guidance = None
    if component.config["guidance_embeds"]:
        guidance = picture.request.guidance
        if guidance is None:
            guidance = DEV_GUIDANCE
    weights = components.checkpoint.fingerprint
    if name != "transformer":
        weights = component.fingerprint
    timesteps = denoise.make_scheduler(components.checkpoint, picture.request).timesteps
    return modulation.make_condition(
        embeddings.pooled.to(components.plan.device, components.dtype("transformer")),
        weights=weights,
        guidance=guidance,
        timesteps=timesteps,
        first_step=picture.request.first_step,
        adapters=picture.adapters if name == "transformer" else (),
    )
