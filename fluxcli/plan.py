"""The plan: which precision, what is in memory in which phase, and why. Arithmetic on headers only. Stdlib only.

Sizes are in bytes. Formulas: weights are elements x bytes of the compute dtype; activations were fitted to counted
values of the full-size model (4608 tokens: 0.46 GiB; VAE decode of 1024x1024: 1.5 GiB, both in 16 bit).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from fluxcli.errors import DoesNotFit, UsageError
from fluxcli.request import GenerationRequest
from quant.checkpoint import Checkpoint, Component, is_modulation

if TYPE_CHECKING:
    from fluxcli.hardware import Hardware

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
TOKEN_ACTIVATIONS = 18  # live (tokens, width) tensors at the peak of a block
PIXEL_ACTIVATIONS = 6  # live (first VAE width, height, width) tensors at the peak of decode
RESIDENT_SHARE = 0.25  # components all stay when together they take less than this share of memory
USABLE_SHARE = 0.92
GIB = 2**30


@dataclass(frozen=True)
class MemoryPlan:
    """What a run will do. `dtypes` by component, `peak_bytes` by phase, `keep` what stays loaded after its phase."""

    device: str
    dtypes: dict[str, str]
    peak_bytes: dict[str, int]
    keep: tuple[str, ...]
    reasons: tuple[str, ...]

    def to_json(self) -> dict:
        return asdict(self)


def make_plan(request: GenerationRequest, checkpoint: Checkpoint, hardware: "Hardware") -> MemoryPlan:
    """Plan a run; raises `DoesNotFit` when its largest phase is more than the device has."""
    dtypes, why = _dtypes(request, checkpoint, hardware)
    weights = sum(c.numel * DTYPE_BYTES[dtypes[c.name]] for c in checkpoint.components.values())
    small = weights < hardware.total_bytes * RESIDENT_SHARE
    keep = tuple(checkpoint.components) if small else ("transformer", "vae")
    stay = "all components stay loaded: together they are small"
    leave = "text encoders leave after encoding, so that the transformer has the memory"
    reasons = (f"{hardware.device}: {hardware.reason}", why, stay if small else leave)
    peaks = phase_peaks(request, checkpoint, dtypes, keep)
    phase = max(peaks, key=peaks.__getitem__)
    usable = int(hardware.total_bytes * USABLE_SHARE)
    if peaks[phase] > usable:
        needs = f"{phase} needs {peaks[phase] / GIB:.1f} GiB, {hardware.device} has {usable / GIB:.1f} GiB usable"
        raise DoesNotFit("the model does not fit", which=request.model, why=needs, hint="a smaller --size, or -p tiny")
    return MemoryPlan(hardware.device, dtypes, peaks, keep, reasons)


def check_guidance(request: GenerationRequest, checkpoint: Checkpoint) -> None:
    """Raise `UsageError` where guidance is given to a model without that input, or missing for one with it."""
    if checkpoint.takes_guidance and request.guidance is None:
        raise UsageError("this model needs a guidance", which=request.model, hint="--guidance 3.5")
    if not checkpoint.takes_guidance and request.guidance is not None:
        why = "it has no guidance input, the value would do nothing"
        raise UsageError("guidance without effect", which=request.model, why=why, hint="--guidance none")


def _dtypes(request: GenerationRequest, checkpoint: Checkpoint, hardware: "Hardware") -> tuple[dict[str, str], str]:
    every = dict.fromkeys(checkpoint.components, "float32")
    if hardware.kind == "cpu":
        if hardware.bf16:
            return dict.fromkeys(every, "bfloat16"), "bfloat16: this CPU has matrix units for it"
        if max(phase_peaks(request, checkpoint, every, ()).values()) <= hardware.total_bytes * USABLE_SHARE:
            return every, "float32: this CPU has no fast bfloat16"
        return dict.fromkeys(every, "bfloat16"), "bfloat16, slowly: float32 does not fit into this RAM"
    if hardware.bf16:
        return dict.fromkeys(every, "bfloat16"), "bfloat16: the device computes it"
    return every | {"transformer": "float16"}, "float16 (encoders and VAE float32): the device has no bfloat16"


def phase_peaks(
    request: GenerationRequest, checkpoint: Checkpoint, dtypes: dict[str, str], keep: Sequence[str]
) -> dict[str, int]:
    """Bytes in memory at the peak of each phase: what the phase needs, and the encoders where `keep` names them."""

    def width_bytes(name: str) -> int:
        return DTYPE_BYTES[dtypes[name]]

    parts, (width, height) = checkpoint.components, request.size
    transformer, vae = parts["transformer"], parts["vae"]
    inner = transformer.config["num_attention_heads"] * transformer.config["attention_head_dim"]
    modulation = modulation_numel(transformer)
    tables = request.steps * modulation // max(1, inner) * width_bytes("transformer")
    tokens = width * height // 256 + request.text_tokens
    held = vae.numel * width_bytes("vae") + tables
    denoise = (transformer.numel - modulation + TOKEN_ACTIVATIONS * tokens * inner) * width_bytes("transformer")
    first_width = vae.config["block_out_channels"][0]
    resident = (transformer.numel - modulation) * width_bytes("transformer")
    encoders = [parts[name].numel * width_bytes(name) for name in ("text_encoder", "text_encoder_2")]
    kept = sum(encoders) if "text_encoder_2" in keep else 0
    return {
        "encode": max(kept, *encoders),
        "condition": kept + tables + _largest(transformer) * width_bytes("transformer"),
        "denoise": kept + denoise + held,
        "decode": kept + resident + held + PIXEL_ACTIVATIONS * width * height * first_width * width_bytes("vae"),
    }


def modulation_numel(transformer: Component) -> int:
    """Parameters that only the condition phase reads: the adaLN linears and the time and text embedding."""
    return sum(t.numel for name, t in transformer.tensors.items() if is_modulation(name))


def _largest(component: Component) -> int:
    return max(tensor.numel for tensor in component.tensors.values())
