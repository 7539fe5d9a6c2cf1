"""Weight files that are damaged, hostile or not whole; the exit codes and words of good ones."""

import json
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from random import Random

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import load_file, save_file

from fluxcli.engine.streaming import load_component
from quant import codecs
from quant.errors import CheckpointError
from quant.header import read_header
from quant.single_file import inspect_file, inspect_transformer
from quant.tensor_info import TensorInfo, gguf_block_values
from quant.weights import Piece
from tests.support import exports
from tests.support.exports import COMFY, DIALECTS, STATE
from tests.support.fuzz_inputs import GGUF_TENSORS, gguf_fields, pack_gguf
from tests.support.helpers import read_pixels
from tests.support.invariant import assert_failed, call
from tests.test_single_file import apart

LAYER = "double_blocks.0.img_attn.qkv"
WEIGHT, SCALE, NF4 = f"{LAYER}.weight", f"{LAYER}.weight_scale", f"{COMFY[0]}{LAYER}.weight"
SMALL = ("--seed", "1", "--steps", "2", "--size", "64")
Tensors = dict[str, torch.Tensor]


def refused(capsys: pytest.CaptureFixture, path: Path, words: str) -> None:
    """`flux generate -m FILE` and `flux inspect` say it so before they compute anything."""
    for command in (("generate", "x", "-p", "tiny", "--dry-run", "-m"), ("inspect",)):
        error = assert_failed(call(capsys, *command, str(path)), 4)
        assert words in error and path.name in error


# --- ComfyUI's and Forge's packs


def state(**changes: object) -> Callable[[Tensors], Tensors]:
    """Change values of an NF4 weight's quant state."""

    def change(tensors: Tensors) -> Tensors:
        text = json.dumps(json.loads(bytes(tensors[NF4 + STATE].tolist())) | changes).encode()
        return {NF4 + STATE: torch.tensor(list(text), dtype=torch.uint8)}

    return change


def nan(name: str) -> Callable[[Tensors], Tensors]:
    def change(tensors: Tensors) -> Tensors:
        raw = tensors[name].clone().flatten().view(torch.uint8)
        # Of float32; its last byte alone of float8.
        raw[-4:] = torch.tensor([0, 0, 0xC0, 0x7F], dtype=torch.uint8)
        return {name: raw.view(tensors[name].dtype).view(tensors[name].shape)}

    return change


def put(name: str, value: torch.Tensor | None) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: value}


def without(ending: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: None for name in tensors if name.endswith(ending)}


