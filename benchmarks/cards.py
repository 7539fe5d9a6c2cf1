"""Every placement on cards of 8 and 12 GiB: measured peaks against the plan, seconds a step.

    python -m benchmarks.cards [--caps 8,12] [--sizes 1024x1024] [--steps 3] [--out FILE]
    python -m benchmarks.cards --shrunk
    python -m benchmarks.cards --row

Needs a CUDA card, which each run caps by the allocator, and 48 GB of RAM (72 for the last row); no
file of a model, no network and no disk: the full-size weights are random and lie in one host
buffer, as mapped files would. diffusers' FluxPipeline runs beside it: resident (which takes a card
of 32 GB), model- and group-offloaded. First `benchmarks.questions`, then our placements, then
diffusers; each answer and each row is a JSON line in --out (or in benchmarks/results, by date and
card) as soon as it is there. What fails is a row with its error, and the rest goes on; after Ctrl-C
there is what came until then. A table for people, then one JSON line.

The defaults are meant for 9 minutes. Reckoned, not measured: a minute of questions; 16 placements
of 10 to 24 GB that are copied at 4 GB/s, 3 steps of 0.3 to 2 s and compute beside them, 15 to 20 s
each, 5 minutes; three pipelines that fill 24 GB of weights and copy them, 3 minutes.

With --row it prints the row of presets/shapes/cards.toml for this card, as measured now; that file
says where it goes. With --shrunk all is as small as the bundled model, and budgets are MiB: within
a minute it shows that nothing of this script is broken here. Its figures say nothing.
"""

import argparse
import contextlib
import datetime
import gc
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import psutil
import torch
from PIL import Image

from benchmarks.counting import pretend_baked
from benchmarks.questions import ask, attempt
from fluxcli.engine import decode, prepare, text
from fluxcli.engine import device as hardware
from fluxcli.engine.engine import Engine
from fluxcli.engine.picture import Picture
from fluxcli.errors import FluxError
from fluxcli.events import Phase, Step
from fluxcli.models.parts import Control
from fluxcli.models.shapes import read_known_shapes
from fluxcli.pictures.inputs import InputPictures, read_picture
from fluxcli.plan import costs, placement
from fluxcli.plan.machine import Hardware
from fluxcli.plan.placement import GIB, PHASES, PREPARE, Candidate
from fluxcli.plan.planner import survey
from fluxcli.request.fields import Order
from fluxcli.request.inputs import ControlRef
from quant import codes, linear
from quant.checkpoint import Checkpoint, Component, inspect
from quant.codecs import Reader
from quant.spec import BAKEABLE, DEQUANTIZE, SCHEMES, QuantSpec
from quant.tensor_info import TensorInfo
from quant.weights import Piece, Weight

if TYPE_CHECKING:
    from diffusers import FluxPipeline

TINY = Path(__file__).resolve().parent.parent / "presets" / "tiny"
RESULTS = Path(__file__).resolve().parent / "results"
DEV = "black-forest-labs/FLUX.1-dev"
DTYPES = {
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "I8": torch.int8,
    "U8": torch.uint8,
}
SPECS = [QuantSpec(name, SCHEMES[name].text_encoder) for name in BAKEABLE]
WAYS = ("resident", "model offload", "group offload")  # of diffusers
INTERRUPTED = 130
# The phase that a component is loaded for.
LOADED_FOR = {"controlnet": "denoise", "transformer": "denoise", "vae": "decode"}
INPUTS = ("controlnet", "reference")  # of rows with a picture: Union-Pro 2.0's size, or Kontext's
NETWORK_BLOCKS = 6  # double ones, as Union-Pro 2.0 has


