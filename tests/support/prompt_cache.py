"""Prompt embeddings that tests write to the cache, good ones and forged ones."""

import os
import signal
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from safetensors.torch import save

from fluxcli.engine import prompt_cache as embeddings
from fluxcli.engine.prompt_cache import Embeddings, key_of

DTYPES = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
KEY, OTHER = key_of(text="a fox"), key_of(text="a hare")
posix = pytest.mark.skipif(os.name == "nt", reason="POSIX")
patient = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


def made(
    seed: int = 0, tokens: int = 4, dtype: torch.dtype = torch.bfloat16, lost: str = ""
) -> Embeddings:
    """Embeddings of any bits at all, NaN among them."""
    draw = torch.Generator().manual_seed(seed)
    shapes = ((1, 8), (1, tokens, 8))
    pooled, sequence = (
        torch.randint(-(2**15), 2**15, shape, dtype=DTYPES[dtype], generator=draw).view(dtype)
        for shape in shapes
    )
    return Embeddings(pooled, sequence, lost)


def bits(found: Embeddings | None) -> tuple | None:
    """What can be compared, NaN and all."""
    if found is None:
        return None
    pair = (found.pooled, found.sequence)
    return tuple((each.dtype, each.view(DTYPES[each.dtype]).tolist()) for each in pair), found.lost


def path_of(key: str = KEY) -> Path:
    return embeddings.folder() / f"{key}.safetensors"


def forged(key: str, found: Embeddings, **more: torch.Tensor) -> bytes:
    """A file as `write` makes it, of things that it would refuse."""
    tensors = {"pooled": found.pooled, "sequence": found.sequence, **more}
    return save(tensors, {embeddings.DESCRIPTION: embeddings._describe(key, found)})


def in_a_child(work: Callable[[], None]) -> int:
    """Fork a process that does this work: its id; it exits 0, or 1 and says why."""
    if pid := os.fork():
        return pid
    code = 1
    signal.alarm(60)
    try:
        work()
        code = 0
    except BaseException:  # noqa: BLE001 - nothing else would show it
        traceback.print_exc()
    finally:
        os._exit(code)
