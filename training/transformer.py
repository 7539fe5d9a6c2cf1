"""Trains the transformer by flow matching on cached latents, with the text encoders frozen. Hours on two cores.

The schedule follows the clock: the run ends annealed at the given time whatever else the machine does. It saves
transformer.pt (weights, average, time spent) and optimizer-N.pt in the work folder every five minutes and resumes.
Guidance is a random number here, so the model learns to ignore it; `distill` gives it a meaning.

    python -m training.transformer WORK --minutes 75
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import torch

from training import export
from training.cache import LENGTH, Cache, positions
from training.optim import schedule
from training.team import Member, Team, flat, launch, make_team
from training.text import Encoders

TOKENS = 12 * 88  # per micro-batch
MICRO = 4  # micro-batches per step
SMALL = (128, 128)
SAVE_EVERY = 300  # steps
LATE_FROM = 0.42  # fraction of the time
EARLY = {(128, 128): 84, (128, 80): 8, (80, 128): 8}  # shares of the batches
LATE = {
    (128, 128): 20,
    (128, 80): 8,
    (80, 128): 8,
    (256, 256): 32,
    (256, 144): 16,
    (144, 256): 16,
}  # from LATE_FROM on
# pictures in each process's cache before the first step
START = {(128, 128): 640, (128, 80): 200, (80, 128): 200, (256, 256): 240, (256, 144): 200, (144, 256): 200}
ADAM_LR, MUON_LR = 2e-3, 0.013
BINS = (0.25, 0.5, 0.75, 0.9, 0.9999, 2.0)  # upper ends, for the log


def load_parts(work: Path) -> export.Parts:
    """Modules of a work folder: trained VAE and encoders, a fresh transformer."""
    parts = export.build(work)
    text = torch.load(work / "text.pt", weights_only=True)
    parts.text_encoder.load_state_dict(text["text_encoder"])
    parts.text_encoder_2.load_state_dict(text["text_encoder_2"])
    vae = torch.load(work / "vae.pt", weights_only=True)
    parts.vae.load_state_dict(vae["weights"])
    parts.vae.register_to_config(shift_factor=round(vae["shift"], 4), scaling_factor=round(vae["scale"], 4))
    for module in (parts.text_encoder, parts.text_encoder_2, parts.vae):
        module.eval().requires_grad_(False)
    parts.vae.to(memory_format=torch.channels_last)
    return parts


def initialize(transformer: torch.nn.Module) -> None:
    """A small output projection and small modulations: the blocks start near the identity."""
    with torch.no_grad():
        transformer.proj_out.weight.mul_(0.05)
        for name, parameter in transformer.named_parameters():
            if (".norm" in name and ".linear." in name) or name.startswith("norm_out.linear"):
                parameter.mul_(0.3)


def times(count: int, length: int) -> torch.Tensor:
    """(B,) noise levels: two in three pushed towards 1, some exactly 1, the rest logit-normal.

    The layout is decided near 1, and the nearer the more tokens a picture has, so the push grows with their root.
    """
    push = 7 * (length / 64) ** 0.5
    u = torch.rand(count)
    t = torch.where(torch.rand(count) < 0.69, push * u / (1 + (push - 1) * u), torch.sigmoid(torch.randn(count)))
    return torch.where(torch.rand(count) < 0.06 * max(1.0, length / 128), torch.ones(()), t)


def is_hidden(name: str, parameter: torch.Tensor) -> bool:
    """The matrices of the blocks, which Muon steps; AdamW steps everything else."""
    return parameter.ndim == 2 and "transformer_blocks" in name and ".linear." not in name


class Trainer:
    """One process's state: the modules, a cache of its own, its member of the team."""

    def __init__(
        self, rank: int, team: Team, work: Path, seed: int, *, muon_lr: float = MUON_LR, adam_lr: float = ADAM_LR
    ) -> None:
        torch.set_num_threads(1)
        torch.set_flush_denormal(True)
        torch.manual_seed(seed * 100 + rank)
        self.work, self.rng, self.rank = work, random.Random(seed * 100 + rank), rank
        self.parts = load_parts(work)
        self.transformer = self.parts.transformer
        self.member = Member(rank, team, self.transformer, is_hidden, muon_lr, adam_lr)
        encoders = Encoders(work, self.parts)
        self.cache = Cache(self.parts.vae, encoders, seed * 100 + rank, 1 / team.size)
        with torch.no_grad():
            self.empty = {n: encoders([""], n) for n in (LENGTH, 16, 32, 64, 512)}
        self.places = {size: positions(size) for size in LATE}

    def fill(self) -> None:
        """The cache to begin with (what an earlier run left, at least a few hundred pictures); it grows in training."""
        if (path := self.work / f"cache-{self.rank}.pt").exists():
            self.cache.load(path)
        for size, count in START.items():
            while self.cache.shelves[size].filled < count:
                self.cache.grow(size, 20)

    def batch(self, part: float) -> tuple[tuple[int, int], dict]:
        """(size, noisy micro-batch): the model's arguments, the target velocity, t, and which prompts are empty."""
        shares = EARLY if part < LATE_FROM else LATE
        size = self.rng.choices(list(shares), list(shares.values()))[0]
        length = LENGTH if self.rng.random() < 0.85 else self.rng.choices((16, 32, 64, 512), (3, 6, 3, 1))[0]
        x, pooled, tokens = self.cache.sample(size, max(2, TOKENS // (len(self.places[size]) + length)), length)
        void = torch.rand(len(x)) < 0.1
        pooled = torch.where(void[:, None], self.empty[length][0], pooled)
        tokens = torch.where(void[:, None, None], self.empty[length][1], tokens)
        t = times(len(x), x.shape[1])
        noise = torch.randn_like(x)
        mixed = torch.lerp(x, noise, t[:, None, None])
        arguments = {
            "hidden_states": mixed,
            "encoder_hidden_states": tokens,
            "pooled_projections": pooled,
            "timestep": t,
            "guidance": 1 + 6 * torch.rand(len(x)),
            "img_ids": self.places[size],
            "txt_ids": torch.zeros(length, 3),
        }
        return size, {"arguments": arguments, "target": noise - x, "t": t, "void": void}

    def compile(self) -> None:
        """Compiles the blocks for any batch and length; the first process does it, the others find it in the cache."""
        if self.rank:
            self.member.wait()
        self.transformer.compile_repeated_blocks(dynamic=True)
        for _ in range(2):
            _, batch = self.batch(1.0)
            self.transformer(**batch["arguments"], return_dict=False)[0].sum().backward()
        self.member.team.grads[self.rank].zero_()
        if not self.rank:
            self.member.wait()
        self.member.wait()


class Log:
    """Mean error per range of t over conditional pictures of the smallest square, printed now and then."""

    def __init__(self) -> None:
        self.sums, self.counts, self.told = torch.zeros(len(BINS)), torch.zeros(len(BINS)), time.time()

    def add(self, t: torch.Tensor, errors: torch.Tensor) -> None:
        """Counts per-picture errors."""
        which = torch.bucketize(t, torch.tensor(BINS))
        self.sums.index_add_(0, which, errors)
        self.counts.index_add_(0, which, torch.ones(len(which)))

    def tell(self, step: int, part: float, spent: float, note: str = "", steps: int = 100) -> None:
        """Prints and starts anew."""
        bins = " ".join(f"{x:.4f}" for x in (self.sums / self.counts.clamp(min=1)).tolist())
        print(
            f"{spent:6.0f} s  {part:.3f}  step {step}  {(time.time() - self.told) / steps:.3f} s/step  {bins}  {note}",
            flush=True,
        )
        self.__init__()


def run(trainer: Trainer, minutes: float, spent: float, step: int) -> None:
    """Trains until `minutes` more are spent; saves every SAVE_EVERY steps and at the end."""
    start, total, log, team = time.time() - spent, spent + minutes * 60, Log(), trainer.member.team
    while (part := team.part.item()) < 1:
        if step % 8 == 0:
            trainer.cache.grow_neediest(5 * 128 * 128)
        while trainer.member.more(MICRO):
            size, batch = trainer.batch(part)
            output = trainer.transformer(**batch["arguments"], return_dict=False)[0]
            errors = (output - batch["target"]).square().mean((1, 2))
            errors.mean().backward()
            if size == SMALL:
                log.add(batch["t"][~batch["void"]], errors.detach()[~batch["void"]])
        step += 1
        spent = time.time() - start
        trainer.member.step(MICRO, schedule(part), min(0.998, (step + 1) / (step + 20)), spent / total)
        if step % 100 == 0 and trainer.rank == 0:
            log.tell(step, part, spent, "cache " + " ".join(str(s.filled) for s in trainer.cache.shelves.values()))
        if step % SAVE_EVERY == 0 or team.part.item() >= 1:
            save(trainer, spent, step)
    trainer.cache.save(trainer.work / f"cache-{trainer.rank}.pt")


def save(trainer: Trainer, spent: float, step: int) -> None:
    """Each process writes its optimizers, the first one the weights: nobody changes them until it meets the others."""
    team, work = trainer.member.team, trainer.work
    files = {f"optimizer-{trainer.rank}.pt": trainer.member.state()}
    if trainer.rank == 0:
        files["transformer.pt"] = {"weights": team.weights, "average": team.average, "spent": spent, "step": step}
    for name, state in files.items():
        torch.save(state, work / (name + ".tmp"))
        (work / (name + ".tmp")).replace(work / name)


def worker(rank: int, team: Team, work: Path, options: argparse.Namespace, spent: float, step: int) -> None:
    """One process of the team."""
    trainer = Trainer(rank, team, work, options.seed + step)
    if (work / f"optimizer-{rank}.pt").exists():
        trainer.member.load(torch.load(work / f"optimizer-{rank}.pt", weights_only=True))
    trainer.fill()
    if options.compile:
        trainer.compile()
    run(trainer, options.minutes, spent, step)


def main() -> None:
    """Reads the command line and launches the team."""
    parser = argparse.ArgumentParser(description="train the transformer")
    parser.add_argument("work", type=Path)
    parser.add_argument("--minutes", type=float, default=75.0)
    parser.add_argument("--seed", type=int, default=4)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="pays after some ten minutes")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    transformer = load_parts(options.work).transformer
    initialize(transformer)
    team, spent, step = make_team(options.processes, flat(transformer)), 0.0, 0
    if (options.work / "transformer.pt").exists():
        state = torch.load(options.work / "transformer.pt", weights_only=True)
        team.weights.copy_(state["weights"])
        team.average.copy_(state["average"])
        spent, step = state["spent"], state["step"]
        team.part[0] = spent / (spent + options.minutes * 60)
    launch(worker, team, options.work, options, spent, step)


if __name__ == "__main__":
    main()
