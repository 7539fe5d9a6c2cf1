"""From checkpoint files to modules: built without storage, then filled tensor by tensor.

Knows the model classes and the key dialects of their files; nothing of requests or plans. A missing
or unknown key or another shape is an error that names it: no layer is ever left randomly
initialized. Layers over the same input become one where their weights allow it: q, k and v, and
the MLP's input of a single block. Sizes are in bytes.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fluxcli.engine import blocks, classes, controlnet
from fluxcli.engine.feeder import make_feeder
from fluxcli.errors import find_broken_library
from quant import codecs
from quant.checkpoint import Component
from quant.codecs import Reader, ValueChecks
from quant.config import DOWNLOAD_AGAIN
from quant.dialects import ADDED_QKV, QKV, T5_TIED
from quant.errors import CheckpointError, ExplainedError, is_out_of_memory
from quant.expected import check_keys, map_names
from quant.linear import find_multiply, fits_together, make_linear
from quant.lora import Adapter
from quant.spec import (
    FAMILIES,
    MULTIPLIED_IN_TEXT_ENCODER,
    ROTATED,
    STREAMS,
    QuantSpec,
    find_rotation,
    is_modulation,
    scheme_in_memory,
)
from quant.weights import Weight

Shape = tuple[int, ...]


class Fusion(NamedTuple):
    """A layer of a block that takes the place of others over the same input, row after row."""

    new: str
    old: tuple[str, ...]


FUSIONS = {  # by the list of blocks
    "transformer_blocks": (
        Fusion("attn.to_qkv", QKV),
        Fusion("attn.to_added_qkv", ADDED_QKV),
    ),
    "single_transformer_blocks": (Fusion("proj_in", (*QKV, "proj_mlp")),),
}


class Place(NamedTuple):
    """Where a layer of the model is: in which layer of the module, from which row of its output."""

    layer: str
    first_row: int


@dataclass
class LoadedComponent:
    """A component's module, and what goes with it while it is loaded."""

    module: Any  # an nn.Module of diffusers or transformers, in eval mode
    places: dict[str, Place]  # by the names of the model's layers, but for the modulation's
    pinned_bytes: int = 0  # of streamed blocks, in RAM that the driver has pinned
    unpinned_bytes: int = 0  # of streamed blocks, in RAM that it has not
    adapters: tuple[Adapter, ...] = ()  # that act on it now
    handles: list[RemovableHandle] = field(default_factory=list)  # whose `remove` ends that


