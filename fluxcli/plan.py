"""The plan: which precision, what is in memory in which phase, and why. Arithmetic on headers only. Stdlib only.

Sizes are in bytes. Formulas: weights are elements x bytes of the compute dtype; activations were fitted to counted
values of the full-size model (4608 tokens: 0.46 GiB; VAE decode of 1024x1024: 1.5 GiB, both in 16 bit).
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from fluxcli.errors import DoesNotFit, UsageError
from fluxcli.request import GenerationRequest
from quant.checkpoint import Checkpoint, Component
from quant.spec import SCHEMES, TEXT_ENCODER, QuantSpec, is_modulation, layout

if TYPE_CHECKING:
    from fluxcli.hardware import Hardware

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
LONG = {short: long for long, short in SHORT.items()}
TOKEN_ACTIVATIONS = 18  # live (tokens, width) tensors at the peak of a block
UNPACKED_ROWS = 9  # a packed layer's weight while it is unpacked: at most (7 x width, width), and its scales
PIXEL_ACTIVATIONS = 6  # live (first VAE width, height, width) tensors at the peak of decode
RESIDENT_SHARE = 0.25  # components all stay when together they take less than this share of memory
USABLE_SHARE = 0.92
GIB = 2**30


@dataclass(frozen=True)
class MemoryPlan:
    """What a run will do. `dtypes` by component, `peak_bytes` by phase, `keep` what stays loaded after its phase.

    `precision` is that of the transformer's blocks; `spec` says what is packed while loading.
    """

    device: str
    precision: str
    dtypes: dict[str, str]
    peak_bytes: dict[str, int]
    keep: tuple[str, ...]
    reasons: tuple[str, ...]
    spec: QuantSpec | None = None

    def to_json(self) -> dict:
        return asdict(self)


def make_plan(request: GenerationRequest, checkpoint: Checkpoint, hardware: "Hardware") -> MemoryPlan:
    """Plan a run; raises `DoesNotFit` when its largest phase is more than the device has."""
    spec, precision, how = _precision(request, checkpoint)
    dtypes, why = _dtypes(request, checkpoint, hardware, spec)
    weights = sum(weight_bytes(c, dtypes[c.name], spec) for c in checkpoint.components.values())
    small = weights < hardware.total_bytes * RESIDENT_SHARE
    keep = tuple(checkpoint.components) if small else ("transformer", "vae")
    stay = "all components stay loaded: together they are small"
    leave = "text encoders leave after encoding, so that the transformer has the memory"
    reasons = (f"{hardware.device}: {hardware.reason}", *how, why, stay if small else leave)
    peaks = phase_peaks(request, checkpoint, dtypes, keep, spec)
    phase = max(peaks, key=peaks.__getitem__)
    usable = int(hardware.total_bytes * USABLE_SHARE)
    if peaks[phase] > usable:
        needs = f"{phase} needs {peaks[phase] / GIB:.1f} GiB, {hardware.device} has {usable / GIB:.1f} GiB usable"
        hint = "a smaller --size, or -p tiny" if precision else "--precision nf4, or a smaller --size"
        raise DoesNotFit("the model does not fit", which=request.model, why=needs, hint=hint)
    return MemoryPlan(hardware.device, precision or SHORT[dtypes["transformer"]], dtypes, peaks, keep, reasons, spec)


def _precision(request: GenerationRequest, checkpoint: Checkpoint) -> tuple[QuantSpec | None, str, tuple[str, ...]]:
    """(what is packed while loading, the scheme of the blocks or "", reasons)."""
    stored, wanted = checkpoint.components["transformer"].precision, request.precision
    if stored and wanted not in ("auto", stored):
        why = f"its weights are {stored}"
        hint = "the 16-bit model, or --precision auto"
        raise UsageError(f"--precision {wanted} is impossible", which=request.model, why=why, hint=hint)
    if stored:
        return None, stored, (f"{stored}: the weights are stored so",)
    if wanted not in SCHEMES:
        return None, "", ()
    spec = QuantSpec(wanted, TEXT_ENCODER.get(wanted, "keep"))
    return spec, wanted, (f"{wanted}: asked for, packed while loading (flux quantize does that once for all)",)


def check_guidance(request: GenerationRequest, checkpoint: Checkpoint) -> None:
    """Raise `UsageError` where guidance is given to a model without that input, or missing for one with it."""
    if checkpoint.takes_guidance and request.guidance is None:
        raise UsageError("this model needs a guidance", which=request.model, hint="--guidance 3.5")
    if not checkpoint.takes_guidance and request.guidance is not None:
        why = "it has no guidance input, the value would do nothing"
        raise UsageError("guidance without effect", which=request.model, why=why, hint="--guidance none")


def _dtypes(
    request: GenerationRequest, checkpoint: Checkpoint, hardware: "Hardware", spec: QuantSpec | None
) -> tuple[dict[str, str], str]:
    every = dict.fromkeys(checkpoint.components, "float32")
    if request.precision in LONG:
        asked = every | {"transformer": LONG[request.precision]}
        asked |= dict.fromkeys(every, "bfloat16") if request.precision == "bf16" else {}
        return asked, f"{asked['transformer']}: asked for"
    if hardware.kind == "cpu":
        if hardware.bf16:
            return dict.fromkeys(every, "bfloat16"), "bfloat16: this CPU has matrix units for it"
        if max(phase_peaks(request, checkpoint, every, (), spec).values()) <= hardware.total_bytes * USABLE_SHARE:
            return every, "float32: this CPU has no fast bfloat16"
        return dict.fromkeys(every, "bfloat16"), "bfloat16, slowly: float32 does not fit into this RAM"
    if hardware.bf16:
        return dict.fromkeys(every, "bfloat16"), "bfloat16: the device computes it"
    return every | {"transformer": "float16"}, "float16 (encoders and VAE float32): the device has no bfloat16"


def weight_bytes(
    component: Component,
    dtype: str,
    spec: QuantSpec | None = None,
    *,
    select: Callable[[str], bool] = lambda name: True,
) -> int:
    """Bytes of a component's weights in memory: packed ones as stored (or as `spec` will), others in `dtype`."""
    total = 0
    for name, weight in component.weights.items():
        scheme = weight.scheme or (spec.scheme(component.name, name, weight.shape) if spec else "")
        if select(name):
            packed = sum(info.nbytes for info in layout(scheme, weight.info)) if scheme else 0
            total += packed or weight.numel * DTYPE_BYTES[dtype]
    return total


