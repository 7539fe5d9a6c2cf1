"""comfy-kitchen's kernels: whether a device can use them, in which back end, and their calls.

The library is an extra: `pip install 'fluxcli[kernels]'`. Of its back ends `cuda` and `triton` are
used; `eager` is plain torch, of which the layers have their own. What a device may use is found
once, in this order: the library imports, its back end has the functions, the card is new enough for
them and the driver for the back end, and what they compute agrees with plain torch. Each kernel is
an operator of torch's here, so that compiled blocks and counters see one call. FLUX_KERNELS=off
does without them. Knows nothing of layers, files or models.
"""

import contextlib
import functools
import importlib
import importlib.util
import io
import logging
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quant.errors import SpecError
from quant.spec import KITCHEN

VARIABLE = "FLUX_KERNELS"
CHOICES = ("auto", "off")
PACKAGE = "comfy_kitchen"
INSTALL = "pip install 'fluxcli[kernels]'"
# The best first; an operator's last argument is one of them.
BACKENDS = ("cuda", "triton")
# What stands before a back end's name where plans, metadata and doctor say how a device multiplies.
PREFIX = f"{KITCHEN} "
# The driver that the library's CUDA back end is built for: its wheels are of CUDA 13.
LEAST_DRIVER = 13000
MAX_SAID = 100  # characters of what a library says


# What 4-bit codes stand for, as a tensor, by device and values.
CODEBOOKS: dict[tuple[str, tuple[float, ...]], Tensor] = {}


class Choice(NamedTuple):
    """The back end to use, "" for none, and why not a better one."""

    backend: str
    why: str = ""


class Library(NamedTuple):
    """comfy-kitchen's registry of back ends; None, and why, where it cannot be imported."""

    registry: Any
    why: str = ""


def is_off() -> bool:
    """Whether FLUX_KERNELS says that no kernels are used; raises `SpecError` for nonsense."""
    choice = os.environ.get(VARIABLE) or "auto"
    if choice not in CHOICES:
        why = f"{choice[:40]!r} is none of {', '.join(CHOICES)}"
        raise SpecError("wrong value", VARIABLE, why=why, hint=f"unset {VARIABLE}")
    return choice == "off"


def find_backend(multiply: str) -> str:
    """The back end in a name of how a device multiplies; "" where torch does it."""
    return multiply.removeprefix(PREFIX) if multiply.startswith(PREFIX) else ""


def choose(functions: Sequence[str], device: str, *, check: Callable[[str], str]) -> Choice:
    """The best back end that has all of these functions for a device, and computes them rightly.

    `check` computes them by a back end; it returns "", or what is wrong with the result. What it
    raises goes up: memory that ran out says nothing of kernels.
    """
    if torch.device(device).type != "cuda":
        return Choice("")
    if is_off():
        return Choice("", f"{VARIABLE} is off")
    library = load_library()
    if library.registry is None:
        return Choice("", library.why)
    faults: list[str] = []
    for backend in BACKENDS:
        fault = _find_fault(library.registry, backend, functions=functions, device=device)
        fault = fault or check(backend)
        if not fault:
            return Choice(backend, "; ".join(faults))
        faults.append(f"{PREFIX}{backend}: {fault}")
    return Choice("", "; ".join(faults))


@functools.cache
def load_library() -> Library:
    """Import comfy-kitchen, whatever that raises or prints."""
    if importlib.util.find_spec(PACKAGE) is None:
        return Library(None, f"comfy-kitchen is not installed: {INSTALL}")
    # Its back ends tell at each call which of them was taken.
    logging.getLogger(PACKAGE).setLevel(logging.CRITICAL)
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            return Library(importlib.import_module(PACKAGE).registry)
    except Exception as error:  # noqa: BLE001 - a broken wheel raises anything
        return Library(None, f"comfy-kitchen cannot be imported: {summarize(error)}")


def summarize(error: Exception) -> str:
    """The first line of what an error says, or its kind."""
    said = str(error).strip() or type(error).__name__
    return said.splitlines()[0][:MAX_SAID].rstrip(". ")


