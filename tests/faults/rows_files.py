"""Fault rows about weight files, their headers and configs: what is taken, refused or named."""

import functools
import json
import os
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.faults.case import PROMPT, QUICK, Case, fault
from tests.support.fuzz_inputs import gguf_fields, pack_gguf

TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
CLIP = "text_encoder/model.safetensors"
T5 = "text_encoder_2/model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"

# A safetensors file in parts: the header's entries, and the data behind them.
Entries = dict[str, Any]


def read(path: Path) -> tuple[Entries, bytes]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def pack(entries: Any, data: bytes = b"") -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + data


def blank(shapes: Mapping[str, tuple[int, ...]], dtype: str = "F32") -> bytes:
    """A file of tensors that are 0."""
    entries, start = {}, 0
    size = {"F32": 4, "I64": 8, "U8": 1, "I8": 1, "BF16": 2}[dtype]
    for name, shape in shapes.items():
        count = size
        for side in shape:
            count *= side
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, start + count]}
        start += count
    return pack(entries, bytes(start))


def draw_changed(case: Case, file: str, change: Callable[[Entries, bytes], bytes]) -> None:
    """Draw with a model one of whose files was changed."""
    model = case.model()
    (model / file).write_bytes(change(*read(model / file)))
    case.draw("-m", model)


# --- headers

KERNEL = "proj_out.weight"


def tensor(entries: Entries, **values: object) -> Entries:
    return entries | {KERNEL: entries[KERNEL] | values}


HEADERS: dict[str, tuple[str, Callable[[Entries, bytes], bytes], list[int]]] = {
    "number-in-metadata": (
        "a number in __metadata__",
        lambda entries, data: pack({"__metadata__": {"epoch": 3}} | entries, data),
        [0],
    ),
    "list-in-metadata": (
        "a list in __metadata__",
        lambda entries, data: pack(entries | {"__metadata__": {"a": []}}, data),
        [4],
    ),
    "metadata-no-object": (
        "__metadata__ is null",
        lambda entries, data: pack(entries | {"__metadata__": None}, data),
        [0],
    ),
    "long-metadata": (
        "5 MB of kohya's tags in __metadata__",
        lambda entries, data: pack(
            entries | {"__metadata__": {"ss_tag_frequency": '{"fox": 1} ' * 500_000}}, data
        ),
        [0],
    ),
    "header-90-mb": (
        "90 MB of metadata",
        lambda entries, data: pack(entries | {"__metadata__": {"a": "x" * 90_000_000}}, data),
        [0],
    ),
    "header-over-100-mb": (
        "a header of more than 100 MB",
        lambda entries, data: pack(entries | {"__metadata__": {"a": "x" * 100_000_000}}, data),
        [4],
    ),
    "long-name": (
        "a tensor's name of 100 KB",
        lambda entries, data: pack(
            {"x" * 100_000 if name == KERNEL else name: entry for name, entry in entries.items()},
            data,
        ),
        [4],
    ),
    "many-names": (
        "4 MB of names of tensors without values",
        lambda entries, data: pack(
            entries | {f"a{n:06}": none(len(data)) for n in range(50_000)}, data
        ),
        [4],
    ),
    "only-empty": (
        "40000 empty tensors and nothing else",
        lambda *_: pack({f"a{n}": none(0) for n in range(40_000)}),
        [4],
    ),
    "deep": ("deep JSON", lambda *_: pack(b'{"a":' * 200_000), [4]),
    "deep-lists": ("lists in lists", lambda *_: pack(b"[" * 2_000_000), [4]),
    "two-values": ("a name twice", lambda *_: pack(b'{"a":{},"a":{}}'), [4]),
    "half-pair": ("half a surrogate pair", lambda *_: pack(b'{"\\ud800":{}}'), [4]),
    "utf-16": ("JSON in UTF-16", lambda *_: pack('{"a":{}}'.encode("utf-16")), [4]),
    "unknown-dtype": ("dtype F4", lambda e, d: pack(tensor(e, dtype="F4"), d), [4]),
    "complex": ("dtype C64", lambda e, d: pack(tensor(e, dtype="C64"), d), [4]),
    "bool-shape": ("a shape of true", lambda e, d: pack(tensor(e, shape=[True, 64]), d), [4]),
    "long-shape": ("a shape of 999 numbers", lambda e, d: pack(tensor(e, shape=[1] * 999), d), [4]),
    "huge-number": (
        "a shape of 5000 digits",
        lambda entries, data: pack(
            json.dumps(tensor(entries, shape=[7])).replace("[7]", f"[{'9' * 5000}]").encode(), data
        ),
        [4],
    ),
    "escape-in-name": (
        "an escape code in a name",
        lambda *_: blank({"\x1b[31mred": (4, 4)}),
        [4],
    ),
}


