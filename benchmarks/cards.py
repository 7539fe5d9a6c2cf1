"""Every placement on cards of 8 and 12 GiB: measured peaks against the plan, seconds a step.

    python -m benchmarks.cards [--caps 8,12] [--sizes 1024x1024] [--steps 3] [--out FILE]
    python -m benchmarks.cards --shrunk
    python -m benchmarks.cards --row

Needs a CUDA card of 80 GB or so, which each run caps by the allocator; the full-size weights are
random and lie in one host buffer, as mapped files would. diffusers' FluxPipeline runs beside it:
resident, model- and group-offloaded. First `benchmarks.questions`, then our placements, then
diffusers; each answer and each row is a JSON line in --out as soon as it is there. A table for
people, then one JSON line.

The defaults are meant for 8 minutes. Reckoned, not measured: a minute of questions; 12 placements
of 10 to 24 GB that are copied at 4 GB/s, 3 steps of 0.3 to 2 s and compute beside them, 15 to 20 s
each, 4 minutes; three pipelines that fill 24 GB of weights and copy them, 3 minutes.

With --row it prints the row of presets/shapes/cards.toml for this card, as measured now; that file
says where it goes. With --shrunk it is the bundled model on the CPU as a simulated card, in
seconds, so that this script is never broken: peaks are counted, and budgets are MiB.
"""

import argparse
import contextlib
import datetime
import gc
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import torch

from benchmarks.counting import CARD, Counter, pretend_baked
from benchmarks.questions import ask
from fluxcli.engine import decode, text
from fluxcli.engine import device as hardware
from fluxcli.engine.engine import Engine
from fluxcli.engine.picture import Picture
from fluxcli.events import Phase, Step
from fluxcli.models.shapes import read_known_shapes
from fluxcli.plan import costs, placement
from fluxcli.plan.machine import CONTEXT_BYTES, DEQUANTIZE, Hardware
from fluxcli.plan.placement import GIB, PHASES, Candidate
from fluxcli.plan.planner import survey
from fluxcli.request.fields import Order
from quant import linear
from quant.checkpoint import Checkpoint, inspect
from quant.codecs import Reader
from quant.spec import BAKEABLE, QuantSpec
from quant.weights import Weight

if TYPE_CHECKING:
    from diffusers import FluxPipeline

TINY = Path(__file__).resolve().parent.parent / "presets" / "tiny"
DEV = "black-forest-labs/FLUX.1-dev"
DTYPES = {
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "I8": torch.int8,
    "U8": torch.uint8,
}
NOISE_NUMEL = 140_000_000  # more than any tensor has
LOADED_FOR = {"transformer": "denoise", "vae": "decode"}  # the phase that a component is loaded for


@contextlib.contextmanager
def random_model() -> Iterator[Checkpoint]:
    """The full-size model: every tensor is a view of one random host buffer."""
    noise = torch.empty(NOISE_NUMEL, dtype=torch.bfloat16).normal_(0, 0.02)
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
        torch.ones(1, 512, dtype=torch.long),
        lost="",
        unknown="",
    )
    with (
        mock.patch.object(Reader, "read", read),
        mock.patch("quant.codecs.check_values", lambda *_: None),
        mock.patch.object(linear, "read_offset", lambda _: 0.0),
        mock.patch.object(decode, "is_finite", lambda _: True),
        mock.patch.object(text, "tokenize", lambda *_: tokens),
        mock.patch.object(Checkpoint, "fingerprint", "random"),
        mock.patch.object(Checkpoint, "text_encoder_fingerprint", "random"),
    ):
        yield read_known_shapes(DEV)


class Run:
    """One picture: the peak bytes of each phase, and the seconds of each step but the first."""

    def __init__(self, engine: Engine, counter: Counter | None) -> None:
        """With a counter it counts live storages; without one it asks CUDA's allocator."""
        self.engine = engine
        self.counter = counter
        self.peaks: dict[str, int] = {}
        self.steps_s: list[float] = []
        self._phase = "encode"

    def draw(self, order: Order) -> None:
        step_ended = 0.0
        with torch.no_grad(), self.counter or contextlib.nullcontext():
            for event in self.engine.draw([Picture(order.request)]):
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
        if self.counter:
            self.peaks = self.counter.peaks

    def _begin_phase(self, event: Phase) -> None:
        if event.name in PHASES:
            self._phase = event.name
        else:  # loading is part of the phase that it is for
            self._phase = LOADED_FOR.get(event.detail, self._phase)
        if self.counter:
            self.counter.phase = self._phase

    def _end_phase(self) -> None:
        if self.counter:
            return
        reserved = torch.cuda.max_memory_reserved() + CONTEXT_BYTES
        self.peaks[self._phase] = max(self.peaks.get(self._phase, 0), reserved)
        torch.cuda.reset_peak_memory_stats()


