"""What tests/support/fuzz.py feeds: tiny model folders, a GGUF, and damage to one of their files.

Knows the formats, no reader.

A folder is its files by relative path. Damage is drawn from one `Random`: the same draws give the
same bytes.
"""

import copy
import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from random import Random

TINY = Path(__file__).resolve().parents[2] / "presets" / "tiny"
OUTSIDE = "outside.safetensors"  # beside the folder: nobody may open it
DTYPE_BYTES = {
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F16": 2,
    "BF16": 2,
    "F32": 4,
    "I64": 8,
}
SINGLE, SHARD = (
    "transformer/diffusion_pytorch_model.safetensors",
    "transformer/d-0000{}-of-2.safetensors",
)
STATE = {
    "quant_type": "nf4",
    "blocksize": 64,
    "dtype": "bfloat16",
    "shape": [8, 8],
    "nested_blocksize": 256,
}
STATE |= {"nested_dtype": "float32", "nested_offset": 0.1}
NF4 = {
    "": ("U8", [32, 1]),
    ".absmax": ("U8", [1]),
    ".quant_map": ("F32", [16]),
    ".nested_absmax": ("F32", [1]),
    ".nested_quant_map": ("F32", [256]),
    ".quant_state.bitsandbytes__nf4": ("U8", [256]),
}
FP8 = {"": ("F8_E4M3", [8, 8]), "_scale": ("F32", [8])}
MARKER = ".comfy_quant"  # follows the layer's name
CONVROT = {"": ("I8", [8, 8]), "_scale": ("F32", [8, 1]), MARKER: ("U8", [99])}
W4A8 = {
    "": ("I8", [8, 8]),
    "_s_rel": ("F8_E4M3", [8, 1]),
    "_s_channel": ("F32", [8]),
    "_codebook": ("F32", [16]),
    MARKER: ("U8", [99]),
}
NVFP4 = {"": ("U8", [8, 8]), "_scale": ("F8_E4M3", [128, 4]), "_scale_2": ("F32", [])}
BFL_NVFP4 = NVFP4 | {"_scale": ("F8_E4M3", [8, 1])}
MXFP8 = {"": ("F8_E4M3", [8, 32]), "_scale": ("U8", [128, 4]), MARKER: ("U8", [99])}
SAID = {  # by kind of folder
    "convrot": {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 4},
    "w4a8": {"format": "asym_w4a8_int8", "group_size": 16, "convrot_groupsize": 16},
    "nvfp4": {"format": "nvfp4"},
    "mxfp8": {"format": "mxfp8", "params": {}},
}
GGUF = "model.gguf"
GGUF_TENSORS = {  # type, shape as GGUF has it, bytes
    "img_in.weight": (0, (64, 32), 8192),
    "txt_in.weight": (30, (32, 32), 2048),
    "vector_in.in_layer.weight": (1, (32, 32), 2048),
    "double_blocks.0.img_attn.norm.query_norm.scale": (0, (16,), 64),
    "double_blocks.0.img_attn.qkv.weight": (8, (32, 96), 3264),
    "single_blocks.0.linear1.weight": (2, (32, 224), 4032),
}
OURS = ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.ff.net.2", "proj_out")
BFL = ("double_blocks.0.img_attn.qkv", "single_blocks.0.linear1", "final_layer.adaLN_modulation.1")
ENDS = (*NF4, *FP8, *W4A8, "_scale_2", "._data", "._scale", ".scale", ".SCB", ".weight")
PATHS = (
    "../x",
    f"../{OUTSIDE}",
    f"../../{OUTSIDE}",
    f"x/../../../{OUTSIDE}",
    f"..\\..\\{OUTSIDE}",
    f"./{OUTSIDE}",
    "..",
    "/",
    "C:\\x.safetensors",
    "/etc/x.safetensors",
    "x\0.safetensors",
    "\ud800.safetensors",
    ".safetensors",
    "\x1b[2J",
    "A" * 300 + ".safetensors",
    "é" * 200 + ".safetensors",
    "x/" * 3000 + ".safetensors",
    "//x.safetensors",
)
WORDS = (
    "",
    "a\nb",
    "A" * 100_000,
    "__metadata__",
    "weight_map",
    "shape",
    "U8",
    "F32",
    "F4",
    "nf4",
    "x.weight",
    *PATHS,
)
NUMBERS = (
    0,
    1,
    -1,
    2,
    3,
    63,
    65,
    2**31,
    2**47,
    2**48,
    2**53,
    2**63,
    -(2**63),
    2**64,
    10**4299,
    0.5,
    1e308,
    2.0,
    -8,
)
VALUES = [
    json.dumps(value)
    for value in (*WORDS, *NUMBERS, None, True, [], {}, [0], [2**47] * 99, [-8, -8], [0, 2**60])
]
VALUES += [
    "NaN",
    "-Infinity",
    "1e999",
    "-0",
    "9" * 5000,
    '"\\u002e./x"',
    '"\\ud83d"',
    '{"a":1,"a":2}',
    "{,}",
    "'a'",
]
VALUES += [
    a * deep + "0" + b * deep
    for deep in (3, 300, 960, 990, 99_999)
    for a, b in (("[", "]"), ('{"a":', "}"))
]
VALUES += [f"[{'281474976710655,' * many}1]" for many in (1000, 30_000)]
LENGTHS = (0, 1, 2, 7, 640, 100_000_000, 100_000_001, 2**31, 2**63, 2**64 - 1, 0x0403_4B50)
STARTS = (
    b"",
    b"PK\x03\x04",
    b"\x80\x02",
    b"GGUF",
    b"<!DOCTYPE html>",
    b"version https://git-lfs.github.com/spec/v1",
)


