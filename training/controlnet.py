"""Trains the bundled ControlNet `edges`: an edge map decides shape, size and place.

One double and one single block, begun as copies of the model's, learn by flow matching to draw the
sentence's colours where and what the map says, though seven sentences in ten name another shape,
size and place. The model itself is frozen. Saves state-N.pt and controlnet.pt in WORK and resumes;
publishes the average of the weights in bfloat16 in OUT at every checkpoint.

    python -m training.controlnet presets/tiny WORK OUT --minutes 60
"""

import argparse
import json
import random
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import FluxControlNetModel, FluxTransformer2DModel

from training import data, edges
from training.cache import Size
from training.evaluate import load
from training.lora import arguments_of, encode
from training.optim import schedule
from training.shape import Parts
from training.team import Member, Team, flat, launch, make_team
from training.transformer import Log

BATCH = 16  # pictures per micro-batch
MICRO = 2  # micro-batches per step
KEPT = 10000  # pictures in the cache
SAMPLED = 0.5  # of the maps are samples of the VAE's distribution, the others its mean
DIFFERS = 0.7  # of the sentences name another shape, size and place
ADAM_LR, MUON_LR = 1e-3, 0.006
SIZES = {(128, 128): 20, (128, 80): 1, (80, 128): 1}  # shares of the batches
TELL_EVERY = 50  # steps
SAVE_EVERY = 250


def is_hidden(name: str, parameter: torch.Tensor) -> bool:
    """The matrices of the blocks, which Muon steps; AdamW steps everything else."""
    return parameter.ndim == 2 and "transformer_blocks" in name and ".linear." not in name


def draw_maps(facts: list[data.Fact], size: Size, seeds: list[int]) -> torch.Tensor:
    """(B, H, W) edge maps of facts rendered with these seeds.

    Six in ten are canny maps of the pictures, blurred by one measure or another, with the usual
    thresholds; the others are traced, 1 to 2 pixels wide.
    """
    maps = []
    for fact, seed in zip(facts, seeds, strict=True):
        chance = random.Random(seed + 1)
        if chance.random() < 0.6:
            picture = data.render([fact], size, random.Random(seed))
            sigma = chance.choice((0.0, 0.8, 1.0, 1.0, 1.4))
            drawn = edges.canny(picture, sigma=sigma)
        else:
            distance = data.distances([fact], size, random.Random(seed))
            drawn = edges.trace(distance, chance.choice((1.0, 1.5, 2.0)))
            if chance.random() < 0.5:
                drawn = (drawn > 0.5).float()
        maps.append(drawn[0])
    return torch.stack(maps)


@dataclass
class Row:
    """What one row of the cache shows, and the fact of which its map was drawn."""

    shown: data.Fact
    mapped: data.Fact


