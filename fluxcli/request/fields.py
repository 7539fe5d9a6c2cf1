"""What one row asks for: which picture, with which resources, into which file.

Three frozen dataclasses, because they have different users: the engine sees the request alone, the
planner its size and the resources, the writer of files the output. `Order` joins them. How text
becomes a value, and which values are taken, stands in `settings`. Knows nothing of files, models
or devices. Stdlib only. Sizes are in pixels, (width, height).
"""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from fluxcli.errors import UsageError
from fluxcli.request.inputs import ControlRef, Expand, ReduxRef
from fluxcli.request.settings import (
    FROM_PICTURES,
    MAX_SEED,
    SETTINGS,
    LoraRef,
    check,
    coerce,
    flag,
    to_json_value,
)
from fluxcli.request.sizes import check_size, fit_references, size_of

MAX_PROMPT_BYTES = 8192  # four times what 512 T5 tokens hold, and what fits into a jpg's metadata
DEFAULT_TRUE_CFG = 3.0  # where a negative prompt alone is given
DEFAULT_STRENGTH = 0.6  # diffusers' own, of FluxImg2ImgPipeline
MAX_RANDOM_SEED = 2**32  # short enough to be typed again


def check_prompt(text: str) -> None:
    """Raise `UsageError` for a prompt that is blank, too long or no text (lone surrogates)."""
    if not text.strip():
        raise UsageError(
            "the prompt is empty",
            hint='flux generate "a red circle on a blue background" -p tiny',
        )
    try:
        size_bytes = len(text.encode())
    except UnicodeEncodeError as error:
        why = f"character {error.start}"
        hint = "a prompt is UTF-8"
        raise UsageError("the prompt is not valid text", why=why, hint=hint) from error
    if size_bytes > MAX_PROMPT_BYTES:
        why = f"{size_bytes} bytes, at most {MAX_PROMPT_BYTES} are taken"
        hint = "shorten it: FLUX.1 reads 512 tokens, about 2000 letters"
        raise UsageError("the prompt is too long", why=why, hint=hint)


