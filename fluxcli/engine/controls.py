"""The ControlNets of a picture in its steps: which of them act, and what they add together.

The sum is that of diffusers' FluxMultiControlNetModel: tensor by tensor, and where one network has
fewer than another, as many as the shorter has. XLabs' networks, whose tensors go to other blocks of
the transformer, are summed by themselves.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from fluxcli.engine.blocks import Residuals
from fluxcli.engine.components import Components
from fluxcli.engine.controlnet import ControlInputs, Samples, takes_pixels
from fluxcli.engine.modulation import ModulationRow
from fluxcli.engine.picture import InputLatents, Picture
from fluxcli.models.parts import Control
from fluxcli.request.inputs import acts_in_step


class Network(NamedTuple):
    """One control picture, and the network that looks at it."""

    control: Control
    model: Any  # a module of `controlnet.controlnet`
    row: ModulationRow
    table: Tensor  # (steps taken, sum of outputs), on the device
    inputs: ControlInputs

    @property
    def repeats(self) -> bool:
        """Whether its tensors take turns over the transformer's blocks: XLabs' do."""
        return takes_pixels(self.model.config)


class Counts(NamedTuple):
    """How many tensors go to the transformer."""

    double: int
    single: int


def list_networks(controls: Sequence[Control]) -> list[str]:
    """The names of the components of control pictures, each once.

    A control that the transformer itself takes in its channels has none.
    """
    return list(dict.fromkeys(control.part for control in controls if control.part))


class Controls:
    """All control pictures of one picture under way, whose steps begin with `first_step`."""

    def __init__(self, networks: Sequence[Network], *, first_step: int, steps: int) -> None:
        self._networks = networks
        self._first_step = first_step
        self._steps = steps - first_step
        self._counts = _count_tensors(networks)

    @classmethod
    def make(
        cls,
        components: Components,
        picture: Picture,
        latents: InputLatents,
        *,
        sequence: Tensor,
        positions: Tensor,
    ) -> "Controls":
        """Those of a picture, whose networks are loaded; each is given its table and its inputs.

        On the device are the `latents`, the `sequence` (1, T, C) of the prompt's embeddings, and
        the `positions` (S, 3) of the picture's tokens.
        """
        request = picture.request
        networks = []
        for control, values in zip(picture.controls, latents.controls, strict=True):
            if not control.part:
                continue
            model = components.loaded[control.part].module
            network = Network(
                control,
                model,
                row=components.rows[control.part],
                table=picture.tables[control.part].to(components.plan.device),
                inputs=model.embed(sequence, values, positions=positions, mode=control.mode),
            )
            networks.append(network)
        return cls(networks, first_step=request.first_step, steps=request.steps)

    def compute(self, tokens: Tensor, index: int) -> list[Residuals]:
        """What all of them add in step `index` (from 0), for packed latents (1, S, 64)."""
        sums: dict[bool, Samples] = {}
        for network in self._networks:
            scale = self._find_scale(network.control, index)
            if not scale:
                continue
            network.row.select(network.table, index - self._first_step)
            samples = network.model(tokens, network.inputs, scale)
            counts = self._counts[network.repeats]
            if network.repeats in sums:
                _add(sums[network.repeats].double, samples.double[: counts.double])
                _add(sums[network.repeats].single, samples.single[: counts.single])
            else:
                sums[network.repeats] = Samples(
                    samples.double[: counts.double], samples.single[: counts.single]
                )
        return [Residuals(*samples, repeats=repeats) for repeats, samples in sums.items()]

    def _find_scale(self, control: Control, index: int) -> float:
        """A control's scale in a step; 0 in those that do not lie within its shares of all."""
        span = (control.start, control.end)
        acts = acts_in_step(index - self._first_step, self._steps, span=span)
        return control.scale if acts else 0.0


def _count_tensors(networks: Sequence[Network]) -> Mapping[bool, Counts]:
    """By `Network.repeats`: how many tensors the sum has, in whatever step.

    diffusers leaves out what the first network has none of.
    """
    found: dict[bool, Counts] = {}
    for network in networks:
        config = network.model.config
        mine = Counts(config["num_layers"], config["num_single_layers"])
        before = found.get(network.repeats, mine)
        found[network.repeats] = Counts(
            min(before.double, mine.double or before.double),
            min(before.single, mine.single or before.single),
        )
    return found


def _add(sums: list[Tensor], tensors: Sequence[Tensor]) -> None:
    """Add tensors to those at the same places; where there are none yet, they are the sums."""
    if not sums:
        sums.extend(tensors)
        return
    for total, tensor in zip(sums, tensors, strict=False):
        total.add_(tensor)
