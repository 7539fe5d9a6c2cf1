"""What one denoising step of the full-size model launches, moves and waits for on a card that is
not there.

    python -m tests.support.steps [--operators] [ROW ...]

The real engine computes on FakeTensors that say "cuda:0", and every operator that torch dispatches
is counted in the second step of a picture of 1024x1024 with 512 text tokens, where what the first
one keeps is there. The rules:

- An operator that makes no view is one launch. It reads its inputs and writes its outputs once; one
  in place, `copy_` too, reads and writes its first argument. An expanded tensor counts in full.
- `rms_norm` is one launch, after a copy of an input that is not contiguous, and attention is the
  flash kernel, as in a torch that has CUDA; this one would take both apart.
- A copy between the host and the card is no launch; it is counted by itself. It is a
  synchronization unless it goes to the card and is `non_blocking`; `.item()` is one, too.

The model is cut down to a few blocks. What a step does is linear in their numbers, so that three
depths tell what 19 double and 38 single blocks do.
"""

import argparse
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from benchmarks.counting import pretend_baked
from fluxcli.engine import classes, condition, denoise
from fluxcli.engine.blocks import CHOSEN, KERNEL_DTYPES
from fluxcli.engine.engine import Engine
from fluxcli.engine.picture import InputLatents, Picture
from fluxcli.engine.prompt_cache import Embeddings
from fluxcli.events import Step
from fluxcli.models.parts import Control, Parts
from fluxcli.models.shapes import read_known_controlnet
from fluxcli.plan import costs
from fluxcli.plan.placement import Placement
from quant import kernels, linear
from quant.checkpoint import Checkpoint, Component
from quant.spec import ROTATED, QuantSpec
from quant.tensor_info import GGUF_BITS
from tests.support.allocator import Allocator
from tests.support.helpers import machine, order, plan_for
from tests.support.simulate import blocked, full_size
from tests.support.simulate_cuda import CUDA_CARD, PRODUCTS, pretend_cuda

ROOT = Path(__file__).resolve().parents[2]
TOTAL_BYTES = 80 << 30  # of the card
IMAGE_TOKENS = 4096  # of 1024x1024
UNION_PRO_2 = "Shakker-Labs/FLUX.1-dev-ControlNet-Union-Pro-2.0"

BAKES = {"nf4": QuantSpec("nf4", "nf4"), "fp8": QuantSpec("fp8")}
BAKES |= {scheme: QuantSpec(scheme) for scheme in ROTATED}
ATTENTION = ("_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention")
# Operators whose bytes are those of products and attention. A product with a rotation is not among
# them: it waits for memory.
# What passes there are inside of a kernel's product nobody knows.
COMPUTING = frozenset((*PRODUCTS, "int8_linear", "packed_linear", *ATTENTION)) - {"bmm"}
KERNELS = f"{kernels.PREFIX}cuda"  # how a card multiplies that can use comfy-kitchen's
# What is neither a view by its schema nor a launch.
NO_LAUNCH = frozenset(
    [
        "empty",
        "empty_like",
        "empty_strided",
        "new_empty",
        "new_empty_strided",
        "_unsafe_view",
        "lift_fresh",
        "sym_size",
    ]
)


class Depth(NamedTuple):
    """How many blocks of each kind a transformer has."""

    double: int
    single: int


FLUX1 = Depth(19, 38)


@dataclass(frozen=True)
class Row:
    """One way to store and to place the transformer."""

    precision: str
    gguf: str = ""  # the kind of the blocks, where it is read from GGUF, nvfp4 or mxfp8
    multiply: str = ""  # how the card multiplies in 8 bit, where not in the best way
    streamed: bool = False  # all of its blocks

    @property
    def shallow(self) -> Depth:
        """The least depth from which its counts are linear: two blocks stay in their two slots."""
        return Depth(2, 2) if self.streamed else Depth(1, 1)


ROWS = {
    "bf16": Row("bf16"),
    "bf16-streamed": Row("bf16", streamed=True),
    "fp16": Row("fp16"),
    "nf4": Row("nf4"),
    "fp8": Row("fp8"),
    "fp8-per-tensor": Row("fp8", multiply=linear.PER_TENSOR),
    "fp8-unpacked": Row("fp8", multiply=linear.DEQUANTIZE),
    **{scheme: Row(scheme) for scheme in ROTATED},
    **{f"{scheme}-unpacked": Row(scheme, multiply=linear.DEQUANTIZE) for scheme in ROTATED},
    **{f"{scheme}-kernels": Row(scheme, multiply=KERNELS) for scheme in ROTATED},
    **{f"gguf-{kind}": Row("auto", gguf=kind) for kind in GGUF_BITS},
    "nvfp4": Row("auto", gguf="nvfp4"),
    "mxfp8": Row("auto", gguf="mxfp8"),
}


