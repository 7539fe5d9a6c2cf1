"""What a picture costs in bytes and in seconds: arithmetic on headers, sizes and speeds.

Opens no file and knows neither prompts nor files of adapters and pictures: a `Workload` is all it
knows of a request. Sizes are in bytes, speeds in bytes or FLOP a second. The activations of a step
are lines fitted to counted values of the full-size model (`quant.spec`, docs/memory.md). FLOP are 2
for each weight and row, and 4 x tokens^2 x width for the attention of each block; what a step moves
and launches beside its products was counted, too (`steps`). Stdlib only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf, sqrt
from typing import Protocol

from fluxcli.plan import steps
from fluxcli.plan.machine import Hardware, Speeds
from fluxcli.request.fields import GenerationRequest
from fluxcli.request.inputs import acts_in_step
from quant.checkpoint import Checkpoint, Component
from quant.lora import Adapter, Part
from quant.spec import (
    BAKEABLE,
    DEQUANTIZE,
    FAMILIES,
    QUANTIZABLE,
    SCHEMES,
    ActivationLine,
    QuantSpec,
    find_error,
    is_modulation,
    scheme_in_memory,
)
from quant.weights import Weight

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

ENCODER_SCORES = 1.63  # live tensors (heads, tokens, tokens) of T5
ENCODER_WIDE = 4.0  # live tensors (tokens, d_ff) of T5
T5_DEFAULTS = {"num_heads": 64, "d_ff": 10240, "d_model": 4096}  # where the config says nothing
# Temporary ones, of dequantizing a part of a GGUF weight (tests/test_gguf_blocks.py); a kind whose
# codes are looked up by numbers of 32 bits takes more.
DEQUANTIZING_BYTES = 96 << 20
LOOKING_UP_BYTES = {"IQ4_XS": 176 << 20}
LINE_BYTES = 64 << 20  # of them, what the activation lines have
PIXEL_ACTIVATIONS = 6  # live tensors (first width of the VAE, height, width) at the peak of decode
# The same with cuDNN's workspaces and what the allocator cannot use again: 2200 values a pixel at
# this decoder's first width of 128. InvokeAI measured 2185 on an RTX 4090 (invoke-ai/InvokeAI#8414,
# 4.27 GiB reserved for 1024x1024 in bfloat16), ComfyUI reckons with 2178 (comfy/sd.py, `VAE`).
PIXEL_ACTIVATIONS_RESERVED = 2200 / 128
DECODE_BYTES = 12 << 20  # beside these
# The same of the VAE's encoder, counted like the decoder's. What is reserved for it nobody has
# measured; ComfyUI reckons with 1767 values a pixel, and says that it should be less
# (comfy/sd.py, `memory_used_encode`).
INPUT_ACTIVATIONS = 5.03
INPUT_ACTIVATIONS_RESERVED = 1767 / 128
TILE_PX = 512  # of what the VAE does in tiles
VAE_FLOP = 1.0e7  # for each pixel that is decoded
INPUT_FLOP = 4.2e6  # for each pixel that is encoded, counted by torch's FlopCounterMode
TILED_WORK = 1.35  # overlaps of tiles are computed twice
SLOW_BF16 = 0.25  # of float32's speed, on a CPU without units for it
T5_BLOCKS = "encoder.block."
# SigLIP and Redux' embedder, which make text tokens of a picture.
IMAGE_ENCODERS = ("image_encoder", "image_embedder")
IMAGE_ENCODER_BYTES = 128 << 20  # beside their weights
LOOK_TOKENS = 729  # that Redux adds to a prompt's: SigLIP's of 27 x 27 patches
CONTROLNET = "controlnet"  # what the names of such components begin with


@dataclass(frozen=True)
class Workload:
    """All that a plan depends on of a request; any two requests with the same one share a plan."""

    width_px: int
    height_px: int
    text_tokens: int
    steps: int  # that are taken: a picture to start from leaves out the first
    reference_tokens: int = 0  # of pictures that the transformer sees beside its own, in each step
    extra_text_tokens: int = 0  # that are no prompt's, as Redux' of a picture
    passes: int = 1  # of the transformer in a step: two with true guidance
    input_pixels: tuple[int, ...] = ()  # of each picture that the VAE encodes
    # The names of ControlNets' components, one for each control picture, and how many steps each
    # computes in. One component may have several pictures.
    controls: tuple[str, ...] = ()
    control_steps: tuple[int, ...] = ()
    # By component: the numbers of all adapters that stay on the device beside its weights.
    adapter_numel: Mapping[str, int] = field(default_factory=dict)
    # Of all adapters in one step of the transformer.
    adapter_flop: int = 0
    adapter_moved_numel: int = 0  # values that are read and written beside the layers' products
    adapter_launches: int = 0

    @property
    def pixels(self) -> int:
        """How many there are."""
        return self.width_px * self.height_px

    @property
    def image_tokens(self) -> int:
        """Rows that the transformer computes for the picture: one for 16 x 16 pixels."""
        return self.pixels // 256

    @property
    def image_rows(self) -> int:
        """Rows of the stream that the picture is in: those of references, too."""
        return self.image_tokens + self.reference_tokens

    @property
    def text_rows(self) -> int:
        """Rows of the stream that the prompt is in: those that Redux adds, too."""
        return self.text_tokens + self.extra_text_tokens

    @property
    def rows(self) -> int:
        """Rows that attention looks at."""
        return self.image_rows + self.text_rows

    @property
    def largest_input_pixels(self) -> int:
        """Pixels of the largest picture that the VAE encodes, 0 where it encodes none."""
        return max(self.input_pixels, default=0)


class Measured(Protocol):
    """A picture whose size is known."""

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""


class Window(Protocol):
    """When a control picture acts, and what looks at it."""

    @property
    def part(self) -> str:
        """The name of a ControlNet's component; "" where the transformer itself looks at it."""

    @property
    def start(self) -> float:
        """The share of the steps from which on it acts."""

    @property
    def end(self) -> float:
        """The share of the steps until which it acts."""


