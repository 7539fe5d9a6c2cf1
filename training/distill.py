"""Gives the guidance input its meaning: the transformer learns its own classifier-free guidance.

Teacher: the trained average, with and without the sentence, combined for a random g in [1, 6].
Student: a copy that sees g (Meng et al. 2023). Writes student.pt beside transformer.pt, which stays
as it is; an existing student.pt is trained further. Minutes; run it after `training.transformer`.

    python -m training.distill WORK --minutes 12
"""

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
# guidance g means classifier-free guidance of 1 + GAIN (g - 1): best at 2.5, so that 3.5 means that
GAIN = 0.6


@torch.no_grad()
def guide(
    teacher: torch.nn.Module,
    arguments: dict[str, torch.Tensor],
    *,
    empty: tuple[torch.Tensor, torch.Tensor],
    strength: torch.Tensor,
) -> torch.Tensor:
    """(B, L, 64) guided velocity of the teacher: without + w (with - without), w = 1 + GAIN (g -
    1).

    With and without the sentence are one batch. `empty` are the embeddings of no sentence, (1, 96)
    and (1, length, 128); `strength` is g (B,).
    """
    count = len(strength)
    no_pooled, no_tokens = (each.expand(count, *each.shape[1:]) for each in empty)
    both = dict(arguments)
    for name in ("hidden_states", "timestep", "guidance"):
        both[name] = torch.cat([arguments[name], arguments[name]])
    both["pooled_projections"] = torch.cat([arguments["pooled_projections"], no_pooled])
    both["encoder_hidden_states"] = torch.cat([arguments["encoder_hidden_states"], no_tokens])
    with_text, without = teacher(**both, return_dict=False)[0].chunk(2)
    return torch.lerp(without, with_text, 1 + GAIN * (strength[:, None, None] - 1))


def distill(trainer: Trainer, teacher: torch.nn.Module, minutes: float) -> None:
    """Train the student for `minutes`; the first process saves its average as student.pt."""
    start = time.time()
    team = trainer.member.team
    log = Log()
    step = 0
    while (part := team.part.item()) < 1:
        while trainer.member.more(MICRO):
            batch = trainer.batch(1.0)
            arguments = batch.arguments
            strength = 1 + (STRONGEST - 1) * torch.rand(len(batch.t))
            empty = trainer.empty[arguments["encoder_hidden_states"].shape[1]]
            target = guide(teacher, arguments, empty=empty, strength=strength)
            output = trainer.transformer(**arguments | {"guidance": strength}, return_dict=False)[0]
            errors = (output - target).square().mean((1, 2))
            errors.mean().backward()
            log.add(batch.t, errors.detach())
        step += 1
        spent_s = time.time() - start
        trainer.member.step(
            MICRO,
            factor=schedule(part, warm=0.03, flat=0.3),
            ema=min(0.99, (step + 1) / (step + 10)),
            part=spent_s / (minutes * 60),
        )
        if step % 50 == 0 and trainer.rank == 0:
            log.tell(step, part=part, spent_s=spent_s, steps=50)
    if trainer.rank == 0:
        torch.save({"weights": team.average}, trainer.work / "student.pt")


def work_along(rank: int, team: Team, options: argparse.Namespace) -> None:
    """One process of the team: the student is shared, the teacher its own.

    The teacher is not compiled: that would not pay for so short a time.
    """
    trainer = Trainer(rank, team, work=options.work, seed=90, muon_lr=MUON_LR, adam_lr=ADAM_LR)
    teacher = copy.deepcopy(trainer.transformer).eval().requires_grad_(False)
    # every process has its teacher; an earlier student may take the weights' place
    trainer.member.wait()
    if rank == 0:
        team.weights.copy_(team.average)
    trainer.fill()
    trainer.member.wait()
    if options.compile:
        trainer.compile()
    distill(trainer, teacher, options.minutes)


def main() -> None:
    """Read the command line and launch the team."""
    parser = argparse.ArgumentParser(
        description="distill classifier-free guidance into the guidance input"
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("--minutes", type=float, default=12.0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="pays after some ten minutes")
    options = parser.parse_args()
    average = torch.load(options.work / "transformer.pt", weights_only=True)["average"]
    team = make_team(options.processes, average)
    if (options.work / "student.pt").exists():
        student = torch.load(options.work / "student.pt", weights_only=True)
        team.average.copy_(student["weights"])
    launch(work_along, team, options)


if __name__ == "__main__":
    main()
