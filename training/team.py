"""Several single-threaded processes that train one model: weights, gradients and averages lie in shared memory.

Each optimizer step is made of a fixed number of micro-batches that the processes draw from a common counter, so one
that must share its core just does fewer of them: threads inside one process would wait for the slowest at every
product. Each process then steps its own part of the weights. Knows nothing about what is trained.
"""

from __future__ import annotations

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
    tensors = [start.clone(), start.clone(), torch.zeros(size, len(start)), torch.zeros(1, dtype=torch.float64)]
    return Team(size, *(t.share_memory_() for t in tensors), context.Value("i", 0), context.Barrier(size))


def flat(module: torch.nn.Module) -> torch.Tensor:
    """(P,) all parameters of a module, in order."""
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()])


def launch(target: Callable, team: Team, *arguments: object) -> None:
    """Runs target(rank, team, *arguments) in every process and waits; raises if one fails."""
    context = mp.spawn(target, (team, *arguments), nprocs=team.size, join=False, start_method="spawn")
    while not context.join():
        pass


class Member:
    """One process's view: the module's parameters live in the team's memory; its share of them is stepped here."""

    def __init__(
        self,
        rank: int,
        team: Team,
        module: torch.nn.Module,
        is_hidden: Callable[[str, torch.Tensor], bool],
        muon_lr: float,
        adam_lr: float,
    ) -> None:
        self.rank, self.team, self.adam_lr = rank, team, adam_lr
        self.total = torch.zeros_like(team.weights)
        hidden, rest, self.own, offset = [], [], [], 0
        loads: dict[object, list[int]] = {}
        for name, p in module.named_parameters():
            part = slice(offset, offset + p.numel())
            offset += p.numel()
            p.data = team.weights[part].view(p.shape)
            p.grad = team.grads[rank, part].view(p.shape)
            kind = tuple(p.shape) if is_hidden(name, p) else "rest"  # deal each kind out evenly
            load = loads.setdefault(kind, [0] * team.size)
            owner = load.index(min(load))
            load[owner] += p.numel()
            if owner == rank:
                master = torch.nn.Parameter(team.weights[part].view(p.shape))
                master.grad = self.total[part].view(p.shape)
                (rest if kind == "rest" else hidden).append(master)
                self.own.append(part)
        self.muon = Muon(hidden, muon_lr)
        self.adam = torch.optim.AdamW(rest, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)

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
    def step(self, micro_batches: int, factor: float, ema: float, part: float) -> None:
        """Sums the gradients, clips them to norm 1, steps this process's share and its average."""
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
