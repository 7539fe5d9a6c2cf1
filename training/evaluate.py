"""Draws held-out facts with a published folder and counts what the checker finds.

A table, then one JSON line. Samples in batches on the stock classes, with the pipeline's own
schedule, so hundreds of pictures take a minute. `--cfg` adds true classifier-free guidance (the
distilled guidance's teacher).

    python -m training.evaluate presets/tiny --count 500 --size 128 --steps 10 --guidance 3.5
"""

import argparse
import itertools
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from PIL import Image
from transformers import CLIPTextModel, T5EncoderModel

from training import check, data
from training.cache import Size, pack, positions, unpack
from training.shape import Parts
from training.text import Encoders

Result = tuple[data.Fact, dict[str, bool]]  # a fact, and which of its words the picture shows


def load(folder: Path) -> tuple[Parts, Encoders]:
    """Float32 parts and encoders of a published folder."""

    def read(kind: type, name: str) -> torch.nn.Module:
        return kind.from_pretrained(folder / name, torch_dtype=torch.float32).eval()

    parts = Parts(
        text_encoder=read(CLIPTextModel, "text_encoder"),
        text_encoder_2=read(T5EncoderModel, "text_encoder_2"),
        transformer=read(FluxTransformer2DModel, "transformer"),
        vae=read(AutoencoderKL, "vae"),
    )
    return parts, Encoders(folder, parts)


def sigmas(steps: int, mu: float = 1.15) -> list[float]:
    """steps + 1 noise levels from 1 to 0.

    As FlowMatchEulerDiscreteScheduler shifts them (time_shift, exponential).
    """
    line = [1 - k * (1 - 1 / steps) / max(1, steps - 1) for k in range(steps)]
    return [math.exp(mu) / (math.exp(mu) + (1 / level - 1)) for level in line] + [0.0]


@torch.no_grad()
def draw(
    parts: Parts,
    encoders: Encoders,
    *,
    prompts: list[str],
    size: Size,
    steps: int,
    guidance: float,
    cfg: float,
    tokens: int,
    seed: int,
) -> Iterator[Image.Image]:
    """One picture per prompt; picture k starts from the noise of seed + k."""
    count = len(prompts)
    width, height = size
    pooled, text = encoders(prompts, tokens)
    no_pooled, no_text = (each.expand(count, *each.shape[1:]) for each in encoders([""], tokens))
    noise = []
    for k in range(count):
        generator = torch.Generator().manual_seed(seed + k)
        noise.append(torch.randn(1, 16, height // 8, width // 8, generator=generator))
    x = pack(torch.cat(noise))
    always = {
        "guidance": torch.full((count,), guidance),
        "img_ids": positions(size),
        "txt_ids": torch.zeros(tokens, 3),
        "return_dict": False,
    }

    for level, following in itertools.pairwise(sigmas(steps)):
        always["timestep"] = torch.full((count,), level)
        velocity = parts.transformer(
            hidden_states=x, encoder_hidden_states=text, pooled_projections=pooled, **always
        )[0]
        if cfg != 1.0:
            without = parts.transformer(
                hidden_states=x,
                encoder_hidden_states=no_text,
                pooled_projections=no_pooled,
                **always,
            )[0]
            velocity = torch.lerp(without, velocity, cfg)
        x = x + (following - level) * velocity
    latents = unpack(x, size) / parts.vae.config.scaling_factor + parts.vae.config.shift_factor
    decoded = parts.vae.decode(latents).sample
    pixels = ((decoded.clamp(-1, 1) + 1) * 127.5).round().byte()
    for picture in pixels.permute(0, 2, 3, 1).numpy():
        yield Image.fromarray(picture)


def wilson(right: int, count: int) -> tuple[float, float]:
    """95 % interval of a share, `right` of `count` (Wilson 1927)."""
    if not count:
        return 0.0, 1.0
    z = 1.96
    share = right / count
    middle = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return (middle - half) / scale, (middle + half) / scale


def tabulate(results: list[Result]) -> dict[str, tuple[int, int]]:
    """(right, counted) answers per attribute, and of the shape per size and per kind."""
    table = {}
    for attribute in check.ATTRIBUTES:
        table[attribute] = [seen[attribute] for _, seen in results]
    for size in data.SIZES:
        table[f"shape, {size}"] = [seen["shape"] for fact, seen in results if fact.size == size]
    table["shape, normal and large"] = table["shape, normal"] + table["shape, large"]
    for shape in data.SHAPES:
        table[f"shape, {shape}"] = [seen["shape"] for fact, seen in results if fact.shape == shape]
    table["all five"] = [all(seen.values()) for _, seen in results]
    return {name: (sum(values), len(values)) for name, values in table.items()}


def sheet(pictures: list[Image.Image], path: Path, columns: int = 10) -> None:
    """Writes the pictures as one contact sheet."""
    width = pictures[0].width + 2
    height = pictures[0].height + 2
    rows = math.ceil(len(pictures) / columns)
    canvas = Image.new("RGB", (columns * width, rows * height), "gray")
    for k, picture in enumerate(pictures):
        row, column = divmod(k, columns)
        canvas.paste(picture, (column * width, row * height))
    canvas.save(path)


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="score a tiny model on held-out facts")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=500, help="of facts")
    parser.add_argument("--skip", type=int, default=0, help="so many facts first")
    parser.add_argument("--size", type=int, default=128, help="longest side in pixels")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--guidance", type=float, default=3.5)
    parser.add_argument("--cfg", type=float, default=1.0)
    parser.add_argument("--tokens", type=int, default=24, help="of T5")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=25)
    parser.add_argument("--ratio", choices=data.RATIOS, default="1:1")
    parser.add_argument("--sheet", type=Path, help="also write the first 40 pictures as one PNG")
    return parser.parse_args()


def main() -> None:
    """Draws, checks, prints."""
    options = read_options()
    torch.set_flush_denormal(True)
    parts, encoders = load(options.folder)
    size = data.picture_size(options.size, options.ratio)
    facts = data.held_out_facts()[options.skip : options.skip + options.count]
    start = time.time()
    results: list[Result] = []
    pictures: list[Image.Image] = []
    for first in range(0, len(facts), options.batch):
        some = facts[first : first + options.batch]
        drawn = draw(
            parts,
            encoders,
            prompts=[data.prompt(fact) for fact in some],
            size=size,
            steps=options.steps,
            guidance=options.guidance,
            cfg=options.cfg,
            tokens=options.tokens,
            seed=options.seed + options.skip + first,
        )
        for fact, picture in zip(some, drawn, strict=True):
            results.append((fact, check.check(picture, fact)))
            pictures.append(picture)
    if options.sheet:
        sheet(pictures[:40], options.sheet)
    table = tabulate(results)
    for name, (right, count) in table.items():
        low, high = wilson(right, count)
        percent = 100 * right / max(1, count)
        interval = f"[{100 * low:.1f}, {100 * high:.1f}]"
        print(f"{name:24} {right:4}/{count:<4} {percent:5.1f} %   {interval}")
    summary = {
        "size": size,
        "steps": options.steps,
        "guidance": options.guidance,
        "cfg": options.cfg,
        "tokens": options.tokens,
        "pictures": len(results),
        "seconds": round(time.time() - start, 1),
        "right": table,
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
