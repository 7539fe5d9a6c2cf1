"""Checkpoints and their components, and how those of a model folder in diffusers' layout are read.

Works from headers alone; of the data it reads nothing but pages for the fingerprint. Knows the
folder layout and shard indexes, but no single files. Sizes are in bytes. Stdlib only.
"""

import hashlib
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeGuard

from quant.config import (
    DOWNLOAD_AGAIN,
    MAX_JSON_BYTES,
    complete,
    name_class,
    read_config,
    read_json,
)
from quant.dialects import T5_TIED, UNUSED, guess_kind
from quant.errors import CheckpointError
from quant.expected import check_tensors
from quant.files import open_regular
from quant.header import file_identity, read_whole_header
from quant.header_json import MARKERS as METADATA
from quant.kinds import CHANNELS_OF, KINDS, Kind, describe_name, find_kind, find_title
from quant.markers import add_layers, read_layers
from quant.spec import FAMILIES, ROTATED, SCALED_BLOCKS, SCHEMES
from quant.weights import SCB, Piece, Weight, group_weights

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
TOKENIZERS = ("tokenizer", "tokenizer_2")
# What a tokenizer is made from: all the files of one of these rows.
VOCABULARIES = {
    "tokenizer": (("tokenizer.json",), ("vocab.json", "merges.txt")),
    "tokenizer_2": (("tokenizer.json",), ("spiece.model",)),
}
# What transformers looks for in the folder of a tokenizer of either kind.
TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "config.json",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)
MAX_EXTRA_IDS = 1000  # the published T5 has 100
COMPONENTS = (*TEXT_ENCODERS, "transformer", "vae")
PLAIN_FILES = ("diffusion_pytorch_model.safetensors", "model.safetensors")
# Pipelines that a FLUX.1 of any kind may name, by a regular expression.
PIPELINES = re.compile(
    r"Flux(Fill|Kontext|KontextInpaint|(Control|ControlNet)?(Img2Img|Inpaint)?|DifferentialImg2Img"
    r"|CFG)?Pipeline(With\w+)?"
)
# Files that diffusers writes with `variant="bf16"`, and their index of shards.
VARIANT_FILE = re.compile(r"(?:diffusion_pytorch_model|model)\.(\w+)\.safetensors")
VARIANT_INDEX = re.compile(r".+\.safetensors\.index\.(\w+)\.json")
SHARD = re.compile(r".+-\d+-of-\d+(\.\w+)?\.safetensors")
# Of several variants the first of these counts, then the first by name.
VARIANTS = ("bf16", "fp16")
# Names of their own for weights that diffusers does not know to be quantized: under a plain name,
# from_pretrained would load them without their scales, and pictures would be noise.
PACKED_FILES = {name: row.file_name for name, row in SCHEMES.items() if row.file_name}
# Those in which every quantized weight has a marker; without, nothing would say that it is rotated.
MARKED_FILES = tuple(PACKED_FILES[name] for name in ROTATED)
# What flux wrote before it rotated weights; read, never written.
FORMER_FILES = ("flux-int8.safetensors",)
# 16-bit originals of layers that are quantized only for bitsandbytes' readers (see `quant.recipe`).
# Where a component has this file, they are read from it.
KEEP_FILE = "flux-keep.safetensors"
MANIFEST = "flux-manifest.json"


@dataclass(frozen=True)
class Component:
    """A part of a model: where it is, its checked config.json, its weights by diffusers' names.

    `folder` is the file where the part came in one. `dialect` describes for people who wrote the
    files, and in which layout. `unused` has the names of tensors that FLUX.1 does not use, as those
    of CLIP's vision half. `title` is what the metadata of its file call the model, "" for nothing.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    weights: dict[str, Weight]
    dialect: str = "diffusers"
    unused: tuple[str, ...] = ()
    title: str = ""

    @property
    def numel(self) -> int:
        return sum(weight.numel for weight in self.weights.values())

    @cached_property
    def nbytes(self) -> int:
        return sum(weight.nbytes for weight in self.weights.values())

    @property
    def files(self) -> list[Path]:
        return sorted({piece.file for piece in self._pieces()})

    @cached_property
    def precision(self) -> str:
        """The scheme (of `SCHEMES`) of most quantized values, "" where nothing is quantized."""
        counts = dict.fromkeys(SCHEMES, 0)
        for weight in self.weights.values():
            if weight.scheme:
                counts[FAMILIES[weight.scheme]] += weight.numel
        if not any(counts.values()):
            return ""
        return max(counts, key=counts.__getitem__)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that change with the config and the weights, see `Checkpoint`."""
        digest = hashlib.sha256(_to_bytes(self.config))
        for path in self.files:
            digest.update(file_identity(path))
        return digest.hexdigest()[:16]

    def _pieces(self) -> Iterator[Piece]:
        for weight in self.weights.values():
            yield from weight.pieces.values()