UNSCALED, HOSTILE, NO_SCALES = (
    "has no scale beside it",
    "hostile or damaged quant state",
    "impossible scales",
)
FIVE_BITS, CODES = (
    torch.ones(384, 128).to(torch.float8_e5m2),
    torch.ones(384, 64, dtype=torch.uint8),
)
BY_HEADER = {
    "old layout, a scale missing": (
        "comfy scaled old",
        put(f"{LAYER}.scale_weight", None),
        f"{WEIGHT} is F8_E4M3",
    ),
    "old layout, no scale at all": ("comfy scaled old", without(".scale_weight"), UNSCALED),
    "new layout, a scale missing": (
        "comfy scaled",
        put(SCALE, None),
        f"{WEIGHT} is F8_E4M3 and {UNSCALED}",
    ),
    "new layout, no scale at all": ("comfy scaled", without("_scale"), UNSCALED),
    "a scale without its weight": (
        "comfy scaled",
        put(WEIGHT, None),
        f"{WEIGHT} has only its scales",
    ),
    "7 scales": ("comfy scaled", put(SCALE, torch.ones(7)), NO_SCALES),
    "scales of blocks": ("comfy scaled", put(SCALE, torch.ones(384, 4)), NO_SCALES),
    "a whole scale": ("comfy scaled", put(SCALE, torch.ones(1, dtype=torch.int32)), NO_SCALES),
    "scaled float8_e5m2": ("comfy scaled", put(WEIGHT, FIVE_BITS), "F8_E5M2 with scales in F32"),
    "another 4-bit pack": ("comfy scaled", put(WEIGHT, CODES), "U8 with scales in F32"),
    **{
        f"{version} without {part}": (
            version,
            put(f"{NF4}.{part}", None),
            f"{WEIGHT} has no {part}",
        )
        for version, parts in (
            ("nf4 v1", ("absmax", "nested_absmax", "nested_quant_map", "quant_map", STATE[1:])),
            ("nf4 v2", ("absmax", "quant_map", STATE[1:])),
        )
        for part in parts
    },
    "codes alone": (
        "nf4 v2",
        lambda t: dict.fromkeys(n for n in t if n.startswith(f"{NF4}.")),
        UNSCALED,
    ),
    "too few codes": ("nf4 v2", put(NF4, CODES[1:]), "U8 [383, 64] for a weight of [384, 128]"),
    "too few scales": (
        "nf4 v2",
        put(f"{NF4}.absmax", torch.ones(767)),
        "F32 [767] for a weight of [384, 128]",
    ),
    "another dtype": ("nf4 v2", state(dtype="object"), "dtype is 'object'"),
    "code as dtype": ("nf4 v1", state(dtype="__import__('os').abort()"), HOSTILE),
    "no dtype": ("nf4 v1", state(dtype=None), HOSTILE),
    "fp4": ("nf4 v1", state(quant_type="fp4"), "quant_type is 'fp4'"),
    "blocks of 128": ("nf4 v2", state(blocksize=128), "blocksize is 128"),
    "a huge shape": ("nf4 v2", state(shape=[1 << 40, 1 << 40]), HOSTILE),
    "a negative shape": ("nf4 v2", state(shape=[-384, -128]), HOSTILE),
    "another shape": ("nf4 v2", state(shape=[128, 128]), "for a weight of [128, 128]"),
    "an infinite offset": ("nf4 v1", state(nested_offset=float("inf")), "nested_offset is inf"),
    "no JSON": ("nf4 v2", put(NF4 + STATE, torch.full((99,), 255, dtype=torch.uint8)), HOSTILE),
    "a long state": (
        "nf4 v2",
        put(NF4 + STATE, torch.zeros(5000, dtype=torch.uint8)),
        "it is too large",
    ),
}
BY_DATA = {
    "scale 0": ("comfy scaled", put(SCALE, torch.tensor(0.0)), "is 0 or negative"),
    "old scale 0": (
        "comfy scaled old",
        put(f"{LAYER}.scale_weight", torch.tensor(0.0)),
        "is 0 or negative",
    ),
    "scale below 0": ("comfy scaled", put(SCALE, torch.tensor(-1.0)), "is 0 or negative"),
    "NaN as scale": ("comfy scaled", nan(SCALE), "not finite"),
    "Inf as scale": ("comfy scaled", put(SCALE, torch.tensor(torch.inf)), "not finite"),
    "NaN in scaled fp8": (
        "comfy scaled",
        nan(WEIGHT),
        "NaN in transformer_blocks.0.attn.to_v.weight",
    ),
    "NaN in fp8": ("comfy fp8", nan(WEIGHT), "NaN in transformer_blocks.0.attn.to_v.weight"),
    "NaN in an fp8 bias": (
        "comfy fp8",
        nan(f"{LAYER}.bias"),
        "NaN in transformer_blocks.0.attn.to_v.bias",
    ),
    "NaN in float8_e5m2": (
        "comfy fp8 e5m2",
        nan(WEIGHT),
        "NaN or Inf in transformer_blocks.0.attn.to_v.weight",
    ),
    "NaN in float32": ("bfl f32", nan("img_in.bias"), "NaN or Inf in x_embedder.bias"),
    "NaN in absmax": ("nf4 v2", nan(f"{NF4}.absmax"), "to_v.weight.absmax"),
    "NaN in nested absmax": ("nf4 v1", nan(f"{NF4}.nested_absmax"), "to_v.weight.nested_absmax"),
    "NaN in the levels": ("nf4 v1", nan(f"{NF4}.nested_quant_map"), "nested_quant_map"),
}