def make_workload(
    request: GenerationRequest,
    adapters: Sequence[Adapter] = (),
    *,
    references: Sequence[Measured] = (),
    controls: Sequence[Window] = (),
) -> Workload:
    """What a plan must know of a request that is drawn with these adapters.

    `references` and `controls` are those that the request names, the latter resolved.
    """
    width_px, height_px = request.size
    steps = request.steps_taken
    networks = [control for control in controls if control.part]
    reference_pixels = _count_canvas_pixels(request, references)
    components = {part.component for adapter in adapters for part in adapter.parts}
    workload = Workload(
        width_px=width_px,
        height_px=height_px,
        text_tokens=request.text_tokens,
        steps=steps,
        reference_tokens=reference_pixels // 256,
        extra_text_tokens=LOOK_TOKENS if request.redux else 0,
        passes=2 if request.true_scale > 1 else 1,
        input_pixels=_list_input_pixels(request, reference_pixels, controls=len(controls)),
        controls=tuple(control.part for control in networks),
        control_steps=tuple(
            count_control_steps(steps, start=control.start, end=control.end) for control in networks
        ),
        adapter_numel={
            name: sum(adapter.numel(name) for adapter in adapters) for name in sorted(components)
        },
    )
    flop = moved_numel = launches = 0
    for adapter in adapters:
        for part in adapter.active_parts("transformer"):
            if part.modulates or len(part.shape) == 1:
                continue
            tokens = _count_tokens(workload, part)
            rows, columns = part.shape
            flop += 2 * tokens * part.held_numel
            # The layer's input is read; its output is read, and written with the sum.
            moved_numel += tokens * (columns + 2 * rows)
            launches += 1 + len(part.layers)
    return replace(
        workload, adapter_flop=flop, adapter_moved_numel=moved_numel, adapter_launches=launches
    )


def _count_canvas_pixels(request: GenerationRequest, references: Sequence[Measured]) -> int:
    """The pixels of all references together, as the transformer sees them."""
    if not references:
        return 0
    width_px, height_px = request.fit_canvas([each.size for each in references])
    return width_px * height_px


def _list_input_pixels(
    request: GenerationRequest, reference_pixels: int, *, controls: int
) -> tuple[int, ...]:
    """The pixels of each picture that the VAE encodes for a request with so many controls."""
    width_px, height_px = request.size
    found = [width_px * height_px] * (controls + bool(request.image or request.mask))
    if reference_pixels:
        found.append(reference_pixels)
    return tuple(found)