def none(start: int) -> Entries:
    return {"dtype": "F32", "shape": [0], "data_offsets": [start, start]}


for name, (title, change, codes) in HEADERS.items():
    slow = name.startswith("header-")
    run = functools.partial(draw_changed, file=TRANSFORMER, change=change)
    fault(f"header-{name}", f"transformer: {title}", codes=codes, exhaustive=slow)(run)


def inspect_bytes(case: Case, data: bytes, name: str = "x.safetensors") -> None:
    case.flux("inspect", case.write(name, data))


fault("inspect-empty-tensors", "inspect: 40000 empty tensors", codes=[4])(
    lambda case: inspect_bytes(case, pack({f"a{n}": none(0) for n in range(40_000)}))
)
fault("inspect-long-names", "inspect: names of 100 KB", codes=[4])(
    lambda case: inspect_bytes(case, blank({f"{n}" + "x" * 100_000: (1,) for n in range(40)}))
)


# --- tensors that do not fit


def integers(entries: Entries, data: bytes) -> bytes:
    """The same file with integers for the last layer's weight."""
    entry = entries[KERNEL]
    start, stop = entry["data_offsets"]
    entries = tensor(entries, dtype="I64", shape=[(stop - start) // 8])
    return pack(entries, data)


def reshaped(entries: Entries, data: bytes, *, name: str, shape: list[int]) -> bytes:
    return pack(entries | {name: entries[name] | {"shape": shape}}, data)


def renamed(entries: Entries, data: bytes, *, name: str) -> bytes:
    return pack({"x" if key == name else key: value for key, value in entries.items()}, data)


fault("integers", "the weights of a layer are I64", codes=[4])(
    functools.partial(draw_changed, file=TRANSFORMER, change=integers)
)
MISSHAPEN = {
    TRANSFORMER: ("time_text_embed.text_embedder.linear_1.weight", [96, 128]),
    CLIP: ("text_model.embeddings.position_embedding.weight", [96, 77]),
    T5: ("shared.weight", [128, 512]),
    VAE: ("decoder.conv_in.weight", [16, 64, 3, 3]),
}
for file, (name, shape) in MISSHAPEN.items():
    part = file.partition("/")[0]
    fault(f"misshapen-{part}", f"{part}: {name} is turned", codes=[4], says="misshapen")(
        functools.partial(
            draw_changed, file=file, change=functools.partial(reshaped, name=name, shape=shape)
        )
    )
    fault(f"missing-{part}", f"{part}: {name} has another name", codes=[4], says=name[-12:])(
        functools.partial(draw_changed, file=file, change=functools.partial(renamed, name=name))
    )


# --- configs

CONFIGS: dict[str, tuple[str, Entries]] = {
    "axes-sum": ("transformer", {"axes_dims_rope": [1, 2, 3]}),
    "axes-odd": ("transformer", {"axes_dims_rope": [4, 13, 15]}),
    "axes-two": ("transformer", {"axes_dims_rope": [16, 16]}),
    "axes-text": ("transformer", {"axes_dims_rope": "x"}),
    "axes-null": ("transformer", {"axes_dims_rope": None}),
    "heads": ("transformer", {"num_attention_heads": 5}),
    "head-width": ("transformer", {"attention_head_dim": 64}),
    "blocks": ("transformer", {"num_layers": 3}),
    "single-blocks": ("transformer", {"num_single_layers": 4}),
    "text-width": ("transformer", {"joint_attention_dim": 96}),
    "pooled-width": ("transformer", {"pooled_projection_dim": 128}),
    "out-channels": ("transformer", {"out_channels": 16}),
    "patch-size": ("transformer", {"patch_size": 2}),
    "no-guidance": ("transformer", {"guidance_embeds": False}),
    "fill": ("transformer", {"in_channels": 384}),
    "controlnet-class": ("transformer", {"_class_name": "FluxControlNetModel"}),
    "clip-heads": ("text_encoder", {"num_attention_heads": 5}),
    "clip-width": ("text_encoder", {"hidden_size": 128}),
    "clip-words": ("text_encoder", {"vocab_size": 9}),
    "clip-positions": ("text_encoder", {"max_position_embeddings": 16}),
    "clip-long": ("text_encoder", {"max_position_embeddings": 248}),
    "clip-act": ("text_encoder", {"hidden_act": "no such"}),
    "clip-act-number": ("text_encoder", {"hidden_act": 3}),
    "clip-eps": ("text_encoder", {"layer_norm_eps": "x"}),
    "clip-eps-null": ("text_encoder", {"layer_norm_eps": None}),
    "clip-eos": ("text_encoder", {"eos_token_id": [1, 2]}),
    "t5-heads": ("text_encoder_2", {"num_heads": 3}),
    "t5-width": ("text_encoder_2", {"d_model": "x"}),
    "t5-buckets": ("text_encoder_2", {"relative_attention_num_buckets": 1}),
    "t5-distance": ("text_encoder_2", {"relative_attention_max_distance": 0}),
    "t5-gate": ("text_encoder_2", {"is_gated_act": False}),
    "t5-act": ("text_encoder_2", {"dense_act_fn": "no such"}),
    "t5-umt5": ("text_encoder_2", {"architectures": ["UMT5EncoderModel"]}),
    "vae-channels": ("vae", {"block_out_channels": [16, 32]}),
    "vae-groups": ("vae", {"norm_num_groups": 7}),
    "vae-latents": ("vae", {"latent_channels": 4}),
    "vae-blocks": ("vae", {"up_block_types": ["AttnUpDecoderBlock2D"] * 4}),
    "vae-quant": ("vae", {"use_post_quant_conv": True}),
    "vae-act": ("vae", {"act_fn": "no such"}),
    "scale-text": ("vae", {"scaling_factor": "x"}),
}


def draw_configured(case: Case, part: str, values: Entries) -> None:
    model = case.model()
    path = model / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    case.draw("-m", model)


for name, (part, values) in CONFIGS.items():
    fault(f"config-{name}", f"{part}: {values}", codes=[4])(
        functools.partial(draw_configured, part=part, values=values)
    )
for name, text in {
    "deep": "[" * 100_000,
    "list": "[]",
    "digits": f'{{"num_layers": {"9" * 5000}}}',
    "nan": '{"_class_name": "AutoencoderKL", "scaling_factor": NaN}',
    "large": '{"a": "' + "x" * 50_000_000 + '"}',
    "utf-16": '{"a": 1}'.encode("utf-16").decode("latin-1"),
}.items():

    @fault(f"config-json-{name}", f"vae/config.json: {name}", codes=[4])
    def config_json(case: Case, text: str = text) -> None:
        model = case.model()
        (model / "vae/config.json").write_text(text, encoding="latin-1")
        case.draw("-m", model)


@fault("config-fifo", "vae/config.json is a FIFO", codes=[4])
def config_fifo(case: Case) -> None:
    model = case.model()
    (model / "vae/config.json").unlink()
    os.mkfifo(model / "vae/config.json")
    case.draw("-m", model)


# --- what else may lie where weights should

NO_WEIGHTS = {
    "html": (b"<!DOCTYPE html><html><body>Log in</body></html>" * 9, "web page"),
    "html-bom": (b"\xef\xbb\xbf\n<html><body>Log in</body></html>" * 9, "web page"),
    "json": (b'{"error":"Unauthorized","message":"log in first"}', "JSON"),
    "text": (b"Entry not found", "Entry not found"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git-lfs"),
    "zeros": (bytes(5000), "zeros"),
    "gzip": (b"\x1f\x8b\x08\0" + bytes(99), "archive"),
    "pickle": (b"PK\x03\x04" + bytes(99), "pickle"),
}
for name, (data, word) in NO_WEIGHTS.items():
    for option in ("-m", "--lora", "--vae"):

        @fault(f"other{option}-{name}", f"{option} FILE is {name}", codes=[4], says=word)
        def other_file(case: Case, option: str = option, data: bytes = data) -> None:
            case.draw("-p", "tiny", option, case.write("x.safetensors", data))


# --- kinds that are not read, by their names

KINDS: dict[str, tuple[str, Mapping[str, tuple[int, ...]]]] = {
    "nunchaku": (
        "nunchaku",
        {
            "transformer_blocks.0.qkv_proj.qweight": (4, 4),
            "single_transformer_blocks.0.qkv_proj.wscales": (4, 4),
        },
    ),
    "controlnet": (
        "ControlNet",
        {"controlnet_blocks.0.weight": (4, 4), "single_transformer_blocks.0.x.weight": (4, 4)},
    ),
    "controlnet-union": (
        "ControlNet",
        {"controlnet_mode_embedder.weight": (4, 4), "transformer_blocks.0.x.weight": (4, 4)},
    ),
    "controlnet-xlabs": (
        "ControlNet",
        {"double_blocks.0.img_attn.qkv.weight": (4, 4), "input_hint_block.0.weight": (4, 4)},
    ),
    "ip-adapter": (
        "IP-Adapter",
        {"double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight": (4, 4)},
    ),
    "ip-adapter-instantx": (
        "IP-Adapter",
        {"image_proj.proj.0.weight": (4, 4), "ip_adapter.0.to_k_ip.weight": (4, 4)},
    ),
    "clip-g": (
        "clip_g",
        {
            "text_model.embeddings.token_embedding.weight": (9, 1280),
            "text_model.encoder.layers.0.x.weight": (4, 4),
        },
    ),
    "long-clip": (
        "LongCLIP",
        {
            "text_model.embeddings.position_embedding.weight": (248, 8),
            "text_model.encoder.layers.0.x.weight": (4, 4),
        },
    ),
    "umt5": (
        "UMT5",
        {
            f"encoder.block.{n}.layer.0.SelfAttention.relative_attention_bias.weight": (4, 4)
            for n in (0, 1)
        },
    ),
}
for name, (word, shapes) in KINDS.items():

    @fault(f"kind-{name}", f"-m FILE is {name}", codes=[4], says=word)
    def other_kind(case: Case, shapes: Mapping[str, tuple[int, ...]] = shapes) -> None:
        case.draw("-p", "tiny", "-m", case.write("x.safetensors", blank(shapes)))


@fault("kind-mflux-folder", "-m DIR is a model that mflux saved", codes=[4], says="mflux")
def mflux_folder(case: Case) -> None:
    ends = ("weight", "scales", "biases")
    data = blank({f"transformer_blocks.0.attn.to_q.{end}": (4, 4) for end in ends})
    path = case.write("model/transformer/0.safetensors", data)
    case.draw("-p", "tiny", "-m", path.parent.parent)


for number, word in {16: "IQ2_XXS", 17: "IQ2_XS", 29: "IQ1_M", 39: "MXFP4", 77: "type 77"}.items():

    @fault(f"gguf-type-{number}", f"a GGUF in {word}", codes=[4], says=word)
    def gguf_type(case: Case, number: int = number) -> None:
        fields = gguf_fields()
        fields["double_blocks.0.img_attn.qkv.weight type"] = ("I", number)
        case.draw("-p", "tiny", "-m", case.write("x.gguf", pack_gguf(fields)))


@fault("gguf-value-twice", "a GGUF whose value stands twice", codes=[4], says="twice")
def gguf_value_twice(case: Case) -> None:
    fields = gguf_fields() | {"list key": ("", "general.alignment")}
    case.draw("-p", "tiny", "-m", case.write("x.gguf", pack_gguf(fields)))


@fault("gguf-tensor-twice", "a GGUF whose tensor stands twice", codes=[4], says="twice")
def gguf_tensor_twice(case: Case) -> None:
    fields = gguf_fields() | {"double_blocks.0.img_attn.qkv.weight name": ("", "img_in.weight")}
    case.draw("-p", "tiny", "-m", case.write("x.gguf", pack_gguf(fields)))


@fault(
    "convrot-w4a4",
    "a form of ComfyUI's that is not read, and would be noise",
    codes=[4],
    says="convrot_w4a4",
)
def convrot_w4a4(case: Case) -> None:
    layers = {"img_in": {"format": "convrot_w4a4", "convrot_groupsize": 256}}
    known = {"_quantization_metadata": json.dumps({"layers": layers})}
    entries = {
        name: {"dtype": "I8", "shape": [4, 4], "data_offsets": [16 * n, 16 * n + 16]}
        for n, name in enumerate(("img_in.weight", "double_blocks.0.img_mod.lin.weight"))
    }
    data = pack({"__metadata__": known} | entries, bytes(32))
    case.draw("-p", "tiny", "-m", case.write("x.safetensors", data))


# --- shards and folders


def draw_sharded(case: Case, index: object, shard: str = "a.safetensors") -> None:
    model = case.model()
    folder = model / "transformer"
    (model / TRANSFORMER).rename(folder / "a.safetensors")
    text = index if isinstance(index, str) else json.dumps(index)
    (folder / "d.safetensors.index.json").write_text(text)
    case.draw("-m", model)


INDEXES = {
    "other-shard": ({"weight_map": {KERNEL: "b.safetensors"}}, "missing shard"),
    "unknown-name": ({"weight_map": {"x": "a.safetensors"}}, "is not in"),
    "outside": ({"weight_map": {KERNEL: "../vae/a.safetensors"}}, "unsafe"),
    "absolute": ({"weight_map": {KERNEL: "/etc/a.safetensors"}}, "unsafe"),
    "nul": ({"weight_map": {KERNEL: "a\0.safetensors"}}, "shard"),
    "number": ({"weight_map": {KERNEL: 3}}, "map"),
    "list": ({"weight_map": []}, "map"),
    "empty": ({}, "map"),
    "deep": ("[" * 100_000, "JSON"),
}
for name, (index, word) in INDEXES.items():
    fault(f"index-{name}", f"a shard index: {name}", codes=[4], says=word)(
        functools.partial(draw_sharded, index=index)
    )


@fault("shard-as-file", "-m names one of several shards", codes=[4], says="one of several")
def shard_as_file(case: Case) -> None:
    path = case.model() / "transformer/d-00001-of-00002.safetensors"
    (path.parent / "diffusion_pytorch_model.safetensors").rename(path)
    case.draw("-p", "tiny", "-m", path)


for name, target in {"dangling": "nowhere", "loop": "diffusion_pytorch_model.safetensors"}.items():

    @fault(f"weights-{name}", f"the transformer's weights are a {name} link", codes=[3, 4])
    def weights_link(case: Case, target: str = target) -> None:
        model = case.model()
        (model / TRANSFORMER).unlink()
        (model / TRANSFORMER).symlink_to(target)
        case.draw("-m", model)


@fault("weights-fifo", "the transformer's weights are a FIFO", codes=[4])
def weights_fifo(case: Case) -> None:
    model = case.model()
    (model / TRANSFORMER).unlink()
    os.mkfifo(model / TRANSFORMER)
    case.draw("-m", model)


@fault("weights-folder", "the transformer's weights are a folder", codes=[4])
def weights_folder(case: Case) -> None:
    model = case.model()
    (model / TRANSFORMER).unlink()
    (model / TRANSFORMER).mkdir()
    case.draw("-m", model)


@fault("manifest-fifo", "a manifest in the user's models is a FIFO", codes=[0])
def manifest_fifo(case: Case) -> None:
    folder = case.home / "XDG_DATA_HOME/flux/models/x"
    folder.mkdir(parents=True)
    os.mkfifo(folder / "flux-manifest.json")
    case.draw()


@fault("refs-fifo", "refs/main in the hub's cache is a FIFO", codes=[3])
def refs_fifo(case: Case) -> None:
    cache = case.folder / "hub"
    folder = cache / "models--org--name/refs"
    folder.mkdir(parents=True)
    os.mkfifo(folder / "main")
    case.draw("-m", "org/name", environment={"HF_HUB_CACHE": str(cache)})


# --- what is taken


@fault("takes-file", "-m is a transformer's file by diffusers' names", codes=[0])
def takes_file(case: Case) -> None:
    case.draw("-p", "tiny", "-m", case.model() / TRANSFORMER)


@fault("takes-folder", "-m is a transformer's folder", codes=[0])
def takes_folder(case: Case) -> None:
    case.draw("-p", "tiny", "-m", case.model() / "transformer")


@fault("takes-variant", "weights called *.bf16.safetensors", codes=[0])
def takes_variant(case: Case) -> None:
    model = case.model()
    for file in (TRANSFORMER, CLIP, T5, VAE):
        path = model / file
        path.rename(path.with_name(path.name.replace(".safetensors", ".bf16.safetensors")))
    case.draw("-m", model)


@fault("takes-whole-encoders", "CLIP with its vision half, T5 with its decoder", codes=[0])
def takes_whole_encoders(case: Case) -> None:
    model = case.model()
    halves = {
        CLIP: ("vision_model.x.weight", "logit_scale", "text_projection.weight"),
        T5: ("decoder.block.0.x.weight", "lm_head.weight"),
    }
    for file, names in halves.items():
        entries, data = read(model / file)
        for name in names:
            place = [len(data), len(data) + 4]
            entries[name] = {"dtype": "F32", "shape": [1], "data_offsets": place}
            data += struct.pack("<f", 1.0)
        (model / file).write_bytes(pack(entries, data))
    classes = {"text_encoder": "CLIPModel", "text_encoder_2": "T5ForConditionalGeneration"}
    for part, name in classes.items():
        path = model / part / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": [name]}))
    case.draw("-m", model)


for pipeline in ("FluxImg2ImgPipeline", "FluxInpaintPipeline"):

    @fault(f"takes-{pipeline}", f"a folder of {pipeline}", codes=[0])
    def takes_pipeline(case: Case, pipeline: str = pipeline) -> None:
        model = case.model()
        path = model / "model_index.json"
        path.write_text(path.read_text().replace("FluxPipeline", pipeline))
        case.draw("-m", model)


for pipeline in ("Flux2Pipeline", "FluxPriorReduxPipeline", "StableDiffusion3Pipeline"):

    @fault(f"names-{pipeline}", f"a folder of {pipeline}", codes=[4], says=pipeline)
    def names_pipeline(case: Case, pipeline: str = pipeline) -> None:
        model = case.model()
        path = model / "model_index.json"
        path.write_text(path.read_text().replace("FluxPipeline", pipeline))
        case.draw("-m", model)


# --- a file that changes while it is read


@fault("cut-while-used", "weights are cut to nothing while a picture is drawn", codes=[0, 4])
def cut_while_used(case: Case) -> None:
    model = case.model()
    arguments = ["generate", PROMPT, "-m", model, *QUICK, "--steps", "60", "-o", "x.png"]
    process = case.start(*arguments)
    changes = [f"model/{file}" for file in (TRANSFORMER, VAE, CLIP, T5)]
    with case.watch(process, arguments, changes=changes) as watched:
        time.sleep(1.5)
        for file in (TRANSFORMER, VAE, CLIP, T5):
            os.truncate(model / file, 100)
        watched.end()
