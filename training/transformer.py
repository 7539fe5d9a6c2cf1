"""Trains the transformer by flow matching on cached latents, with the text encoders frozen.

Hours on two cores. The schedule follows the clock: the run ends annealed at the given time whatever
else the machine does. It saves transformer.pt (weights, average, time spent) and optimizer-N.pt in
the work folder every five minutes and resumes. Guidance is a random number here, so the model
learns to ignore it; `distill` gives it a meaning.

    python -m training.transformer WORK --minutes 75
"""

import argparse
import random
import time
from pathlib import Path
from typing import NamedTuple

import torch

from training.cache import LENGTH, Cache, Size, positions
from training.optim import schedule
from training.shape import Parts, build
from training.team import Member, Team, flat, launch, make_team
from training.text import Encoders

TOKENS = 12 * 88  # per micro-batch
MICRO = 4  # micro-batches per step
SMALL = (128, 128)
SAVE_EVERY = 300  # steps
LATE_FROM = 0.42  # fraction of the time
EARLY = {(128, 128): 84, (128, 80): 8, (80, 128): 8}  # shares of the batches
# from LATE_FROM on
LATE = {
    (128, 128): 20,
    (128, 80): 8,
    (80, 128): 8,
    (256, 256): 32,
    (256, 144): 16,
    (144, 256): 16,
}
# pictures in each process's cache before the first step
START = {
    (128, 128): 640,
    (128, 80): 200,
    (80, 128): 200,
    (256, 256): 240,
    (256, 144): 200,
    (144, 256): 200,
}
ADAM_LR, MUON_LR = 2e-3, 0.013
BINS = (0.25, 0.5, 0.75, 0.9, 0.9999, 2.0)  # upper ends, for the log


def load_parts(work: Path) -> Parts:
    """Modules of a work folder: trained VAE and encoders, a fresh transformer."""
    parts = build(work)
    text = torch.load(work / "text.pt", weights_only=True)
    parts.text_encoder.load_state_dict(text["text_encoder"])
    parts.text_encoder_2.load_state_dict(text["text_encoder_2"])
    vae = torch.load(work / "vae.pt", weights_only=True)
    parts.vae.load_state_dict(vae["weights"])
    parts.vae.register_to_config(
        shift_factor=round(vae["shift"], 4), scaling_factor=round(vae["scale"], 4)
    )
    for module in (parts.text_encoder, parts.text_encoder_2, parts.vae):
        module.eval().requires_grad_(False)
    parts.vae.to(memory_format=torch.channels_last)
    return parts


def initialize(transformer: torch.nn.Module) -> None:
    """A small output projection and small modulations: the blocks start near the identity."""
    with torch.no_grad():
        transformer.proj_out.weight.mul_(0.05)
        for name, parameter in transformer.named_parameters():
            in_a_block = ".norm" in name and ".linear." in name
            if in_a_block or name.startswith("norm_out.linear"):
                parameter.mul_(0.3)


def draw_times(count: int, length: int) -> torch.Tensor:
    """(B,) noise levels: two in three pushed towards 1, some exactly 1, the rest logit-normal.

    The layout is decided near 1, and the nearer the more tokens a picture has, so the push grows
    with the root of their number, `length`.
    """
    push = 7 * (length / 64) ** 0.5
    u = torch.rand(count)
    is_pushed = torch.rand(count) < 0.69
    pushed = push * u / (1 + (push - 1) * u)
    t = torch.where(is_pushed, pushed, torch.sigmoid(torch.randn(count)))
    is_noise = torch.rand(count) < 0.06 * max(1.0, length / 128)
    return torch.where(is_noise, torch.ones(()), t)


def is_hidden(name: str, parameter: torch.Tensor) -> bool:
    """The matrices of the blocks, which Muon steps; AdamW steps everything else."""
    return parameter.ndim == 2 and "transformer_blocks" in name and ".linear." not in name


