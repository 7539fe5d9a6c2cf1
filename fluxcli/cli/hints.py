"""Hints for options that users of other tools type, and that this one has not.

Knows names of options, not what they do. A test holds it against the options that exist.
"""

import re
from collections.abc import Sequence
from itertools import pairwise

_NEGATIVE = "--negative-prompt TEXT says what the picture is not to show"
_ONE_SAMPLER = "there is one sampler, the published one: leave it out"
_NAME_LORA = "--lora FILE:0.8, once for each; the scale follows the colon"

# What drawing commands say, by the options of other tools (mflux, diffusers' scripts,
# stable-diffusion.cpp, sd-scripts, A1111, InvokeAI).
_DRAWING: dict[str, tuple[str, ...]] = {
    "--width 1024": ("-W", "-w", "--image-width"),
    "--height 768": ("-H", "--image-height"),
    "--width 1024 --height 768, or --ar 4:3 --size 1024": (
        "--resolution", "--dimensions", "--image-size", "--res",
    ),
    "--ar 16:9": ("-a", "--aspect-ratio", "--aspect", "--ratio"),
    "--steps 28": (
        "-s", "--num-inference-steps", "--inference-steps", "--num-steps", "--sample-steps",
        "--sampling-steps",
    ),
    "--seed 1": ("-S", "--random-seed", "--manual-seed", "--noise-seed", "--rng-seed"),
    "-n 4 draws four pictures, with seeds that follow each other": (
        "-b", "--batch-size", "--batch-count", "--num-images", "--num-images-per-prompt",
        "--images", "--num-samples", "--n-samples", "--n-iter", "--samples", "--auto-seeds",
        "--seeds", "--repeat", "--num",
    ),
    "--guidance 3.5": (
        "-g", "-l", "--cfg-scale", "--cfg", "--guidance-scale", "--scale", "--distilled-guidance",
    ),
    _NEGATIVE: ("--negative", "--neg", "--neg-prompt", "--uncond", "--negative-prompts"),
    "--negative-prompt TEXT --true-cfg 3": ("--true-cfg-scale", "--real-cfg"),
    "--image FILE --strength 0.6": (
        "-i", "--images-path", "--init-image", "--init-img", "--input-image", "--image-path",
        "--img2img", "--source-image",
    ),
    "--strength 0.6: 1 draws all of --image anew, 0 leaves it as it is": (
        "--image-strength", "--denoise", "--denoising-strength", "--init-image-strength",
    ),
    "--image FILE --mask FILE: white is painted": (
        "--inpaint", "--mask-image", "--mask-path", "--masked-image-path",
    ),
    "-p fill --image FILE --expand 0,0,256,0": (
        "--outpaint", "--image-outpaint-padding", "--outpaint-padding",
    ),
    "--control canny:FILE:0.7": (
        "--control-image", "--control-net", "--controlnet", "--controlnet-image-path",
        "--controlnet-strength", "--control-strength", "--control-type", "--canny", "--depth",
    ),
    "--redux FILE:0.8": (
        "--redux-image-paths", "--redux-image-strengths", "--ip-adapter", "--image-prompt",
    ),
    "-p kontext --reference FILE": (
        "--reference-image", "--ref-image", "--kontext", "--edit-image", "--image-paths",
    ),
    "--precision int8, or once for all: flux quantize dev --to int8": (
        "--quantize", "--quantise", "--quantization", "--bits", "--int8", "--8bit", "-8",
        "--load-in-8bit",
    ),
    "--precision w6a8, or once for all: flux quantize dev --to w6a8": ("--w6a8", "--6bit", "-6"),
    "--precision w4a8, or once for all: flux quantize dev --to w4a8": (
        "--w4a8", "--4bit", "--load-in-4bit", "--int4", "-4",
    ),
    "--precision nf4, or once for all: flux quantize dev --to nf4": ("--nf4",),
    "--precision fp8, or once for all: flux quantize dev --to fp8": (
        "--fp8", "--float8", "--fp8-base", "--fp8-scaled",
    ),
    "--precision bf16": (
        "--dtype", "--torch-dtype", "--weight-type", "--type", "--bf16", "--bfloat16",
        "--mixed-precision",
    ),
    "--precision fp16": ("--fp16", "--half", "--float16"),
    "--precision fp32": ("--fp32", "--float32", "--full-precision", "--no-half"),
    "-o FILE, -o FOLDER/, or a template such as -o 'out/{seed}.png'": (
        "--out", "--outdir", "--out-dir", "--output-dir", "--output-path", "--output-file",
        "--output-folder", "--outfile", "--save", "--save-path", "--save-to", "--save-image",
        "--filename", "--dest",
    ),
    "--format jpg": ("--image-format", "--output-format", "--ext", "--extension"),
    "--no-metadata": ("--disable-metadata", "--no-exif", "--strip-metadata"),
    "flux inspect PICTURE: each picture has its metadata in itself": ("--metadata",),
    "flux replay PICTURE": ("--config-from-metadata", "--from-image", "--recreate"),
    'open the path that is printed: xdg-open "$(flux generate ...)"': (
        "--open",
    ),
    "--show draws it in the terminal": ("--display", "--view", "--inline", "--viewer"),
    "--preview-every 5": (
        "--preview", "--preview-interval", "--preview-method", "--live-preview", "--taesd",
    ),
    "--debug; what goes on is shown without it": (
        "-v", "-vv", "--verbose", "--trace", "--log-level",
    ),
    "--quiet": ("--silent", "--no-progress", "--no-progress-bar", "--disable-progress"),
    "--offload sequential takes the least memory; without it flux plans what fits": (
        "--low-ram", "--lowvram", "--low-vram", "--medvram", "--low-memory", "--cpu-offload",
        "--offload-to-cpu", "--enable-model-cpu-offload", "--enable-sequential-cpu-offload",
        "--model-cpu-offload", "--sequential-offload", "--blocks-to-swap", "--block-swap",
        "--group-offload", "--novram", "--save-memory",
    ),
    "--offload none": ("--highvram", "--high-vram", "--gpu-only", "--no-offload"),
    "--vram-limit 8GiB": (
        "--vram", "--max-vram", "--max-memory", "--memory-limit", "--vram-budget", "--reserve-vram",
    ),
    "leave it out: the VAE works in tiles where it must": (
        "--vae-tiling", "--tiling", "--tiled-vae", "--vae-slicing", "--vae-tile-size",
        "--attention-slicing", "--slicing",
    ),
    "leave it out: torch's own attention is used": (
        "--xformers", "--diffusion-fa", "--flash-attn", "--flash-attention", "--sdpa",
        "--use-flash-attention",
    ),
    "--compile": ("--torch-compile",),
    "leave it out": ("--no-compile", "--trt", "--teacache"),
    _NAME_LORA: (
        "--lora-paths", "--lora-path", "--lora-scales", "--lora-scale", "--lora-weight",
        "--lora-weights", "--lora-name", "--lora-names", "--lora-dir", "--lora-model-dir",
        "--lora-style", "--loras", "--adapter", "--adapters",
    ),
    "-m FOLDER or FILE, or -p dev": (
        "-M", "--model-path", "--model-name", "--model-id", "--diffusion-model", "--checkpoint",
        "--ckpt", "--ckpt-path", "--base-model", "--unet", "--transformer", "--repo",
        "--pretrained-model-name-or-path", "--weights", "--gguf", "--model-dir",
    ),
    "--text-encoders CLIP --text-encoders T5": (
        "--clip-l", "--t5xxl", "--t5", "--clip", "--text-encoder", "--t5-path", "--clip-path",
    ),
    "--vae FILE": ("--ae", "--vae-path", "--vae-model"),
    "--text-tokens 512": ("--max-sequence-length", "--max-length", "--t5xxl-max-token-length"),
    _ONE_SAMPLER: (
        "--sampler", "--sampler-name", "--sampling-method", "--scheduler", "--schedule",
        "--sigmas", "--shift", "--flow-shift", "--karras", "--eta",
    ),
    "--device cuda, or --device cuda:1 for the second card": (
        "--gpu", "--gpu-id", "--gpus", "--gpu-ids", "--device-id", "--cuda", "--gpu-index",
    ),
    "--device cpu": ("--cpu", "--cpu-only", "--use-cpu", "--no-cuda", "--no-gpu"),
    "--device mps": ("--mps", "--metal"),
    "OMP_NUM_THREADS=4 in the environment": ("-t", "--threads", "--num-threads"),
    "flux generate --from FILE draws each of its lines": (
        "--prompt-file", "--prompts", "--prompts-file", "--from-file", "--input", "--input-file",
        "--batch", "--batch-file", "--file", "-f", "--promptfile", "--prompts-from-file",
    ),
    "--force": ("-y", "--overwrite", "--yes", "--replace", "--clobber"),
    "flux generate --from FILE --resume": ("--skip-existing", "--continue", "--no-clobber"),
    "flux generate --from FILE --fail-fast": ("--stop-on-error", "--exit-on-error"),
    "flux plan": ("--plan", "--dryrun", "--explain", "--simulate"),
    "-p dev": ("--dev", "--style", "--variant"),
    "-p schnell": ("--schnell", "--fast"),
    "-p turbo": ("--turbo",),
    "-p tiny": ("--tiny", "--demo"),
    "--json or --events": ("--jsonl", "--output-json", "--json-output"),
    "flux worker start keeps models in memory": (
        "--server", "--serve", "--daemon", "--keep-alive", "--keep-loaded", "--interactive",
    ),
    "hf auth login, or HF_TOKEN in the environment": (
        "--token", "--hf-token", "--use-auth-token", "--api-key",
    ),
    "HF_HOME in the environment": ("--cache-dir", "--hf-home", "--models-dir", "--hf-cache"),
    "HF_HUB_OFFLINE=1 in the environment; generate downloads nothing anyhow": (
        "--offline", "--local-files-only", "--no-download",
    ),
    "flux draws at the size that is asked for and does not enlarge afterwards": (
        "--upscale", "--upscaler", "--upscale-model", "--hires", "--hires-fix",
    ),
    "flux has no filter of its own": ("--safety-checker", "--nsfw", "--disable-safety-checker"),
    "FLUX.1 takes the prompt as it is: leave it out": ("--clip-skip", "--prompt-2"),
}  # fmt: skip
_QUANTIZING: dict[str, tuple[str, ...]] = {
    "the model comes first: flux quantize dev --to fp8": (
        "-m", "--model", "-p", "--preset", "--source", "--src", "-i", "--input", "--model-path",
        "--base-model", "--from",
    ),
    "the target follows the model: flux quantize dev out/ --to fp8": (
        "-o", "--output", "--out", "--path", "--dst", "--target", "--output-path", "--output-dir",
        "--outdir", "--save-path", "--dest", "--outfile",
    ),
    "--to int8": ("--int8", "--8bit", "--bits", "-b", "--quantize", "--w8a8"),
    "--to w6a8": ("--w6a8", "--6bit"),
    "--to w4a8": ("--w4a8", "--4bit", "--int4", "--load-in-4bit"),
    "--to nf4": ("--nf4",),
    "--to fp8": (
        "--fp8", "--type", "--dtype", "--precision", "--scheme", "--qtype", "--format",
        "--quantization", "-t", "-q8", "--method", "--weight-dtype",
    ),
    "--force": ("-f", "-y", "--yes", "--overwrite", "--replace"),
    "--keep NAME, once for each": ("--exclude", "--skip", "--ignore", "--keep-layers"),
    "--lora FILE:0.8, once for each": (
        "--lora-paths", "--lora-path", "--lora-scales", "--loras", "--lora-scale",
    ),
    "--debug": ("-v", "--verbose"),
}  # fmt: skip
_DOWNLOADING: dict[str, tuple[str, ...]] = {
    "--mirror FOLDER": ("--local-dir", "--dir", "-o", "--output", "--out", "--to", "--path"),
    "--only transformer,vae": ("--include", "--exclude", "--allow-patterns", "--parts"),
    "the model is the argument: flux models download dev": (
        "-m", "--model", "-p", "--preset", "--repo-id", "--repo",
    ),
    "hf auth login, or HF_TOKEN in the environment": ("--token", "--hf-token"),
    "HF_HOME in the environment": ("--cache-dir", "--hf-home"),
    "it goes on by itself where the hub's library can": ("--resume", "--resume-download"),
    "flux models remove MODEL first": ("--force", "--force-download", "-f"),
}  # fmt: skip
_PROGRAM: dict[str, tuple[str, ...]] = {
    "flux --version": ("-v", "-V", "-version", "--v"),
    "flux --help": ("-?", "--usage", "-help"),
}  # fmt: skip
BY_COMMAND = {
    "generate": _DRAWING,
    "replay": _DRAWING,
    "decode": _DRAWING,
    "plan": _DRAWING,
    "quantize": _QUANTIZING,
    "download": _DOWNLOADING,
    "flux": _PROGRAM,
}


def find_hint(command: str, option: str) -> str:
    """Return what to type instead of an option that a command has not, "" if nobody knows.

    `command` is the last word of its path. Underscores count as dashes, and the value that is glued
    to a short option, as in -W1024, does not count.
    """
    wanted = option.partition("=")[0].replace("_", "-")
    for hint, options in BY_COMMAND.get(command, {}).items():
        if wanted in options:
            return hint
    return ""


def find_for_count(arguments: Sequence[str]) -> str:
    """Return the hint for a text after -n, which elsewhere is a negative prompt, else ""."""
    for option, value in pairwise(arguments):
        if option == "-n" and re.search(r"[A-Za-z]", value):
            return f"-n is the number of pictures. {_NEGATIVE}"
    return ""


def find_for_words(words: Sequence[str]) -> str:
    """Return the hint for words that follow a prompt."""
    if words and all(word in ("3", "4", "5", "6", "8") for word in words):
        # mflux: -q 8
        return "--precision int8 or --precision w4a8; -q is --quiet here"
    return 'quote a prompt of several words: flux generate "a red circle"'