class Filler:
    """Gives a module's layers their tensors.

    Quantized weights stay so, as layers of their own, others become `dtype`. With `spec` weights in
    16 bit are quantized one by one as it says. Raises `CheckpointError` for missing, unknown or
    misshapen tensors, and for values that are not finite: those on a CUDA device when `check` is
    called, which has to be before they are used.
    """

    def __init__(
        self,
        component: Component,
        *,
        dtype: torch.dtype,
        device: str,
        spec: QuantSpec | None = None,
    ) -> None:
        self.module: Any = build(component)
        self.device = device
        self._component = component
        self._dtype = dtype
        self._spec = spec
        self.feeder = make_feeder(device)
        self._host_reader = Reader()
        self._reader = Reader(self.feeder.bring) if self.feeder else self._host_reader
        self._checks = ValueChecks()
        names = map_names(component.name, component.weights)
        self._weights = {name: component.weights[stored] for name, stored in names.items()}
        check_keys(
            component.name,
            component.folder,
            expected=_shapes_of(self.module),
            found={name: weight.shape for name, weight in self._weights.items()},
        )
        self._schemes = {name: self._scheme_of(weight) for name, weight in self._weights.items()}
        self._sources: dict[str, tuple[str, ...]] = {}  # the old layers by their new one
        self._fused: dict[str, Place] = {}  # the new place by the old layer
        if component.name in STREAMS:
            installers = {"transformer": blocks.install, "controlnet": controlnet.install}
            installers[component.name](self.module, backend=self._choose_backend())
            self._fuse()
        self.names = [name for name in self.module.state_dict() if name != T5_TIED]

    def finish(self) -> LoadedComponent:
        """The module in eval mode, checked, its own buffers on the device.

        Layers may be filled later, and are to be checked then.
        """
        self.check()
        for name, buffer in list(self.module.named_buffers()):
            _set(self.module, name, buffer.to(self.device))
        if T5_TIED in self._weights:
            self.module.encoder.embed_tokens.weight = self.module.shared.weight
        places = {
            name: Place(name, 0)
            for name, _ in self.module.named_modules()
            if not is_modulation(f"{name}.weight")
        }
        return LoadedComponent(self.module.eval(), places | self._fused)

    def check(self) -> None:
        """Look at the values that were filled in: each weight's once, however often it is read."""
        self._checks.finish()

    def quantizes(self, block: str) -> bool:
        """Whether filling the block quantizes weights that are stored in 16 bit."""
        return any(
            scheme and not self._weights[name].scheme
            for name, scheme in self._schemes.items()
            if name.startswith(f"{block}.")
        )

    def block_bytes(self, block: str, *, skip: Callable[[str], bool]) -> int:
        """Bytes that the block's tensors take at most, but for the names that `skip` takes."""
        total = 0
        for name, weight in self._weights.items():
            if name.startswith(f"{block}.") and not skip(name):
                if scheme := self._schemes[name]:
                    total += weight.bytes_in(scheme)
                else:
                    total += weight.numel * self._dtype.itemsize
        return total

    def fill(self, name: str, *, device: str = "") -> None:
        """Fill the module's tensor `name` on a device ("": the filler's own).

        The bias of a quantized layer comes with its weight, since the layer is made anew.
        """
        device = device or self.device
        layer, _, leaf = name.rpartition(".")
        sources = self._sources.get(layer, (layer,))
        scheme = self._schemes.get(f"{sources[0]}.weight", "")
        if not scheme:
            values = self._read_values(sources, leaf, device)
            _set(self.module, name, nn.Parameter(values, requires_grad=False))
        elif leaf == "weight":
            made = self._make_quantized(sources, scheme, device)
            # The hooks of adapters stay, where the layer is made anew for every forward.
            made._forward_hooks = self.module.get_submodule(layer)._forward_hooks
            _set(self.module, layer, made)

    def _choose_backend(self) -> str:
        """Which back end of comfy-kitchen computes what is between products; "" for torch."""
        for form in self._schemes.values():
            scheme = FAMILIES.get(form, "")
            if scheme in ROTATED:
                multiply = find_multiply(scheme, self.device)
                return blocks.choose_backend(multiply, self.device, dtype=self._dtype).backend
        return ""

    def _scheme_of(self, weight: Weight) -> str:
        """The scheme that a weight has in memory, "" for values."""
        if weight.scheme:
            return scheme_in_memory(self._component.name, weight.name, weight.scheme)
        if self._spec:
            return self._spec.choose_scheme(self._component.name, weight.name, weight.shape)
        return ""

    def _read_values(self, layers: Sequence[str], leaf: str, device: str) -> Tensor:
        """The values of one tensor of these layers, row after row."""
        weights = [self._weights[f"{layer}.{leaf}".removeprefix(".")] for layer in layers]
        values = []
        for weight in weights:
            stored = self._read_checked(weight, device)
            values.append(_dequantize(weight, stored, self._dtype))
        return codecs.stack_rows(values)

    def _make_quantized(self, layers: Sequence[str], scheme: str, device: str) -> nn.Module:
        """Return one layer over the quantized weights of these layers, one below the other."""
        weights = [self._weights[f"{layer}.weight"] for layer in layers]
        stored = [self._read_quantized(weight, scheme, device) for weight in weights]
        shapes = [weight.shape for weight in weights]
        bias = None
        if f"{layers[0]}.bias" in self._weights:
            bias = self._read_values(layers, "bias", device)
        rotation = self._rotation_of(weights[0])
        return make_linear(
            scheme,
            stored,
            shapes=shapes,
            bias=bias,
            arithmetic=self._may_multiply(scheme, rotation),
            rotation=rotation,
        )

    def _may_multiply(self, scheme: str, rotation: int) -> bool:
        """Whether layers may multiply quantized activations, where the scheme and the device can.

        Those of text encoders are full of outliers, which only a rotation spreads.
        """
        if self._component.name in STREAMS:
            return True
        return rotation > 0 and FAMILIES[scheme] in MULTIPLIED_IN_TEXT_ENCODER

    def _rotation_of(self, weight: Weight) -> int:
        """How many columns of a weight are rotated together: as stored, or as it is quantized."""
        if weight.scheme:
            return weight.rotation
        return find_rotation(weight.shape[1])

    def _read_quantized(self, weight: Weight, scheme: str, device: str) -> dict[str, Tensor]:
        """The tensors of a weight by suffix, as they are stored, or quantized from 16 bit."""
        if weight.scheme:
            return self._read_checked(weight, device)
        assert self._spec, "only a spec gives values a scheme"
        values = self._reader_for(device).read(weight)[""].to(device)
        return codecs.quantize(
            values,
            scheme,
            name=weight.name,
            where=weight.pieces[""],
            search=self._spec.scales == "search",
        ).stored

    def _read_checked(self, weight: Weight, device: str) -> dict[str, Tensor]:
        return self._reader_for(device).read_checked(weight, device, checks=self._checks)

    def _reader_for(self, device: str) -> Reader:
        return self._reader if device == self.device else self._host_reader

    def _fuse(self) -> None:
        """Make one layer (on meta) of those over the same input whose weights can be one.

        Each row of a product is its own, so the pictures stay the same.
        """
        for stack, fusions in FUSIONS.items():
            for index, block in enumerate(getattr(self.module, stack)):
                prefix = f"{stack}.{index}."
                if not all(self._fits_together(prefix, fusion.old) for fusion in fusions):
                    continue
                for fusion in fusions:
                    self._fuse_layers(block, fusion, prefix=prefix)
                block.attn.fused_projections = True

    def _fits_together(self, prefix: str, layers: Sequence[str]) -> bool:
        """Whether the weights of these layers can be one.

        They are in one scheme, and no block of the scheme crosses from one to the next.
        """
        names = [f"{prefix}{layer}.weight" for layer in layers]
        schemes = {self._schemes[name] for name in names}
        shapes = [self._weights[name].shape for name in names]
        kinds = {self._weights[name].kind for name in names}
        is_alike = len(schemes) == 1 and len(kinds) == 1
        return is_alike and fits_together(schemes.pop(), shapes)

    def _fuse_layers(self, block: Any, fusion: Fusion, *, prefix: str) -> None:
        """Replace a block's layers over the same input by one on meta; note their rows."""
        layers = {name: block.get_submodule(name) for name in fusion.old}
        first = layers[fusion.old[0]]
        rows = sum(layer.out_features for layer in layers.values())
        has_bias = first.bias is not None
        fused = nn.Linear(first.in_features, rows, bias=has_bias, device="meta")
        block.set_submodule(fusion.new, fused)
        first_row = 0
        for name, layer in layers.items():
            self._fused[prefix + name] = Place(prefix + fusion.new, first_row)
            first_row += layer.out_features
            owner, _, leaf = name.rpartition(".")
            delattr(block.get_submodule(owner), leaf)
        self._sources[prefix + fusion.new] = tuple(prefix + name for name in fusion.old)