class Batch(NamedTuple):
    """A noisy micro-batch of B pictures of one size."""

    size: Size
    arguments: dict[str, torch.Tensor]  # the transformer's
    target: torch.Tensor  # (B, L, 64) the velocity that it should answer
    t: torch.Tensor  # (B,) noise levels
    is_empty: torch.Tensor  # (B,) whether the prompt is


class Trainer:
    """One process's state: the modules, a cache of its own, its member of the team."""

    def __init__(
        self,
        rank: int,
        team: Team,
        *,
        work: Path,
        seed: int,
        muon_lr: float = MUON_LR,
        adam_lr: float = ADAM_LR,
    ) -> None:
        torch.set_num_threads(1)
        torch.set_flush_denormal(True)
        torch.manual_seed(seed * 100 + rank)
        self.work = work
        self.rank = rank
        self.rng = random.Random(seed * 100 + rank)
        self.parts = load_parts(work)
        self.transformer = self.parts.transformer
        self.member = Member(
            rank,
            team,
            module=self.transformer,
            is_hidden=is_hidden,
            muon_lr=muon_lr,
            adam_lr=adam_lr,
        )
        encoders = Encoders(work, self.parts)
        self.cache = Cache(self.parts.vae, encoders, seed=seed * 100 + rank, share=1 / team.size)
        with torch.no_grad():
            self.empty = {n: encoders([""], n) for n in (LENGTH, 16, 32, 64, 512)}
        self.places = {size: positions(size) for size in LATE}

    def fill(self) -> None:
        """Fill the cache to begin with: what an earlier run left, at least a few hundred pictures.

        It grows while training runs.
        """
        path = self.work / f"cache-{self.rank}.pt"
        if path.exists():
            self.cache.load(path)
        for size, count in START.items():
            while self.cache.shelves[size].filled < count:
                self.cache.grow(size, 20)

    def batch(self, part: float) -> Batch:
        """A random micro-batch at that fraction of the time: large pictures come late."""
        shares = EARLY if part < LATE_FROM else LATE
        size = self.rng.choices(list(shares), list(shares.values()))[0]
        length = LENGTH
        if self.rng.random() >= 0.85:
            length = self.rng.choices((16, 32, 64, 512), (3, 6, 3, 1))[0]
        count = max(2, TOKENS // (len(self.places[size]) + length))
        x, pooled, tokens = self.cache.sample(size, count, length=length)
        is_empty = torch.rand(count) < 0.1
        no_pooled, no_tokens = self.empty[length]
        t = draw_times(count, x.shape[1])
        noise = torch.randn_like(x)
        arguments = {
            "hidden_states": torch.lerp(x, noise, t[:, None, None]),
            "encoder_hidden_states": torch.where(is_empty[:, None, None], no_tokens, tokens),
            "pooled_projections": torch.where(is_empty[:, None], no_pooled, pooled),
            "timestep": t,
            "guidance": 1 + 6 * torch.rand(count),
            "img_ids": self.places[size],
            "txt_ids": torch.zeros(length, 3),
        }
        return Batch(size, arguments, target=noise - x, t=t, is_empty=is_empty)

    def compile(self) -> None:
        """Compile the blocks for any batch and length.

        The first process does it; the others wait, and find it in the compiler's cache.
        """
        if self.rank > 0:
            self.member.wait()
        self.transformer.compile_repeated_blocks(dynamic=True)
        for _ in range(2):
            batch = self.batch(1.0)
            self.transformer(**batch.arguments, return_dict=False)[0].sum().backward()
        self.member.team.grads[self.rank].zero_()
        if self.rank == 0:
            self.member.wait()
        self.member.wait()


class Log:
    """Mean error per range of t, of the pictures that are added; printed now and then."""

    def __init__(self) -> None:
        self.start_anew()

    def start_anew(self) -> None:
        """Forget what was added."""
        self.sums = torch.zeros(len(BINS))
        self.counts = torch.zeros(len(BINS))
        self.told_s = time.time()

    def add(self, t: torch.Tensor, errors: torch.Tensor) -> None:
        """Count the errors (B,) of pictures at noise levels t (B,)."""
        which = torch.bucketize(t, torch.tensor(BINS))
        self.sums.index_add_(0, which, errors)
        self.counts.index_add_(0, which, torch.ones(len(which)))

    def tell(self, step: int, *, part: float, spent_s: float, steps: int, note: str = "") -> None:
        """Print what `steps` steps have added, and start anew."""
        means = self.sums / self.counts.clamp(min=1)
        bins = " ".join(f"{mean:.4f}" for mean in means.tolist())
        speed = (time.time() - self.told_s) / steps
        line = f"{spent_s:6.0f} s  {part:.3f}  step {step}  {speed:.3f} s/step  {bins}  {note}"
        print(line, flush=True)
        self.start_anew()


def run(trainer: Trainer, minutes: float, *, spent_s: float, step: int) -> None:
    """Train until `minutes` more are spent; save every SAVE_EVERY steps and at the end.

    `spent_s` and `step` are where an earlier run has ended.
    """
    start = time.time() - spent_s
    total_s = spent_s + minutes * 60
    team = trainer.member.team
    log = Log()
    while (part := team.part.item()) < 1:
        if step % 8 == 0:
            trainer.cache.grow_neediest(5 * 128 * 128)
        while trainer.member.more(MICRO):
            batch = trainer.batch(part)
            output = trainer.transformer(**batch.arguments, return_dict=False)[0]
            errors = (output - batch.target).square().mean((1, 2))
            errors.mean().backward()
            if batch.size == SMALL:
                log.add(batch.t[~batch.is_empty], errors.detach()[~batch.is_empty])
        step += 1
        spent_s = time.time() - start
        trainer.member.step(
            MICRO,
            factor=schedule(part),
            ema=min(0.998, (step + 1) / (step + 20)),
            part=spent_s / total_s,
        )
        if step % 100 == 0 and trainer.rank == 0:
            filled = " ".join(str(shelf.filled) for shelf in trainer.cache.shelves.values())
            log.tell(step, part=part, spent_s=spent_s, steps=100, note=f"cache {filled}")
        if step % SAVE_EVERY == 0 or team.part.item() >= 1:
            save(trainer, spent_s=spent_s, step=step)
    trainer.cache.save(trainer.work / f"cache-{trainer.rank}.pt")


def save(trainer: Trainer, *, spent_s: float, step: int) -> None:
    """Each process writes its optimizers, the first one the weights.

    Nobody changes the weights meanwhile: that takes a meeting of all.
    """
    team = trainer.member.team
    files = {f"optimizer-{trainer.rank}.pt": trainer.member.state()}
    if trainer.rank == 0:
        files["transformer.pt"] = {
            "weights": team.weights,
            "average": team.average,
            "spent": spent_s,
            "step": step,
        }
    for name, state in files.items():
        temporary = trainer.work / f"{name}.tmp"
        torch.save(state, temporary)
        temporary.replace(trainer.work / name)


def work_along(
    rank: int, team: Team, options: argparse.Namespace, spent_s: float, step: int
) -> None:
    """One process of the team."""
    trainer = Trainer(rank, team, work=options.work, seed=options.seed + step)
    optimizers = options.work / f"optimizer-{rank}.pt"
    if optimizers.exists():
        trainer.member.load(torch.load(optimizers, weights_only=True))
    trainer.fill()
    if options.compile:
        trainer.compile()
    run(trainer, options.minutes, spent_s=spent_s, step=step)


def main() -> None:
    """Read the command line and launch the team."""
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
    team = make_team(options.processes, flat(transformer))
    spent_s = 0.0
    step = 0
    if (options.work / "transformer.pt").exists():
        state = torch.load(options.work / "transformer.pt", weights_only=True)
        team.weights.copy_(state["weights"])
        team.average.copy_(state["average"])
        spent_s = state["spent"]
        step = state["step"]
        team.part[0] = spent_s / (spent_s + options.minutes * 60)
    launch(work_along, team, options, spent_s, step)


if __name__ == "__main__":
    main()
