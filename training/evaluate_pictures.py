"""Judges what the bundled model draws from pictures, and with its LoRA and its ControlNet.

Every judge takes `draw`, a function from tasks to pictures, so that flux and diffusers' pipelines
are judged alike; `product` makes the one, `stock` the other. All facts are held out, and the input
pictures are rendered with seeds that no training used. Shares of right pictures, with intervals
(Wilson).

    python -m training.evaluate_pictures presets/tiny --count 200
"""

import argparse
import json
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxPipeline,
)
from PIL import Image, ImageDraw

import fluxcli
from training import check, data, edges
from training.evaluate import sheet, wilson

SIZE = (128, 128)
STEPS, GUIDANCE, TOKENS = 10, 3.5, 24
STRENGTHS = (0.3, 0.6, 0.9, 1.0)
INPUT_SEED = 2_000_000  # input picture k is rendered with Random(INPUT_SEED + k)
MASK_MARGIN_PX = 10  # around the shape that is painted over
BATCH = 20
KINDS = ("outline", "edges", "img2img", "inpaint")
LORA = Path("presets/lora/outline.safetensors")
CONTROLNET = Path("presets/control/edges")


@dataclass(frozen=True)
class Task:
    """One picture to draw, 128x128, with the bundled model's own settings."""

    prompt: str
    seed: int
    outlined: bool = False  # with the LoRA at scale 1
    edges: Image.Image | None = None  # for the ControlNet at scale 1
    image: Image.Image | None = None  # the input picture
    strength: float = 1.0
    mask: Image.Image | None = None  # white is painted


Draw = Callable[[Sequence[Task]], Iterable[Image.Image]]
Table = dict[str, tuple[int, int]]  # (right, counted) by name