def make_reader(device: str) -> Reader:
    """A reader to a device; to RAM where the device has no feeder."""
    feeder = make_feeder(device)
    return Reader(feeder.bring) if feeder else Reader()


def read_tensors(
    component: Component,
    names: Iterable[str],
    *,
    dtype: torch.dtype,
    device: str,
    reader: Reader | None = None,
) -> dict[str, Tensor]:
    """The values of these weights in `dtype`; raises `CheckpointError` unless they are finite.

    `reader`, of `make_reader`, spares who reads several times the making of one.
    """
    reader = reader or make_reader(device)
    checks = ValueChecks()
    values = {}
    for name in names:
        weight = component.weights[name]
        stored = reader.read_checked(weight, device, checks=checks)
        values[name] = _dequantize(weight, stored, dtype)
    checks.finish()
    return values


def _dequantize(weight: Weight, stored: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    return codecs.dequantize(
        stored, weight.scheme, shape=weight.shape, dtype=dtype, rotation=weight.rotation
    )


def _set(module: nn.Module, name: str, value: Tensor | nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, value)


def build(component: Component) -> Any:
    """Instantiate the component's class from its config, parameters on meta, buffers real."""
    kinds = {
        "transformer": classes.transformer,
        "vae": classes.vae,
        "text_encoder": classes.clip,
        "text_encoder_2": classes.t5,
        "controlnet": classes.controlnet,
        "image_encoder": classes.siglip,
        "image_embedder": classes.redux_embedder,
    }
    kind = kinds[component.name]()
    with _parameters_on_meta(), refusing(f"cannot build {component.name}", component.folder):
        if not hasattr(kind, "config_class"):  # diffusers' classes read a config themselves
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of names that diffusers itself uses
                return kind.from_config(component.config)
        # How attention computes is this library's choice, not the file's.
        options = {
            key: value
            for key, value in component.config.items()
            if "attn_implementation" not in key
        }
        if component.name == "image_encoder":
            options["vision_use_head"] = False  # Redux takes what is before it
        return kind(kind.config_class(**options))


@contextlib.contextmanager
def refusing(what: str, which: object) -> Iterator[None]:
    """Turn whatever a library raises about a file's values into a `CheckpointError`.

    Memory that ran out, and a library that cannot be imported, are no fault of the file's.
    """
    try:
        yield
    except ExplainedError:
        raise
    except Exception as error:
        if is_out_of_memory(error) or find_broken_library(error):
            raise
        first = str(error).partition("\n")[0]
        why = f"its values make no model: {type(error).__name__}: {first[:100]}"
        raise CheckpointError(what, which=which, why=why, hint=DOWNLOAD_AGAIN) from error


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules built inside have parameters without storage: building 12 B costs nothing.

    Their buffers are real. `normal_` does nothing meanwhile: on meta it would import torch._dynamo,
    which takes more than a second.
    """
    modules: Any = nn.Module
    tensors: Any = torch.Tensor
    register = modules.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    modules.register_parameter = register_on_meta
    tensors.normal_ = lambda tensor, *_, **__: tensor  # hides the base class's
    try:
        yield
    finally:
        modules.register_parameter = register
        del tensors.normal_


def _shapes_of(module: nn.Module) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