@dataclass(frozen=True)
class GenerationRequest:
    """Which picture is wanted: everything that decides it but the hardware's arithmetic.

    `seed` -1 asks for a random one. `guidance` None is for models without that input. Either
    `width` and `height` are given, or `aspect_ratio` and `image_size`, the longest side. `image`,
    `mask` and `reference` are files of pictures; `strength` None is the default of what is drawn.
    The prompt is empty only beside `redux`.
    """

    prompt: str
    model: str = "black-forest-labs/FLUX.1-dev"
    steps: int = 28
    guidance: float | None = 3.5
    seed: int = -1
    aspect_ratio: str = "1:1"
    image_size: int = 1024
    width: int | None = None
    height: int | None = None
    text_tokens: int = 512
    text_encoders: tuple[str, ...] = ()
    vae: str | None = None
    lora: tuple[LoraRef, ...] = ()
    image: str | None = None
    strength: float | None = None
    mask: str | None = None
    mask_invert: bool = False
    mask_feather: int = 0
    expand: Expand | None = None
    reference: tuple[str, ...] = ()
    redux: tuple[ReduxRef, ...] = ()
    redux_model: tuple[str, ...] = ()
    control: tuple[ControlRef, ...] = ()
    negative_prompt: str | None = None
    true_cfg: float | None = None
    kind: str = "auto"

    def __post_init__(self) -> None:
        if self.prompt or not self.redux:
            check_prompt(self.prompt)
        _check_fields(self)
        if (self.width is None) != (self.height is None):
            raise UsageError("--width and --height go together", hint="or give --ar and --size")
        if not self.steps_taken:
            which = f"--strength {self.strength:g}"
            why = f"none of {self.steps} steps would be taken"
            raise UsageError("nothing to draw", which=which, why=why, hint="--strength 0.6")
        width, height = self.size
        check_size(width, height, aspect_ratio=None if self.width else self.aspect_ratio)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the picture in pixels."""
        if self.width is not None and self.height is not None:
            return self.width, self.height
        return size_of(self.aspect_ratio, self.image_size)

    def fit_canvas(self, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
        """Return (width, height) of the canvas that takes references of these sizes.

        A single one that is edited within a mask has the size of the picture, as in diffusers'
        FluxKontextInpaintPipeline.
        """
        if self.mask and len(sizes) == 1:
            return self.size
        width, height = self.size
        return fit_references(sizes, width * height)

    @property
    def true_scale(self) -> float:
        """The scale of real classifier-free guidance; 1.0 where there is none."""
        if self.negative_prompt is None:
            return 1.0
        return DEFAULT_TRUE_CFG if self.true_cfg is None else self.true_cfg

    @property
    def first_step(self) -> int:
        """The step that the picture begins with, from 0: those before it `strength` leaves out."""
        if self.strength is None or (self.image is None and self.mask is None):
            return 0
        return int(max(self.steps - min(self.steps * self.strength, self.steps), 0))

    @property
    def steps_taken(self) -> int:
        """How many of the steps are computed."""
        return self.steps - self.first_step

    def describe_steps(self) -> str:
        """Return how many steps are computed, and of how many if that is not all."""
        steps = "1 step" if self.steps == 1 else f"{self.steps} steps"
        return f"{self.steps_taken} of {steps}" if self.first_step else steps


@dataclass(frozen=True)
class Resources:
    """With what a picture may be computed. `vram_limit` is in bytes; None takes what is there.

    `compile` lets torch.compile make one graph of each kind of the transformer's blocks.
    """

    device: str = "auto"
    precision: str = "auto"
    vram_limit: int | None = None
    offload: str = "auto"
    compile: bool = False

    def __post_init__(self) -> None:
        _check_fields(self)


@dataclass(frozen=True)
class Output:
    """Into which files `count` pictures go.

    `output` is a file, a folder, a template, - for stdout, or None for the current folder.
    `metadata` says whether a file tells how its picture was made, `preview_every` after how many
    steps a preview of it is written, None for none.
    """

    output: str | None = None
    format: str = "jpg"
    quality: int = 80
    metadata: bool = True
    count: int = 1
    preview_every: int | None = None

    def __post_init__(self) -> None:
        _check_fields(self)


@dataclass(frozen=True)
class Order:
    """What one row asks for: a request, resources and an output, and the preset they came from."""

    request: GenerationRequest
    resources: Resources = field(default_factory=Resources)
    output: Output = field(default_factory=Output)
    preset: str = "dev"

    def __post_init__(self) -> None:
        check("preset", self.preset, where=flag("preset"))
        if self.request.seed + self.output.count - 1 > MAX_SEED:
            why = f"seed + count passes {MAX_SEED}"
            raise UsageError("seed out of range", which="--seed", why=why, hint="a smaller --seed")

    @classmethod
    def from_settings(cls, prompt: str, settings: Mapping[str, Any]) -> "Order":
        """Build an order from merged settings: keys are field names, values of the fields' types.

        Settings that are not given have their defaults. Raises `UsageError`.
        """
        parts: dict[str, dict[str, Any]] = {"request": {}, "resources": {}, "output": {}}
        preset = {}
        for name, value in settings.items():
            if name == "preset":
                preset = {"preset": value}
            else:
                parts[PART_OF[name]][name] = value
        return cls(
            request=GenerationRequest(prompt, **parts["request"]),
            resources=Resources(**parts["resources"]),
            output=Output(**parts["output"]),
            **preset,
        )

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Order":
        """Build the order that `to_json` described; missing settings have their defaults.

        Raises `UsageError` for unknown settings and values that cannot be, KeyError where there is
        no prompt.
        """
        prompt = value["prompt"]
        if not isinstance(prompt, str):
            why = "the prompt is no text"
            raise UsageError("wrong value", why=why, hint='"prompt": "a red circle"')
        settings = {
            name: coerce(name, each, where="metadata")
            for name, each in value.items()
            if name != "prompt"
        }
        return cls.from_settings(prompt, settings)

    def settings(self) -> dict[str, Any]:
        """Return every setting by its name, with the fields' values; without the prompt."""
        found: dict[str, Any] = {"preset": self.preset}
        for part in (self.request, self.resources, self.output):
            found |= {each.name: getattr(part, each.name) for each in fields(part)}
        del found["prompt"]
        return {name: found[name] for name in SETTINGS}

    def to_json(self) -> dict[str, Any]:
        """Return one flat object of JSON types: the prompt and every setting by its name."""
        settings = {name: to_json_value(value) for name, value in self.settings().items()}
        return {"prompt": self.request.prompt} | settings

    def with_seed(self) -> "Order":
        """Return the same order with a seed: a random 32-bit one where none was given."""
        if self.request.seed >= 0:
            return self
        seed = secrets.randbelow(MAX_RANDOM_SEED - self.output.count)
        return replace(self, request=replace(self.request, seed=seed))

    def picture(self, k: int) -> "Order":
        """Return the order that makes picture `k` (from 0) of this one alone, without a path."""
        return replace(
            self,
            request=replace(self.request, seed=self.request.seed + k),
            output=replace(self.output, output=None, count=1),
        )


PART_OF: dict[str, str] = {
    each.name: part
    for part, owner in (
        ("request", GenerationRequest),
        ("resources", Resources),
        ("output", Output),
    )
    for each in fields(owner)
}


def _check_fields(part: GenerationRequest | Resources | Output) -> None:
    """Raise `UsageError` naming the flag of the first field whose value is out of range."""
    for each in fields(part):
        if each.name in SETTINGS:
            check(each.name, getattr(part, each.name), where=flag(each.name))


def is_default_input(name: str, value: object) -> bool:
    """Whether a setting of input pictures has its default, as JSON has it.

    Pictures of before there were these settings do not say them, and are what they are.
    """
    return name in FROM_PICTURES and value == to_json_value(DEFAULTS[name])


DEFAULTS: dict[str, Any] = Order(GenerationRequest("x")).settings()
