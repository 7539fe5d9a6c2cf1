"""Trains the bundled LoRA `outline`: every shape gets an outline, whatever the sentence says.

Low-rank updates of all matrices of the blocks, by flow matching on outlined pictures of facts that
are not held out; the model itself is frozen. Writes diffusers' file of a LoRA in bfloat16, now and
at every checkpoint. Half an hour on one core.

    python -m training.lora presets/tiny WORK --minutes 25
"""

import argparse
import random
import time
from dataclasses import replace
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from training import data
from training.cache import LENGTH, Size, pack, positions
from training.evaluate import load
from training.optim import schedule
from training.team import Member, Team, flat, launch, make_team
from training.text import Encoders
from training.transformer import Log, draw_times

RANK = 16
# the matrices of the blocks, but not those that make the modulation
ATTENTION = r"attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
TARGETS = (
    rf".*transformer_blocks\.\d+\.({ATTENTION}|ff(_context)?\.net\.(0\.proj|2)|proj_mlp|proj_out)"
)
BATCH = 16  # pictures per micro-batch
MICRO = 2  # micro-batches per step
LR = 2e-3
RARE = 0.14  # of the pictures are made to be black on white or white on black
KEPT = 6000  # pictures in the cache
SIZES = {(128, 128): 8, (128, 80): 1, (80, 128): 1}  # shares of the batches
TELL_EVERY = 100  # steps
SAVE_EVERY = 300


@torch.no_grad()
def encode(vae: torch.nn.Module, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation, (B, L, 64) each, of the packed latents of pictures (B, 3, H, W).

    Shifted and scaled as the transformer takes them; the pictures are in [-1, 1].
    """
    found = vae.encode(pictures.contiguous(memory_format=torch.channels_last)).latent_dist
    mean = (found.mean - vae.config.shift_factor) * vae.config.scaling_factor
    return pack(mean.contiguous()), pack((found.std * vae.config.scaling_factor).contiguous())


def draw_fact(rng: random.Random) -> data.Fact:
    """A training fact; some are black on white or white on black: their red outline is rare."""
    while True:
        fact = data.training_fact(rng)
        if rng.random() < RARE:
            colour, background = rng.sample(("black", "white"), 2)
            fact = replace(fact, colour=colour, background=background)
        if not fact.held_out:
            return fact


class Shelf:
    """Outlined pictures of one size as packed latents; the oldest make room for new ones."""

    def __init__(self, size: Size, count: int) -> None:
        self.size = size
        self.latents = torch.empty(count, size[0] * size[1] // 256, 64)
        self.facts: list[data.Fact] = []
        self.next = 0

    def grow(self, vae: torch.nn.Module, count: int, rng: random.Random) -> None:
        """Add `count` pictures of training facts."""
        facts = [draw_fact(rng) for _ in range(count)]
        latents, _ = encode(vae, data.render(facts, self.size, rng, outlined=True))
        for fact, each in zip(facts, latents, strict=True):
            if len(self.facts) < len(self.latents):
                self.facts.append(fact)
            else:
                self.facts[self.next] = fact
            self.latents[self.next] = each
            self.next = (self.next + 1) % len(self.latents)

    def sample(self, count: int, rng: random.Random) -> tuple[torch.Tensor, list[data.Fact]]:
        """(latents (B, L, 64), their facts) of random rows."""
        rows = [rng.randrange(len(self.facts)) for _ in range(count)]
        return self.latents[rows], [self.facts[row] for row in rows]


def arguments_of(
    x: torch.Tensor, prompts: list[str], *, size: Size, encoders: Encoders
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """(the transformer's arguments, the velocity that it should answer) for latents (B, L, 64).

    Noise, noise levels and guidance are random.
    """
    count = len(x)
    t = draw_times(count, x.shape[1])
    noise = torch.randn_like(x)
    with torch.no_grad():
        pooled, tokens = encoders(prompts, LENGTH)
    arguments = {
        "hidden_states": torch.lerp(x, noise, t[:, None, None]),
        "encoder_hidden_states": tokens,
        "pooled_projections": pooled,
        "timestep": t,
        "guidance": 1 + 6 * torch.rand(count),
        "img_ids": positions(size),
        "txt_ids": torch.zeros(LENGTH, 3),
    }
    return arguments, noise - x


def adapt(transformer: torch.nn.Module) -> torch.nn.ParameterDict:
    """Freeze a transformer, add the adapter, return its weights under peft's names, "." as "/"."""
    transformer.requires_grad_(False)
    transformer.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS))
    named = transformer.named_parameters()
    return torch.nn.ParameterDict(
        {name.replace(".", "/"): weight for name, weight in named if weight.requires_grad}
    )


