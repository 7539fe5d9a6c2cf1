"""From mapped checkpoint files to modules: meta-init, then strict assignment, tensor by tensor.

Knows the model classes and the key dialects of their files; nothing of requests or plans. A missing or extra key or
another shape is an error that names it: no layer is ever left randomly initialized. One layer takes the place of
several over the same input: q, k, v and a single block's MLP.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate

from fluxcli.engine import classes
from quant import codecs
from quant.checkpoint import Component
from quant.codecs import Reader
from quant.errors import CheckpointError
from quant.lazy import Tensor, Tensors, nn, torch
from quant.spec import QuantSpec, layout, scheme_in_memory
from quant.weights import Weight

CLIP_PREFIX, CLIP_POSITIONS = "text_model.", "embeddings.position_ids"
T5_SHARED, T5_TIED = "shared.weight", "encoder.embed_tokens.weight"
QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
FUSED: dict[str, dict[str, tuple[str, ...]]] = {  # of each block of a kind: new layers, and the old ones in each
    "transformer_blocks": {"attn.to_qkv": QKV, "attn.to_added_qkv": tuple(f"attn.add_{x}_proj" for x in "qkv")},
    "single_transformer_blocks": {"proj_in": (*QKV, "proj_mlp")},
}


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

    def __init__(self, part: Component, *, dtype: "torch.dtype", device: str, spec: QuantSpec | None = None) -> None:
        self.module, self.reader, self.spec = build(part), Reader(), spec
        self.dtype, self.device = dtype, device
        self.weights = {name: part.weights[stored] for name, stored in _names_in_file(part).items()}
        expected = {name: tuple(tensor.shape) for name, tensor in self.module.state_dict().items()}
        check_keys(part, expected, {name: weight.shape for name, weight in self.weights.items()})
        packs = spec.scheme if spec else lambda *_: ""
        self.schemes = {
            name: scheme_in_memory(part.name, w.name, w.scheme) if w.scheme else packs(part.name, w.name, w.shape)
            for name, w in self.weights.items()
        }
        self.arithmetic = part.name == "transformer"  # encoders run once, on activations full of outliers
        self.parts_of = self._fuse() if part.name == "transformer" else {}
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
        total = 0
        for name, weight in self.weights.items():
            if name.startswith(f"{block}.") and not skip(name):
                stored = layout(self.schemes[name], weight.info) if self.schemes[name] else ()
                total += sum(info.nbytes for info in stored) or weight.numel * self.dtype.itemsize
        return total

    def fill(self, name: str) -> None:
        """Fill the tensor `name` of the module on `device`; the bias of a packed layer comes with its weight."""
        from quant.linear import make_linear

        layer, _, leaf = name.rpartition(".")
        layers = self.parts_of.get(layer, (layer,))
        scheme = self.schemes.get(f"{layers[0]}.weight", "")
        if not scheme:
            _set(self.module, name, nn.Parameter(self._dense(layers, leaf), requires_grad=False))
        elif leaf == "weight":
            weights = [self.weights[f"{part}.weight"] for part in layers]
            parts = [self._packed(weight, scheme) for weight in weights]
            bias = self._dense(layers, "bias") if f"{layers[0]}.bias" in self.weights else None
            shapes = [weight.shape for weight in weights]
            made = make_linear(scheme, parts, shapes, bias, arithmetic=self.arithmetic)
            made._forward_hooks = self.module.get_submodule(layer)._forward_hooks  # adapters, where it is made anew
            _set(self.module, layer, made)

    def _dense(self, layers: Sequence[str], leaf: str) -> Tensor:
        weights = [self.weights[f"{layer}.{leaf}".removeprefix(".")] for layer in layers]
        return codecs.stack_rows([_values(weight, self.reader, self.dtype, self.device) for weight in weights])

    def _packed(self, weight: Weight, scheme: str) -> Tensors:
        if weight.scheme:
            return self.reader.read_checked(weight, self.device)
        stored, search = self.reader.read(weight)[""].to(self.device), self.spec.scales == "search"
        return codecs.quantize(stored, scheme, name=weight.name, where=weight.pieces[""], search=search).stored

    def _fuse(self) -> dict[str, tuple[str, ...]]:
        """Make one layer (on meta) of those over the same input whose weights can be one; the layers in each such.

        Each row of a product is its own, so the pictures stay the same.
        """
        found: dict[str, tuple[str, ...]] = {}
        self.module.fused = {}  # the old layers: the new one of each, and its first row there
        for stack, table in FUSED.items():
            for i, block in enumerate(getattr(self.module, stack)):
                names = {new: tuple(f"{stack}.{i}.{name}" for name in old) for new, old in table.items()}
                if not all(map(self._together, names.values())):
                    continue
                for new, parts in names.items():
                    layers = [self.module.get_submodule(part) for part in parts]
                    rows, bias = sum(layer.out_features for layer in layers), layers[0].bias is not None
                    block.set_submodule(new, nn.Linear(layers[0].in_features, rows, bias=bias, device="meta"))
                    for owner, _, leaf in (name.rpartition(".") for name in table[new]):
                        delattr(block.get_submodule(owner), leaf)
                    found[f"{stack}.{i}.{new}"] = parts
                    for part, end, layer in zip(parts, accumulate(x.out_features for x in layers), layers, strict=True):
                        self.module.fused[part] = f"{stack}.{i}.{new}", end - layer.out_features
                block.attn.fused_projections = True
                if "proj_in" in names:
                    block.attn.to_qkv, block.__class__ = nn.Identity(), _single_block()
        return found

    def _together(self, layers: Sequence[str]) -> bool:
        """Whether the weights of these layers can be those of one: all in one scheme, whose blocks end with each."""
        from quant.linear import fits_together

        names = [f"{layer}.weight" for layer in layers]
        schemes = {self.schemes[name] for name in names}
        return len(schemes) == 1 and fits_together(schemes.pop(), [self.weights[name].shape for name in names])


@functools.cache
def _single_block() -> type:
    """diffusers' single block with one layer for q, k, v and the MLP's input."""
    import torch  # itself: torch.compile does not look through a lazy one

    class FusedSingleBlock(classes.single_block()):
        """`proj_in` gives (B, S, 3 D + M); the attention gets q, k and v ready."""

        def forward(
            self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, temb: torch.Tensor,
            image_rotary_emb: tuple | None = None, joint_attention_kwargs: dict | None = None,
        ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
            residual = torch.cat([encoder_hidden_states, hidden_states], dim=1)  # (B, T + S, D)
            normed, gate = self.norm(residual, emb=temb)
            projected = self.proj_in(normed)
            qkv, mlp = projected.split([projected.shape[-1] - self.mlp_hidden_dim, self.mlp_hidden_dim], dim=-1)
            attended = self.attn(qkv, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
            joined = torch.cat([attended, self.act_mlp(mlp)], dim=2)
            del normed, projected, qkv, mlp, attended  # most of what is alive
            output = residual + gate.unsqueeze(1) * self.proj_out(joined)
            if output.dtype == torch.float16:
                output = output.clip(-65504, 65504)
            return output.tensor_split([encoder_hidden_states.shape[1]], dim=1)

    return FusedSingleBlock


def read_tensors(component: Component, names: Iterable[str], *, dtype: "torch.dtype", device: str) -> Tensors:
    """The values of weights of the component in `dtype` on `device`; raises `CheckpointError` unless finite."""
    reader = Reader()
    return {name: _values(component.weights[name], reader, dtype, device) for name in names}


def _values(weight: Weight, reader: Reader, dtype: "torch.dtype", device: str) -> Tensor:
    return codecs.dequantize(reader.read_checked(weight, device), weight.scheme, weight.shape, dtype)


def _set(module: "nn.Module", name: str, value: "torch.Tensor") -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, value)


def build(component: Component) -> "nn.Module":
    """Instantiate the component's class from its config, parameters on meta, buffers real."""
    kinds = {"transformer": classes.transformer, "vae": classes.vae, "text_encoder": classes.clip}
    kind, config = kinds.get(component.name, classes.t5)(), component.config
    with _parameters_on_meta(), refusing(f"cannot build {component.name}", component.folder):
        if not hasattr(kind, "config_class"):  # diffusers' classes read a config themselves
            return kind.from_config(config)
        return kind(kind.config_class(**{k: value for k, value in config.items() if "attn_implementation" not in k}))


@contextlib.contextmanager
def refusing(what: str, which: object) -> Iterator[None]:
    """Turn whatever a library raises about a file's values into a `CheckpointError`."""
    try:
        yield
    except Exception as error:
        first = str(error).partition("\n")[0]
        why = f"its values make no model: {type(error).__name__}: {first[:100]}"
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