@contextlib.contextmanager
def random_weights(checkpoint: Checkpoint, *, text_tokens: int) -> Iterator[None]:
    """Give the checkpoint weights of its shapes: each a view of one random host buffer.

    It has no tokenizers then: every prompt is as many ones as there are tokens.
    """
    numel = max(
        weight.info.numel
        for component in checkpoint.components.values()
        for weight in component.weights.values()
    )
    noise = torch.empty(numel, dtype=torch.bfloat16).normal_(0, 0.02)
    pools = {
        torch.bfloat16: noise,
        torch.float8_e4m3fn: noise.to(torch.float8_e4m3fn),
        torch.uint8: noise.view(torch.uint8),
        torch.int8: noise.view(torch.int8),
    }

    def read(_: Reader, found: Weight) -> dict[str, torch.Tensor]:
        tensors = {}
        for suffix, piece in found.pieces.items():
            dtype = DTYPES[piece.info.dtype]
            numel = piece.info.numel
            flat = pools[dtype][:numel] if dtype in pools else torch.full([numel], 1e-3)
            tensors[suffix] = flat.view(piece.shape)
        return tensors

    tokens = text.TokenIds(
        torch.ones(1, 77, dtype=torch.long),
        torch.ones(1, text_tokens, dtype=torch.long),
        lost="",
        unknown="",
    )
    with (
        mock.patch.object(Reader, "read", read),
        mock.patch("quant.codecs.check_values", lambda *_: None),
        mock.patch.object(linear, "read_offset", lambda _: 0.0),
        mock.patch.object(decode, "is_finite", lambda _: True),
        mock.patch.object(prepare, "is_finite", lambda _: True),
        mock.patch.object(text, "tokenize", lambda *_: tokens),
        mock.patch.object(Checkpoint, "fingerprint", "random"),
        mock.patch.object(Component, "fingerprint", property(lambda part: part.name)),
        mock.patch.object(Checkpoint, "text_encoder_fingerprint", "random"),
    ):
        yield


@contextlib.contextmanager
def shrunk_constants() -> Iterator[None]:
    """Plan for the tiny model, of which what is fixed for the real one would be the most."""
    with (
        mock.patch.object(costs, "DECODE_BYTES", 64 << 10),
        mock.patch.object(placement, "RESIDENT_SHARE", 0.0),
        mock.patch.object(placement, "CONTEXT_BYTES", 0),
        mock.patch.object(placement, "FRAGMENTS_BYTES", 0),
        mock.patch.object(hardware, "CONTEXT_BYTES", 0),
    ):
        yield