@dataclass
class Counts:
    """What was counted, by operator; copies are those between the host and the card."""

    launches: Counter[str] = field(default_factory=Counter)
    moved_bytes: Counter[str] = field(default_factory=Counter)
    copies: Counter[str] = field(default_factory=Counter)
    copied_bytes: Counter[str] = field(default_factory=Counter)
    syncs: Counter[str] = field(default_factory=Counter)  # by operator and line of the project

    def __add__(self, other: "Counts") -> "Counts":
        sums = []
        for mine, its in zip(self._all(), other._all(), strict=True):
            both = {name: mine[name] + its[name] for name in mine | its}
            sums.append(Counter({name: count for name, count in both.items() if count}))
        return Counts(*sums)

    def __sub__(self, other: "Counts") -> "Counts":
        return self + other * -1

    def __mul__(self, times: int) -> "Counts":
        scaled = [
            Counter({name: count * times for name, count in counter.items()})
            for counter in self._all()
        ]
        return Counts(*scaled)

    def _all(self) -> tuple[Counter[str], ...]:
        return self.launches, self.moved_bytes, self.copies, self.copied_bytes, self.syncs

    @property
    def product_bytes(self) -> int:
        """Bytes that products and attention move."""
        return sum(self.moved_bytes[name] for name in COMPUTING)

    @property
    def other_bytes(self) -> int:
        """Bytes that everything else moves."""
        return self.moved_bytes.total() - self.product_bytes


@dataclass(frozen=True)
class StepCounts:
    """What a step does in one double block, in one single block, and outside of the blocks."""

    double: Counts
    single: Counts
    beside: Counts

    def extrapolate(self, depth: Depth) -> Counts:
        """What a step does in a model of so many blocks."""
        return self.beside + self.double * depth.double + self.single * depth.single


class StepCounter(TorchDispatchMode):
    """Counts while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self._counts = Counts()

    def take(self) -> Counts:
        """What was counted since the last call."""
        found = self._counts
        self._counts = Counts()
        return found

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        library, _, name = function._schema.name.partition("::")
        if library != "prim" and not function.is_view and name not in NO_LAUNCH:
            is_async = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
            self._count(name, _tensors((args, kwargs)), _tensors(result), is_async=bool(is_async))
        return result

    def _count(
        self, name: str, given: list[torch.Tensor], made: list[torch.Tensor], *, is_async: bool
    ) -> None:
        counts = self._counts
        given_here = [tensor for tensor in given if tensor.is_cuda]
        new_here = [
            tensor
            for tensor in made
            if tensor.is_cuda and not any(tensor is each for each in given)
        ]
        if not given_here and not new_here:
            return
        if name in ("_to_copy", "copy_"):
            target, source = (made[0], given[-1])
            if target.device != source.device:
                counts.copies[name] += 1
                counts.copied_bytes[name] += source.nbytes
                if not (target.is_cuda and is_async):
                    counts.syncs[f"{name} to {target.device.type} at {_find_place()}"] += 1
                return
        elif name == "_local_scalar_dense":
            counts.syncs[f"item at {_find_place()}"] += 1
            return
        size_bytes = sum(_nbytes(tensor) for tensor in given_here + new_here)
        if name.endswith("_"):
            size_bytes += _nbytes(given_here[0])
        counts.launches[name] += 1
        counts.moved_bytes[name] += size_bytes


def _tensors(tree: object) -> list[torch.Tensor]:
    leaves, _ = tree_flatten(tree)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _find_place() -> str:
    """The innermost line of the project on the stack."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in ("fluxcli", "quant"):
            return f"{path.relative_to(ROOT)}:{frame.lineno}: {frame.line}"
    return "?"


def cut_depth(checkpoint: Checkpoint, depth: Depth) -> Checkpoint:
    """The same model with fewer blocks of each kind."""
    cut = cut_blocks(checkpoint.components["transformer"], depth)
    return replace(checkpoint, components=checkpoint.components | {cut.name: cut})


def cut_blocks(part: Component, depth: Depth) -> Component:
    """The same transformer or ControlNet with fewer blocks of each kind."""
    config = part.config | {"num_layers": depth.double, "num_single_layers": depth.single}
    counts = {"transformer_blocks": depth.double, "single_transformer_blocks": depth.single}
    counts |= {"controlnet_blocks": depth.double, "controlnet_single_blocks": depth.single}
    kept = {}
    for name, weight in part.weights.items():
        kind, _, rest = name.partition(".")
        if kind not in counts or int(rest.partition(".")[0]) < counts[kind]:
            kept[name] = weight
    return replace(part, config=config, weights=kept)