def _count_tokens(workload: Workload, part: Part) -> int:
    """How many tokens the layers of an adapter's part see in a step."""
    layer = next(iter(part.layers))
    if layer.startswith("single"):
        return workload.rows
    return workload.text_rows if _is_for_text(layer) else workload.image_rows


def count_control_steps(steps: int, *, start: float, end: float) -> int:
    """In how many of the steps a ControlNet computes: those that lie within its shares of all."""
    return sum(acts_in_step(index, steps, span=(start, end)) for index in range(steps))


@dataclass(frozen=True)
class Block:
    """One block of the transformer, without its modulation."""

    nbytes: int  # on the device
    image_numel: int  # weights that image tokens are multiplied by
    text_numel: int  # weights that text tokens are multiplied by
    is_single: bool  # image and text tokens are one sequence there
    numel_by_form: Mapping[str, int]  # weights by the form they have on the device, "" for 16 bit


@dataclass(frozen=True)
class ControlCost:
    """What a ControlNet takes, whatever number of pictures it is given."""

    name: str  # of its component
    blocks: tuple[Block, ...]  # in the order of the forward, before the transformer's
    rest_bytes: int  # neither in a block nor modulation
    rest_numel: int
    quantized_numel: int  # that is quantized while loading
    residual_tensors: int  # (1, S, D) that its blocks give to the transformer's
    pictures: int
    calls: int  # in all steps, for all its pictures

    @property
    def blocks_bytes(self) -> int:
        """All blocks together."""
        return sum(block.nbytes for block in self.blocks)

    @property
    def nbytes(self) -> int:
        """What a step needs of it: all but its modulation."""
        return self.rest_bytes + self.blocks_bytes

    @property
    def slot_bytes(self) -> int:
        """Of its largest block."""
        return max((block.nbytes for block in self.blocks), default=0)


@dataclass(frozen=True)
class Cost:
    """What a workload makes of a checkpoint in one precision.

    Weights are split as they are placed; an adapter's bytes are with the weights that it stays
    beside. "Beside" means what a phase needs on top of weights.
    """

    workload: Workload
    clip_bytes: int
    t5_bytes: int
    t5_numel: int
    t5_block_bytes: int  # of the largest block
    t5_rest_bytes: int  # in no block: embeddings, the last norm, adapters
    blocks: tuple[Block, ...]  # of the transformer, in the order of the forward
    rest_bytes: int  # of the transformer: neither in a block nor modulation
    modulation_bytes: int
    largest_modulation_bytes: int  # of one weight
    modulation_numel: int
    dequantizing_bytes: int  # beside a modulation weight that is stored as GGUF
    vae_bytes: int
    stored_bytes: int  # of all files
    width: int  # of the transformer, in channels
    element_bytes: int  # of what the transformer computes in
    encode_bytes: int  # beside T5
    tables_bytes: int  # of modulation, for all steps of one picture
    denoise_bytes: int  # beside the transformer
    decode_bytes: int  # beside the VAE, for the whole picture at once
    decode_tiled_bytes: int  # beside the VAE, tile by tile
    workspace_bytes: int  # of cuDNN, on top of `decode_bytes`
    workspace_tiled_bytes: int  # of cuDNN, on top of `decode_tiled_bytes`
    controls: tuple[ControlCost, ...] = ()  # in the order in which they compute
    image_encoders_bytes: int = 0  # of SigLIP and Redux' embedder, where they are needed
    prepare_bytes: int = 0  # beside the VAE, to encode the largest picture at once
    prepare_tiled_bytes: int = 0  # beside the VAE, tile by tile
    prepare_workspace_bytes: int = 0  # of cuDNN, on top of `prepare_bytes`
    prepare_workspace_tiled_bytes: int = 0  # of cuDNN, on top of `prepare_tiled_bytes`

    @property
    def blocks_bytes(self) -> int:
        """All blocks together."""
        return sum(block.nbytes for block in self.blocks)

    @property
    def transformer_bytes(self) -> int:
        """What a step needs of the transformer: all but its modulation."""
        return self.rest_bytes + self.blocks_bytes

    @property
    def controls_bytes(self) -> int:
        """What a step needs of all ControlNets."""
        return sum(control.nbytes for control in self.controls)

    @property
    def control_blocks(self) -> tuple[Block, ...]:
        """The blocks of all ControlNets, in the order in which they compute."""
        return tuple(block for control in self.controls for block in control.blocks)

    @property
    def encoders_bytes(self) -> int:
        """All that reads prompts, and pictures as prompts."""
        return self.clip_bytes + self.t5_bytes + self.image_encoders_bytes

    @property
    def total_bytes(self) -> int:
        """All components but for the modulation."""
        of_steps_bytes = self.transformer_bytes + self.controls_bytes
        return self.encoders_bytes + of_steps_bytes + self.vae_bytes