class Run:
    """One picture: the peak bytes of each phase, and the seconds of each step but the first."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.peaks: dict[str, int] = {}  # bytes that the allocator held, and the context's
        self.live: dict[str, int] = {}  # bytes of tensors among them
        self.steps_s: list[float] = []
        self._phase = "encode"

    def draw(self, picture: Picture) -> None:
        step_ended = 0.0
        hardware.reset_peak(self.engine.plan.device)
        with torch.no_grad():
            for event in self.engine.draw([picture]):
                if isinstance(event, Phase):
                    self._end_phase()
                    self._begin_phase(event)
                elif isinstance(event, Step):
                    hardware.synchronize(self.engine.plan.device)
                    now = time.perf_counter()
                    if event.index > 1:
                        self.steps_s.append(now - step_ended)
                    step_ended = now
        self._end_phase()

    def _begin_phase(self, event: Phase) -> None:
        if event.name in (*PHASES, PREPARE):
            self._phase = event.name
        else:  # loading is part of the phase that it is for
            self._phase = LOADED_FOR.get(event.detail, self._phase)

    def _end_phase(self) -> None:
        device = self.engine.plan.device
        peak_bytes = hardware.peak_memory(device)["vram_bytes"] + placement.CONTEXT_BYTES
        live_bytes = torch.cuda.max_memory_allocated(device)
        self.peaks[self._phase] = max(self.peaks.get(self._phase, 0), peak_bytes)
        self.live[self._phase] = max(self.live.get(self._phase, 0), live_bytes)
        hardware.reset_peak(device)


def carry_out(candidate: Candidate, machine: Hardware, *, picture: Picture) -> dict:
    """One plan, carried out: what of a row is measured."""
    plan = candidate.plan
    if plan is None:
        raise ValueError(candidate.why)
    codes.TABLES.clear()  # of the candidates before
    engine = Engine(candidate.checkpoint, plan, machine)
    run = Run(engine)
    run.draw(picture)
    cost = candidate.cost
    planned_s = sum(costs.block_seconds(cost, machine, machine.speeds))
    for control in cost.controls:
        planned_s += sum(costs.control_seconds(cost, control, machine, machine.speeds))
    copied_bytes = sum(cost.blocks[i].nbytes for i in plan.placement.streamed)
    return {
        "placed": plan.placement.level("denoise"),
        "encode": plan.placement.encode,
        "decode": plan.placement.decode,
        "went_on_as_planned": engine.plan.placement == plan.placement,
        "plan_bytes": plan.peak_bytes,
        "measured_bytes": {phase: run.peaks.get(phase, 0) for phase in plan.peak_bytes},
        "live_bytes": {phase: run.live.get(phase, 0) for phase in plan.peak_bytes},
        "step_s": round(statistics.median(run.steps_s), 4),
        "planned_step_s": round(planned_s, 4),
        "bus_s": round(copied_bytes / machine.speeds.bus_bytes, 4),
    }


def make_picture(order: Order, kind: str, folder: Path) -> Picture:
    """The picture of an order, with an input of that kind unless it is ""."""
    if not kind:
        return Picture(order.request)
    path = folder / "input.png"
    Image.new("RGB", order.request.size, "teal").save(path)
    given = read_picture(str(path))
    if kind == "reference":
        request = replace(order.request, reference=(given.path,))
        return Picture(request, inputs=InputPictures(references=(given,)))
    request = replace(order.request, control=(ControlRef("a network", given.path),))
    inputs = InputPictures(controls=(given,))
    return Picture(request, inputs=inputs, controls=(Control("controlnet"),))


def add_network(checkpoint: Checkpoint) -> Checkpoint:
    """The model with a ControlNet of its own first blocks, in the same precision."""
    part = checkpoint.components["transformer"]
    count = min(NETWORK_BLOCKS, part.config["num_layers"])
    width = part.config["num_attention_heads"] * part.config["attention_head_dim"]
    weights = {}
    for name, weight in part.weights.items():
        kind, _, rest = name.partition(".")
        if kind in ("single_transformer_blocks", "norm_out", "proj_out"):
            continue
        if kind != "transformer_blocks" or int(rest.partition(".")[0]) < count:
            weights[name] = weight
    layers = {f"controlnet_blocks.{i}": (width, width) for i in range(count)}
    layers["controlnet_x_embedder"] = (width, part.config["in_channels"])
    for layer, shape in layers.items():
        for leaf, its_shape in (("weight", shape), ("bias", shape[:1])):
            info = TensorInfo(f"{layer}.{leaf}", "BF16", its_shape)
            weights[info.name] = Weight(info.name, its_shape, "", {"": Piece(part.folder, info)})
    config = {key: value for key, value in part.config.items() if key != "out_channels"}
    config |= {"num_layers": count, "num_single_layers": 0, "_class_name": "FluxControlNetModel"}
    network = Component("controlnet", part.folder, config, weights=weights)
    return replace(checkpoint, components=checkpoint.components | {"controlnet": network})


def try_placements(
    folders: Sequence[Checkpoint], machine: Hardware, *, order: Order
) -> Iterator[dict]:
    """Rows of every precision, as planned, of other placements of 16 bit, and with pictures.

    The second are with blocks that stream, and with blocks that come from their files; the last
    with a ControlNet, and with a reference as Kontext has it.
    """
    wide = "bf16" if machine.bf16 else "fp16"
    wanted = [(precision, "auto", "") for precision in (wide, *BAKEABLE)]
    wanted += [(wide, "stream", ""), (wide, "sequential", "")]
    wanted += [("w4a8", "auto", kind) for kind in INPUTS]
    for precision, offload, kind in wanted:
        resources = replace(order.resources, precision=precision, offload=offload)
        asked = replace(order, resources=resources)

        def measure(asked: Order = asked, kind: str = kind) -> dict:
            candidates = folders
            if kind == "controlnet":
                candidates = [add_network(each) for each in folders]
            with tempfile.TemporaryDirectory() as folder:
                given = make_picture(asked, kind, Path(folder))
                workload = costs.make_workload(
                    given.request, references=given.inputs.references, controls=given.controls
                )
                best = survey(workload, asked.resources, candidates, machine)[0]
                return carry_out(best, machine, picture=given)

        row = {"precision": precision, "offload": offload, "inputs": kind}
        yield row | attempt(measure)
        gc.collect()
        hardware.empty_cache(machine.device)


def time_diffusers(checkpoint: Checkpoint, device: str, *, order: Order) -> Iterator[dict]:
    """diffusers' own pipeline in each of its ways, on the whole card."""
    hardware.cap(device, 1 << 50)
    for way in WAYS:

        def measure(way: str = way) -> dict:
            return time_pipeline(checkpoint, device, way=way, order=order)

        yield {"way": f"diffusers {way}"} | attempt(measure)
        gc.collect()
        hardware.empty_cache(device)