def carry_out(candidate: Candidate, machine: Hardware, *, order: Order, shrunk: bool) -> dict:
    """One plan, carried out: a row of the table."""
    plan = candidate.plan
    counter = Counter(budget=plan.budget_bytes) if shrunk else None
    on_card = replace(plan, device=CARD) if shrunk else plan
    engine = Engine(candidate.checkpoint, on_card, machine)
    run = Run(engine, counter)
    run.draw(order)
    planned_s = sum(costs.block_seconds(candidate.cost, machine, machine.speeds))
    copied_bytes = sum(candidate.cost.blocks[i].nbytes for i in plan.placement.streamed)
    row = {
        "precision": plan.precision,
        "placed": plan.placement.level("denoise"),
        "encode": plan.placement.encode,
        "decode": plan.placement.decode,
        "went_on_as_planned": engine.plan.placement == plan.placement,
        "plan_bytes": plan.peak_bytes,
        "measured_bytes": {phase: run.peaks.get(phase, 0) for phase in PHASES},
        "step_s": round(statistics.median(run.steps_s), 4),
        "planned_step_s": round(planned_s, 4),
        "bus_s": round(copied_bytes / machine.speeds.bus_bytes, 4),
    }
    del engine, run
    gc.collect()
    hardware.empty_cache(on_card.device)
    return row


def try_placements(
    checkpoint: Checkpoint, machine: Hardware, *, order: Order, shrunk: bool
) -> Iterator[dict]:
    """Rows of every precision that fits, as planned, and of other placements of 16 bit.

    Those are with blocks that stream, and with blocks that come from their files.
    """
    folders = [checkpoint]
    if not shrunk:
        specs = (QuantSpec("nf4", "nf4"), QuantSpec("fp8"), QuantSpec("int8"))
        folders = [*(pretend_baked(checkpoint, spec) for spec in specs), checkpoint]
    wide = "fp32" if shrunk else "bf16"
    wanted = [(precision, "auto") for precision in (wide, *BAKEABLE)]
    wanted += [(wide, "stream"), (wide, "sequential")]
    for precision, offload in wanted:
        resources = replace(order.resources, precision=precision, offload=offload)
        asked = replace(order, resources=resources)
        best = survey(costs.make_workload(asked.request), resources, folders, machine)[0]
        if best.plan:
            row = carry_out(best, machine, order=asked, shrunk=shrunk)
            yield row | {"offload": offload}


def time_diffusers(machine: Hardware, *, order: Order, shrunk: bool) -> Iterator[dict]:
    """diffusers' own pipeline from prepared embeddings: seconds a step, the allocator's peak."""
    ways = ("resident",) if shrunk else ("resident", "model offload", "group offload")
    request = order.request
    checkpoint = inspect(TINY) if shrunk else read_known_shapes(DEV)
    config = checkpoint.components["transformer"].config
    dtype = torch.float32 if shrunk else torch.bfloat16
    on_device = {"dtype": dtype, "device": machine.device}
    width = config.get("joint_attention_dim", 4096)
    pooled_width = config["pooled_projection_dim"]
    for way in ways:
        pipe = make_pipeline(checkpoint, machine, way=way, dtype=dtype)
        step_ends: list[float] = []

        def tick(*_: object, step_ends: list[float] = step_ends) -> dict:
            hardware.synchronize(machine.device)
            step_ends.append(time.perf_counter())
            return {}

        hardware.reset_peak(machine.device)
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
        yield {
            "way": f"diffusers {way}",
            "step_s": round(statistics.median(steps_s), 4),
            "peak_bytes": hardware.peak_memory(machine.device).get("vram_bytes", 0),
        }
        del pipe
        gc.collect()
        hardware.empty_cache(machine.device)


