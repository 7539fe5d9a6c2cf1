"""Pieces of an optimizer: Muon, an exponential average of weights, a schedule by wall clock.

The schedule is a function of the fraction of the time that is spent, so a run ends annealed
whatever else the machine does. Knows nothing about the models.
"""

from collections import defaultdict

import torch


def orthogonalize(g: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Nearest semi-orthogonal matrices of a batch (N, rows, columns).

    By the Newton-Schulz iteration of Muon (Jordan et al. 2024). It runs on the small Gram matrices
    alone: x -> p(x x') x commutes, so the factors can be gathered first.
    """
    tall = g.shape[-2] > g.shape[-1]
    x = g.mT if tall else g
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    gram = x @ x.mT
    eye = torch.eye(gram.shape[-1])
    gathered = None
    for k in range(steps):
        factor = 3.4445 * eye - 4.7750 * gram + 2.0315 * gram @ gram
        gathered = factor if gathered is None else factor @ gathered
        if k + 1 < steps:
            gram = factor @ gram @ factor
    x = gathered @ x
    return x.mT if tall else x


class Muon:
    """Nesterov momentum, then an orthogonal step; matrices of one shape are stepped together."""

    def __init__(
        self,
        parameters: list[torch.nn.Parameter],
        lr: float,
        *,
        momentum: float = 0.95,
        decay: float = 0.0,
    ) -> None:
        self.lr = lr
        self.momentum = momentum
        self.decay = decay
        self.groups: dict[tuple[int, int], list[torch.nn.Parameter]] = defaultdict(list)
        for parameter in parameters:
            self.groups[parameter.shape[0], parameter[0].numel()].append(parameter)
        self.buffers: dict[tuple[int, int], torch.Tensor] = {}
        for shape, group in self.groups.items():
            self.buffers[shape] = torch.zeros(len(group), *shape)

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """One step at `scale` times the learning rate."""
        for shape, group in self.groups.items():
            gradients = torch.stack([parameter.grad.reshape(shape) for parameter in group])
            buffer = self.buffers[shape].lerp_(gradients, 1 - self.momentum)
            updates = orthogonalize(gradients.lerp(buffer, self.momentum))
            lr = self.lr * scale * max(1.0, shape[0] / shape[1]) ** 0.5
            for parameter, update in zip(group, updates, strict=True):
                parameter.mul_(1 - lr * self.decay)
                parameter.add_(update.reshape(parameter.shape), alpha=-lr)

    def state(self) -> dict:
        """The momentum, for a checkpoint."""
        return {"buffers": self.buffers}

    def load(self, state: dict) -> None:
        """Takes back what `state` gave."""
        self.buffers = state["buffers"]


class Ema:
    """An exponential average of parameters; `swap` exchanges it with the live values."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self.live = list(parameters)
        self.average = [p.detach().clone() for p in self.live]

    @torch.no_grad()
    def update(self, rate: float) -> None:
        """average = rate * average + (1 - rate) * live."""
        torch._foreach_lerp_(self.average, [p.detach() for p in self.live], 1 - rate)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges average and live values: once to evaluate or save, once more to train on."""
        for live, average in zip(self.live, self.average, strict=True):
            kept = live.detach().clone()
            live.copy_(average)
            average.copy_(kept)


def schedule(spent: float, *, warm: float = 0.01, flat: float = 0.35, last: float = 0.02) -> float:
    """Learning-rate factor at a fraction of the time: a short ramp, flat, then linear down to
    `last`.
    """
    if spent < warm:
        return max(0.02, spent / warm)
    if spent < flat:
        return 1.0
    return max(last, 1 - (1 - last) * (spent - flat) / (1 - flat))
