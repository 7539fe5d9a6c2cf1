"""Gives the guidance input its meaning: the transformer learns its own classifier-free guidance at every strength.

Teacher: the trained average, with and without the sentence, combined for a random g in [1, 6]. Student: a copy that
sees g (Meng et al. 2023). Writes student.pt beside transformer.pt, which stays as it is; an existing student.pt is
trained further. Minutes; run it after `training.transformer`.

    python -m training.distill WORK --minutes 12
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

import torch

from training.optim import schedule
from training.team import Team, launch, make_team
from training.transformer import MICRO, Log, Trainer

ADAM_LR, MUON_LR = 7e-4, 0.004
STRONGEST = 6.0
GAIN = 0.6  # guidance g means classifier-free guidance of 1 + GAIN (g - 1): best at 2.5, so that 3.5 means that


@torch.no_grad()
def teach(teacher: torch.nn.Module, trainer: Trainer, arguments: dict, strength: torch.Tensor) -> torch.Tensor:
    """(B, L, 64) guided velocity of the teacher: uncond + w (cond - uncond), w = 1 + GAIN (g - 1), in one batch."""
    count, length = len(strength), arguments["encoder_hidden_states"].shape[1]
    pooled, tokens = (e.expand(count, *e.shape[1:]) for e in trainer.empty[length])
    both = {name: torch.cat([arguments[name]] * 2) for name in ("hidden_states", "timestep", "guidance")}
    both["pooled_projections"] = torch.cat([arguments["pooled_projections"], pooled])
    both["encoder_hidden_states"] = torch.cat([arguments["encoder_hidden_states"], tokens])
    with_text, without = teacher(**{**arguments, **both}, return_dict=False)[0].chunk(2)
    return torch.lerp(without, with_text, 1 + GAIN * (strength[:, None, None] - 1))


def distill(trainer: Trainer, teacher: torch.nn.Module, minutes: float) -> None:
    """Trains the student for `minutes`; the first process saves its average as student.pt."""
    start, step, log, team = time.time(), 0, Log(), trainer.member.team
    while (part := team.part.item()) < 1:
        while trainer.member.more(MICRO):
            _, batch = trainer.batch(1.0)
            arguments = batch["arguments"]
            strength = 1 + (STRONGEST - 1) * torch.rand(len(batch["t"]))
            target = teach(teacher, trainer, arguments, strength)
            output = trainer.transformer(**{**arguments, "guidance": strength}, return_dict=False)[0]
            errors = (output - target).square().mean((1, 2))
            errors.mean().backward()
            log.add(batch["t"], errors.detach())
        step += 1
        spent = time.time() - start
        trainer.member.step(
            MICRO, schedule(part, warm=0.03, flat=0.3), min(0.99, (step + 1) / (step + 10)), spent / (minutes * 60)
        )
        if step % 50 == 0 and trainer.rank == 0:
            log.tell(step, part, spent, steps=50)
    if trainer.rank == 0:
        torch.save({"weights": team.average}, trainer.work / "student.pt")


def worker(rank: int, team: Team, work: Path, options: argparse.Namespace) -> None:
    """One process of the team: a teacher of its own, never compiled for so short a time; the student is shared."""
    trainer = Trainer(rank, team, work, 90, muon_lr=MUON_LR, adam_lr=ADAM_LR)
    teacher = copy.deepcopy(trainer.transformer).eval().requires_grad_(False)
    trainer.member.wait()  # every process has its teacher; an earlier student may take the weights' place
    if rank == 0:
        team.weights.copy_(team.average)
    trainer.fill()
    trainer.member.wait()
    if options.compile:
        trainer.compile()
    distill(trainer, teacher, options.minutes)


def main() -> None:
    """Reads the command line and launches the team."""
    parser = argparse.ArgumentParser(description="distill classifier-free guidance into the guidance input")
    parser.add_argument("work", type=Path)
    parser.add_argument("--minutes", type=float, default=12.0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="pays after some ten minutes")
    options = parser.parse_args()
    average = torch.load(options.work / "transformer.pt", weights_only=True)["average"]
    team = make_team(options.processes, average)
    if (options.work / "student.pt").exists():
        team.average.copy_(torch.load(options.work / "student.pt", weights_only=True)["weights"])
    launch(worker, team, options.work, options)


if __name__ == "__main__":
    main()
