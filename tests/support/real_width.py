"""Every dialect at FLUX.1's real width, with one block of each kind.

python -m tests.support.real_width [DIALECT ...]

Random weights under the published BFL names are written in each dialect, read back by the dialect's
own library and renamed by diffusers' own converters: what we read of the same file must be equal.
Also the published VAE, by diffusers' LDM converter. Takes minutes, 6 GB of memory and 3 GB of disk,
and is not a part of the suite. Exits with 1 if any value differs.
"""

import argparse
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from diffusers.loaders.single_file_utils import (
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_ldm_vae_checkpoint,
)
from safetensors.torch import save_file

from fluxcli.engine.loader import read_tensors
from fluxcli.models.shapes import read_known_shapes
from quant.checkpoint import Component
from quant.expected import count_matching
from quant.single_file import inspect_file
from tests import published
from tests.support.exports import DIALECTS, Tensors

WIDTH = 3072
CHANNELS = 64  # of dev
COUNT = 15_485_863  # different random values


def random_tensors(name: str, dtype: torch.dtype, *, channels: int = CHANNELS) -> Tensors:
    """Tensors of a published list with random values; of the transformer one block of each kind.

    Parts of one random row of a prime length: no two rows are the same, and it takes no time.
    """
    found, at = {}, 0
    source = (
        torch.randn(COUNT, generator=torch.Generator().manual_seed(0))
        .mul_(0.02)
        .to(dtype)
        .repeat(2)
    )
    shapes = {full: shape for full, (_, shape) in published.tensors(name).items()}
    if channels != CHANNELS:
        shapes["img_in.weight"] = (WIDTH, channels)
    for full, shape in shapes.items():
        if not re.match(r"(double|single)_blocks\.(?!0\.)", full):
            size = torch.Size(shape).numel()
            row = source[at : at + COUNT]
            found[full] = (
                (row.repeat(-(-size // COUNT)) if size > COUNT else row)[:size].clone().view(shape)
            )
            at = (at + size) % COUNT
    return found


def difference(part: Component, expected: Tensors) -> float:
    """The largest difference of any value, infinite where names or shapes are not the same."""
    if {name: weight.shape for name, weight in part.weights.items()} != {
        n: tuple(t.shape) for n, t in expected.items()
    }:
        return float("inf")
    there, needed = count_matching(part.name, config=part.config, weights=part.weights)
    largest = 0.0 if there == needed else float("inf")
    for name, values in expected.items():
        found = read_tensors(part, [name], dtype=torch.float32, device="cpu")[name]
        if not torch.equal(found, values.float()):
            largest = max(largest, float((found - values.float()).abs().max()))
    return largest


def transformer(dialect: str, folder: Path, channels: int = CHANNELS) -> tuple[int, float]:
    """(tensors, the largest difference) of a transformer with one block of each kind."""
    export, suffix, called = DIALECTS[dialect]
    path = folder / f"x.{suffix}"
    values = export(random_tensors("bfl_dev", torch.bfloat16, channels=channels), path)
    expected = convert_flux_transformer_checkpoint_to_diffusers(values)
    part = inspect_file(path)["transformer"]
    config = part.config
    found = (config["num_attention_heads"] * config["attention_head_dim"], config["in_channels"])
    whole = part.dialect == called and found == (WIDTH, channels) and config["guidance_embeds"]
    whole = whole and (config["num_layers"], config["num_single_layers"]) == (1, 1)
    return len(expected), difference(part, expected) if whole else float("inf")


def vae(folder: Path) -> tuple[int, float]:
    """The same of the whole VAE."""
    tensors = random_tensors("ae", torch.float32)
    config = read_known_shapes("black-forest-labs/FLUX.1-dev")
    config = config.components["vae"].config
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "x.safetensors"
    )
    expected = convert_ldm_vae_checkpoint(tensors, config)
    return len(expected), difference(
        replace(inspect_file(folder / "x.safetensors")["vae"], config=config), expected
    )


def rows(dialects: list[str], root: Path | None) -> Iterator[tuple[str, int, float, float]]:
    """(dialect, tensors, largest difference, seconds) one by one."""
    for dialect in dialects:
        began = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=root) as folder:
            found = vae(Path(folder)) if dialect == "vae" else transformer(dialect, Path(folder))
        yield dialect, *found, time.perf_counter() - began


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.support.real_width", description=__doc__.partition("\n")[0]
    )
    parser.add_argument(
        "dialects", nargs="*", metavar="DIALECT", help=f"of {', '.join(DIALECTS)}, vae; all if none"
    )
    parser.add_argument("--folder", type=Path, help="where to write; a temporary one by default")
    options = parser.parse_args(arguments)
    print(f"{'dialect':<18} {'tensors':>7} {'max difference':>14} {'seconds':>8}")
    worst = 0.0
    for dialect, tensors, largest, seconds in rows(
        options.dialects or [*DIALECTS, "vae"], options.folder
    ):
        print(f"{dialect:<18} {tensors:>7} {largest:>14g} {seconds:>8.1f}", flush=True)
        worst = max(worst, largest)
    return 1 if worst else 0


if __name__ == "__main__":
    sys.exit(main())