# --- bytes of weights


def block_names(transformer: Component) -> list[str]:
    """The blocks of a transformer or a ControlNet in the order of the forward.

    The double ones come first, then the single ones.
    """
    config = transformer.config
    double = [f"transformer_blocks.{i}" for i in range(config["num_layers"])]
    single = [f"single_transformer_blocks.{i}" for i in range(config["num_single_layers"])]
    return double + single


def is_control(name: str) -> bool:
    """Whether a component of this name is a ControlNet."""
    return name.startswith(CONTROLNET)


def find_control_spec(precision: str) -> QuantSpec | None:
    """What ControlNets in 16 bit are quantized to while they are loaded beside a transformer.

    They get its precision, whether it was quantized before or is now; None where flux cannot
    quantize to that.
    """
    if precision not in BAKEABLE:
        return None
    return QuantSpec(precision, SCHEMES[precision].text_encoder)


def t5_block_names(t5: Component) -> list[str]:
    """T5's blocks in the order of the forward."""
    numbers = set()
    for name in t5.weights:
        number = name.removeprefix(T5_BLOCKS).split(".")[0]
        if name.startswith(T5_BLOCKS) and number.isdecimal():
            numbers.add(int(number))
    return [f"{T5_BLOCKS}{number}" for number in sorted(numbers)]


def weight_bytes(weight: Weight, component: str, *, dtype: str, spec: QuantSpec | None) -> int:
    """Bytes of a weight in memory: as it is stored, or as `spec` will store it, else in `dtype`."""
    form = _find_form(weight, component, spec)
    if form:
        return weight.bytes_in(form)
    return weight.numel * DTYPE_BYTES[dtype]


def _find_form(weight: Weight, component: str, spec: QuantSpec | None) -> str:
    """The form of a weight in memory: as it is stored, or as `spec` will store it; "" for wide."""
    if spec and not weight.scheme:
        return spec.choose_scheme(component, weight.name, weight.shape)
    return scheme_in_memory(component, weight.name, weight.scheme)


def estimate_error(transformer: Component, spec: QuantSpec | None) -> float:
    """The relative error of a layer's output, over the weights of the blocks: root mean square."""
    total_numel = 0
    squares = 0.0
    for name, weight in transformer.weights.items():
        if is_modulation(name) or not QUANTIZABLE[transformer.name].fullmatch(name):
            continue
        form = _find_form(weight, transformer.name, spec)
        is_rotated = not weight.scheme or weight.rotation > 0
        squares += weight.numel * find_error(form, is_rotated=is_rotated) ** 2
        total_numel += weight.numel
    return sqrt(squares / total_numel) if total_numel else 0.0


def component_bytes(
    component: Component, *, dtype: str, spec: QuantSpec | None, prefix: str = ""
) -> int:
    """Bytes in memory of a component's weights, or of those whose names begin with `prefix`."""
    return sum(
        weight_bytes(weight, component.name, dtype=dtype, spec=spec)
        for name, weight in component.weights.items()
        if name.startswith(prefix)
    )