def make_pipeline(
    checkpoint: Checkpoint, machine: Hardware, *, way: str, dtype: torch.dtype
) -> "FluxPipeline":
    """FluxPipeline of random weights without text encoders, placed in one of diffusers' ways."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        FluxPipeline,
        FluxTransformer2DModel,
    )

    configs = {name: dict(part.config) for name, part in checkpoint.components.items()}
    with torch.device(machine.device if way == "resident" else "cpu"):
        torch.set_default_dtype(dtype)
        transformer = FluxTransformer2DModel.from_config(configs["transformer"])
        vae = AutoencoderKL.from_config(configs["vae"])
        torch.set_default_dtype(torch.float32)
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
        pipe.enable_model_cpu_offload()
    elif way == "group offload":
        device = torch.device(machine.device)
        transformer.enable_group_offload(
            onload_device=device,
            offload_type="block_level",
            num_blocks_per_group=1,
            use_stream=True,
        )
        vae.to(device)
    return pipe


def measure_row(card: Hardware) -> str:
    """The card's row of the table of cards: what is reached, when and with which driver.

    TFLOP/s of products, GB/s of its memory, and of copies from pinned memory and from other memory.
    The products are in 16 bit and in 8, and those of a block at 1024x1024: 4608 tokens by a (12288,
    3072) weight. What layers do beside them is counted, and no part of these figures.
    """
    dtype = torch.bfloat16 if card.bf16 else torch.float16
    figures = measure_products(card.device, dtype, rows=4608, columns=3072)
    pageable = torch.randint(256, (1 << 30,), dtype=torch.uint8)
    pinned = pageable.pin_memory()
    target = torch.empty_like(pageable, device=card.device)
    other = torch.empty_like(target)
    copy_s = seconds_of(lambda: other.copy_(target), card.device)
    figures["memory"] = 2 * target.numel() / copy_s / 1e9  # read and written
    copy_s = seconds_of(lambda: target.copy_(pinned, non_blocking=True), card.device)
    figures["bus"] = target.numel() / copy_s / 1e9
    copy_s = seconds_of(lambda: target.copy_(pageable), card.device)
    figures["pageable"] = target.numel() / copy_s / 1e9
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    fields = [f"{name} = {figure:.1f}" for name, figure in figures.items()]
    fields += [f'date = "{datetime.date.today()}"', f'driver = "{driver}"']
    return f'"{card.name}" = {{ {", ".join(fields)} }}'


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


def main() -> None:
    """Read the command line, run, print."""
    parser = argparse.ArgumentParser(
        description="measured against planned, for cards that a large one stands for"
    )
    parser.add_argument("--caps", help="GiB, default 8,12; with --shrunk MiB, 9,12,30")
    parser.add_argument("--sizes", help="default 1024x1024; with --shrunk 64x64")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--shrunk", action="store_true")
    parser.add_argument("--row", action="store_true", help="only measure this card's row")
    parser.add_argument("--out", type=Path, help="gets a JSON line as each row comes")
    given = parser.parse_args()
    if given.row:
        print(measure_row(hardware.probe("cuda")))
        return
    shrunk = given.shrunk
    if shrunk:  # the tiny model: what is fixed for the real one would be all there is
        costs.DECODE_BYTES = 64 << 10
        placement.CONTEXT_BYTES = 0
        placement.RESIDENT_SHARE = 0.0
    caps = given.caps or ("9,12,30" if shrunk else "8,12")
    sizes = given.sizes or ("64x64" if shrunk else "1024x1024")
    unit_bytes = 2**20 if shrunk else GIB
    here = hardware.probe("cpu" if shrunk else "cuda")
    rows, peers = [], []
    for answer in ask(here.device, shrunk=shrunk):
        print(json.dumps(answer), flush=True)
        append(given.out, answer)
    with contextlib.nullcontext(inspect(TINY)) if shrunk else random_model() as checkpoint:
        for size in sizes.split(","):
            order = make_order(size, steps=given.steps, shrunk=shrunk)
            for cap in map(int, caps.split(",")):
                memory = {"total_bytes": cap * unit_bytes, "free_bytes": cap * unit_bytes}
                machine = replace(here, device="cuda:0", **memory)
                for row in try_placements(checkpoint, machine, order=order, shrunk=shrunk):
                    rows.append({"cap": cap, "size": size, **row})
                    show(rows[-1], unit_bytes)
                    append(given.out, rows[-1])
        hardware.cap(here.device, 1 << 50)  # diffusers has the whole card
        for size in sizes.split(","):
            order = make_order(size, steps=given.steps, shrunk=shrunk)
            for peer in time_diffusers(here, order=order, shrunk=shrunk):
                peers.append({"size": size, **peer})
                append(given.out, peers[-1])
                peak = f"{peer['peak_bytes'] / GIB:.2f} GiB"
                print(f"{size:<18} {peer['way']:<24} {peak:>10}  {peer['step_s']:.3f} s/step")
    result = {
        "card": platform.machine() if shrunk else here.name,
        "torch": torch.__version__,
        "shrunk": shrunk,
        "placements": rows,
        "diffusers": peers,
    }
    print(json.dumps(result))


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


def show(row: dict, unit_bytes: int) -> None:
    """One line of the table: the phase that needs most, planned and measured."""
    phase = max(PHASES, key=row["measured_bytes"].__getitem__)
    plan = row["plan_bytes"][phase] / unit_bytes
    measured = row["measured_bytes"][phase] / unit_bytes
    bound_s = max(row["planned_step_s"], row["bus_s"])
    kept = "" if row["went_on_as_planned"] else "  not as planned"
    print(
        f"cap {row['cap']:<3} {row['size']:<10} {row['precision']:<5} {row['placed']:<12}"
        f" {phase:<9} plan {plan:6.2f} measured {measured:6.2f} ({measured / plan:.2f})"
        f"  {row['step_s']:.3f} s/step, bound {bound_s:.3f}{kept}"
    )


if __name__ == "__main__":
    main()