def folders() -> dict[str, dict[str, bytes]]:
    """Model folders by kind.

    They are the bundled one with tiny tensors, its shards, quantized weights, BFL's names.
    """
    plain = {
        str(path.relative_to(TINY)): path.read_bytes()
        for path in TINY.rglob("*.json")
        if "tok" not in str(path)
    }
    plain |= {"tokenizer/tokenizer.json": b"{}", "tokenizer_2/tokenizer.json": b"{}"}
    for path in TINY.rglob("*.safetensors"):
        entries, _ = parse(path.read_bytes())
        some = {name: entries[name] for name in [*entries][:: len(entries) // 5]}
        shrunk = {name: (entry["dtype"], [2] * len(entry["shape"])) for name, entry in some.items()}
        plain[str(path.relative_to(TINY))] = pack(_with_data(shrunk))
    kinds = {"plain": plain, "sharded": plain | _shards(_tensors(plain[SINGLE]))}
    for kind, parts, names in (
        ("nf4", NF4, OURS),
        ("fp8", FP8, OURS),
        ("bfl-nf4", NF4, BFL),
        ("bfl-fp8", FP8, BFL),
        ("convrot", CONVROT, OURS),
        ("w4a8", W4A8, OURS),
        ("nvfp4", NVFP4 | {MARKER: ("U8", [99])}, OURS),
        ("bfl-nvfp4", BFL_NVFP4, BFL),
        ("mxfp8", MXFP8, OURS),
    ):
        tensors = _with_data(
            {
                name + (end if end == MARKER else f".weight{end}"): part
                for name in names
                for end, part in parts.items()
            }
        )
        for name, (dtype, shape, _) in tensors.items():
            if name.endswith(MARKER):
                said = json.dumps(SAID[kind]).encode().ljust(shape[0])
                tensors[name] = (dtype, shape, said)
        kinds[kind] = plain | _shards(tensors)
    config = json.loads(plain["transformer/config.json"]) | {
        "quantization_config": {"quant_method": "bitsandbytes"}
    }
    kinds["nf4"]["transformer/config.json"] = json.dumps(config).encode()
    for kind in [*kinds][1:]:
        del kinds[kind][SINGLE]
    return kinds | {"gguf": {GGUF: pack_gguf(gguf_fields())}}


def damage(rng: Random, folder: dict[str, bytes], *, whole: bool) -> dict[str, bytes | None]:
    """Other contents for one or two files that matter, or for one weight file.

    None stands for a file that is missing.
    """
    if GGUF in folder:
        return {GGUF: _damaged_gguf(rng, folder[GGUF])}
    paths = [
        p for p in folder if not p.startswith("tokenizer") and (whole or p.endswith(".safetensors"))
    ]
    weights = [
        6 if p.endswith(".index.json") else 3 if p.startswith("transformer") else 1 for p in paths
    ]
    chosen = rng.choices(paths, weights, k=2 if whole and rng.random() < 0.2 else 1)
    return {path: _damaged(rng, folder, path) for path in chosen}


def write(root: Path, files: dict[str, bytes | None]) -> None:
    """Make the files below a folder what they shall be."""
    for path, data in files.items():
        if data is None:
            (root / path).unlink()
            continue
        if not (root / path).parent.is_dir():
            (root / path).parent.mkdir(parents=True)
        (root / path).write_bytes(data)


def _damaged(rng: Random, folder: dict[str, bytes], path: str) -> bytes | None:
    data, pick = folder[path], rng.random()
    if pick < 0.02:
        return None
    if pick < 0.8 and path.endswith(".json"):
        data = _damaged_json(rng, json.loads(data))
    elif pick < 0.4:
        entries, rest = parse(data)
        text = _damaged_json(rng, entries)
        data = len(text).to_bytes(8, "little") + text + rest
    elif pick < 0.8:
        data = pack(_retyped(rng, _tensors(data)))
    return (
        data
        if pick < 0.8 and rng.random() < 0.8
        else _damaged_bytes(rng, data, folder[rng.choice([*folder])])
    )


def _damaged_bytes(rng: Random, data: bytes, other: bytes) -> bytes:
    at, size = (
        rng.randrange(min(len(data), rng.choice((16, 800, 1 << 20))) + 1),
        rng.choice((1, 1, 2, 8, 100)),
    )
    match rng.randrange(6):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + other[rng.randrange(len(other) + 1) :]
        case 2:
            length = rng.choice(
                (*LENGTHS, len(data) - 8, len(data) - 7, int.from_bytes(data[:8], "little") ^ 1)
            )
            return max(0, length).to_bytes(8, "little") + data[8:]
        case 3:
            return rng.choice(STARTS) + data[rng.choice((0, size)) :]
        case 4:
            return data[:at] + data[at : at + size] * 2 + data[at + size :]
    return data[:at] + rng.randbytes(size) + data[at + size :]


def _damaged_json(rng: Random, document: object) -> bytes:
    raw = {}
    for mark in ("@1@", "@2@", "@3@")[: rng.choice((1, 1, 1, 2, 3))]:
        box, key = rng.choice([*_places(document)] or [([0], 0)])
        match rng.randrange(7 if isinstance(box, dict) else 4):
            case 0:
                del box[key]
            case 1:
                other, place = rng.choice([*_places(document)] or [([0], 0)])
                box[key] = copy.deepcopy(other[place])
            case 4:  # the name twice
                box[mark], raw[mark] = 0, json.dumps(key)
            case 5:
                box[mark], raw[mark] = (
                    box.pop(key),
                    json.dumps(rng.choice((*WORDS, key + rng.choice(ENDS)))),
                )
            case _:
                is_path = str(box[key]).endswith(".safetensors") and rng.random() < 0.7
                box[key], raw[mark] = (
                    mark,
                    json.dumps(rng.choice(PATHS)) if is_path else rng.choice(VALUES),
                )
    text = json.dumps(document)
    for mark, value in raw.items():
        text = text.replace(f'"{mark}"', value)
    return text.encode()


def _places(document: object) -> Iterator[tuple[dict | list, object]]:
    keys = (
        [*document]
        if isinstance(document, dict)
        else range(len(document) if isinstance(document, list) else 0)
    )
    for key in keys:
        yield document, key
        yield from _places(document[key])


def _retyped(rng: Random, tensors: dict) -> dict:
    """Tensors that still tile the data, with a defect in one of them.

    It has another name, type, shape or state, or is missing.
    """
    texts = [name for name in tensors if "state" in name or name.endswith(MARKER)]
    name = rng.choice([name for name in texts if rng.random() < 0.5] or [*tensors])
    dtype, shape, data = tensors[name]
    match rng.randrange(4):
        case 0:
            del tensors[name]
        case 1:
            layer = rng.choice([*tensors]).partition(".weight")[0]
            tensors[layer + rng.choice(("", ".weight", ".bias")) + rng.choice(ENDS)] = tensors.pop(
                name
            )
        case 2 if data[:1] == b"{":
            state = _damaged_json(rng, json.loads(data))[: rng.choice((256, 256, 5000))]
            state = state if rng.random() < 0.3 else state.ljust(256)
            tensors[name] = (dtype, [len(state)], state)
        case _:
            shape = rng.choice(
                (shape, [rng.choice((0, 1, 2, 8, 16)) for _ in range(rng.randrange(4))])
            )
            tensors |= _with_data({name: (rng.choice([dtype, *DTYPE_BYTES]), shape)})
    return tensors or {"x": ("U8", [0], b"")}


def pack(tensors: dict[str, tuple[str, list[int], bytes]]) -> bytes:
    """A safetensors file of (dtype, shape, data) by name."""
    entries, at = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape, data) in tensors.items():
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at := at + len(data)]}
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + b"".join(data for *_, data in tensors.values())