def estimate_cost(
    workload: Workload,
    checkpoint: Checkpoint,
    *,
    dtypes: Mapping[str, str],
    spec: QuantSpec | None,
    lines: Sequence[ActivationLine],
    control_spec: QuantSpec | None = None,
    has_workspaces: bool = False,
) -> Cost:
    """The bytes of every part that is placed by itself, and of what is needed beside them.

    `dtypes` has what each component computes in, `spec` what is quantized while loading, of
    ControlNets `control_spec`, and `lines` the activations of the transformer's precision, of which
    the largest counts. With `has_workspaces` convolutions are cuDNN's, which takes memory of its
    own.
    """
    parts = checkpoint.components
    t5 = parts["text_encoder_2"]
    transformer = parts["transformer"]
    wide_bytes = DTYPE_BYTES[dtypes["transformer"]]
    held_bytes = {
        name: numel * DTYPE_BYTES[dtypes[name]] for name, numel in workload.adapter_numel.items()
    }
    loaded_bytes = {}
    for name in ("text_encoder", "text_encoder_2", "vae"):
        size = component_bytes(parts[name], dtype=dtypes[name], spec=spec)
        loaded_bytes[name] = size + held_bytes.get(name, 0)
    t5_blocks = [
        component_bytes(t5, dtype=dtypes[t5.name], spec=spec, prefix=f"{block}.")
        for block in t5_block_names(t5)
    ]
    blocks, rest = _split_blocks(transformer, dtype=dtypes["transformer"], spec=spec)
    rest_bytes = sum(
        weight_bytes(w, transformer.name, dtype=dtypes["transformer"], spec=spec) for w in rest
    )
    stepping = [parts[name] for name in dict.fromkeys(workload.controls)]
    modulation_numels = [
        weight.numel
        for part in (*stepping, transformer)
        for name, weight in part.weights.items()
        if is_modulation(name)
    ]
    # One table for each pass of the transformer, and one for each ControlNet.
    outputs = workload.passes * _count_outputs(transformer)
    outputs += sum(_count_outputs(part) for part in stepping)
    config = transformer.config
    width = config["num_attention_heads"] * config["attention_head_dim"]
    dequantizing_bytes = count_temporary_bytes(transformer)
    controls = tuple(
        _estimate_control(name, workload, parts, dtypes=dtypes, spec=control_spec)
        for name in dict.fromkeys(workload.controls)
    )
    denoise_bytes = _estimate_step(workload, lines, width=width, dtype=dtypes["transformer"])
    denoise_bytes += max(0, dequantizing_bytes - LINE_BYTES)
    denoise_bytes += _count_control_numel(controls, workload) * width * wide_bytes
    vae_dtype = dtypes["vae"]
    input_pixels = workload.largest_input_pixels
    tile_pixels = min(workload.width_px, TILE_PX) * min(workload.height_px, TILE_PX)
    input_tile_pixels = min(input_pixels, TILE_PX**2)
    of_pixel = _bytes_of_a_pixel(parts["vae"], vae_dtype, PIXEL_ACTIVATIONS)
    of_input_pixel = _bytes_of_a_pixel(parts["vae"], vae_dtype, INPUT_ACTIVATIONS)
    # What cuDNN and the allocator take on top of these.
    more_of_pixel = more_of_input_pixel = 0
    if has_workspaces:
        reserved = _bytes_of_a_pixel(parts["vae"], vae_dtype, PIXEL_ACTIVATIONS_RESERVED)
        more_of_pixel = reserved - of_pixel
        reserved = _bytes_of_a_pixel(parts["vae"], vae_dtype, INPUT_ACTIVATIONS_RESERVED)
        more_of_input_pixel = reserved - of_input_pixel
    # Three channels, twice: the tiles that are done, and the picture that they are joined to.
    joined_bytes = 2 * 3 * DTYPE_BYTES[vae_dtype] * workload.pixels
    return Cost(
        workload=workload,
        clip_bytes=loaded_bytes["text_encoder"],
        t5_bytes=loaded_bytes[t5.name],
        t5_numel=t5.numel,
        t5_block_bytes=max(t5_blocks, default=0),
        t5_rest_bytes=loaded_bytes[t5.name] - sum(t5_blocks),
        blocks=blocks,
        rest_bytes=rest_bytes + held_bytes.get("transformer", 0),
        modulation_bytes=sum(modulation_numels) * wide_bytes,
        largest_modulation_bytes=max(modulation_numels, default=0) * wide_bytes,
        modulation_numel=sum(modulation_numels),
        dequantizing_bytes=dequantizing_bytes,
        vae_bytes=loaded_bytes["vae"],
        stored_bytes=checkpoint.nbytes,
        width=width,
        element_bytes=wide_bytes,
        encode_bytes=_estimate_encode(workload, t5, dtype=dtypes[t5.name], spec=spec),
        tables_bytes=workload.steps * outputs * wide_bytes,
        denoise_bytes=denoise_bytes,
        decode_bytes=of_pixel * workload.pixels + DECODE_BYTES,
        decode_tiled_bytes=of_pixel * tile_pixels + joined_bytes + DECODE_BYTES,
        workspace_bytes=more_of_pixel * workload.pixels,
        workspace_tiled_bytes=more_of_pixel * tile_pixels,
        controls=controls,
        image_encoders_bytes=_count_image_encoders(workload, parts, dtypes),
        prepare_bytes=of_input_pixel * input_pixels + DECODE_BYTES,
        prepare_tiled_bytes=of_input_pixel * input_tile_pixels + DECODE_BYTES,
        prepare_workspace_bytes=more_of_input_pixel * input_pixels,
        prepare_workspace_tiled_bytes=more_of_input_pixel * input_tile_pixels,
    )