def changed(exported: Callable, dialect: str, change: Callable[[Tensors], Tensors]) -> Path:
    tensors = load_file(exported(dialect)[0])
    tensors |= change(tensors)
    save_file(
        {name: tensor for name, tensor in tensors.items() if tensor is not None}, "x.safetensors"
    )
    return Path("x.safetensors")


@pytest.mark.parametrize("dialect, change, words", BY_HEADER.values(), ids=BY_HEADER)
def test_a_pack_that_is_not_whole_is_refused_by_its_header(
    dialect, change, words, exported, capsys
):
    refused(capsys, changed(exported, dialect, change), words)


@pytest.mark.parametrize("dialect, change, words", BY_DATA.values(), ids=BY_DATA)
def test_values_that_are_not_finite_are_refused_when_they_are_read(
    dialect, change, words, exported
):
    part = inspect_transformer(changed(exported, dialect, change))
    with pytest.raises(CheckpointError, match=words) as caught:
        load_component(part, dtype=torch.float32, device="cpu")
    assert "x.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    "layers", [{LAYER: {"format": "float8_e4m3fn"}}, {f"{COMFY[0]}{LAYER}": {}}]
)
def test_a_file_whose_header_alone_calls_layers_scaled_is_not_read_without_scales(
    layers, exported, capsys
):
    tensors, said = (
        load_file(exported("comfy fp8")[0]),
        json.dumps({"format_version": "1.0", "layers": layers}),
    )
    prefix = COMFY[0] if LAYER not in layers else ""
    tensors = {prefix + name: tensor for name, tensor in tensors.items()}
    save_file(tensors, "x.safetensors", {"_quantization_metadata": said})
    refused(capsys, Path("x.safetensors"), UNSCALED)
    for other in ('{"layers": {"x": {}}}', '{"layers": 1}', "[]", "{", "[" * 5000):
        save_file(tensors, "x.safetensors", {"_quantization_metadata": other})
        assert inspect_transformer(Path("x.safetensors")).dialect == DIALECTS["comfy fp8"][2]


def test_a_scale_of_nothing_is_exit_4(exported, capsys):
    path = changed(exported, "comfy scaled", put(SCALE, torch.tensor(0.0)))
    error = assert_failed(
        call(capsys, "generate", "x", "-p", "tiny", "-q", *SMALL, "-m", str(path)), 4
    )
    assert "impossible scales" in error and not list(Path().glob("*.png"))


# --- GGUF

# The gguf package reads these, and writes none of them.
ONLY_READ = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"]