class _Fingerprints(NamedTuple):
    whole: str
    text_encoders: str


@dataclass(frozen=True)
class Checkpoint:
    """A complete model: components by name, the scheduler's config, the folder of tokenizers.

    Beside the four of `COMPONENTS` there may be what a request adds, as ControlNets. `pipeline` is
    the class that the folder's index names, `said_kind` what the user, or the manifest of a bake,
    says that the model is.
    """

    folder: Path
    components: dict[str, Component]
    scheduler: dict[str, Any]
    pipeline: str = ""
    said_kind: str = ""

    @property
    def kind(self) -> str:
        """Which kind of FLUX.1 it is, of `quant.kinds.KINDS`."""
        return self.said_kind or self.found_kind.kind

    @cached_property
    def found_kind(self) -> Kind:
        """Which kind it is by its files, and what tells it."""
        return find_kind_of(self.components["transformer"], self.pipeline)

    @property
    def nbytes(self) -> int:
        return sum(component.nbytes for component in self.components.values())

    @property
    def parts(self) -> dict[str, Component]:
        """The components that a request adds, by their keys."""
        return {
            name: component for name, component in self.components.items() if name not in COMPONENTS
        }

    @property
    def takes_guidance(self) -> bool:
        """Whether the transformer was distilled with guidance, as dev was and schnell was not."""
        return bool(self.components["transformer"].config["guidance_embeds"])

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change with the configs, the tokenizers and the weights.

        Configs count with all values, files with their sizes and 64 sampled pages.
        """
        return self._fingerprints.whole

    @property
    def text_encoder_fingerprint(self) -> str:
        """As `fingerprint`, of the tokenizers and text encoders alone."""
        return self._fingerprints.text_encoders

    @cached_property
    def _fingerprints(self) -> _Fingerprints:
        """Both fingerprints in one pass, because the pages may come from a slow disk."""
        whole = hashlib.sha256(_to_bytes(self.scheduler))
        text_encoders = hashlib.sha256()
        for name, component in self.components.items():
            if name not in COMPONENTS:
                continue
            identities = [file_identity(path) for path in component.files]
            for part in (_to_bytes(component.config), *identities):
                whole.update(part)
                if name in TEXT_ENCODERS:
                    text_encoders.update(part)
        tokenizer_files: list[Path] = []
        for name in TOKENIZERS:
            tokenizer_files += list_tokenizer_files(self.folder / name)
        for path in sorted(tokenizer_files):
            try:
                part = path.name.encode() + file_identity(path)
            except CheckpointError as error:
                what = "cannot read the tokenizer"
                raise CheckpointError(what, path, why=error.why, hint=DOWNLOAD_AGAIN) from error
            whole.update(part)
            text_encoders.update(part)
        return _Fingerprints(whole.hexdigest()[:16], text_encoders.hexdigest()[:16])


def find_kind_of(transformer: Component, pipeline: str = "") -> Kind:
    """Return which kind of FLUX.1 a transformer is of, in a model of this pipeline."""
    return find_kind(
        transformer.config,
        pipeline=pipeline,
        title=transformer.title or find_title(transformer.config),
        name=describe_name(transformer.folder),
    )


def _to_bytes(config: dict[str, Any]) -> bytes:
    return json.dumps(config, sort_keys=True).encode()


def inspect(folder: Path) -> Checkpoint:
    """Return what a diffusers folder holds.

    Raises `CheckpointError` that names the first part that is not usable.
    """
    index = read_json(folder / "model_index.json", "not a FLUX model folder")
    pipeline = index.get("_class_name")
    if not isinstance(pipeline, str) or not PIPELINES.fullmatch(pipeline):
        why = f"its model_index.json names {str(pipeline)[:60]!r}, not FluxPipeline"
        kind = name_class(pipeline)
        if kind:
            why += f"; it is {kind}"
        raise CheckpointError("not a FLUX.1 model", folder, why=why)
    components = {name: inspect_component(name, folder / name) for name in COMPONENTS}
    for name in TOKENIZERS:
        check_tokenizer(folder / name)
    scheduler = read_config("scheduler", folder / "scheduler" / "scheduler_config.json")
    kind = _read_baked_kind(folder, components["transformer"])
    return Checkpoint(folder, components, scheduler, pipeline=pipeline, said_kind=kind)


def _read_baked_kind(folder: Path, transformer: Component) -> str:
    """What the manifest of a bake says that the model is; "" where nothing says it.

    The folder may have the index of another kind's model: the parts that its source lacked are of
    that.
    """
    if not os.path.lexists(folder / MANIFEST):
        return ""
    try:
        said = read_json(folder / MANIFEST, "no manifest").get("kind")
    except CheckpointError:
        return ""
    if said not in KINDS or CHANNELS_OF[said] != transformer.config["in_channels"]:
        return ""
    return str(said)


def check_components(components: Mapping[str, Component]) -> None:
    """Raise `CheckpointError` unless each has the tensors that it needs, and they fit together."""
    for part in components.values():
        check_tensors(part.name, part.folder, config=part.config, weights=part.weights)
    transformer = complete("transformer", components["transformer"].config)
    clip = complete("text_encoder", components["text_encoder"].config)
    t5 = complete("text_encoder_2", components["text_encoder_2"].config)
    widths = {
        "text_encoder": (transformer["pooled_projection_dim"], clip["hidden_size"]),
        "text_encoder_2": (transformer["joint_attention_dim"], t5["d_model"]),
    }
    for name, (wanted, given) in widths.items():
        if wanted != given:
            why = f"it gives {given} values, the transformer takes {wanted}"
            folder = components[name].folder
            raise CheckpointError(f"{name} of another model", folder, why=why)


def is_complete(folder: Path, components: Collection[str] = COMPONENTS) -> bool:
    """Whether a model folder has all its files, as that of an interrupted download has not.

    Weights are looked for of `components` only, configs and tokenizers of all. Names decide; no
    file is opened but shard indexes.
    """
    files = [f"{name}/config.json" for name in COMPONENTS]
    files += ["model_index.json", "scheduler/scheduler_config.json"]
    if not all((folder / name).is_file() for name in files):
        return False
    if not all(_has_vocabulary(folder / name) for name in TOKENIZERS):
        return False
    try:
        return all(_find_files(folder / name) for name in components)
    except CheckpointError:
        return False


def check_tokenizer(folder: Path) -> None:
    """Raise `CheckpointError` unless a tokenizer's folder has every file that it is made from.

    Without them the library makes one that knows no word, and says nothing. Each file that it looks
    for must be readable and, where it is JSON, an object; others may be there and are not touched.
    """
    name = folder.name
    if not folder.is_dir():
        what = f"no {name} in the model folder"
        raise CheckpointError(what, folder.parent, hint=DOWNLOAD_AGAIN)
    if not _has_vocabulary(folder):
        choices = [" and ".join(files) for files in VOCABULARIES[name]]
        why = f"there is no {', nor '.join(choices)}"
        raise CheckpointError(f"{name} has no vocabulary", folder, why=why, hint=DOWNLOAD_AGAIN)
    what = f"cannot read {name}"
    paths = [folder / file for file in TOKENIZER_FILES]
    for path in (*paths, *folder.glob("chat_templates/*.jinja")):
        if not os.path.lexists(path):
            continue
        if path.suffix == ".json":
            config = read_json(path, what)
            if "fast_tokenizer_files" in config:  # which would name others
                raise CheckpointError(what, path, why="it names other files", hint=DOWNLOAD_AGAIN)
            extra_ids = config.get("extra_ids", 0)  # T5's library makes so many tokens
            if type(extra_ids) is not int or not 0 <= extra_ids <= MAX_EXTRA_IDS:
                why = f"extra_ids is not a whole number from 0 to {MAX_EXTRA_IDS}"
                raise CheckpointError(what, path, why=why, hint=DOWNLOAD_AGAIN)
        elif not _is_readable(path):
            why = f"it is no readable file, empty, or over {MAX_JSON_BYTES / 1e6:.1f} MB"
            raise CheckpointError(what, path, why=why, hint=DOWNLOAD_AGAIN)


def _has_vocabulary(folder: Path) -> bool:
    """Whether the folder of a tokenizer has its vocabulary, in one of the forms that are known."""
    return any(
        all(os.path.lexists(folder / file) for file in files)
        for files in VOCABULARIES.get(folder.name, ())
    )


def _is_readable(path: Path) -> bool:
    """Whether there is a regular file of a tokenizer's size, which may be read.

    The library reads it whole: the published ones have 0.5 and 0.8 MB.
    """
    try:
        with open_regular(path) as file:
            size_bytes = os.fstat(file.fileno()).st_size
            return bool(file.read(1)) and size_bytes <= MAX_JSON_BYTES
    except OSError:
        return False


def list_tokenizer_files(folder: Path) -> list[Path]:
    """The regular files of a tokenizer's folder; what else may lie there does not make it."""
    return [path for path in folder.glob("*") if path.is_file()]