def _count_outputs(component: Component) -> int:
    """Numbers in a row of a component's modulation table."""
    return sum(
        weight.shape[0]
        for name, weight in component.weights.items()
        if is_modulation(name) and name.endswith(".linear.weight")
    )


def _count_image_encoders(
    workload: Workload, parts: Mapping[str, Component], dtypes: Mapping[str, str]
) -> int:
    """Bytes of what makes text tokens of a picture, where the workload has such tokens."""
    if not workload.extra_text_tokens:
        return 0
    return sum(
        component_bytes(parts[name], dtype=dtypes[name], spec=None)
        for name in IMAGE_ENCODERS
        if name in parts
    )


def _estimate_control(
    name: str,
    workload: Workload,
    parts: Mapping[str, Component],
    *,
    dtypes: Mapping[str, str],
    spec: QuantSpec | None,
) -> ControlCost:
    """What a ControlNet of the workload takes, with all its pictures."""
    component = parts[name]
    blocks, rest = _split_blocks(component, dtype=dtypes[name], spec=spec)
    steps = [
        count
        for of_name, count in zip(workload.controls, workload.control_steps, strict=True)
        if of_name == name
    ]
    return ControlCost(
        name=name,
        blocks=blocks,
        rest_bytes=sum(
            weight_bytes(w, component.name, dtype=dtypes[name], spec=spec) for w in rest
        ),
        rest_numel=sum(weight.numel for weight in rest),
        quantized_numel=sum(
            weight.numel
            for weight in component.weights.values()
            if not weight.scheme and _find_form(weight, component.name, spec)
        ),
        residual_tensors=len(blocks),
        pictures=len(steps),
        calls=sum(steps),
    )


def _count_control_numel(controls: Sequence[ControlCost], workload: Workload) -> int:
    """Values for each channel that ControlNets keep beside the transformer's own in a step.

    Tensors for the picture's tokens after blocks, of which those of a second picture are there
    until they are added to the first one's; and the embedded text and control of each picture.
    """
    tensors = [control.residual_tensors for control in controls for _ in range(control.pictures)]
    kept = sum(sorted(tensors, reverse=True)[:2])
    return kept * workload.image_tokens + len(tensors) * workload.rows


def _split_blocks(
    component: Component, *, dtype: str, spec: QuantSpec | None
) -> tuple[tuple[Block, ...], list[Weight]]:
    """The blocks of a transformer or a ControlNet without modulation, and what is in no block."""
    inside: dict[str, list[Weight]] = {name: [] for name in block_names(component)}
    rest = []
    for name, weight in component.weights.items():
        if is_modulation(name):
            continue
        block = ".".join(name.split(".")[:2])
        if block in inside:
            inside[block].append(weight)
        else:
            rest.append(weight)
    blocks = []
    for block_name, weights in inside.items():
        sizes = [weight_bytes(w, component.name, dtype=dtype, spec=spec) for w in weights]
        is_single = block_name.startswith("single")
        text = [w for w in weights if _is_for_text(w.name)]
        image = [w for w in weights if not _is_for_text(w.name)]
        if is_single:
            text = image
        numel_by_form: dict[str, int] = {}
        for weight in weights:
            form = _find_form(weight, component.name, spec)
            numel_by_form[form] = numel_by_form.get(form, 0) + weight.numel
        made = Block(
            sum(sizes),
            image_numel=sum(weight.numel for weight in image),
            text_numel=sum(weight.numel for weight in text),
            is_single=is_single,
            numel_by_form=numel_by_form,
        )
        blocks.append(made)
    return tuple(blocks), rest


def _is_for_text(name: str) -> bool:
    """Whether a double block multiplies its text tokens by this weight, not its image tokens."""
    return "add_" in name or "_context" in name


# --- bytes beside weights


