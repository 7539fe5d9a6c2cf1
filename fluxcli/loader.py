"""From mapped checkpoint files to modules: meta-init, then strict assignment, tensor by tensor.

Knows the model classes and the key dialects of their files; nothing of requests or plans. A missing or extra key or
another shape is an error that names it: no layer is ever left randomly initialized.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence

from fluxcli.fusion import fuse
from quant import codecs
from quant.checkpoint import Component
from quant.errors import CheckpointError
from quant.lazy import nn, torch
from quant.spec import QuantSpec, layout
from quant.tensors import Reader
from quant.weights import Weight

CLIP_PREFIX, CLIP_POSITIONS = "text_model.", "embeddings.position_ids"
T5_SHARED, T5_TIED = "shared.weight", "encoder.embed_tokens.weight"


def load_component(component: Component, *, skip: Callable[[str], bool] = lambda name: False, **options) -> "nn.Module":
    """Return the component's module in eval mode; names that `skip` takes stay meta. `options` go to `Filler`."""
    filler = Filler(component, **options)
    for name in filler.names:
        if not skip(name):
            filler.fill(name)
    return filler.finish()


def matching(component: Component) -> tuple[int, int]:
    """(how many tensors of the component have a place in its module, how many it needs)."""
    expected = {name: tuple(tensor.shape) for name, tensor in build(component).state_dict().items()}
    names = _names_in_file(component)
    return sum(expected.get(n) == component.weights[stored].shape for n, stored in names.items()), len(expected)


class Filler:
    """Gives a module's layers their tensors: packed ones as layers of their own, fused where that is possible.

    Packed weights stay packed, others become `dtype`; with `spec` it packs them itself, one by one. Raises
    `CheckpointError` for missing, extra or misshapen tensors, and for values that are not finite.
    """

    def __init__(
        self, component: Component, *, dtype: "torch.dtype", device: str, spec: QuantSpec | None = None
    ) -> None:  # fmt: skip
        self.module = build(component)
        self.weights = {name: component.weights[stored] for name, stored in _names_in_file(component).items()}
        expected = {name: tuple(tensor.shape) for name, tensor in self.module.state_dict().items()}
        check_keys(component, expected, {name: weight.shape for name, weight in self.weights.items()})
        self.spec, self.reader = spec, Reader()
        self.dtype, self.device = dtype, device
        self.schemes = {
            name: weight.scheme or (spec.scheme(component.name, weight.name, weight.shape) if spec else "")
            for name, weight in self.weights.items()
        }
        self.arithmetic = component.name == "transformer"  # encoders run once, on activations full of outliers
        self.parts_of = fuse(self.module, self._together) if component.name == "transformer" else {}
        self.names = [name for name in self.module.state_dict() if name != T5_TIED]

    def finish(self) -> "nn.Module":
        """The module in eval mode, its own buffers on the device."""
        for name, buffer in list(self.module.named_buffers()):
            _set(self.module, name, buffer.to(self.device))
        if T5_TIED in self.weights:
            self.module.encoder.embed_tokens.weight = self.module.shared.weight
        return self.module.eval()

    def packs(self, block: str) -> bool:
        """Whether filling the block packs weights that are stored in 16 bit: work for the device."""
        return any(s and not self.weights[n].scheme for n, s in self.schemes.items() if n.startswith(f"{block}."))

    def nbytes(self, block: str, skip: Callable[[str], bool]) -> int:
        """Bytes that the block's tensors take at most, but for the names that `skip` takes."""
        wide, total = self.dtype.itemsize, 0
        for name, weight in self.weights.items():
            if name.startswith(f"{block}.") and not skip(name):
                stored = layout(self.schemes[name], weight.info) if self.schemes[name] else ()
                total += sum(info.nbytes for info in stored) or weight.numel * wide
        return total

    def _together(self, layers: Sequence[str]) -> bool:
        """Whether the weights of these layers can be those of one: all in one scheme, whose blocks end with each."""
        from quant.linear import fits_together

        names = [f"{layer}.weight" for layer in layers]
        schemes = {self.schemes[name] for name in names}
        return len(schemes) == 1 and fits_together(schemes.pop(), [self.weights[name].shape for name in names])

    def fill(self, name: str) -> None:
        """Fill the tensor `name` of the module on `device`; the bias of a packed layer comes with its weight."""
        layer, _, leaf = name.rpartition(".")
        layers = self.parts_of.get(layer, (layer,))
        scheme = self.schemes.get(f"{layers[0]}.weight", "")
        if not scheme:
            dense = self._dense([f"{part}.{leaf}" for part in layers])
            _set(self.module, name, nn.Parameter(dense, requires_grad=False))
        elif leaf == "weight":
            _set(self.module, layer, self._packed(layers, scheme))

    def _dense(self, names: list[str]) -> "torch.Tensor":
        parts = [read_dense(self.weights[name], self.reader, dtype=self.dtype, device=self.device) for name in names]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _packed(self, layers: Sequence[str], scheme: str) -> "nn.Module":
        from quant.linear import make_linear

        weights = [self.weights[f"{layer}.weight"] for layer in layers]
        biases = [f"{layer}.bias" for layer in layers if f"{layer}.bias" in self.weights]
        parts = [self._pieces(weight, scheme) for weight in weights]
        bias = self._dense(biases) if biases else None
        return make_linear(scheme, parts, [w.shape for w in weights], bias, arithmetic=self.arithmetic)

    def _pieces(self, weight: Weight, scheme: str) -> "dict[str, torch.Tensor]":
        if weight.scheme:
            return _checked(weight, self.reader, self.device)
        stored = self.reader.weight(weight)[""].to(self.device)
        return codecs.encode(
            stored, scheme, name=weight.name, where=weight.pieces[""], search=self.spec.scales == "search"
        ).pieces


