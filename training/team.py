"""Several single-threaded processes that train one model.

Weights, gradients and averages lie in shared memory. Each optimizer step is made of a fixed number
of micro-batches that the processes draw from a common counter, so one that must share its core just
does fewer of them: threads inside one process would wait for the slowest at every product. Each
process then steps its own part of the weights. Knows nothing about what is trained.
"""

from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier

import torch
import torch.multiprocessing as mp

from training.optim import Muon

PATIENCE_S = 900.0  # the first compilation takes minutes


@dataclass
class Team:
    """What the processes share; picklable."""

    size: int
    weights: torch.Tensor  # (P,)
    average: torch.Tensor  # (P,)
    grads: torch.Tensor  # (size, P)
    part: torch.Tensor  # (1,) float64: fraction of the time that is spent
    counter: object  # shared int: micro-batches handed out in this step
    barrier: Barrier


def make_team(size: int, start: torch.Tensor) -> Team:
    """A team of `size` processes for the flat weights `start`."""
    context = mp.get_context("spawn")
    return Team(
        size=size,
        weights=start.clone().share_memory_(),
        average=start.clone().share_memory_(),
        grads=torch.zeros(size, len(start)).share_memory_(),
        part=torch.zeros(1, dtype=torch.float64).share_memory_(),
        counter=context.Value("i", 0),
        barrier=context.Barrier(size),
    )


def flat(module: torch.nn.Module) -> torch.Tensor:
    """(P,) all parameters of a module, in order."""
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()])


def launch(target: Callable, team: Team, *arguments: object) -> None:
    """Run target(rank, team, *arguments) in every process and wait; raises if one fails."""
    context = mp.spawn(
        target, (team, *arguments), nprocs=team.size, join=False, start_method="spawn"
    )
    while not context.join():
        pass


class Member:
    """One process's view of the team.

    The parameters of its module are views of the team's weights, their gradients views of its row
    of the team's gradients. Its own share of the parameters is stepped here: hidden matrices by
    Muon, the rest by AdamW.
    """

    def __init__(
        self,
        rank: int,
        team: Team,
        *,
        module: torch.nn.Module,
        is_hidden: Callable[[str, torch.Tensor], bool],
        muon_lr: float,
        adam_lr: float,
    ) -> None:
        self.rank = rank
        self.team = team
        self.adam_lr = adam_lr
        self.total = torch.zeros_like(team.weights)
        self.own: list[slice] = []
        hidden: list[torch.nn.Parameter] = []
        rest: list[torch.nn.Parameter] = []
        loads: dict[object, list[int]] = {}  # by kind: numbers that each process owns already
        offset = 0
        for name, parameter in module.named_parameters():
            part = slice(offset, offset + parameter.numel())
            offset = part.stop
            parameter.data = team.weights[part].view(parameter.shape)
            parameter.grad = team.grads[rank, part].view(parameter.shape)
            by_muon = is_hidden(name, parameter)
            # each kind is dealt out evenly, since Muon steps matrices of one shape together
            kind = tuple(parameter.shape) if by_muon else "rest"
            load = loads.setdefault(kind, [0] * team.size)
            owner = load.index(min(load))
            load[owner] += parameter.numel()
            if owner != rank:
                continue
            master = torch.nn.Parameter(team.weights[part].view(parameter.shape))
            master.grad = self.total[part].view(parameter.shape)
            if by_muon:
                hidden.append(master)
            else:
                rest.append(master)
            self.own.append(part)
        self.muon = Muon(hidden, muon_lr)
        self.adam = torch.optim.AdamW(
            rest, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True
        )

    def wait(self) -> None:
        """Meets the others."""
        self.team.barrier.wait(PATIENCE_S)

    def more(self, micro_batches: int) -> bool:
        """Takes the next micro-batch of this step, if one is left."""
        with self.team.counter.get_lock():
            if self.team.counter.value >= micro_batches:
                return False
            self.team.counter.value += 1
            return True

    @torch.no_grad()
    def step(self, micro_batches: int, *, factor: float, ema: float, part: float) -> None:
        """Sum the gradients, clip them to norm 1, step this process's share and its average.

        `factor` scales the learning rates, `ema` is the share of the average that stays, `part` the
        fraction of the time that is spent.
        """
        self.wait()
        torch.sum(self.team.grads, 0, out=self.total)
        self.total.mul_(1 / micro_batches)
        self.total.mul_(1 / max(1.0, self.total.norm().item()))
        self.adam.param_groups[0]["lr"] = self.adam_lr * factor
        self.adam.step()
        self.muon.step(factor)
        for own in self.own:
            self.team.average[own].lerp_(self.team.weights[own], 1 - ema)
        if self.rank == 0:
            self.team.counter.value = 0
            self.team.part[0] = part
        self.wait()
        self.team.grads[self.rank].zero_()

    def state(self) -> dict:
        """This process's optimizer state."""
        return {"muon": self.muon.state(), "adam": self.adam.state_dict()}

    def load(self, state: dict) -> None:
        """Takes back what `state` gave."""
        self.muon.load(state["muon"])
        self.adam.load_state_dict(state["adam"])
