"""The options that several commands share, declared once. Knows their names and help, not what they do."""

import inspect
from collections.abc import Callable
from typing import Annotated, Optional

import typer

from fluxcli.request.fields import ASPECT_RATIOS


def _option(kind: type, *names: str, text: str) -> object:
    """The annotation of an option: a bool is a switch, others may be absent."""
    shown = typer.Option(*names, help=text, show_default=False)
    return Annotated[bool, shown] if kind is bool else Annotated[Optional[kind], shown]


REQUEST_OPTIONS: dict[str, object] = {
    "preset": _option(str, "-p", "--preset", text="Named settings, see flux presets; default dev."),
    "model": _option(str, "-m", "--model", text="Model folder, file or hub id; default: the preset's."),
    "text_encoders": _option(list[str], "--text-encoders", text="Folder or file (CLIP, T5) for a model in one file."),
    "vae": _option(str, "--vae", text="Folder or file of the VAE for a model in one file."),
    "lora": _option(list[str], "--lora", text="PATH[:SCALE] or REPO[:FILE][:SCALE]; repeatable; none drops presets'."),
    "aspect_ratio": _option(str, "--ar", text=f"W:H, e.g. {' '.join(ASPECT_RATIOS)}."),
    "image_size": _option(int, "--size", text="Longest side in pixels, a multiple of 16."),
    "width": _option(int, "--width", text="Pixels; with --height, instead of --ar and --size."),
    "height": _option(int, "--height", text="Pixels; with --width."),
    "steps": _option(int, "--steps", text="Denoising steps."),
    "guidance": _option(str, "--guidance", text="How closely to follow the prompt; none for schnell."),
    "seed": _option(int, "--seed", text="-1 picks one; the seed used is always reported."),
    "count": _option(int, "-n", "--count", text="Pictures; number k uses seed+k; default 1."),
    "text_tokens": _option(int, "--text-tokens", text="T5 length; padding counts: it changes the picture."),
    "output": _option(
        str, "-o", "--output",
        text="File, folder/, - for stdout, or template of {seed} {n} {row} {slug} {preset} {width} {height} {date}.",
    ),
    "format": _option(str, "--format", text="jpg, png or webp."),
    "quality": _option(int, "--quality", text="1 to 100, for jpg and webp."),
    "no_metadata": _option(bool, "--no-metadata", text="Write the bare picture."),
    "force": _option(bool, "--force", text="Replace an existing -o file."),
    "precision": _option(str, "--precision", text="auto, bf16, fp16, fp32, fp8, int8 or nf4."),
    "vram_limit": _option(str, "--vram-limit", text="Plan as if the device had only so much, e.g. 8GiB."),
    "offload": _option(str, "--offload", text="auto, none, stream (blocks pass through) or sequential (least memory)."),
    "no_wait": _option(bool, "--no-wait", text="Fail (exit 5) where another flux has the device, instead of waiting."),
    "no_worker": _option(bool, "--no-worker", text="Run here, even where flux worker is up."),
    "no_cache": _option(bool, "--no-cache", text="Neither read nor keep encoded prompts on disk: see flux cache."),
    "device": _option(str, "--device", text="auto, cpu, cuda[:n], mps or xpu[:n]."),
    "json_output": _option(bool, "--json", text="One JSON object on stdout instead of paths."),
    "events": _option(bool, "--events", text="One JSON object a line while it goes on."),
    "quiet": _option(bool, "-q", "--quiet", text="Only errors on stderr."),
    "debug": _option(bool, "--debug", text="Tracebacks and library warnings."),
}  # fmt: skip


def with_request_options(command: Callable) -> Callable:
    """Give a command whose last parameter is `**options` every option of the table as a real parameter."""
    own = [p for p in inspect.signature(command).parameters.values() if p.kind is not p.VAR_KEYWORD]
    kind = inspect.Parameter.KEYWORD_ONLY
    shared = [
        inspect.Parameter(name, kind, annotation=hint, default=False if hint.__origin__ is bool else None)
        for name, hint in REQUEST_OPTIONS.items()
    ]
    command.__signature__ = inspect.Signature([p.replace(kind=kind) for p in own] + shared)
    command.__annotations__ = {p.name: p.annotation for p in own} | REQUEST_OPTIONS
    return command