def inspect_component(name: str, folder: Path) -> Component:
    """Return the component `name` that a folder holds; raises `CheckpointError`."""
    config = read_config(name, folder / "config.json")
    tensors = _read_folder(folder)
    pieces, unused = split_unused(name, tensors.pieces)
    weights = group_weights(pieces, markers=tensors.markers)
    kept = folder / KEEP_FILE
    if kept.is_file():
        tensors = _read_pieces([kept])
        originals = group_weights(tensors.pieces, markers=tensors.markers)
        for key, original in originals.items():
            if key not in weights or weights[key].shape != original.shape:
                raise CheckpointError("originals of other weights", kept, why=key)
        weights |= originals
    component = Component(name, folder, config=config, weights=weights, unused=unused)
    return replace(component, dialect=_describe_dialect(component))


def split_unused(
    name: str, pieces: Mapping[str, Piece]
) -> tuple[dict[str, Piece], tuple[str, ...]]:
    """The tensors that FLUX.1 uses of a component, by name; and the names of the others."""
    used = {}
    unused = []
    for stored, piece in pieces.items():
        if name in UNUSED and UNUSED[name].fullmatch(stored):
            unused.append(stored)
        else:
            used[stored] = piece
    return used, tuple(sorted(unused))


def _describe_dialect(component: Component) -> str:
    """Who quantized a component of a folder, and to what, for people."""
    names = []
    for weight in component.weights.values():
        if weight.scheme:
            names += [piece.info.name for piece in weight.pieces.values()]
    if not names:
        return "diffusers"
    if component.precision in SCALED_BLOCKS:
        return f"diffusers, {component.precision}"
    writer = "flux"
    if component.precision == "nf4" or any(name.endswith(SCB) for name in names):
        writer = "bitsandbytes"
    elif any(name.endswith("._data") for name in names):
        writer = "optimum-quanto"
    return f"diffusers, {component.precision} by {writer}"


