"""The transformer's blocks by torch.compile: one graph for each kind of block, and no other.

What a block computes between its layers (norms, modulation, rotary embedding, gates) becomes a few
kernels; each linear layer is one operator of the graph, which runs the layer as it is: its own
weights wherever they are now, packed or not, with the hooks of adapters. So the graph sees neither
weights nor adapters, and all blocks of a kind, sizes, steps, adapters, placements and precisions
share it. A block whose norms an adapter changes is computed by its own forward, as without
compiling.

So is whatever cannot be compiled (no C++ compiler, no Triton, a graph that a version of torch does
not take), and `BlockCompiler.failure` says why. torch._dynamo, which takes seconds to import, is
imported when the first block computes.
"""

import contextlib
import copy
import functools
import itertools
import logging
import os
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fluxcli import paths
from quant.errors import is_out_of_memory
from quant.linear import QuantizedLinear

logger = logging.getLogger(__name__)

BACKEND: Any = "inductor"  # of torch.compile: a name, or a function as it takes
MAX_SAID = 120  # characters of a compiler's message
# Where the compilers keep what they made; folders that the user named stay.
CACHES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}


class BlockCompiler:
    """Compiles the blocks of a transformer, however often it is loaded again."""

    def __init__(self) -> None:
        self.failure = ""  # why blocks are not compiled; "" as long as they are
        self._is_told = False

    @property
    def begins(self) -> bool:
        """Whether the next block would be the first that this process compiles."""
        return not self.failure and not _compile.cache_info().currsize

    def install(self, model: Any) -> None:
        """Make every block of a transformer compute compiled, from its first forward on.

        Its layers and their tensors may come, go and be replaced afterwards.
        """
        _choose_caches()
        for block in itertools.chain(model.transformer_blocks, model.single_transformer_blocks):
            block.forward = _CompiledForward(block, self)

    def tell_failure(self) -> str:
        """Return `failure` once; "" from then on, and as long as there is none."""
        if self._is_told or not self.failure:
            return ""
        self._is_told = True
        return self.failure

    def fail(self, error: Exception) -> None:
        """Note that blocks cannot be compiled."""
        logger.debug("the blocks are not compiled", exc_info=error)
        cause = getattr(error, "inner_exception", error)  # torch says first that a back end failed
        lines = str(cause).strip().splitlines() or [""]
        self.failure = f"{type(cause).__name__}: {lines[0][:MAX_SAID].strip()}"


class _CompiledForward:
    """Takes the place of a block's forward."""

    def __init__(self, block: nn.Module, compiler: BlockCompiler) -> None:
        self._block = block
        self._forward = block.forward  # not compiled
        self._compiler = compiler
        # Made in the first forward: until then parts of the block are replaced.
        self._outline: nn.Module | None = None
        self._inside: list[nn.Module] = []  # the modules that the graph sees

    def __call__(self, *arguments: object, **options: object) -> Any:
        if self._outline is None:
            self._outline = _make_outline(self._block)
            self._inside = [
                module for module in self._outline.modules() if not isinstance(module, _Layer)
            ]
        has_hooks = any(module._forward_hooks for module in self._inside)
        if self._compiler.failure or has_hooks:
            return self._forward(*arguments, **options)
        try:
            return _run_compiled(self._outline, arguments, options)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            # The graph writes into none of its inputs, so that the block can be computed again. An
            # error of a layer comes again then.
            result = self._forward(*arguments, **options)
            self._compiler.fail(error)
            return result


def _run_compiled(outline: nn.Module, arguments: Any, options: Any) -> Any:
    """Compute a block by the graph of its kind, which is made when the first block comes."""
    from torch.fx.experimental import _config

    shapes: Any = _config
    arguments, options = _prepare((arguments, options))
    compiled = _compile(type(outline).forward, BACKEND)
    # Equal lengths (512 tokens of text and of the picture, say) stay two lengths of the graph.
    with shapes.patch(use_duck_shape=False):
        return compiled(outline, *arguments, **options)