def _find_fault(registry: Any, backend: str, *, functions: Sequence[str], device: str) -> str:
    """Why a back end cannot compute these functions on a device; "" where nothing is known."""
    state = registry.list_backends().get(backend)
    if state is None or not state["available"]:
        reason = state["unavailable_reason"] if state else ""
        return str(reason or "it is not there")[:MAX_SAID]
    capability = torch.cuda.get_device_capability(device)
    for function in functions:
        if function not in state["capabilities"]:
            return f"it has no {function}, a newer one may: {INSTALL}"
        constraints = registry.get_constraints(backend, function)
        least = constraints.min_compute_capability if constraints else None
        if least and capability < least:
            return f"its {function} needs sm{least[0]}{least[1]}"
    driver = read_driver()
    if backend == "cuda" and driver < LEAST_DRIVER:
        has = f"for CUDA {driver // 1000}" if driver else "not NVIDIA's"
        return f"the driver is {has}, and it needs one for CUDA {LEAST_DRIVER // 1000}"
    return ""


def read_driver() -> int:
    """The newest CUDA that the driver knows, 12080 for 12.8; 0 where it is not NVIDIA's."""
    ask = getattr(torch._C, "_cuda_getDriverVersion", None)
    if ask is None or torch.version.hip:
        return 0
    try:
        version: int = ask()
    except RuntimeError:
        return 0
    return version


# --- the operators: each is one kernel, or a few, of comfy-kitchen's


class Packed(NamedTuple):
    """A weight (N, K) of w4a8 or w6a8, as it is stored."""

    codes: Tensor  # (N, K / 2) or (N, 3 K / 4) int8
    group_scale: Tensor  # (N, K / 16) float8_e4m3fn
    channel_scale: Tensor  # (N,) float32
    levels: Tensor | None  # (16,) float32 of w4a8


def int8_linear(
    x: Tensor, weight: Tensor, scale: Tensor, *, bias: Tensor | None, rotation: int, backend: str
) -> Tensor:
    """The product (..., N) in x's dtype of x (..., K) with int8 weights (N, K), plus the bias (N,).

    Groups of `rotation` columns of x are rotated first (0: none), and its rows are quantized.
    `scale` (N,) float32 is the weight's.
    """
    product: Tensor = torch.ops.flux.int8_linear(
        x, weight, scale, bias=bias, rotation=rotation, backend=backend
    )
    return product


def packed_linear(
    x: Tensor, weight: Packed, *, bias: Tensor | None, rotation: int, backend: str
) -> Tensor:
    """As `int8_linear`, of weights in 4 or 6 bits, which are decoded to int8 for the product."""
    product: Tensor = torch.ops.flux.packed_linear(
        x, **weight._asdict(), bias=bias, rotation=rotation, backend=backend
    )
    return product