def count_step(row: Row, depth: Depth, *, network: Depth | None = None) -> Counts:
    """What the second step of a picture does in a model of that depth.

    With `network` a ControlNet of that depth acts: Union-Pro-2.0, which has double blocks alone.
    """
    # Their first import would be under the counter.
    for load in (classes.transformer, classes.single_block, classes.scheduler, classes.controlnet):
        load()
    with pytest.MonkeyPatch.context() as monkeypatch, full_size(monkeypatch) as dev:
        pretend_cuda(monkeypatch, Allocator(), TOTAL_BYTES)
        for scheme, ways in linear.WAYS.items():
            way = linear.Multiplication(row.multiply or ways[0])
            monkeypatch.setitem(linear.PROBED, (scheme, CUDA_CARD), way)
        backend = kernels.Choice(kernels.find_backend(row.multiply))
        for dtype in KERNEL_DTYPES:
            monkeypatch.setitem(CHOSEN, (CUDA_CARD, dtype), backend)
        checkpoint = cut_depth(dev, depth)
        if row.precision in BAKES:
            checkpoint = pretend_baked(checkpoint, BAKES[row.precision])
        if network:
            published = read_known_controlnet(UNION_PRO_2)
            assert published is not None
            part = cut_blocks(published, network)
            checkpoint = Parts({part.name: part}).add_to(checkpoint)
        if row.gguf:
            checkpoint = blocked(checkpoint, row.gguf)
        # A file of quantized weights has one precision.
        precision = "auto" if row.precision in BAKES else row.precision
        asked = order("x", steps=2, seed=1, image_size=1024, precision=precision)
        here = machine(80)
        _, plan = plan_for(asked, [checkpoint], here)
        if row.streamed:
            blocks = costs.block_names(checkpoint.components["transformer"])
            placed = Placement(denoise="streamed", streamed=tuple(range(len(blocks))))
            plan = replace(plan, placement=placed)
        engine = Engine(checkpoint, replace(plan, device=CUDA_CARD), here)
        picture = Picture(asked.request)
        if network:
            picture.controls = (Control("controlnet"),)
            latents = torch.zeros(1, IMAGE_TOKENS, 64)
            picture.latents = InputLatents(noise=latents, controls=(latents,))
        return _follow(engine, picture)


def _follow(engine: Engine, picture: Picture) -> Counts:
    """What the last step of the picture does, its embeddings given."""
    width = engine.checkpoint.components["transformer"].config["joint_attention_dim"]
    sequence = torch.zeros(1, picture.request.text_tokens, width)
    picture.embeddings = Embeddings(torch.zeros(1, 768), sequence)
    counter = StepCounter()
    with torch.no_grad(), counter:
        for _ in condition.run(engine.components, [picture]):
            pass
        found = Counts()
        for event in denoise.run(engine.components, [picture]):
            if isinstance(event, Step):
                found = counter.take()
    return found


def count_blocks(row: Row) -> StepCounts:
    """What a step does by kind of block, from three depths."""
    depth = row.shallow
    base = count_step(row, depth)
    double = count_step(row, depth._replace(double=depth.double + 1)) - base
    single = count_step(row, depth._replace(single=depth.single + 1)) - base
    beside = base - double * depth.double - single * depth.single
    return StepCounts(double, single, beside)


# --- the table


def describe_row(name: str, counts: StepCounts) -> str:
    """One line of the table."""
    step = counts.extrapolate(FLUX1)
    parts = [each.launches.total() for each in (counts.beside, counts.double, counts.single)]
    products = sum(step.launches[operator] for operator in COMPUTING)
    return (
        f"{name:<16} {step.launches.total():>8} {'{} + 19 x {} + 38 x {}'.format(*parts):>22}"
        f" {products:>8} {step.other_bytes / 1e9:>9.2f} {step.product_bytes / 1e9:>9.2f}"
        f" {step.syncs.total():>6} {step.copies.total():>7} {step.copied_bytes.total() / 1e9:>8.2f}"
    )


HEADER = (
    f"{'row':<16} {'launches':>8} {'beside, double, single':>22} {'products':>8}"
    f" {'GB beside':>9} {'GB in':>9} {'syncs':>6} {'copies':>7} {'GB':>8}"
)


def describe_operators(counts: Counts) -> Iterator[str]:
    """Lines of the operators that move most, and of every synchronization."""
    for name, moved_bytes in counts.moved_bytes.most_common(16):
        yield f"    {name:<36} {counts.launches[name]:>6} launches {moved_bytes / 1e9:>8.2f} GB"
    for place, count in counts.syncs.items():
        yield f"    {count} x {place}"


def main() -> None:
    """Read the command line, count, print."""
    parser = argparse.ArgumentParser(description="one step of the full-size model, counted")
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--operators", action="store_true", help="what moves most, and what waits")
    given = parser.parse_args()
    unknown = set(given.rows) - set(ROWS)
    if unknown:
        parser.error(f"no such row: {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    print(HEADER)
    for name in given.rows or ROWS:
        counts = count_blocks(ROWS[name])
        print(describe_row(name, counts), flush=True)
        if given.operators:
            print(*describe_operators(counts.extrapolate(FLUX1)), sep="\n", flush=True)


if __name__ == "__main__":
    main()
