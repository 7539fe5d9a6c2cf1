"""From mapped checkpoint files to modules: meta-init, then strict assignment, tensor by tensor.

Knows the model classes and the key dialects of their files; nothing of requests or plans. A missing or extra key or
another shape is an error that names it: no layer is ever left randomly initialized.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fluxcli.fusion import fuse
from quant import codecs
from quant.checkpoint import Component
from quant.errors import CheckpointError
from quant.spec import QuantSpec
from quant.tensors import Reader
from quant.weights import Weight

if TYPE_CHECKING:
    import torch
    from torch import nn

CLIP_PREFIX, CLIP_POSITIONS = "text_model.", "embeddings.position_ids"
T5_SHARED, T5_TIED = "shared.weight", "encoder.embed_tokens.weight"


def load_component(
    component: Component, *, dtype: "torch.dtype", device: str, skip: Callable[[str], bool] = lambda name: False,
    spec: QuantSpec | None = None,
) -> "nn.Module":  # fmt: skip
    """Return the component's module in eval mode, on `device`; names that `skip` takes stay meta.

    Packed weights stay packed, others become `dtype`; with `spec` it packs them itself, one by one. Raises
    `CheckpointError` for missing, extra or misshapen tensors, and for values that are not finite.
    """
    module = build(component)
    weights = {name: component.weights[stored] for name, stored in _names_in_file(component).items()}
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    check_keys(component, expected, {name: weight.shape for name, weight in weights.items()})
    schemes = {name: _scheme(component, weight, spec) for name, weight in weights.items()}
    parts_of = {}
    if component.name == "transformer":
        parts_of = fuse(module, lambda layers: _together(layers, weights, schemes))
    arithmetic = component.name == "transformer"  # the encoders run once, on outlier-ridden activations
    filler = _Filler(module, weights, schemes, parts_of, dtype, device, spec, arithmetic)
    with Reader() as reader:
        for name in module.state_dict():
            if name != T5_TIED and not skip(name):
                filler.fill(name, reader)
    for name, buffer in list(module.named_buffers()):
        _set(module, name, buffer.to(device))
    if T5_TIED in weights:
        module.encoder.embed_tokens.weight = module.shared.weight
    return module.eval()


def matching(component: Component) -> tuple[int, int]:
    """(how many tensors of the component have a place in its module, how many it needs)."""
    expected = {name: tuple(tensor.shape) for name, tensor in build(component).state_dict().items()}
    names = _names_in_file(component)
    return sum(expected.get(n) == component.weights[stored].shape for n, stored in names.items()), len(expected)


def _scheme(component: Component, weight: Weight, spec: QuantSpec | None) -> str:
    return weight.scheme or (spec.scheme(component.name, weight.name, weight.shape) if spec else "")


def _together(layers: Sequence[str], weights: dict[str, Weight], schemes: dict[str, str]) -> bool:
    """Whether the weights of these layers can be those of one: all in one scheme, whose blocks end with each."""
    from quant.linear import fits_together

    found = {schemes[f"{layer}.weight"] for layer in layers}
    shapes = [weights[f"{layer}.weight"].shape for layer in layers]
    return len(found) == 1 and fits_together(next(iter(found)), shapes)


@dataclass
class _Filler:
    """Gives a module's layers their tensors, packed ones as layers of their own."""

    module: "nn.Module"
    weights: dict[str, Weight]
    schemes: dict[str, str]
    parts_of: dict[str, tuple[str, ...]]  # fused layer -> the layers it holds
    dtype: "torch.dtype"
    device: str
    spec: QuantSpec | None
    arithmetic: bool  # 8-bit layers may multiply in 8 bit

    def fill(self, name: str, reader: Reader) -> None:
        """Fill the tensor `name` of the module; the bias of a packed layer comes with its weight."""
        from torch import nn

        layer, _, leaf = name.rpartition(".")
        layers = self.parts_of.get(layer, (layer,))
        scheme = self.schemes.get(f"{layers[0]}.weight", "")
        if not scheme:
            parts = [f"{part}.{leaf}" for part in layers]
            _set(self.module, name, nn.Parameter(self._dense(parts, reader), requires_grad=False))
        elif leaf == "weight":
            _set(self.module, layer, self._packed(layers, scheme, reader))

    def _dense(self, names: list[str], reader: Reader) -> "torch.Tensor":
        import torch

        options = {"dtype": self.dtype, "device": self.device}
        parts = [read_dense(self.weights[name], reader, **options) for name in names]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _packed(self, layers: Sequence[str], scheme: str, reader: Reader) -> "nn.Module":
        weights = [self.weights[f"{layer}.weight"] for layer in layers]
        from quant.linear import make_linear

        biases = [f"{layer}.bias" for layer in layers if f"{layer}.bias" in self.weights]
        parts = [self._pieces(weight, scheme, reader) for weight in weights]
        bias = self._dense(biases, reader) if biases else None
        return make_linear(scheme, parts, [w.shape for w in weights], bias, arithmetic=self.arithmetic)

    def _pieces(self, weight: Weight, scheme: str, reader: Reader) -> "dict[str, torch.Tensor]":
        stored = {suffix: tensor.to(self.device) for suffix, tensor in reader.weight(weight).items()}
        where = weight.pieces[""]
        if not weight.scheme:
            search = self.spec.scales == "search"
            return codecs.encode(stored[""], scheme, name=weight.name, where=where, search=search).pieces
        codecs.check(weight.name, stored, where)
        return stored