def _checked(weight: Weight, reader: Reader, device: str) -> "dict[str, torch.Tensor]":
    pieces = {suffix: tensor.to(device) for suffix, tensor in reader.weight(weight).items()}
    codecs.check(weight.name, pieces, weight.pieces[""])
    return pieces


def read_dense(weight: Weight, reader: Reader, *, dtype: "torch.dtype", device: str) -> "torch.Tensor":
    """The values of a weight, unpacked; raises `CheckpointError` where they are not finite."""
    return codecs.decode(_checked(weight, reader, device), weight.scheme, weight.shape, dtype)


def _set(module: "nn.Module", name: str, value: "torch.Tensor") -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, value)


def build(component: Component) -> "nn.Module":
    """Instantiate the component's class from its config, parameters on meta, buffers real."""
    from fluxcli import classes

    kinds = {"transformer": classes.transformer, "vae": classes.vae, "text_encoder": classes.clip}
    kind, config = kinds.get(component.name, classes.t5)(), component.config
    with _parameters_on_meta(), refusing(f"cannot build {component.name}", component.folder):
        if isinstance(kind, type):  # diffusers' classes read a config themselves
            return kind.from_config(config)
        model, config_class = kind
        return model(config_class(**{key: value for key, value in config.items() if "attn_implementation" not in key}))


@contextlib.contextmanager
def refusing(what: str, which: object) -> Iterator[None]:
    """Turn whatever a library raises about a file's values into a `CheckpointError`."""
    try:
        yield
    except Exception as error:
        lines = str(error).split("\n")
        why = f"its values make no model: {type(error).__name__}: {lines[0][:100]}"
        raise CheckpointError(what, which=which, why=why) from error


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules built inside have parameters without storage (their buffers are real): building 12 B costs nothing.

    `normal_` does nothing meanwhile: on meta it would import torch._dynamo, 1.2 s.
    """
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
    component: Component, names: Iterable[str], *, dtype: "torch.dtype", device: str
) -> "dict[str, torch.Tensor]":
    """The values of weights of the component, in `dtype` on `device`."""
    reader = Reader()
    return {name: read_dense(component.weights[name], reader, dtype=dtype, device=device) for name in names}