def count_temporary_bytes(component: Component) -> int:
    """The most bytes that dequantizing a part of a weight in blocks takes beside the result."""
    if component.precision not in ("gguf", "nvfp4", "mxfp8"):
        return 0
    kinds = {weight.scheme for weight in component.weights.values()}
    return max(LOOKING_UP_BYTES.get(kind, DEQUANTIZING_BYTES) for kind in kinds)


def _estimate_encode(
    workload: Workload, t5: Component, *, dtype: str, spec: QuantSpec | None
) -> int:
    """Bytes beside T5's weights: attention scores, the wide layer, and a dequantized weight."""
    known = T5_DEFAULTS | t5.config
    tokens = workload.text_tokens
    numel = ENCODER_SCORES * known["num_heads"] * tokens**2
    numel += ENCODER_WIDE * known["d_ff"] * tokens
    if t5.precision or (spec and spec.text_encoder != "keep"):
        numel += known["d_ff"] * known["d_model"]
    return int(numel * DTYPE_BYTES[dtype]) + count_temporary_bytes(t5)


def _estimate_step(
    workload: Workload, lines: Sequence[ActivationLine], *, width: int, dtype: str
) -> int:
    """Bytes beside the transformer's weights at the peak of a step: the largest of the lines."""
    tokens = workload.rows
    numel = max((line.per_token * tokens + line.per_width * width) * width for line in lines)
    return int(numel * DTYPE_BYTES[dtype])


def _bytes_of_a_pixel(vae: Component, dtype: str, tensors: float) -> int:
    """Bytes that the VAE takes for each pixel that it has in hand.

    `tensors` says how many there are with the VAE's first width of channels.
    """
    channels: int = vae.config["block_out_channels"][0]
    return int(tensors * channels * DTYPE_BYTES[dtype])


# --- seconds


def block_seconds(cost: Cost, hardware: Hardware, speeds: Speeds) -> list[float]:
    """Seconds that each block computes in one step, what is in no block spread over them.

    `speeds` are the hardware's own, or what is taken for them. A block takes as long as its
    products and the bytes that are moved beside them, or as the host needs to launch them.
    """
    moved_bytes = _scale_outside(cost) + cost.workload.adapter_moved_numel * cost.element_bytes
    launches = steps.OUTSIDE.launches + cost.workload.adapter_launches
    outside_s = moved_bytes / speeds.memory_bytes + cost.workload.adapter_flop / speeds.wide
    outside_s = max(outside_s, launches * speeds.launch_s) / len(cost.blocks)
    return [_estimate_block(cost, block, hardware, speeds) + outside_s for block in cost.blocks]


def control_seconds(
    cost: Cost, control: ControlCost, hardware: Hardware, speeds: Speeds
) -> list[float]:
    """Seconds that each block of a ControlNet computes in one call, as of `block_seconds`."""
    outside_s = 2 * control.rest_numel * cost.workload.image_rows / speeds.wide
    outside_s /= len(control.blocks)
    return [_estimate_block(cost, block, hardware, speeds) + outside_s for block in control.blocks]


def _scale_outside(cost: Cost) -> float:
    """Bytes that a step moves outside of its blocks."""
    tokens = cost.workload.rows
    per_value = cost.element_bytes / 2 * tokens * cost.width / (steps.TOKENS * steps.WIDTH)
    return steps.OUTSIDE.moved_mb * 1e6 * per_value


def _estimate_block(cost: Cost, block: Block, hardware: Hardware, speeds: Speeds) -> float:
    """Seconds that a block computes in one step."""
    image = cost.workload.image_rows
    text = cost.workload.text_rows
    flop = 2 * (block.image_numel * image + block.text_numel * text)
    total_numel = block.image_numel if block.is_single else block.image_numel + block.text_numel
    device_s = 4 * (image + text) ** 2 * cost.width / speeds.attention
    launches = 0.0
    for form, numel in block.numel_by_form.items():
        scheme = FAMILIES.get(form, "")
        multiply = hardware.find_multiply(scheme)
        key = steps.find_row(form, multiply)
        share = numel / total_numel
        flops = speeds.wide if multiply == DEQUANTIZE else speeds.of(scheme)
        moved_bytes = steps.moved_bytes(
            key,
            is_single=block.is_single,
            numel=total_numel,
            tokens=image + text,
            width=cost.width,
            element_bytes=cost.element_bytes,
        )
        device_s += share * (flop / flops + moved_bytes / speeds.memory_bytes)
        launches += share * steps.launches_of(key, is_single=block.is_single)
    return max(device_s, launches * speeds.launch_s)