def parse(file: bytes) -> tuple[dict, bytes]:
    """The entries of a whole safetensors file, and its data."""
    size = 8 + int.from_bytes(file[:8], "little")
    entries = json.loads(file[8:size])
    entries.pop("__metadata__", None)
    return entries, file[size:]


def gguf_fields() -> dict[str, tuple[str, object]]:
    """What a GGUF's header says, in its order, by labels.

    Each is a letter of `struct`, "" for text, and the value.
    """
    found = {
        "magic": ("4s", b"GGUF"),
        "version": ("I", 3),
        "tensors": ("Q", len(GGUF_TENSORS)),
        "values": ("Q", 3),
    }
    for key, kind, letter, value in (("architecture", 8, "", "flux"), ("alignment", 4, "I", 32)):
        found |= {
            f"{key} key": ("", f"general.{key}"),
            f"{key} type": ("I", kind),
            key: (letter, value),
        }
    found |= {
        "list key": ("", "a.list"),
        "list type": ("I", 9),
        "item type": ("I", 8),
        "items": ("Q", 2),
    }
    found |= {"item 0": ("", "one"), "item 1": ("", "two")}
    at = 0
    for name, (kind, shape, size) in GGUF_TENSORS.items():
        found |= {f"{name} name": ("", name), f"{name} rank": ("I", len(shape))}
        found |= {f"{name} dim {k}": ("Q", count) for k, count in enumerate(shape)}
        found |= {f"{name} type": ("I", kind), f"{name} start": ("Q", at)}
        at += -(-size // 32) * 32
    return found


def pack_gguf(fields: dict[str, tuple[str, object]]) -> bytes:
    """A GGUF file with such a header, all of its data 0."""
    header = b""
    for letter, value in fields.values():
        text = value.encode("utf-8", "surrogatepass") if letter == "" else b""
        header += (
            struct.pack(f"<{letter}", value) if letter else len(text).to_bytes(8, "little") + text
        )
    sizes = [-(-size // 32) * 32 for *_, size in GGUF_TENSORS.values()]
    return header + bytes(-len(header) % 32 + sum(sizes))


def _damaged_gguf(rng: Random, data: bytes) -> bytes:
    if rng.random() < 0.3:
        return _damaged_bytes(rng, data, data)
    fields = gguf_fields()
    for _ in range(rng.choice((1, 1, 2))):
        label = rng.choice([*fields])
        letter, _ = fields[label]
        if letter in ("I", "Q"):
            most = (1 << 8 * struct.calcsize(f"<{letter}")) - 1
            fields[label] = (
                letter,
                rng.choice((*NUMBERS[:5], *range(6, 40), *LENGTHS, 1 << 16, 1 << 62)) & most,
            )
        elif rng.random() < 0.2:
            del fields[label]
        elif letter == "":
            fields[label] = ("", rng.choice((*WORDS, *GGUF_TENSORS, "general.alignment")))
    return pack_gguf(fields)


def _tensors(file: bytes) -> dict[str, tuple[str, list[int], bytes]]:
    entries, data = parse(file)
    return {
        name: (e["dtype"], e["shape"], data[slice(*e["data_offsets"])])
        for name, e in entries.items()
    }


def _with_data(
    tensors: dict[str, tuple[str, list[int]]],
) -> dict[str, tuple[str, list[int], bytes]]:
    state = json.dumps(STATE).encode()
    sized = {
        name: (dtype, shape, DTYPE_BYTES[dtype] * math.prod(shape))
        for name, (dtype, shape) in tensors.items()
    }
    return {
        n: (d, s, (state if "state" in n else b"").ljust(size)[:size])
        for n, (d, s, size) in sized.items()
    }


def _shards(tensors: dict) -> dict[str, bytes]:
    """Two shards, a packed weight on both sides of the cut, and their index."""
    names, half = [*tensors], len(tensors) // 2
    parts = {SHARD.format(1): names[:half], SHARD.format(2): names[half:]}
    placed = {name: Path(path).name for path, part in parts.items() for name in part}
    index = {
        "metadata": {"total_size": sum(len(data) for *_, data in tensors.values())},
        "weight_map": placed,
    }
    files = {path: pack({name: tensors[name] for name in part}) for path, part in parts.items()}
    return files | {
        "transformer/diffusion_pytorch_model.safetensors.index.json": json.dumps(index).encode()
    }