def time_pipeline(checkpoint: Checkpoint, device: str, *, way: str, order: Order) -> dict:
    """diffusers' pipeline from prepared embeddings: seconds a step, the allocator's peak."""
    request = order.request
    config = checkpoint.components["transformer"].config
    on_device = {"dtype": torch.bfloat16, "device": device}
    width = config.get("joint_attention_dim", 4096)
    pooled_width = config["pooled_projection_dim"]
    pipe = make_pipeline(checkpoint, device, way=way)
    step_ends: list[float] = []

    def tick(*_: object) -> dict:
        hardware.synchronize(device)
        step_ends.append(time.perf_counter())
        return {}

    hardware.reset_peak(device)
    pipe(
        prompt_embeds=torch.zeros(1, request.text_tokens, width, **on_device),
        pooled_prompt_embeds=torch.zeros(1, pooled_width, **on_device),
        width=request.size[0],
        height=request.size[1],
        num_inference_steps=request.steps,
        callback_on_step_end=tick,
        output_type="np",
    )
    steps_s = [after - before for before, after in pairwise(step_ends)]
    return {
        "step_s": round(statistics.median(steps_s), 4),
        "peak_bytes": hardware.peak_memory(device)["vram_bytes"],
    }


def import_pipeline() -> dict:
    """Import diffusers whole, before the engine imports it without accelerate, which its pipelines
    offload with.
    """
    from diffusers import FluxPipeline

    return {"imported": FluxPipeline.__name__}


def make_pipeline(checkpoint: Checkpoint, device: str, *, way: str) -> "FluxPipeline":
    """FluxPipeline of random weights without text encoders, placed in one of diffusers' ways."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        FluxPipeline,
        FluxTransformer2DModel,
    )

    configs = {name: dict(part.config) for name, part in checkpoint.components.items()}
    with torch.device("meta"):  # to draw 12 billion numbers takes minutes
        transformer = FluxTransformer2DModel.from_config(configs["transformer"])
        vae = AutoencoderKL.from_config(configs["vae"])
    weights_bytes = sum(parameter.numel() for parameter in transformer.parameters()) * 2
    if way == "group offload" and psutil.virtual_memory().available < 3 * weights_bytes:
        # Where the RAM ends the system ends the process, not the row. torch's pinned allocator
        # rounds each weight up to a power of 2, beside those that are there.
        raise MemoryError(f"pinned groups may take {3 * weights_bytes / GIB:.0f} GiB of RAM")
    for model in (transformer, vae):
        model.to(torch.bfloat16).to_empty(device=device if way == "resident" else "cpu")
        fill(model)
    shifting = checkpoint.scheduler | {"use_dynamic_shifting": True}
    pipe = FluxPipeline(
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler.from_config(shifting),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
    )
    pipe.set_progress_bar_config(disable=True)
    if way == "model offload":
        pipe.enable_model_cpu_offload(device=device)
    elif way == "group offload":
        transformer.enable_group_offload(
            onload_device=torch.device(device),
            offload_type="block_level",
            num_blocks_per_group=1,
            use_stream=True,
        )
        vae.to(device)
    return pipe


@torch.no_grad()
def fill(model: torch.nn.Module) -> None:
    """Fill a model's parameters with the same random numbers, as many as each has."""
    parameters = list(model.parameters())
    numel = max(parameter.numel() for parameter in parameters)
    noise = torch.empty(numel, dtype=torch.bfloat16, device=parameters[0].device).normal_(0, 0.02)
    for parameter in parameters:
        parameter.copy_(noise[: parameter.numel()].view_as(parameter))