def stored_name(name: str) -> str:
    """The name in diffusers' file of one of the adapter's weights."""
    return f"transformer.{name.replace('/', '.').replace('.default', '')}"


def save(adapter: torch.nn.ParameterDict, values: torch.Tensor, path: Path) -> None:
    """Write flat weights (P,) of the adapter in bfloat16 under diffusers' names."""
    sizes = [weight.numel() for weight in adapter.values()]
    stored = {}
    for (name, weight), value in zip(adapter.items(), values.split(sizes), strict=True):
        stored[stored_name(name)] = value.view(weight.shape).to(torch.bfloat16).clone()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    save_file(stored, temporary, {"format": "pt"})
    temporary.chmod(0o644)
    temporary.replace(path)


def train(rank: int, team: Team, options: argparse.Namespace) -> None:
    """One process of the team; the first one writes the average of the weights."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.manual_seed(options.seed * 100 + rank)
    rng = random.Random(options.seed * 100 + rank)
    parts, encoders = load(options.folder)
    vae = parts.vae.requires_grad_(False).to(memory_format=torch.channels_last)
    transformer = parts.transformer
    adapter = adapt(transformer)
    member = Member(rank, team, module=adapter, is_hidden=lambda *_: False, muon_lr=0.0, adam_lr=LR)
    shelves = {size: Shelf(size, KEPT * share // 10) for size, share in SIZES.items()}
    for shelf in shelves.values():
        for _ in range(8):
            shelf.grow(vae, 16, rng)
    log = Log()
    start = time.time()
    step = 0
    while (part := team.part.item()) < 1:
        shelf = shelves[rng.choices(list(SIZES), list(SIZES.values()))[0]]
        if step % 4 == 0:
            shelf.grow(vae, 12, rng)
        while member.more(MICRO):
            x, facts = shelf.sample(BATCH, rng)
            prompts = [data.any_prompt(fact, rng) for fact in facts]
            arguments, target = arguments_of(x, prompts, size=shelf.size, encoders=encoders)
            output = transformer(**arguments, return_dict=False)[0]
            errors = (output - target).square().mean((1, 2))
            errors.mean().backward()
            log.add(arguments["timestep"], errors.detach())
        step += 1
        spent_s = time.time() - start
        member.step(
            MICRO,
            factor=schedule(part, warm=0.02),
            ema=min(0.99, (step + 1) / (step + 10)),
            part=spent_s / (options.minutes * 60),
        )
        if rank == 0 and step % TELL_EVERY == 0:
            log.tell(step, part=part, spent_s=spent_s, steps=TELL_EVERY)
        if rank == 0 and (step % SAVE_EVERY == 0 or team.part.item() >= 1):
            save(adapter, team.average, options.out)


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description="train the LoRA that outlines shapes")
    parser.add_argument("folder", type=Path, help="the published model")
    parser.add_argument("out", type=Path, help="the file to write, .safetensors")
    parser.add_argument("--minutes", type=float, default=25.0)
    parser.add_argument("--seed", type=int, default=17)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--from", type=Path, dest="start_from", help="an earlier file to train on")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    parts, _ = load(options.folder)
    adapter = adapt(parts.transformer)
    if options.start_from:
        stored = load_file(options.start_from)
        with torch.no_grad():
            for name, weight in adapter.items():
                weight.copy_(stored[stored_name(name)])
    launch(train, make_team(options.processes, flat(adapter)), options)


if __name__ == "__main__":
    main()