def phase_peaks(
    request: GenerationRequest, checkpoint: Checkpoint, dtypes: dict[str, str], keep: Sequence[str],
    spec: QuantSpec | None = None,
) -> dict[str, int]:  # fmt: skip
    """Bytes in memory at the peak of each phase: what the phase needs, and the encoders where `keep` names them."""
    parts, (width, height) = checkpoint.components, request.size
    bytes_of = {name: weight_bytes(part, dtypes[name], spec) for name, part in parts.items()}
    transformer, vae = parts["transformer"], parts["vae"]
    wide = DTYPE_BYTES[dtypes["transformer"]]
    inner = transformer.config["num_attention_heads"] * transformer.config["attention_head_dim"]
    tables = request.steps * modulation_numel(transformer) // max(1, inner) * wide
    tokens = width * height // 256 + request.text_tokens
    held = bytes_of["vae"] + tables
    resident = weight_bytes(transformer, dtypes["transformer"], spec, select=lambda name: not is_modulation(name))
    unpacked = UNPACKED_ROWS * inner * inner * wide if spec or transformer.precision else 0
    first_width = vae.config["block_out_channels"][0]
    encoders = [bytes_of[name] for name in ("text_encoder", "text_encoder_2")]
    kept = sum(encoders) if "text_encoder_2" in keep else 0
    decode = PIXEL_ACTIVATIONS * width * height * first_width * DTYPE_BYTES[dtypes["vae"]]
    return {
        "encode": max(kept, *encoders),
        "condition": kept + tables + max(weight.numel for weight in transformer.weights.values()) * wide,
        "denoise": kept + resident + unpacked + TOKEN_ACTIVATIONS * tokens * inner * wide + held,
        "decode": kept + resident + held + decode,
    }


def modulation_numel(transformer: Component) -> int:
    """Parameters that only the condition phase reads: the adaLN linears and the time and text embedding."""
    return sum(weight.numel for name, weight in transformer.weights.items() if is_modulation(name))
