"""Every rung on cards of 8, 12, 16 and 24 GiB: measured peaks against the plan, seconds a step against their bound.

    python -m benchmarks.cards [--caps 8,12,16,24] [--sizes 1024x1024,768x1344] [--steps 4] [--out FILE]
    python -m benchmarks.cards --shrunk
    python -m benchmarks.cards --row

With --row it prints the row of presets/shapes/cards.toml for this card, as measured now; that file says where it goes.
Needs a CUDA card of 80 GB or so, which each run caps by the allocator; the full-size weights are random and lie in one
host buffer, as mapped files would. diffusers' FluxPipeline runs beside it: resident, model- and group-offloaded. With
--shrunk it is the bundled model on the CPU as a simulated card, in seconds, so that this script is never broken: peaks
are counted, and budgets are MiB. A table for people, then one JSON line.
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
from unittest import mock

import torch

from benchmarks.counting import CARD, Counter, packed
from fluxcli.engine import decode, text
from fluxcli.engine import device as hardware
from fluxcli.engine.engine import Engine
from fluxcli.engine.picture import Picture
from fluxcli.events import Phase, Step
from fluxcli.models.shapes import read_known_shapes
from fluxcli.plan import costs, placement
from fluxcli.plan.machine import CONTEXT_BYTES, Hardware
from fluxcli.plan.placement import GIB, PHASES, Candidate
from fluxcli.plan.planner import survey
from fluxcli.request.fields import Order
from quant import linear
from quant.checkpoint import Checkpoint, inspect
from quant.codecs import Reader
from quant.spec import BAKEABLE, QuantSpec

TINY = Path(__file__).resolve().parent.parent / "presets" / "tiny"
DEV = "black-forest-labs/FLUX.1-dev"
DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "U8": torch.uint8, "I8": torch.int8}
DTYPES["F8_E4M3"] = torch.float8_e4m3fn


@contextlib.contextmanager
def random_model() -> Iterator[Checkpoint]:
    """The full-size model: every tensor is a view of one random host buffer, read without checks."""
    noise = torch.empty(140_000_000, dtype=torch.bfloat16).normal_(0, 0.02)
    pools = {torch.bfloat16: noise, torch.float8_e4m3fn: noise.to(torch.float8_e4m3fn)}
    pools |= {torch.uint8: noise.view(torch.uint8), torch.int8: noise.view(torch.int8)}

    def weight(_: Reader, found: object) -> dict[str, torch.Tensor]:
        tensors = {}
        for suffix, piece in found.pieces.items():
            dtype, shape = DTYPES[piece.info.dtype], piece.shape
            flat = pools[dtype][: piece.info.numel] if dtype in pools else torch.full([piece.info.numel], 1e-3)
            tensors[suffix] = flat.view(shape)
        return tensors

    tokens = text.TokenIds(
        torch.ones(1, 77, dtype=torch.long), torch.ones(1, 512, dtype=torch.long), ""
    )
    with (
        mock.patch.object(Reader, "weight", weight),
        mock.patch("quant.codecs.check_values", lambda *_: None),
        mock.patch.object(linear, "offset_of", lambda _: 0.0),
        mock.patch.object(decode, "is_finite", lambda _: True),
        mock.patch.object(text, "tokenize", lambda *_: tokens),
        mock.patch.object(Checkpoint, "fingerprint", "random"),
    ):
        yield read_known_shapes(DEV)


def run(engine: Engine, request: Order, counter: Counter | None) -> tuple[dict, list[float]]:
    """(peak bytes of each phase, seconds of each step but the first) of one picture."""
    peaks, seconds, phase, since = {}, [], "encode", 0.0

    def close() -> None:
        if counter is None:
            peaks[phase] = max(peaks.get(phase, 0), torch.cuda.max_memory_reserved() + CONTEXT_BYTES)
            torch.cuda.reset_peak_memory_stats()

    with torch.no_grad(), counter or contextlib.nullcontext():
        for event in engine.draw([Picture(request)]):
            if isinstance(event, Phase):
                close()
                loads = {"transformer": "denoise", "vae": "decode"}.get(event.detail, phase)
                phase = event.name if event.name in PHASES else loads
                if counter:
                    counter.phase = phase
            elif isinstance(event, Step):
                hardware.synchronize(engine.plan.device)
                now = time.perf_counter()
                seconds += [now - since] if event.index > 1 else []
                since = now
    close()
    return (counter.peaks if counter else peaks), seconds


def carry_out(candidate: Candidate, machine: Hardware, request: Order, *, shrunk: bool) -> dict:
    """One plan, carried out."""
    made = candidate.plan
    counter = Counter(budget=made.budget_bytes) if shrunk else None
    engine = Engine(candidate.checkpoint, replace(made, device=CARD) if shrunk else made, machine)
    peaks, seconds = run(engine, request, counter)
    compute = costs.block_seconds(candidate.cost, machine.speeds, candidate.scheme)
    copied = sum(candidate.cost.blocks[i].nbytes for i in made.placement.streamed)
    row = {
        "precision": made.precision, "placed": made.placement.level("denoise"), "encode": made.placement.encode,
        "decode": made.placement.decode, "went_on_as_planned": engine.plan.placement == made.placement,
        "plan_bytes": made.peak_bytes, "measured_bytes": {phase: peaks.get(phase, 0) for phase in PHASES},
        "step_s": round(statistics.median(seconds), 4), "planned_step_s": round(sum(compute), 4),
        "bus_s": round(copied / machine.speeds.bus_bytes, 4),
    }  # fmt: skip
    del engine
    gc.collect()
    hardware.empty_cache(CARD if shrunk else made.device)
    return row


def rungs(checkpoint: Checkpoint, machine: object, request: Order, *, shrunk: bool) -> Iterator[dict]:
    """Every precision that fits, as planned; and 16 bit with all blocks on the card, streamed, and from their files."""
    specs = [QuantSpec("nf4", "nf4"), QuantSpec("fp8"), QuantSpec("int8")]
    folders = [checkpoint] if shrunk else [*(packed(checkpoint, spec) for spec in specs), checkpoint]
    wide = "fp32" if shrunk else "bf16"
    wanted = [(to, "auto") for to in (wide, *BAKEABLE)] + [(wide, offload) for offload in ("stream", "sequential")]
    for precision, offload in wanted:
        asked = replace(request, resources=replace(request.resources, precision=precision, offload=offload))
        workload = costs.make_workload(asked.request)
        found = survey(workload, asked.resources, folders, machine)[0]
        if found.plan:
            yield carry_out(found, machine, asked, shrunk=shrunk) | {"offload": offload}


def diffusers_rows(machine: object, request: Order, *, shrunk: bool) -> Iterator[dict]:
    """diffusers' own pipeline from prepared embeddings: seconds a step, and the allocator's peak."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    checkpoint = inspect(TINY) if shrunk else read_known_shapes(DEV)
    configs = {name: dict(part.config) for name, part in checkpoint.components.items()}
    dtype = torch.float32 if shrunk else torch.bfloat16
    width = configs["transformer"].get("joint_attention_dim", 4096)
    embeddings = {
        "prompt_embeds": torch.zeros(1, request.request.text_tokens, width, dtype=dtype, device=machine.device),
        "pooled_prompt_embeds": torch.zeros(1, configs["transformer"]["pooled_projection_dim"], dtype=dtype,
                                            device=machine.device),
    }  # fmt: skip
    for way in ("resident",) if shrunk else ("resident", "model offload", "group offload"):
        with torch.device("cpu" if way != "resident" else machine.device):
            torch.set_default_dtype(dtype)
            transformer = FluxTransformer2DModel.from_config(configs["transformer"])
            vae = AutoencoderKL.from_config(configs["vae"])
            torch.set_default_dtype(torch.float32)
        parts = {"text_encoder": None, "text_encoder_2": None, "tokenizer": None, "tokenizer_2": None}
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(checkpoint.scheduler | {"use_dynamic_shifting": True})
        pipe = FluxPipeline(transformer=transformer, vae=vae, scheduler=scheduler, **parts)
        pipe.set_progress_bar_config(disable=True)
        if way == "model offload":
            pipe.enable_model_cpu_offload()
        elif way == "group offload":
            on = torch.device(machine.device)
            transformer.enable_group_offload(onload_device=on, offload_type="block_level", num_blocks_per_group=1,
                                             use_stream=True)  # fmt: skip
            vae.to(on)
        hardware.reset_peak(machine.device)
        times: list[float] = []

        def tick(*_: object, times: list[float] = times) -> dict:
            hardware.synchronize(machine.device)
            times.append(time.perf_counter())
            return {}

        pipe(**embeddings, width=request.request.size[0], height=request.request.size[1], num_inference_steps=request.request.steps,
             callback_on_step_end=tick, output_type="np")  # fmt: skip
        steps = [b - a for a, b in pairwise(times)]
        peak = hardware.peak_memory(machine.device).get("vram_bytes", 0)
        yield {"way": f"diffusers {way}", "step_s": round(statistics.median(steps), 4), "peak_bytes": peak}
        del pipe, transformer, vae
        gc.collect()
        hardware.empty_cache(machine.device)