@functools.cache
def _compile(forward: Callable[..., Any], backend: Any) -> Callable[..., Any]:
    """A kind's forward, compiled: one for all blocks of that class."""
    compiled: Any = torch.compile(forward, backend=backend, fullgraph=True)
    return compiled


def _prepare(value: Any) -> Any:
    """The same inputs of a block as the graph wants them: plain strides, lengths marked.

    A tensor's length is its first dimension above 1, but the last: S of (1, S, D) and of (S, D). A
    view of a longer sequence has another stride of its first dimension, of size 1: no kernel looks
    at it, but a guard does. Complex numbers become pairs of real ones, see `blocks.rotate`.
    """
    if isinstance(value, tuple | list):
        return type(value)(_prepare(each) for each in value)
    if isinstance(value, dict):
        return {name: _prepare(each) for name, each in value.items()}
    if not isinstance(value, Tensor) or value.ndim < 2:
        return value
    if value.is_complex():
        value = torch.view_as_real(value)
    plain = value.contiguous().view(-1).view(value.shape)
    for dimension, size in enumerate(value.shape[:-1]):
        if size > 1:  # a graph for 1 is another one in any case
            torch._dynamo.mark_dynamic(plain, dimension)
            break
    return plain


# --- layers, which are operators of the graph


class _Layer(nn.Module):
    """Stands for a linear layer in a block's outline; the graph sees an operator."""

    def __init__(self, owner: nn.Module, leaf: str, layer: Any) -> None:
        super().__init__()
        self.out_features = layer.out_features
        # By its name in its owner: where it is quantized, each loading makes another module.
        self._find = functools.partial(getattr, owner, leaf)
        number = next(_numbers)
        # A tensor and no number, which would be a constant of the graph.
        self._number = torch.tensor(number)
        _layers[number] = self

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = torch.ops.flux.run_layer(x, self._number, self.out_features)
        return product

    def run(self, x: Tensor) -> Tensor:
        """What the layer gives now, with its hooks."""
        product: Tensor = self._find()(x)
        return product


_numbers = itertools.count()
_layers: "weakref.WeakValueDictionary[int, _Layer]" = weakref.WeakValueDictionary()


def _run_layer(x: Tensor, number: Tensor, out_features: int) -> Tensor:
    """The operator: `number` () int64 on the CPU says which layer runs."""
    return _layers[int(number)].run(x).contiguous()


def _describe_layer(x: Tensor, number: Tensor, out_features: int) -> Tensor:
    """What the graph has to know of the operator's result."""
    return x.new_empty(*x.shape[:-1], out_features)


_library = torch.library.Library("flux", "DEF")
_library.define("run_layer(Tensor x, Tensor number, int out_features) -> Tensor")
_library.impl("run_layer", _run_layer, "CompositeExplicitAutograd")
torch.library.register_fake("flux::run_layer", _describe_layer, lib=_library)


def _make_outline(block: nn.Module) -> nn.Module:
    """The block with stand-ins for its linear layers; everything else is the block's own.

    Modules on the way to a layer are copies, which share their tensors and hooks with the block's.
    """
    outline = copy.copy(block)
    outline.__dict__.pop("forward", None)
    outline._modules = {}
    for name, child in block._modules.items():
        if isinstance(child, nn.Linear | QuantizedLinear):
            outline._modules[name] = _Layer(block, name, child)
        elif child is not None and child._modules:
            outline._modules[name] = _make_outline(child)
        else:
            outline._modules[name] = child
    return outline


# --- what compilers keep


def _choose_caches() -> None:
    """Let the compilers keep what they made in the user's cache folder, unless told otherwise."""
    for variable, name in CACHES.items():
        if variable not in os.environ:
            folder = paths.compiled_folder() / name
            with contextlib.suppress(OSError):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                os.environ[variable] = str(folder)