class Shelf:
    """Pictures and their maps of one size as packed latents; the oldest make room for new ones."""

    def __init__(self, size: Size, count: int) -> None:
        self.size = size
        shape = (count, size[0] * size[1] // 256, 64)
        self.latents = torch.empty(shape, dtype=torch.float16)
        self.maps = torch.empty(shape, dtype=torch.float16)
        self.deviations = torch.empty(shape, dtype=torch.float16)
        self.rows: list[Row] = []
        self.next = 0
        self.forbidden = edges.judged_fingerprints(size) if size == (128, 128) else set()
        self.thrown = 0

    def grow(self, vae: torch.nn.Module, count: int, rng: random.Random) -> None:
        """Add `count` pictures: colours of one training fact, the map of another."""
        rows = [draw_row(rng) for _ in range(count)]
        seeds = [rng.getrandbits(48) + 2 * edges.JUDGED_SEED for _ in rows]
        maps = draw_maps([row.mapped for row in rows], self.size, seeds)
        pictures = []
        for row, seed in zip(rows, seeds, strict=True):
            pictures.append(data.render([row.shown], self.size, random.Random(seed))[0])
        lines = maps[:, None].expand(-1, 3, -1, -1) * 2 - 1
        latents, _ = encode(vae, torch.stack(pictures))
        maps_mean, maps_deviation = encode(vae, lines)
        for k, row in enumerate(rows):
            if edges.fingerprint(maps[k]) in self.forbidden:
                self.thrown += 1
                continue
            if len(self.rows) < len(self.latents):
                self.rows.append(row)
            else:
                self.rows[self.next] = row
            self.latents[self.next] = latents[k]
            self.maps[self.next] = maps_mean[k]
            self.deviations[self.next] = maps_deviation[k]
            self.next = (self.next + 1) % len(self.latents)

    def sample(
        self, count: int, rng: random.Random
    ) -> tuple[torch.Tensor, torch.Tensor, list[data.Fact]]:
        """(latents, maps, both (B, L, 64), facts that the sentences state) of random rows.

        diffusers' pipelines take a random sample of what the VAE makes of a map, others its mean:
        half of these maps are one, half the other.
        """
        which = [rng.randrange(len(self.rows)) for _ in range(count)]
        said = [say(self.rows[row].shown, rng) for row in which]
        maps = self.maps[which].float()
        noise = torch.randn_like(maps) * (torch.rand(count, 1, 1) < SAMPLED)
        return self.latents[which].float(), maps + noise * self.deviations[which], said


def draw_row(rng: random.Random) -> Row:
    """A map's fact, and what is shown; neither is held out."""
    mapped = data.training_fact(rng)
    while True:
        colours = data.training_fact(rng)
        shown = replace(mapped, colour=colours.colour, background=colours.background)
        if not shown.held_out:
            return Row(shown, mapped)


def say(shown: data.Fact, rng: random.Random) -> data.Fact:
    """What the sentence states: the colours of what is shown, mostly the rest of another fact."""
    if rng.random() >= DIFFERS:
        return shown
    while True:
        other = data.training_fact(rng)
        said = replace(other, colour=shown.colour, background=shown.background)
        if not said.held_out:
            return said


def steered(
    transformer: FluxTransformer2DModel,
    controlnet: FluxControlNetModel,
    arguments: dict[str, torch.Tensor],
    maps: torch.Tensor,
) -> torch.Tensor:
    """(B, L, 64) the velocity with the ControlNet at scale 1, as the pipeline calls both models."""
    double, single = controlnet(controlnet_cond=maps, **arguments, return_dict=False)
    return transformer(
        **arguments,
        controlnet_block_samples=double,
        controlnet_single_block_samples=single,
        return_dict=False,
    )[0]


def make(parts: Parts) -> FluxControlNetModel:
    """One double and one single block, copies of the transformer's; it adds nothing yet."""
    config = parts.transformer.config
    return FluxControlNetModel.from_transformer(
        parts.transformer,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=config.attention_head_dim,
        num_attention_heads=config.num_attention_heads,
    )


def publish(controlnet: FluxControlNetModel, values: torch.Tensor, folder: Path) -> None:
    """Write flat weights (P,) in bfloat16 as diffusers saves them, without where they came from."""
    sizes = [parameter.numel() for parameter in controlnet.parameters()]
    stored = FluxControlNetModel.from_config(dict(controlnet.config))
    with torch.no_grad():
        pairs = zip(stored.parameters(), values.split(sizes), strict=True)
        for parameter, value in pairs:
            parameter.copy_(value.view(parameter.shape))
    stored.to(torch.bfloat16).save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def train(rank: int, team: Team, options: argparse.Namespace, spent_s: float, step: int) -> None:
    """One process of the team."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    seed = (options.seed + step) * 100 + rank
    torch.manual_seed(seed)
    rng = random.Random(seed)
    parts, encoders = load(options.folder)
    for module in vars(parts).values():
        module.requires_grad_(False)
    vae = parts.vae.to(memory_format=torch.channels_last)
    controlnet = make(parts).train()
    member = Member(
        rank, team, module=controlnet, is_hidden=is_hidden, muon_lr=MUON_LR, adam_lr=ADAM_LR
    )
    state = options.work / f"state-{rank}-of-{team.size}.pt"
    if state.exists():
        member.load(torch.load(state, weights_only=True))
    shelves = {size: Shelf(size, KEPT * share // 20) for size, share in SIZES.items()}
    for size, shelf in shelves.items():
        for _ in range(20 if size == (128, 128) else 2):
            shelf.grow(vae, 24, rng)
    start = time.time() - spent_s
    total_s = spent_s + options.minutes * 60
    log = Log()
    while (part := team.part.item()) < 1:
        shelf = shelves[rng.choices(list(SIZES), list(SIZES.values()))[0]]
        shelf.grow(vae, 8, rng)
        while member.more(MICRO):
            x, maps, said = shelf.sample(BATCH, rng)
            prompts = [data.any_prompt(fact, rng) for fact in said]
            arguments, target = arguments_of(x, prompts, size=shelf.size, encoders=encoders)
            output = steered(parts.transformer, controlnet, arguments, maps)
            errors = (output - target).square().mean((1, 2))
            errors.mean().backward()
            log.add(arguments["timestep"], errors.detach())
        step += 1
        spent_s = time.time() - start
        member.step(
            MICRO,
            factor=schedule(part, flat=0.4),
            ema=min(0.995, (step + 1) / (step + 20)),
            part=spent_s / total_s,
        )
        if step % TELL_EVERY == 0 and rank == 0:
            square = shelves[128, 128]
            note = f"cache {len(square.rows)}, {square.thrown} thrown away"
            log.tell(step, part=part, spent_s=spent_s, steps=TELL_EVERY, note=note)
        if step % SAVE_EVERY == 0 or team.part.item() >= 1:
            torch.save(member.state(), state)
            if rank == 0:
                weights = {"weights": team.weights, "average": team.average}
                torch.save(
                    weights | {"spent": spent_s, "step": step}, options.work / "controlnet.pt"
                )
                publish(controlnet, team.average, options.out)


def main() -> None:
    """Read the command line and launch the team."""
    parser = argparse.ArgumentParser(description="train the ControlNet that follows edge maps")
    parser.add_argument("folder", type=Path, help="the published model")
    parser.add_argument("work", type=Path, help="for checkpoints")
    parser.add_argument("out", type=Path, help="folder to publish the ControlNet in")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=23)
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    parts, _ = load(options.folder)
    team = make_team(options.processes, flat(make(parts)))
    spent_s = 0.0
    step = 0
    if (options.work / "controlnet.pt").exists():
        state = torch.load(options.work / "controlnet.pt", weights_only=True)
        team.weights.copy_(state["weights"])
        team.average.copy_(state["average"])
        spent_s = state["spent"]
        step = state["step"]
        team.part[0] = spent_s / (spent_s + options.minutes * 60)
    launch(train, team, options, spent_s, step)


if __name__ == "__main__":
    main()