def measure_row(card: Hardware, *, shrunk: bool = False) -> str:
    """The card's row of the table of cards: what is reached, when and with which driver.

    TFLOP/s of products, GB/s of its memory, and of copies from pinned memory and from other memory.
    The products are in 16 bit and in 8, and those of a block at 1024x1024: 4608 tokens by a (12288,
    3072) weight. What layers do beside them is counted, and no part of these figures.
    """
    dtype = torch.bfloat16 if card.bf16 else torch.float16
    rows, columns, warm_s = (32, 64, 0.0) if shrunk else (4608, 3072, 1.0)
    copied_bytes = 1 << 20 if shrunk else 1 << 30
    figures = measure_products(card.device, dtype, rows=rows, columns=columns, warm_s=warm_s)
    pageable = torch.randint(256, (copied_bytes,), dtype=torch.uint8)
    pinned = pageable.pin_memory()
    target = torch.empty_like(pageable, device=card.device)
    other = torch.empty_like(target)
    copy_s = seconds_of(lambda: other.copy_(target), card.device, warm_s=warm_s)
    figures["memory"] = 2 * target.numel() / copy_s / 1e9  # read and written
    copy_s = seconds_of(lambda: target.copy_(pinned, non_blocking=True), card.device, warm_s=warm_s)
    figures["bus"] = target.numel() / copy_s / 1e9
    copy_s = seconds_of(lambda: target.copy_(pageable), card.device, warm_s=warm_s)
    figures["pageable"] = target.numel() / copy_s / 1e9
    fields = [f"{name} = {figure:.1f}" for name, figure in figures.items()]
    fields += [f'date = "{datetime.date.today()}"', f'driver = "{find_driver()}"']
    return f'"{card.name}" = {{ {", ".join(fields)} }}'


def find_driver() -> str:
    """The driver's version; "unknown" where nvidia-smi does not say it."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return said[0] if said else "unknown"


def measure_products(
    device: str, dtype: torch.dtype, *, rows: int, columns: int, warm_s: float = 1.0
) -> dict[str, float]:
    """TFLOP/s of products of random matrices in 16 bit, and in 8 where the device has them.

    Not of ones: a card that switches fewer bits draws less power, and clocks higher.
    """
    inputs = torch.randn(rows, columns, dtype=dtype, device=device)
    weight = torch.randn(4 * columns, columns, dtype=dtype, device=device)
    products: dict[str, Callable[[], object]] = {"wide": lambda: inputs @ weight.T}
    if linear.find_multiply("fp8", device) != DEQUANTIZE:
        layer = linear.FP8Linear(
            [{"": weight.to(torch.float8_e4m3fn), "_scale": weight[:, 0].float()}],
            [tuple(weight.shape)],
            bias=None,
            arithmetic=True,
        )
        scale = inputs[:, :1].float().contiguous()
        values = inputs.to(torch.float8_e4m3fn)
        products["fp8"] = lambda: layer.multiply(values, scale, torch.bfloat16)
    if linear.find_multiply("int8", device) != DEQUANTIZE:
        codes = inputs.mul(40).char(), weight.mul(40).char()
        products["int8"] = lambda: torch._int_mm(codes[0], codes[1].T)
    flop = 2 * rows * weight.numel()
    return {
        name: flop / seconds_of(run, device, warm_s=warm_s) / 1e12 for name, run in products.items()
    }


def seconds_of(run: Callable[[], object], device: str, *, warm_s: float = 1.0) -> float:
    """The median seconds of twenty calls, after as many as it takes to clock the card up."""
    run()
    hardware.synchronize(device)
    began = time.perf_counter()
    while time.perf_counter() - began < warm_s:
        run()
        hardware.synchronize(device)
    taken = []
    for _ in range(20):
        started = time.perf_counter()
        run()
        hardware.synchronize(device)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def main(words: Sequence[str] | None = None) -> int:
    """Read the command line, run, print; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cards",
        description="measured against planned, for cards that a large one stands for",
    )
    parser.add_argument("--caps", help="GiB, default 8,12; with --shrunk MiB, 512")
    parser.add_argument("--sizes", help="default 1024x1024; with --shrunk 64x64")
    parser.add_argument("--steps", type=int, default=3, help="at least 2, default 3")
    parser.add_argument("--shrunk", action="store_true", help="the bundled model, in seconds")
    parser.add_argument("--row", action="store_true", help="only measure this card's row")
    parser.add_argument(
        "--out",
        type=Path,
        help="gets a JSON line as each row comes; default: a file of benchmarks/results",
    )
    given = parser.parse_args(words)
    if given.steps < 2:
        parser.error("--steps: the first step is not timed, so there must be two")
    try:
        here = hardware.probe("cuda")
    except FluxError as error:
        print(f"benchmarks.cards: {error}", file=sys.stderr)
        return int(error.exit_code)
    if given.row:
        print(measure_row(here, shrunk=given.shrunk))
        return 0
    out = given.out
    if out is None and not given.shrunk:
        out = name_results(here.name)
        print(f"rows go to {out}", file=sys.stderr)
    found: dict[str, list[dict]] = {"questions": [], "placements": [], "diffusers": []}
    code = 0
    try:
        for kind, row in measure_all(here, given):
            found[kind].append(row)
            append(out, row)
    except KeyboardInterrupt:
        code = INTERRUPTED
    card = {"card": here.name, "torch": torch.__version__, "shrunk": given.shrunk}
    print(json.dumps(card | found))
    return code


