"""Fault rows of files in unexpected places: each file as a FIFO, a device, a sparse file."""

import functools
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

from tests.faults.case import TINY, Case, fault
from tests.faults.rows_processes import run_shell

HUGE_BYTES = 1 << 40  # of a sparse file: it takes no room


def make_sparse(path: Path) -> None:
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        file.truncate(HUGE_BYTES)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))


def draw_with_sparse(case: Case, file: str) -> None:
    model = case.model()
    make_sparse(model / file)
    case.draw("-m", model)


for file in (
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "tokenizer/merges.txt",
    "tokenizer/vocab.json",
    "tokenizer_2/spiece.model",
    "tokenizer_2/tokenizer.json",
    "transformer/diffusion_pytorch_model.safetensors",
):
    fault(f"sparse-{file.replace('/', '-')}", f"{file} is a sparse file of 1 TB", codes=[4])(
        functools.partial(draw_with_sparse, file=file)
    )


def draw_over(case: Case, make: Callable[[Path], object]) -> None:
    make(case.folder / "x.png")
    case.draw("--force", "-o", "x.png")


for name, make in {
    "fifo": os.mkfifo,
    "socket": make_socket,
    "device": lambda path: path.symlink_to("/dev/null"),
}.items():
    fault(f"force-{name}", f"--force -o of a {name}", codes=[6], says="no regular file")(
        functools.partial(draw_over, make=make)
    )


def read_picture(case: Case, command: str) -> None:
    os.mkfifo(case.folder / "x.png")
    case.flux(command, "x.png")


for command in ("inspect", "replay"):
    fault(f"picture-fifo-{command}", f"flux {command} of a FIFO", codes=[4], says="regular")(
        functools.partial(read_picture, command=command)
    )


@fault("rows-memory", "--from a device that gives errors", codes=[2], says="check")
def rows_memory(case: Case) -> None:
    case.flux("generate", "-p", "tiny", "--from", "/proc/self/mem")


@fault("tokenizer-many-extra-ids", "T5's tokenizer asks for 10^30 tokens", codes=[4], says="extra")
def tokenizer_many_extra_ids(case: Case) -> None:
    model = case.model()
    path = model / "tokenizer_2/tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"extra_ids": 10**30}))
    case.draw("-m", model)


@fault("inspect-stdout-closed", "flux inspect MODEL >&-", codes=[6], says="it is closed")
def inspect_stdout_closed(case: Case) -> None:
    run_shell(case, f"inspect {TINY} >&-")


@fault("draw-stdout-closed", "a picture whose path cannot be printed", codes=[6], exhaustive=True)
def draw_stdout_closed(case: Case) -> None:
    run_shell(case, "DRAW -o x.png >&-")
    if not (case.folder / "x.png").exists():
        case.problems.append("the picture is not there")