def read_dense(weight: Weight, reader: Reader, *, dtype: "torch.dtype", device: str) -> "torch.Tensor":
    """The values of a weight, unpacked; raises `CheckpointError` where they are not finite."""
    pieces = {suffix: tensor.to(device) for suffix, tensor in reader.weight(weight).items()}
    codecs.check(weight.name, pieces, weight.pieces[""])
    return codecs.decode(pieces, weight.scheme, weight.shape, dtype)


def _set(module: "nn.Module", name: str, value: "torch.Tensor") -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, value)


def build(component: Component) -> "nn.Module":
    """Instantiate the component's class from its config, parameters on meta, buffers real."""
    factory = _factory(component)
    with _parameters_on_meta(), refusing(f"cannot build {component.name}", component.folder):
        return factory()


@contextlib.contextmanager
def refusing(what: str, which: object) -> Iterator[None]:
    """Turn whatever a library raises about a file's values into a `CheckpointError`."""
    try:
        yield
    except Exception as error:
        lines = str(error).split("\n")
        why = f"its values make no model: {type(error).__name__}: {lines[0][:100]}"
        raise CheckpointError(what, which=which, why=why) from error


def _factory(component: Component) -> Callable:
    from fluxcli import classes

    if component.name in ("transformer", "vae"):
        kind = classes.transformer() if component.name == "transformer" else classes.vae()
        return lambda: kind.from_config(component.config)
    model, config_class = classes.clip() if component.name == "text_encoder" else classes.t5()
    config = {key: value for key, value in component.config.items() if "attn_implementation" not in key}
    return lambda: model(config_class(**config))


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules built inside have parameters without storage (their buffers are real): building 12 B costs nothing.

    `normal_` does nothing meanwhile: on meta it would import torch._dynamo, 1.2 s.
    """
    import torch
    from torch import nn

    register = nn.Module.register_parameter

    def register_on_meta(module: "nn.Module", name: str, parameter: "nn.Parameter | None") -> None:
        on_meta = parameter if parameter is None else nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, on_meta)

    nn.Module.register_parameter = register_on_meta
    torch.Tensor.normal_ = lambda tensor, *_, **__: tensor  # hides the base class's
    try:
        yield
    finally:
        nn.Module.register_parameter = register
        del torch.Tensor.normal_


def _names_in_file(component: Component) -> dict[str, str]:
    """Module key -> key in the file, for the dialects that published folders use."""
    names = {name.removeprefix(CLIP_PREFIX): name for name in component.weights}
    if component.name == "text_encoder":
        names.pop(CLIP_POSITIONS, None)  # a buffer that old files carry along
    if component.name == "text_encoder_2":
        stored = names.get(T5_SHARED) or names.get(T5_TIED)
        names |= dict.fromkeys((T5_SHARED, T5_TIED), stored) if stored else {}  # one tensor under two names
    return names


def check_keys(component: Component, expected: dict[str, tuple], found: dict[str, tuple]) -> None:
    """Raise `CheckpointError` with the first three names and the count unless both have the same keys and shapes."""
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    shapes = [name for name in expected if name in found and expected[name] != found[name]]
    for what, names in (("missing", missing), ("unknown", extra), ("misshapen", shapes)):
        if names:
            why = f"{len(names)} {what} tensors: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
            hint = "download the model again, or check that config.json belongs to these weights"
            raise CheckpointError(f"weights do not match {component.name}", which=component.folder, why=why, hint=hint)


def read_tensors(
    component: Component, names: list[str], *, dtype: "torch.dtype", device: str
) -> "Iterator[tuple[str, torch.Tensor]]":
    """Yield (name, values in `dtype` on `device`) of weights of the component."""
    with Reader() as reader:
        for name in names:
            yield name, read_dense(component.weights[name], reader, dtype=dtype, device=device)