def measure_all(here: Hardware, given: argparse.Namespace) -> Iterator[tuple[str, dict]]:
    """Every row as it comes, with its kind: of "questions", "placements" or "diffusers"."""
    attempt(import_pipeline)
    shrunk = given.shrunk
    unit_bytes = 2**20 if shrunk else GIB
    caps = [int(cap) for cap in (given.caps or ("512" if shrunk else "8,12")).split(",")]
    sizes = (given.sizes or ("64x64" if shrunk else "1024x1024")).split(",")
    orders = {size: make_order(size, steps=given.steps, shrunk=shrunk) for size in sizes}
    for answer in ask(here.device, shrunk=shrunk):
        print(json.dumps(answer), flush=True)
        yield "questions", answer

    checkpoint = inspect(TINY) if shrunk else read_known_shapes(DEV)
    folders = [*(pretend_baked(checkpoint, spec) for spec in SPECS), checkpoint]
    constants = shrunk_constants() if shrunk else contextlib.nullcontext()
    text_tokens = orders[sizes[0]].request.text_tokens
    with constants, random_weights(checkpoint, text_tokens=text_tokens):
        for size, order in orders.items():
            for cap in caps:
                total_bytes = min(cap * unit_bytes, here.total_bytes)
                free_bytes = min(total_bytes, here.free_bytes)
                machine = replace(here, total_bytes=total_bytes, free_bytes=free_bytes)
                for row in try_placements(folders, machine, order=order):
                    show(size, cap, row=row, unit_bytes=unit_bytes)
                    yield "placements", {"cap": cap, "size": size, **row}
    for size, order in orders.items():
        for row in time_diffusers(checkpoint, here.device, order=order):
            show_peer(size, row)
            yield "diffusers", {"size": size, **row}


def name_results(card: str) -> Path:
    """The file for this card's rows of today."""
    name = re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")
    return RESULTS / f"{datetime.date.today()}-cards-{name}.jsonl"


def append(out: Path | None, row: dict) -> None:
    """Add a row to the file, so that it is there whatever becomes of the rest."""
    if out:
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def make_order(size: str, *, steps: int, shrunk: bool) -> Order:
    """A picture of a size as WIDTHxHEIGHT."""
    width, height = map(int, size.split("x"))
    settings = {"steps": steps, "width": width, "height": height, "seed": 1}
    if shrunk:
        settings |= {"text_tokens": 24, "model": "bundled/tiny"}
    return Order.from_settings("x", settings)


def show(size: str, cap: int, *, row: dict, unit_bytes: int) -> None:
    """One line of the table: the phase that needs most, planned and measured."""
    said = f"cap {cap:<3} {size:<10} {row['precision']:<5} {row['inputs']:<10}"
    if "error" in row:
        print(f"{said} {row['offload']:<12} {row['error']}", flush=True)
        return
    phase = max(row["measured_bytes"], key=row["measured_bytes"].__getitem__)
    plan = row["plan_bytes"][phase] / unit_bytes
    measured = row["measured_bytes"][phase] / unit_bytes
    bound_s = max(row["planned_step_s"], row["bus_s"])
    kept = "" if row["went_on_as_planned"] else "  not as planned"
    print(
        f"{said} {row['placed']:<12}"
        f" {phase:<9} plan {plan:6.2f} measured {measured:6.2f} ({measured / plan:.2f})"
        f"  {row['step_s']:.3f} s/step, bound {bound_s:.3f}{kept}",
        flush=True,
    )


def show_peer(size: str, row: dict) -> None:
    """One line of the table: one of diffusers' ways."""
    said = row.get("error", "")
    if not said:
        said = f"{row['peak_bytes'] / GIB:7.2f} GiB  {row['step_s']:.3f} s/step"
    print(f"{size:<18} {row['way']:<24} {said}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