class _Tensors(NamedTuple):
    """The tensors of files by name, and ComfyUI's markers of layers, None for no such metadata."""

    pieces: dict[str, Piece]
    markers: dict[str, object] | None


def _read_pieces(files: list[Path]) -> _Tensors:
    """The tensors of several files; raises `CheckpointError` where one stands in two."""
    pieces: dict[str, Piece] = {}
    markers = None
    for path in files:
        header = read_whole_header(path)
        twice = sorted(header.tensors.keys() & pieces.keys())
        if twice:
            raise CheckpointError("a tensor stands in two shards", path, why=twice[0][:60])
        pieces |= {name: Piece(path, info) for name, info in header.tensors.items()}
        if METADATA in header.metadata or path.name in MARKED_FILES:
            markers = add_layers(markers or {}, read_layers(header.metadata), file=path)
    return _Tensors(pieces, markers)


def _read_folder(folder: Path) -> _Tensors:
    """The tensors of a component's folder.

    Raises `CheckpointError` where one stands in two files, or not where the index says.
    """
    files = _find_files(folder)
    tensors = _read_pieces(files.weights)
    for name, shard in files.shards.items():
        is_there = name in tensors.pieces and tensors.pieces[name].file.name == shard
        # Some indexes have T5's embedding under both of its names.
        if not is_there and name != T5_TIED:
            why = f"{name[:60]} is not in {shard[:60]}"
            raise CheckpointError("corrupt shard index", folder, why=why, hint=DOWNLOAD_AGAIN)
    return tensors


class _Files(NamedTuple):
    """The weight files of a folder, and by its index the names of their tensors, if it has one."""

    weights: list[Path]
    shards: dict[str, str]


