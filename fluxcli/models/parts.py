"""What a request adds to a model: ControlNets, and what makes tokens of pictures, by its names.

Each becomes a component that is planned, loaded and evicted like the model's own. Reads headers, no
weights. Stdlib only.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from fluxcli.request.fields import GenerationRequest
from quant.checkpoint import Checkpoint, Component


@dataclass(frozen=True)
class Control:
    """What one control picture of a request acts by, and how.

    `part` is the key of a ControlNet in the checkpoint's components; "" stands for the transformer
    itself, which takes the picture in its channels. `start` and `end` are shares of the steps,
    `mode` is the number of what the picture shows, for a union of several ControlNets.
    """

    part: str
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    mode: int | None = None


@dataclass(frozen=True)
class Parts:
    """The components that a request adds, by their keys, and a `Control` for each of its pictures.

    Equal control networks of one request are one component.
    """

    components: Mapping[str, Component] = field(default_factory=dict)
    controls: tuple[Control, ...] = ()

    def add_to(self, checkpoint: Checkpoint) -> Checkpoint:
        """Return the checkpoint with these components beside its own."""
        if not self.components:
            return checkpoint
        return replace(checkpoint, components=checkpoint.components | dict(self.components))


def resolve_parts(request: GenerationRequest, checkpoint: Checkpoint) -> Parts:
    """Find what a request adds to a model; raises what looking for weights raises."""
    return Parts()