@pytest.mark.parametrize("kind", [*ONLY_READ, "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
@pytest.mark.parametrize("bits", [0x7E00, 0x7C00, 0xFC00], ids=["NaN", "Inf", "-Inf"])
def test_a_block_is_refused_exactly_where_the_gguf_package_reads_what_is_not_finite(kind, bits):
    chosen = GGMLQuantizationType[kind]
    if kind in ONLY_READ:
        whole = exports.random_blocks(chosen, 512, seed=5)
    else:
        whole = gguf.quantize(
            np.random.default_rng(5).standard_normal((1, 64), np.float32), chosen
        ).reshape(2, -1)
    where = Piece(Path("x.gguf"), TensorInfo("x", kind, (2, gguf_block_values(kind))))
    codecs.check_values("x", {"": torch.from_numpy(whole)}, where)
    refused_at = []
    for at in range(0, whole.shape[1] - 1, 2):
        blocks = whole.copy()
        blocks[1, at : at + 2] = list(bits.to_bytes(2, "little"))
        with np.errstate(all="ignore"):
            finite = np.isfinite(gguf.dequantize(blocks, chosen)).all()
        try:
            codecs.check_values("x", {"": torch.from_numpy(blocks)}, where)
        except CheckpointError:
            refused_at.append(at)
        assert finite == (at not in refused_at), at
    assert len(refused_at) == (2 if kind in ("Q2_K", "Q4_K", "Q5_K", "Q4_1", "Q5_1") else 1)


QKV, IMG = "double_blocks.0.img_attn.qkv.weight", "img_in.weight"
HEADERS = {  # fields of the header, and what is said of them
    "a later version": ({"version": 4}, "version 4"),
    "big-endian": ({"version": 3 << 24}, "version"),
    "no tensors": ({"tensors": 0}, "0 tensors"),
    "20,000 tensors": ({"tensors": 20_000}, "20000 tensors"),
    "2^63 values": ({"values": 1 << 63}, "9223372036854775808 values"),
    "a tensor more": ({"tensors": 7}, "corrupt GGUF"),
    "2^62 items": ({"items": 1 << 62}, "corrupt GGUF"),
    "lists in lists": ({"item type": 9}, "corrupt GGUF"),
    "items of no type": ({"item type": 99}, "corrupt GGUF"),
    "a value of no type": ({"alignment type": 13}, "corrupt GGUF"),
    "alignment 0": ({"alignment": 0}, "alignment is 0"),
    "alignment 1": ({"alignment": 1}, "alignment is 1"),
    "alignment 48": ({"alignment": 48}, "alignment is 48"),
    "alignment 32.0": ({"alignment type": 6, "alignment": 0x42000000}, "alignment is 32.0"),
    "rank 9": ({f"{IMG} rank": 9}, "corrupt GGUF"),
    "rank 2^31": ({f"{IMG} rank": 1 << 31}, "corrupt GGUF"),
    "overflowing dims": ({f"{IMG} dim 0": 1 << 62, f"{IMG} dim 1": 4}, "impossible shape or place"),
    "2^64 - 1 rows": ({f"{IMG} dim 1": (1 << 64) - 1}, "impossible shape or place"),
    "broken blocks": ({f"{QKV} dim 0": 33}, "no whole blocks of Q8_0"),
    "a new type": ({f"{QKV} type": 99}, "weight is of type 99"),
    "a type of ggml's": ({f"{QKV} type": 17}, "weights packed in a way that is not read"),
    "a type by its name": ({f"{QKV} type": 39}, "weight is MXFP4"),
    "a value twice": ({"list key": "general.alignment"}, "stands twice"),
    "an offset past the end": ({f"{QKV} start": 1 << 40}, "impossible shape or place"),
    "an overflowing offset": ({f"{QKV} start": (1 << 64) - 32}, "impossible shape or place"),
    "an odd offset": ({f"{IMG} start": 8, f"{IMG} dim 1": 31}, "not aligned"),
    "the same place": ({f"{QKV} start": 0}, "overlaps"),
    "a name twice": ({f"{QKV} name": IMG}, "stands twice"),
    "SDXL": ({"architecture": "sdxl"}, "its architecture is 'sdxl'"),
    "a language model": ({"architecture": "llama"}, "its architecture is 'llama'"),
    "other channels": ({f"{IMG} dim 0": 96, f"{IMG} type": 2}, "96 channels"),
}


@pytest.mark.parametrize("changes, words", HEADERS.values(), ids=HEADERS)
def test_a_hostile_gguf_header_is_refused(changes, words, capsys):
    fields = gguf_fields()
    fields |= {label: (fields[label][0], value) for label, value in changes.items()}
    Path("x.gguf").write_bytes(pack_gguf(fields))
    refused(capsys, Path("x.gguf"), words)


def bounded(path: Path, data: bytes, *, traced: bool = True) -> str:
    """What becomes of a file: "" if it is accepted, else the refusal.

    It takes at most a second and, if `traced`, little memory.
    """

    def outcome() -> str:
        try:
            inspect_file(path)
        except CheckpointError as error:
            return str(error)
        return ""

    path.write_bytes(data)
    began = time.process_time()
    found = outcome()
    assert time.process_time() - began < 1
    if traced:
        tracemalloc.start()
        try:
            assert outcome() == found and tracemalloc.get_traced_memory()[1] < 32 << 20
        finally:
            tracemalloc.stop()
    return found


def test_a_gguf_cut_anywhere_or_with_any_bytes_changed_is_read_or_refused_in_bounded_time(tmp_path):
    whole, rng, path = pack_gguf(gguf_fields()), Random(1), tmp_path / "x.gguf"
    size = len(whole) - sum(-(-size // 32) * 32 for *_, size in GGUF_TENSORS.values())
    assert bounded(path, whole) == "" and all(bounded(path, whole[:n]) for n in range(200))
    assert "impossible shape or place" in bounded(path, whole[:-40])
    outcomes = set()
    for _ in range(1500):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 1, 2, 8))):
            data[rng.randrange(size)] = rng.randrange(256)
        outcomes.add(bounded(path, bytes(data)).partition(" (")[0])
    assert {
        "",
        "corrupt GGUF file",
        "a GGUF of another model",
        "not a safetensors file",
        "weights packed in a way that is not read",
    } <= outcomes


def test_a_gguf_with_long_lists_is_read_or_refused_in_bounded_time(tmp_path):
    def text(value: bytes) -> bytes:
        return len(value).to_bytes(8, "little") + value

    path, start = tmp_path / "x.gguf", b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + text(b"a.list")
    empty, nested = struct.pack("<IQ", 0, 0), struct.pack("<IQ", 9, 1)
    for kind, item in ((0, b"\1"), (6, bytes(4)), (8, text(b"")), (9, empty), (9, nested)):
        count = (4 << 20) // len(item)
        data = start + struct.pack("<IIQ", 9, kind, count) + item * count
        # Tracing takes seconds of the others.
        assert "corrupt GGUF file" in bounded(path, data, traced=kind < 8)
    many = b"".join(text(b"%d" % n) + struct.pack("<IQIQ", 1, 8, 0, 32 * n) for n in range(1 << 14))
    data = b"GGUF" + struct.pack("<IQQ", 3, 1 << 14, 0) + many + bytes(33 << 14)
    assert "not a FLUX.1 model" in bounded(path, data)


def test_nan_in_a_gguf_is_exit_4(exported, capsys):
    data = bytearray(exported("gguf Q8_0")[0].read_bytes())
    place = read_header(exported("gguf Q8_0")[0])["single_blocks.3.linear2.weight"]
    data[place.stop - 34 : place.stop - 32] = b"\0\x7e"  # the scale of the last block
    Path("x.gguf").write_bytes(data)
    error = assert_failed(
        call(capsys, "generate", "x", "-p", "tiny", "-q", *SMALL, "-m", "x.gguf"), 4
    )
    assert "not finite" in error and "single_transformer_blocks.3.proj_out.weight" in error


# --- other families


FAMILIES = {
    "Chroma": [
        "distilled_guidance_layer.in_proj.weight",
        "double_blocks.0.img_attn.qkv.weight",
        "img_in.weight",
    ],
    "Stable Diffusion 3": [
        "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight",
        *(
            f"text_encoders.{name}.transformer.text_model.encoder.layers.0.x"
            for name in ("clip_l", "clip_g")
        ),
    ],
    "a nunchaku (SVDQuant) checkpoint, which is not read": [
        "x_embedder.weight",
        "transformer_blocks.0.qkv_proj.qweight",
        "transformer_blocks.0.qkv_proj.wscales",
        "transformer_blocks.0.qkv_proj.lora_down",
        "single_transformer_blocks.0.qkv_proj.lora_up",
    ],
    "a GPTQ or AWQ checkpoint, which is not read": [
        "single_transformer_blocks.0.attn.to_q.qweight",
        "single_transformer_blocks.0.attn.to_q.qzeros",
    ],
    "a ControlNet, which --control KIND:PICTURE takes": [
        "controlnet_blocks.0.weight",
        "controlnet_mode_embedder.weight",
        "transformer_blocks.0.attn.to_q.weight",
        "single_transformer_blocks.0.attn.to_q.weight",
    ],
    "an IP-Adapter, which is not read: --redux PICTURE draws alike": [
        "double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight",
        "ip_adapter_proj_model.proj.weight",
    ],
    "an mflux (MLX) checkpoint, which is not read": [
        f"single_transformer_blocks.0.attn.to_q.{end}" for end in ("weight", "scales", "biases")
    ],
    "UMT5, FLUX.1 takes T5 1.1 XXL": [
        f"encoder.block.{i}.layer.0.SelfAttention.relative_attention_bias.weight" for i in (0, 1)
    ],
    "a CLIP in OpenCLIP's layout, FLUX.1 takes CLIP-L in Hugging Face's": [
        "transformer.resblocks.0.attn.in_proj_weight"
    ],
}
XLABS_CONTROLNET = ["double_blocks.0.img_attn.qkv.weight", "input_hint_block.0.weight"]
OTHER_FORMS = {
    "a ControlNet": [XLABS_CONTROLNET, ["control_model.double_blocks.0.img_mod.lin.weight"]],
    "an IP-Adapter": [["image_proj.proj.0.weight", "ip_adapter.0.to_k_ip.weight"]],
}
TEXT_MODEL = "text_model.encoder.layers.0.self_attn.k_proj.weight"


@pytest.mark.parametrize("family", FAMILIES)
def test_another_familys_file_is_named(family, capsys):
    save_file({name: torch.ones(4, 4) for name in FAMILIES[family]}, "x.safetensors")
    error = assert_failed(call(capsys, "generate", "x", "-p", "tiny", "-m", "x.safetensors"), 4)
    assert (
        f"not a FLUX.1 model in one file ({Path('x.safetensors').absolute()}): {family}." in error
    )


@pytest.mark.parametrize("family", OTHER_FORMS)
def test_other_forms_of_a_family_are_named(family, capsys):
    for names in OTHER_FORMS[family]:
        save_file({name: torch.ones(4, 4) for name in names}, "x.safetensors")
        error = call(capsys, "generate", "x", "-p", "tiny", "-m", "x.safetensors")
        assert family in assert_failed(error, 4)
        assert family in json.loads(call(capsys, "inspect", "x.safetensors").stdout)["kind"]


@pytest.mark.parametrize(
    "word, shapes",
    [
        ("LongCLIP", {"text_model.embeddings.position_embedding.weight": (248, 8)}),
        ("clip_g", {"text_model.embeddings.token_embedding.weight": (9, 1280)}),
    ],
)
def test_another_clip_is_named_by_its_shapes(word, shapes, capsys):
    tensors = {name: torch.ones(shape) for name, shape in shapes.items()}
    save_file(tensors | {TEXT_MODEL: torch.ones(8, 8)}, "x.safetensors")
    error = call(capsys, "generate", "x", "-p", "tiny", "--text-encoders", "x.safetensors")
    assert word in assert_failed(error, 4)


def test_mflux_and_nunchaku_say_it_in_their_metadata(capsys):
    tensors = {"single_transformer_blocks.0.attn.to_q.weight": torch.ones(4, 4)}
    for word, metadata in (
        ("mflux", {"mflux_version": "0.9"}),
        ("nunchaku", {"quantization_config": '{"method": "svdquant"}'}),
    ):
        save_file(tensors, "x.safetensors", metadata)
        error = call(capsys, "generate", "x", "-p", "tiny", "-m", "x.safetensors")
        assert word in assert_failed(error, 4)


# --- the command line


@pytest.fixture(scope="module")
def parts(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every kind of single file of the bundled model."""
    folder = tmp_path_factory.mktemp("parts")
    clip, t5, vae = (
        exports.part_of(tiny_folder, name) for name in ("text_encoder", "text_encoder_2", "vae")
    )
    exports.all_in_one(
        tiny_folder,
        exports.bfl_tensors(tiny_folder, folder / "bfl.safetensors"),
        folder / "all.safetensors",
    )
    save_file(clip, folder / "clip.safetensors")
    save_file(t5, folder / "t5.safetensors")
    save_file(
        {n: t.contiguous() for n, t in (exports.to_ldm(*item) for item in vae.items())},
        folder / "ae.safetensors",
    )
    exports.in_gguf("Q8_0", architecture="t5encoder", rename=exports.to_llama)(
        t5, folder / "t5.gguf"
    )
    exports.in_gguf("Q8_0")(load_file(folder / "bfl.safetensors"), folder / "bfl.gguf")
    return folder


def draw(capsys: pytest.CaptureFixture, *arguments: object) -> np.ndarray:
    given = (
        "generate",
        "a red circle",
        "-p",
        "tiny",
        *SMALL,
        "-o",
        "x.png",
        "--force",
        *map(str, arguments),
    )
    result = call(capsys, *given)
    assert result.returncode == 0, result.stderr
    return read_pixels(Path("x.png"))


def test_the_command_line_draws_the_same_picture_from_every_file(parts, tiny_folder, capsys):
    expected, bfl, every = (
        draw(capsys),
        ("-m", parts / "bfl.safetensors"),
        ("--text-encoders", parts / "clip.safetensors"),
    )
    every += ("--text-encoders", parts / "t5.safetensors", "--vae", parts / "ae.safetensors")
    for given in (
        bfl,
        ("-m", parts / "all.safetensors"),
        (*bfl, "--text-encoders", tiny_folder),
        (*bfl, *every),
        every,
    ):
        assert np.array_equal(draw(capsys, *given), expected), given
    for given in (("-m", parts / "bfl.gguf"), (*bfl, "--text-encoders", parts / "t5.gguf")):
        assert 0 < apart(draw(capsys, *given), expected) < 0.5
    assert np.array_equal(draw(capsys, *bfl, *every), expected)
    result = call(capsys, "replay", "x.png", "--check")
    assert (result.returncode, result.stdout) == (0, "x.png: identical\n")


PARTS = ("text_encoder", "text_encoder_2", "vae")
LACKING = {"bfl.safetensors": PARTS, "bfl.gguf": PARTS, "all.safetensors": ()}


@pytest.mark.parametrize("name", LACKING)
def test_a_file_without_its_base_is_exit_3_and_says_what_to_download(name, parts, capsys):
    error = assert_failed(call(capsys, "generate", "x", "-p", "dev", "-m", str(parts / name)), 3)
    lacking = " and no ".join((*LACKING[name], "tokenizers"))
    assert f"it has no {lacking}, and black-forest-labs/FLUX.1-dev is not here" in error
    only = ",".join(("tokenizers", *LACKING[name]))
    command = f"flux models download black-forest-labs/FLUX.1-dev --only {only}"
    assert f"hint: {command}; or --text-encoders FOLDER\n" in error


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("-m", "clip.safetensors"), "no transformer in this file"),
        (("-m", "bfl.safetensors", "--vae", "clip.safetensors"), "no vae there"),
        (
            ("-m", "bfl.safetensors", "--text-encoders", "ae.safetensors"),
            "no text_encoder or text_encoder_2 there",
        ),
        (("--vae", "t5.gguf"), "no vae there"),
    ],
)
def test_a_file_of_another_part_is_exit_4(arguments, words, parts, capsys, monkeypatch):
    monkeypatch.chdir(parts)
    assert words in assert_failed(
        call(capsys, "generate", "x", "-p", "tiny", "--dry-run", *arguments), 4
    )


@pytest.mark.parametrize(
    "dialect", ["bfl f32", "comfy fp8", "comfy scaled old", "comfy scaled", "gguf Q4_0", "nf4 v1"]
)
def test_inspect_names_a_transformers_dialect(dialect, exported, capsys):
    result = call(capsys, "inspect", str(exported(dialect)[0]))
    found = json.loads(result.stdout)
    assert (result.returncode, found["kind"], found["loads"], found["problems"]) == (
        0,
        "transformer",
        "154 of 154",
        [],
    )
    assert (found["dialect"], found["parameters"]) == (DIALECTS[dialect][2], 2_617_600)