def measure_row(card: Hardware) -> str:
    """The card's row of the table of cards: TFLOP/s of 16-bit and 8-bit products, GB/s of pinned copies, when and how.

    The products are those of a block at 1024x1024: 4608 tokens by a (12288, 3072) weight.
    """
    rows, columns = 4608, 3072
    dtype = torch.bfloat16 if card.bf16 else torch.float16
    inputs = torch.ones(rows, columns, dtype=dtype, device=card.device)
    weight = torch.ones(4 * columns, columns, dtype=dtype, device=card.device)
    flop = 2 * rows * weight.numel()
    figures = {"wide": flop / seconds_of(lambda: inputs @ weight.T, card.device) / 1e12}
    for scheme, stored in (("fp8", torch.float8_e4m3fn), ("int8", torch.int8)):
        if linear.find_multiply(scheme, card.device) != "dequantize":
            tensors = {"": weight.to(stored), "_scale": weight[:, 0].float()}
            layer = linear.make_linear(scheme, [tensors], shapes=[tuple(weight.shape)], bias=None, arithmetic=True)
            figures[scheme] = flop / seconds_of(lambda layer=layer: layer(inputs), card.device) / 1e12
    host = torch.empty(128 << 20, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(host, device=card.device, pin_memory=False)
    copy_s = seconds_of(lambda: target.copy_(host, non_blocking=True), card.device)
    figures["bus"] = host.numel() / copy_s / 1e9
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    fields = [f"{name} = {figure:.1f}" for name, figure in figures.items()]
    fields += [f'date = "{datetime.date.today()}"', f'driver = "{driver}"']
    return f'"{card.name}" = {{ {", ".join(fields)} }}'


def seconds_of(run: Callable[[], object], device: str) -> float:
    """The median seconds of five calls, after one that does not count."""
    run()
    taken = []
    for _ in range(5):
        hardware.synchronize(device)
        started = time.perf_counter()
        run()
        hardware.synchronize(device)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def main() -> None:
    """Reads the command line, runs, prints."""
    parser = argparse.ArgumentParser(description="measured against planned, for cards that a large one stands for")
    parser.add_argument("--caps", help="GiB, default 8,12,16,24; with --shrunk MiB, default 9,12,30")
    parser.add_argument("--sizes", help="default 1024x1024,768x1344; with --shrunk 64x64")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--shrunk", action="store_true")
    parser.add_argument("--row", action="store_true", help="only measure this card's row of the table of cards")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.row:
        print(measure_row(hardware.probe("cuda")))
        return
    shrunk = given.shrunk
    if shrunk:  # the tiny model: what is fixed for the real one would be all there is
        costs.DECODE_BYTES, placement.CONTEXT_BYTES, placement.RESIDENT_SHARE = 64 << 10, 0, 0.0
    given.caps = given.caps or ("9,12,30" if shrunk else "8,12,16,24")
    given.sizes = given.sizes or ("64x64" if shrunk else "1024x1024,768x1344")
    here = hardware.probe("cpu") if shrunk else hardware.probe("cuda")
    unit, rows, peers = 2**20 if shrunk else GIB, [], []
    with contextlib.nullcontext(inspect(TINY)) if shrunk else random_model() as checkpoint:
        for size in given.sizes.split(","):
            width, height = map(int, size.split("x"))
            tokens = {"text_tokens": 24, "model": "bundled/tiny"} if shrunk else {}
            request = Order.from_settings("x", dict(steps=given.steps, width=width, height=height, seed=1, **tokens))
            for cap in map(int, given.caps.split(",")):
                machine = replace(here, device="cuda:0", total_bytes=cap * unit, free_bytes=cap * unit)
                for row in rungs(checkpoint, machine, request, shrunk=shrunk):
                    rows.append({"cap": cap, "size": size, **row})
                    show(rows[-1], unit)
            hardware.cap(here.device, 1 << 50)  # diffusers has the whole card
            for peer in diffusers_rows(here, request, shrunk=shrunk):
                peers.append({"size": size, **peer})
                speed, peak = f"{peer['step_s']:.3f} s/step", f"{peer['peak_bytes'] / GIB:.2f} GiB"
                print(f"{size:<18} {peer['way']:<24} {peak:>10}  {speed}")
    name = platform.machine() if shrunk else here.name
    line = json.dumps({"card": name, "torch": torch.__version__, "shrunk": shrunk, "rungs": rows, "diffusers": peers})
    print(line)
    if given.out:
        given.out.write_text(line + "\n")


def show(row: dict, unit: int) -> None:
    """One line of the table: the phase that needs most, planned and measured."""
    phase = max(PHASES, key=row["measured_bytes"].__getitem__)
    plan, measured = row["plan_bytes"][phase] / unit, row["measured_bytes"][phase] / unit
    bound = max(row["planned_step_s"], row["bus_s"])
    kept = "" if row["went_on_as_planned"] else "  not as planned"
    print(
        f"cap {row['cap']:<3} {row['size']:<10} {row['precision']:<5} {row['placed']:<12} {phase:<9}"
        f" plan {plan:6.2f} measured {measured:6.2f} ({measured / plan:.2f})  {row['step_s']:.3f} s/step,"
        f" bound {bound:.3f}{kept}"
    )


if __name__ == "__main__":
    main()