@dataclass(frozen=True)
class Bus:
    """How fast blocks come from RAM, in bytes a second."""

    bus_bytes: float  # from pinned memory
    fed_bytes: float  # from other memory, by way of a feeder
    pin_limit_bytes: float = inf  # how much is pinned at most

    def copy_seconds(self, sizes: Sequence[int]) -> list[float]:
        """Seconds that blocks of these bytes take, pinned one by one until the limit."""
        found = []
        pinned_bytes = 0
        for size in sizes:
            pinned_bytes += size
            is_pinned = pinned_bytes <= self.pin_limit_bytes
            found.append(size / (self.bus_bytes if is_pinned else self.fed_bytes))
        return found


def put_before(cost: Cost, control: ControlCost) -> Cost:
    """The cost with a ControlNet's blocks before the transformer's, as they compute."""
    return replace(cost, blocks=(*control.blocks, *cost.blocks))


def choose_streamed(
    cost: Cost, compute_s: Sequence[float], count: int, *, bus: Bus
) -> tuple[int, ...]:
    """Which `count` blocks are streamed, by their indexes, so that a step takes the least seconds.

    They are spread evenly over the seconds that the blocks compute (`compute_s`), so that the bus
    neither idles nor makes a block wait. Two ways are compared: of all blocks, or single blocks
    first, which have half the bytes for the same seconds. Of equals the one with fewer bytes is
    taken.
    """
    every = range(len(compute_s))
    single = [i for i in every if cost.blocks[i].is_single]
    double = [i for i in every if i not in single]
    from_single = _spread_evenly(single, compute_s, min(count, len(single)))
    from_double = _spread_evenly(double, compute_s, count - len(from_single))
    of_all = _spread_evenly(every, compute_s, count)
    single_first = tuple(sorted((*from_double, *from_single)))

    def price(chosen: tuple[int, ...]) -> tuple[float, int]:
        taken_s = step_seconds(cost, compute_s, chosen, bus=bus)
        return round(taken_s, 4), sum(cost.blocks[i].nbytes for i in chosen)

    return min(of_all, single_first, key=price)


def _spread_evenly(among: Sequence[int], compute_s: Sequence[float], count: int) -> tuple[int, ...]:
    """`count` of the blocks in `among`, each in the middle of its equal share of their seconds."""
    total_s = sum(compute_s[i] for i in among)
    passed_s = 0.0
    chosen: list[int] = []
    for position, i in enumerate(among):
        passed_s += compute_s[i]
        wanted = count - len(chosen)
        is_due = wanted > 0 and passed_s >= total_s * (len(chosen) + 0.5) / count
        is_last_chance = wanted == len(among) - position
        if is_due or is_last_chance:
            chosen.append(i)
    return tuple(chosen)


def step_seconds(
    cost: Cost, compute_s: Sequence[float], streamed: Sequence[int], *, bus: Bus
) -> float:
    """Seconds of a step when the blocks in `streamed` come over the bus through two slots.

    Plays the steps through: a slot is filled again as soon as its block has computed, one copy at
    a time, and a block waits until it is there. The first step also fills the slots; the third is
    like all others, and is returned.
    """
    order = {block: k for k, block in enumerate(streamed)}
    copy_s = bus.copy_seconds([cost.blocks[block].nbytes for block in streamed])
    ready_s: dict[int, float] = {}  # when the k-th streamed block is there
    bus_free_s = 0.0
    now_s = 0.0
    started_s = 0.0

    def copy(k: int, since_s: float) -> None:
        nonlocal bus_free_s
        bus_free_s = max(bus_free_s, since_s) + copy_s[k]
        ready_s[k] = bus_free_s

    for k in range(min(2, len(streamed))):
        copy(k, 0.0)
    for _ in range(3):
        started_s = now_s
        for block, block_s in enumerate(compute_s):
            if block not in order:
                now_s += block_s
                continue
            k = order[block]
            now_s = max(now_s, ready_s[k]) + block_s
            if len(streamed) > 2:
                following = k + 2 if k + 2 < len(streamed) else k % 2
                copy(following, now_s)
    return now_s - started_s