def _find_files(folder: Path) -> _Files:
    """The safetensors files of a component: those of its shard index, or its only file.

    A file without a variant in its name comes before one with. Raises `CheckpointError` where there
    is none, or a shard is missing or lies elsewhere.
    """
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    plain = [folder / name for name in (*PLAIN_FILES, *PACKED_FILES.values(), *FORMER_FILES)]
    files = [path for path in plain if os.path.exists(path)]
    if not indexes and not files:
        indexes, files = _find_variants(folder)
    if indexes:
        return _read_index(indexes[0])
    if files:
        return _Files(files[:1], {})
    raise CheckpointError("no weights", folder, why=_explain_no_weights(folder))


def _find_variants(folder: Path) -> tuple[list[Path], list[Path]]:
    """The indexes and the files of the best variant in a folder."""
    indexes: dict[str, list[Path]] = {}
    files: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*")):
        for pattern, found in ((VARIANT_INDEX, indexes), (VARIANT_FILE, files)):
            match = pattern.fullmatch(path.name)
            if match and os.path.exists(path):
                found.setdefault(match[1], []).append(path)
    for variant in (*VARIANTS, *sorted(indexes.keys() | files.keys())):
        if variant in indexes or variant in files:
            return indexes.get(variant, []), files.get(variant, [])
    return [], []


def _read_index(index: Path) -> _Files:
    """The shards that an index names; raises `CheckpointError`."""
    weight_map = read_json(index, "unreadable shard index").get("weight_map")
    if not _is_map_of_names(weight_map):
        raise CheckpointError("corrupt shard index", index, why="weight_map is no map of names")
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        _check_shard(index, shard)
    return _Files([index.parent / shard for shard in shards], weight_map)


def _explain_no_weights(folder: Path) -> str:
    """Why a folder has no weights, by what is there instead."""
    for pattern in ("*.bin", "*.pt", "*.ckpt"):
        pickle = next(folder.glob(pattern), None)
        if pickle:
            return f"only pickles are there ({pickle.name})"
    for path in sorted(folder.glob("*.safetensors")):
        if not os.path.exists(path):
            return f"{path.name} is a link to nothing"
        if SHARD.fullmatch(path.name):
            return f"their index is missing, which says what {path.name} is a part of"
        return f"{path.name} is called in another way than diffusers' files"
    return "no .safetensors file is there"


def name_folder(folder: Path) -> str:
    """What a folder without configs is, by the first weight file in it; "" for nothing known."""
    for pattern in ("*.safetensors", "transformer/*.safetensors"):
        for path in sorted(folder.glob(pattern)):
            try:
                header = read_whole_header(path)
            except CheckpointError as error:
                return str(error)
            return f"it seems to be {guess_kind(header.tensors, header.metadata)}"
    return ""


def _is_map_of_names(value: object) -> TypeGuard[dict[str, str]]:
    """Whether a JSON value is an object that is not empty, and whose values are texts."""
    if not isinstance(value, dict) or not value:
        return False
    return all(isinstance(name, str) for name in value.values())


def _check_shard(index: Path, shard: str) -> None:
    """Raise `CheckpointError` unless a shard is there and is a file beside its index.

    It may be a link to a file of the same cache of the hub, but to nothing else: an index must not
    make the program read files elsewhere.
    """
    folder = index.parent
    is_plain = len(PurePosixPath(shard).parts) == 1 and "\\" not in shard and ".." not in shard
    if not is_plain or not shard.endswith(".safetensors"):
        raise CheckpointError("unsafe shard index", index, why=f"it names {shard[:60]!r}")
    if not os.path.exists(folder / shard):
        raise CheckpointError("missing shard", folder / shard[:100], hint=DOWNLOAD_AGAIN)
    file = (folder / shard).resolve()
    root = folder.resolve()
    # The hub's cache has REPOSITORY/snapshots/COMMIT/COMPONENT. Its files are links to
    # REPOSITORY/blobs/HASH, or to blobs/AB/HASH beside all repositories.
    repository = root.parent.parent.parent
    is_blob = file.parent == repository / "blobs"
    is_shared_blob = file.parent.parent == repository.parent / "blobs"
    if not (file.is_relative_to(root) or is_blob or is_shared_blob):
        why = f"{shard[:60]} is a link to elsewhere"
        raise CheckpointError("unsafe shard index", index, why=why)