def norm_and_turn(
    query: Tensor,
    key: Tensor,
    turns: Tensor,
    *,
    query_weight: Tensor,
    key_weight: Tensor,
    epsilon: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """RMS-norm q and k (B, S, H, d), and turn their pairs of channels.

    `turns` (1, S, 1, d / 2, 2, 2) has the matrix that each pair is multiplied with. The weights are
    (d,).
    """
    turned: tuple[Tensor, Tensor] = torch.ops.flux.rms_rope(
        query,
        key,
        turns,
        query_weight=query_weight,
        key_weight=key_weight,
        epsilon=epsilon,
        backend=backend,
    )
    return turned


def norm_and_modulate(
    x: Tensor, scale: Tensor, shift: Tensor, *, epsilon: float, backend: str
) -> Tensor:
    """The layer norm of x (B, S, D) without weights, times 1 + scale, plus shift (B, 1, D)."""
    modulated: Tensor = torch.ops.flux.adaln(x, scale, shift, epsilon=epsilon, backend=backend)
    return modulated


def find_codebook(values: tuple[float, ...], device: torch.device) -> Tensor | None:
    """The tensor of what 4-bit codes stand for, made once for a device; None of no values."""
    if not values:
        return None
    key = (str(device), values)
    if key not in CODEBOOKS:
        CODEBOOKS[key] = torch.tensor(values, device=device)
    return CODEBOOKS[key]


def _get_function(name: str, backend: str) -> Callable[..., Any]:
    """comfy-kitchen's own function of a back end."""
    found: Callable[..., Any] = load_library().registry.get_implementation(name, backend=backend)
    return found


def _on_device_of(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """What makes a tensor's card the current one: kernels are launched on that."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _run_int8_linear(
    x: Tensor, weight: Tensor, scale: Tensor, *, bias: Tensor | None, rotation: int, backend: str
) -> Tensor:
    if not x.numel():  # a grid of no blocks cannot be launched
        return _describe_linear(x, weight)
    multiply = _get_function("int8_linear", backend)
    with _on_device_of(x):
        product: Tensor = multiply(
            x.contiguous(),  # Triton's takes the rows of others from the wrong places
            weight,
            scale,
            bias=bias,
            out_dtype=x.dtype,
            convrot=rotation > 0,
            convrot_groupsize=rotation or 256,
        )
    return product


def _run_packed_linear(
    x: Tensor,
    codes: Tensor,
    group_scale: Tensor,
    channel_scale: Tensor,
    *,
    levels: Tensor | None,
    bias: Tensor | None,
    rotation: int,
    backend: str,
) -> Tensor:
    if not x.numel():
        return _describe_linear(x, codes)
    multiply = _get_function("w4a8_int8_linear", backend)
    with _on_device_of(x):
        product: Tensor = multiply(
            x,
            codes,
            group_scale,
            channel_scale,
            codebook=levels,
            bias=bias,
            group_size=x.shape[-1] // group_scale.shape[1],
            convrot_groupsize=rotation,
            out_dtype=x.dtype,
        )
    return product


def _describe_linear(x: Tensor, weight: Tensor, *_: object, **__: object) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _run_rms_rope(
    query: Tensor,
    key: Tensor,
    turns: Tensor,
    *,
    query_weight: Tensor,
    key_weight: Tensor,
    epsilon: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    turn = _get_function("rms_rope", backend)
    with _on_device_of(query):
        turned: tuple[Tensor, Tensor] = turn(query, key, turns, query_weight, key_weight, epsilon)
    return turned


def _describe_rms_rope(
    query: Tensor, key: Tensor, *_: object, **__: object
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key)


def _run_adaln(x: Tensor, scale: Tensor, shift: Tensor, *, epsilon: float, backend: str) -> Tensor:
    modulate = _get_function("adaln", backend)
    with _on_device_of(x):
        modulated: Tensor = modulate(x, scale, shift, epsilon)
    return modulated


def _describe_adaln(x: Tensor, *_: object, **__: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_make_library: Any = torch.library.Library  # has no types
_library = _make_library("flux", "FRAGMENT")
_OPERATORS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "int8_linear(Tensor x, Tensor weight, Tensor scale, *, Tensor? bias, int rotation, str backend)"
    " -> Tensor": (_run_int8_linear, _describe_linear),
    "packed_linear(Tensor x, Tensor codes, Tensor group_scale, Tensor channel_scale, *,"
    " Tensor? levels, Tensor? bias, int rotation, str backend) -> Tensor": (
        _run_packed_linear,
        _describe_linear,
    ),
    "rms_rope(Tensor query, Tensor key, Tensor turns, *, Tensor query_weight, Tensor key_weight,"
    " float epsilon, str backend) -> (Tensor, Tensor)": (_run_rms_rope, _describe_rms_rope),
    "adaln(Tensor x, Tensor scale, Tensor shift, *, float epsilon, str backend) -> Tensor": (
        _run_adaln,
        _describe_adaln,
    ),
}
for _schema, (_run, _describe) in _OPERATORS.items():
    _name = _schema.partition("(")[0]
    _library.define(_schema)
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"flux::{_name}", _describe, lib=_library)
