"""Draws held-out facts with a published folder and counts what the checker finds: a table, then one JSON line.

Samples in batches on the stock classes, with the pipeline's own schedule, so hundreds of pictures take a minute.
`--cfg` adds true classifier-free guidance (the distilled guidance's teacher).

    python -m training.evaluate presets/tiny --count 500 --size 128 --ratio 1:1 --steps 10 --guidance 3.5
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image

from training import check, data
from training.cache import pack, positions, unpack
from training.export import Parts
from training.text import Encoders


def load(folder: Path) -> tuple[Parts, Encoders]:
    """Float32 parts and encoders of a published folder."""
    from diffusers import AutoencoderKL, FluxTransformer2DModel
    from transformers import CLIPTextModel, T5EncoderModel

    options = {"torch_dtype": torch.float32}
    parts = Parts(
        CLIPTextModel.from_pretrained(folder / "text_encoder", **options),
        T5EncoderModel.from_pretrained(folder / "text_encoder_2", **options),
        FluxTransformer2DModel.from_pretrained(folder / "transformer", **options),
        AutoencoderKL.from_pretrained(folder / "vae", **options),
    )
    for module in vars(parts).values():
        module.eval()
    return parts, Encoders(folder, parts)


def sigmas(steps: int, mu: float = 1.15) -> list[float]:
    """Noise levels from 1 to 0, as FlowMatchEulerDiscreteScheduler shifts them (time_shift, exponential)."""
    line = [1 - k * (1 - 1 / steps) / max(1, steps - 1) for k in range(steps)]
    return [math.exp(mu) / (math.exp(mu) + (1 / s - 1)) for s in line] + [0.0]


@torch.no_grad()
def draw(
    parts: Parts,
    encoders: Encoders,
    prompts: list[str],
    *,
    size: tuple[int, int],
    steps: int,
    guidance: float,
    cfg: float,
    tokens: int,
    seed: int,
) -> Iterator[Image.Image]:
    """One picture per prompt; picture k starts from the noise of seed + k."""
    pooled, text = encoders(prompts, tokens)
    empty = [e.expand(len(prompts), *e.shape[1:]) for e in encoders([""], tokens)]
    places, count = positions(size), len(prompts)
    noise = [
        torch.randn(1, 16, size[1] // 8, size[0] // 8, generator=torch.Generator().manual_seed(seed + k))
        for k in range(count)
    ]
    x = pack(torch.cat(noise))

    def velocity(p: torch.Tensor, t: torch.Tensor, level: float) -> torch.Tensor:
        return parts.transformer(
            hidden_states=x,
            encoder_hidden_states=t,
            pooled_projections=p,
            timestep=torch.full((count,), level),
            guidance=torch.full((count,), guidance),
            img_ids=places,
            txt_ids=torch.zeros(tokens, 3),
            return_dict=False,
        )[0]

    levels = sigmas(steps)
    for level, following in itertools.pairwise(levels):
        v = velocity(pooled, text, level)
        if cfg != 1.0:
            v = torch.lerp(velocity(empty[0], empty[1], level), v, cfg)
        x = x + (following - level) * v
    latents = unpack(x, size) / parts.vae.config.scaling_factor + parts.vae.config.shift_factor
    decoded = parts.vae.decode(latents).sample
    for picture in ((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy():
        yield Image.fromarray(picture)


def wilson(right: int, count: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    if not count:
        return 0.0, 1.0
    z, p = 1.96, right / count
    middle, half = p + z * z / (2 * count), z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    return (middle - half) / (1 + z * z / count), (middle + half) / (1 + z * z / count)


def rows(results: list[tuple[data.Fact, dict[str, bool]]]) -> dict[str, tuple[int, int]]:
    """Right and counted answers per attribute, and of the shape per size and per kind."""
    table = {a: [seen[a] for _, seen in results] for a in check.ATTRIBUTES}
    for size in data.SIZES:
        table[f"shape, {size}"] = [seen["shape"] for fact, seen in results if fact.size == size]
    table["shape, normal and large"] = table["shape, normal"] + table["shape, large"]
    for shape in data.SHAPES:
        table[f"shape, {shape}"] = [seen["shape"] for fact, seen in results if fact.shape == shape]
    table["all five"] = [all(seen.values()) for _, seen in results]
    return {name: (sum(values), len(values)) for name, values in table.items()}


def sheet(pictures: list[Image.Image], path: Path, columns: int = 10) -> None:
    """Writes the pictures as one contact sheet."""
    w, h = pictures[0].size
    canvas = Image.new("RGB", (columns * (w + 2), -(-len(pictures) // columns) * (h + 2)), "gray")
    for k, picture in enumerate(pictures):
        canvas.paste(picture, (k % columns * (w + 2), k // columns * (h + 2)))
    canvas.save(path)


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="score a tiny model on held-out facts")
    parser.add_argument("folder", type=Path)
    for name, default in (
        ("count", 500),
        ("size", 128),
        ("steps", 10),
        ("guidance", 3.5),
        ("cfg", 1.0),
        ("tokens", 24),
        ("seed", 0),
        ("batch", 25),
        ("skip", 0),
    ):
        parser.add_argument(f"--{name}", type=type(default), default=default)
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
    start, results, pictures = time.time(), [], []
    for first in range(0, len(facts), options.batch):
        some = facts[first : first + options.batch]
        drawn = draw(
            parts,
            encoders,
            [data.prompt(f) for f in some],
            size=size,
            steps=options.steps,
            guidance=options.guidance,
            cfg=options.cfg,
            tokens=options.tokens,
            seed=options.seed + options.skip + first,
        )
        for fact, picture in zip(some, drawn, strict=False):
            results.append((fact, check.check(picture, fact)))
            pictures.append(picture)
    if options.sheet:
        sheet(pictures[:40], options.sheet)
    table = rows(results)
    for name, (right, count) in table.items():
        low, high = wilson(right, count)
        print(
            f"{name:24} {right:4}/{count:<4} {100 * right / max(1, count):5.1f} %   [{100 * low:.1f}, {100 * high:.1f}]"
        )
    print(
        json.dumps(
            {
                "size": size,
                "steps": options.steps,
                "guidance": options.guidance,
                "cfg": options.cfg,
                "tokens": options.tokens,
                "pictures": len(results),
                "seconds": round(time.time() - start, 1),
                "right": table,
            }
        )
    )


if __name__ == "__main__":
    main()
