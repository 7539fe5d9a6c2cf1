"""From mapped checkpoint files to modules: meta-init, then strict assignment, tensor by tensor.

Knows the model classes and the key dialects of their files; nothing of requests or plans. A missing or extra key or
another shape is an error that names it: no layer is ever left randomly initialized.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from quant.checkpoint import Component
from quant.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import nn

CLIP_PREFIX, CLIP_POSITIONS = "text_model.", "embeddings.position_ids"
T5_SHARED, T5_TIED = "shared.weight", "encoder.embed_tokens.weight"


def load_component(
    component: Component, *, dtype: "torch.dtype", device: str, skip: Callable[[str], bool] = lambda name: False
) -> "nn.Module":
    """Return the component's module in eval mode, weights in `dtype` on `device`; names that `skip` takes stay meta.

    Raises `CheckpointError` for missing, extra or misshapen tensors.
    """
    from torch import nn

    module = build(component)
    names = _names_in_file(component)
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    check_keys(component, expected, {name: component.tensors[stored].shape for name, stored in names.items()})
    wanted = {stored: name for name, stored in names.items() if name != T5_TIED and not skip(name)}
    for stored, tensor in read_tensors(component, list(wanted), dtype=dtype, device=device):
        _set(module, wanted[stored], nn.Parameter(tensor, requires_grad=False))
    for name, buffer in list(module.named_buffers()):
        _set(module, name, buffer.to(device))
    if T5_TIED in names:
        module.encoder.embed_tokens.weight = module.shared.weight
    return module.eval()


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
    names = {name.removeprefix(CLIP_PREFIX): name for name in component.tensors}
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
    """Yield (name, tensor in `dtype` on `device`) for keys of the file, mapped file by mapped file."""
    from safetensors import safe_open

    for path in sorted({component.files[name] for name in names}):
        with safe_open(path, framework="pt", device="cpu") as file:
            for name in names:
                if component.files[name] == path:
                    yield name, file.get_tensor(name).to(device=device, dtype=dtype)