def to_image(picture: torch.Tensor) -> Image.Image:
    """A rendered picture (3, H, W) in [-1, 1]."""
    return Image.fromarray(((picture + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())


def count_all(rows: Iterable[dict[str, bool]], prefix: str = "") -> Table:
    """How often each name is true."""
    table: Table = {}
    for row in rows:
        for name, value in row.items():
            right, counted = table.get(prefix + name, (0, 0))
            table[prefix + name] = (right + bool(value), counted + 1)
    return table


def judge_outline(draw: Draw, count: int, skip: int = 0) -> Table:
    """Held-out facts with and without the LoRA: is the outline seen, are the words right?"""
    facts = data.held_out_facts()[skip : skip + count]
    table: Table = {}
    for outlined in (True, False):
        tasks = [
            Task(data.prompt(fact), seed=k, outlined=outlined) for k, fact in enumerate(facts, skip)
        ]
        rows = [
            check.check_outlined(drawn, fact)
            for drawn, fact in zip(draw(tasks), facts, strict=True)
        ]
        table |= count_all(rows, "with: " if outlined else "without: ")
    return table


def judge_edges(draw: Draw, count: int, skip: int = 0) -> Table:
    """Maps that differ from their prompt in shape and place, with and without the ControlNet.

    `layout` is shape and place of the map together.
    """
    pairs = edges.judged_pairs(count, skip)
    table: Table = {}
    for steered in (True, False):
        tasks = []
        for pair in pairs:
            lines = edges.judged_map(pair, SIZE).expand(3, -1, -1) * 2 - 1
            tasks.append(
                Task(
                    data.prompt(pair.said),
                    seed=pair.seed,
                    edges=to_image(lines) if steered else None,
                )
            )
        rows = []
        for drawn, pair in zip(draw(tasks), pairs, strict=True):
            row = check.check(drawn, pair.shown)
            rows.append({"layout": row["shape"] and row["position"], **row})
        table |= count_all(rows, "with: " if steered else "without: ")
    return table


def input_pairs(count: int, skip: int = 0) -> list[tuple[data.Fact, data.Fact]]:
    """(what the prompt says, what the input picture shows): held out, other shape and place.

    The colours are the same: it is the layout that a strength keeps or gives up.
    """
    held = data.held_out_facts()
    pairs = []
    for k, said in enumerate(held[skip : skip + count], skip):
        others = list(held)
        random.Random(INPUT_SEED + k).shuffle(others)
        pairs.append((said, next(fact for fact in others if _differ(fact, said))))
    return pairs


def _differ(one: data.Fact, other: data.Fact) -> bool:
    if (one.colour, one.background) != (other.colour, other.background):
        return False
    return one.shape != other.shape and one.position != other.position


def judge_img2img(
    draw: Draw, count: int, skip: int = 0, strengths: Sequence[float] = STRENGTHS
) -> Table:
    """Whose layout, shape and place, is drawn at each strength: the input's or the prompt's?

    The prompt names another shape and place; at the lowest strength also the input's own.
    """
    pairs = input_pairs(count, skip)
    images = []
    for k, (_, shown) in enumerate(pairs, skip):
        images.append(to_image(data.render([shown], SIZE, random.Random(INPUT_SEED + k))[0]))
    table: Table = {}
    for strength in strengths:
        for name in ("other", "own") if strength == min(strengths) else ("other",):
            tasks = []
            for k, ((said, shown), image) in enumerate(zip(pairs, images, strict=True), skip):
                prompt = data.prompt(said if name == "other" else shown)
                tasks.append(Task(prompt, seed=k, image=image, strength=strength))
            rows = []
            for drawn, (said, shown) in zip(draw(tasks), pairs, strict=True):
                old, new = check.check(drawn, shown), check.check(drawn, said)
                row = {"input's layout": old["shape"] and old["position"]}
                if name == "other":
                    row["prompt's layout"] = new["shape"] and new["position"]
                rows.append(row)
            table |= count_all(rows, f"{strength}, {name} prompt: ")
    return table


@dataclass(frozen=True)
class Repaint:
    """A picture, a mask over its shape, and what is to be painted there."""

    said: data.Fact
    shown: data.Fact
    image: Image.Image
    mask: Image.Image


def repaints(count: int, skip: int = 0) -> list[Repaint]:
    """Held-out facts, each to be painted over another on the same background at the same place.

    The other is held out too, has another colour and shape, and the same size where there is one;
    facts for which there is none are passed over.
    """
    held = data.held_out_facts()
    found = []
    for k, said in enumerate(held):
        rng = random.Random(INPUT_SEED + k)
        others = [fact for fact in held if _can_be_replaced(fact, said)]
        if not others:
            continue
        shown = rng.choice([fact for fact in others if fact.size == said.size] or others)
        image = to_image(data.render([shown], SIZE, random.Random(INPUT_SEED + k))[0])
        found.append(Repaint(said, shown, image, _mask(said, shown)))
        if len(found) == skip + count:
            break
    return found[skip:]


def _can_be_replaced(fact: data.Fact, by: data.Fact) -> bool:
    is_there = (fact.background, fact.position) == (by.background, by.position)
    return is_there and fact.colour != by.colour and fact.shape != by.shape


def _mask(*facts: data.Fact) -> Image.Image:
    """White over the box in which every shape of these facts' sizes and places lies, with a
    margin.
    """
    inside = torch.zeros(SIZE[1], SIZE[0], dtype=torch.bool)
    for fact in facts:
        for shape in data.SHAPES:
            distance = data.distances([replace(fact, shape=shape)], SIZE, random.Random(0))[0]
            inside |= distance < 0
    rows, columns = np.nonzero(inside.numpy())
    mask = Image.new("L", SIZE)
    box = (
        columns.min() - MASK_MARGIN_PX,
        rows.min() - MASK_MARGIN_PX,
        columns.max() + MASK_MARGIN_PX,
        rows.max() + MASK_MARGIN_PX,
    )
    ImageDraw.Draw(mask).rectangle([int(side) for side in box], fill=255)
    return mask


def judge_inpaint(draw: Draw, count: int, skip: int = 0) -> Table:
    """Strength 1.0: is what is asked painted inside the mask, and nothing changed outside?"""
    asked = repaints(count, skip)
    tasks = [
        Task(data.prompt(each.said), seed=k, image=each.image, mask=each.mask)
        for k, each in enumerate(asked, skip)
    ]
    rows = []
    for drawn, each in zip(draw(tasks), asked, strict=True):
        row = check.check(drawn, each.said)
        outside = np.asarray(each.mask) == 0
        same = np.asarray(drawn.convert("RGB"))[outside] == np.asarray(each.image)[outside]
        rows.append({"painted": all(row.values()), **row, "outside unchanged": same.all()})
    return count_all(rows)


JUDGES = {
    "outline": judge_outline,
    "edges": judge_edges,
    "img2img": judge_img2img,
    "inpaint": judge_inpaint,
}


def stock(folder: Path, *, lora: Path, controlnet: Path) -> Draw:
    """Draws with diffusers' pipelines in float32.

    The tasks of one call are of one kind. A mask's outside is pasted from the input.
    """
    plain = FluxPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipelines = {"plain": plain}

    def pipeline_of(task: Task) -> object:
        kind = (
            "edges"
            if task.edges
            else "inpaint"
            if task.mask
            else "img2img"
            if task.image
            else "plain"
        )
        if kind not in pipelines:
            parts = dict(plain.components)
            if kind == "edges":
                network = FluxControlNetModel.from_pretrained(controlnet, torch_dtype=torch.float32)
                for name in ("image_encoder", "feature_extractor"):
                    parts.pop(name)
                pipelines[kind] = FluxControlNetPipeline(**parts, controlnet=network)
            else:
                made = {"img2img": FluxImg2ImgPipeline, "inpaint": FluxInpaintPipeline}[kind]
                pipelines[kind] = made(**parts)
            pipelines[kind].set_progress_bar_config(disable=True)
        return pipelines[kind]

    def draw(tasks: Sequence[Task]) -> Iterable[Image.Image]:
        plain.set_progress_bar_config(disable=True)
        if tasks[0].outlined:
            plain.load_lora_weights(lora.parent, weight_name=lora.name)
        try:
            for first in range(0, len(tasks), BATCH):
                yield from draw_some(tasks[first : first + BATCH])
        finally:
            if tasks[0].outlined:
                plain.unload_lora_weights()

    def draw_some(tasks: Sequence[Task]) -> list[Image.Image]:
        more = {}
        if tasks[0].edges:
            more["control_image"] = [task.edges for task in tasks]
            more["controlnet_conditioning_scale"] = 1.0
        if tasks[0].image:
            more["image"] = [task.image for task in tasks]
            more["strength"] = tasks[0].strength
        if tasks[0].mask:
            more["mask_image"] = [task.mask for task in tasks]
        drawn = pipeline_of(tasks[0])(
            prompt=[task.prompt for task in tasks],
            width=SIZE[0],
            height=SIZE[1],
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            max_sequence_length=TOKENS,
            generator=[torch.Generator().manual_seed(task.seed) for task in tasks],
            **more,
        ).images
        pictures = []
        for task, picture in zip(tasks, drawn, strict=True):
            pasted = Image.composite(picture, task.image, task.mask) if task.mask else picture
            pictures.append(pasted)
        return pictures

    return draw


def product() -> Draw:
    """Draws with flux itself: its preset tiny, the bundled LoRA and ControlNet by their names."""

    def draw(tasks: Sequence[Task]) -> Iterable[Image.Image]:
        with fluxcli.Flux("tiny", precision="fp32") as flux:
            for task in tasks:
                more: dict[str, object] = {}
                if task.outlined:
                    more["lora"] = "outline"
                if task.edges:
                    more["control"] = {"kind": "edges", "image": task.edges, "scale": 1.0}
                if task.image:
                    more |= {"image": task.image, "strength": task.strength}
                if task.mask:
                    more["mask"] = task.mask
                yield flux.generate(task.prompt, seed=task.seed, **more)[0]

    return draw


def show(draw: Draw, kept: list[Image.Image]) -> Draw:
    """The same, but keeps the pictures."""

    def drawing(tasks: Sequence[Task]) -> Iterable[Image.Image]:
        for picture in draw(tasks):
            kept.append(picture)
            yield picture

    return drawing


def main() -> None:
    """Read the command line; draw, check and print."""
    parser = argparse.ArgumentParser(description="judge what is drawn from pictures")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=200, help="of facts")
    parser.add_argument("--skip", type=int, default=0, help="so many facts first")
    parser.add_argument("--only", choices=KINDS, nargs="+", default=KINDS)
    parser.add_argument("--by", choices=("flux", "diffusers"), default="flux")
    parser.add_argument("--lora", type=Path, default=LORA)
    parser.add_argument("--controlnet", type=Path, default=CONTROLNET)
    parser.add_argument(
        "--sheets", type=Path, help="also write a sheet of each kind's pictures here"
    )
    options = parser.parse_args()
    torch.set_flush_denormal(True)
    draw = product()
    if options.by == "diffusers":
        draw = stock(options.folder, lora=options.lora, controlnet=options.controlnet)
    found = {}
    start = time.time()
    for kind in options.only:
        pictures: list[Image.Image] = []
        with torch.no_grad():
            found[kind] = JUDGES[kind](show(draw, pictures), options.count, options.skip)
        if options.sheets:
            options.sheets.mkdir(parents=True, exist_ok=True)
            sheet(pictures, options.sheets / f"{kind}.png", columns=20)
        print(kind)
        for name, (right, counted) in found[kind].items():
            low, high = wilson(right, counted)
            share = 100 * right / max(1, counted)
            interval = f"[{100 * low:.1f}, {100 * high:.1f}]"
            print(f"  {name:36} {right:4}/{counted:<4} {share:5.1f} %   {interval}", flush=True)
    print(json.dumps({"seconds": round(time.time() - start, 1), "right": found}))


if __name__ == "__main__":
    main()
