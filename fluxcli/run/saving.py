"""Pictures that were drawn become files: their metadata, their encoding, their names.

And back: whether a file is what a row asks for, and what is kept of a picture that is not written
yet. What a picture was computed with is asked of the engine; nothing here computes.
"""

import hashlib
import os
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice, repeat
from pathlib import Path
from typing import Any, Protocol

import numpy as np

import fluxcli
from fluxcli import paths
from fluxcli.engine.engine import Engine
from fluxcli.engine.picture import Picture
from fluxcli.events import GeneratedImage
from fluxcli.models import loras
from fluxcli.models.parts import Control
from fluxcli.pictures import image, latents, names
from fluxcli.pictures.inputs import InputPictures, name_hashes
from fluxcli.pictures.latents import Latents
from fluxcli.pictures.names import Destination
from fluxcli.request.fields import GenerationRequest, Order
from fluxcli.request.target import Target
from quant.errors import ExplainedError
from quant.lora import Adapter


class Ingredients(Protocol):
    """What a picture is made of beside its order and the model: itself, or what draws it."""

    @property
    def adapters(self) -> tuple[Adapter, ...]: ...

    @property
    def inputs(self) -> InputPictures: ...

    @property
    def controls(self) -> tuple[Control, ...]: ...


def save_picture(picture: Picture, destination: Destination, engine: Engine) -> GeneratedImage:
    """Write a picture that has its pixels, with its metadata unless the order wants none.

    Raises `OutputError`.
    """
    assert picture.pixels is not None
    metadata = make_metadata(engine, destination.order, picture, seeded=destination.seeded)
    return save_pixels(picture.pixels, destination, metadata)


def check_metadata(engine: Engine, destination: Destination, given: Ingredients) -> None:
    """Raise `OutputError` for a picture whose metadata its format could not hold."""
    order = destination.order
    if order.output.metadata:
        metadata = make_metadata(engine, order, given, seeded=destination.seeded)
        written = metadata | {"pixels_sha256": "0" * 64}
        image.check_metadata(written, order.output.format)


def save_pixels(
    pixels: np.ndarray, destination: Destination, metadata: dict[str, Any]
) -> GeneratedImage:
    """Write pixels (H, W, 3) uint8 that were made as the metadata say; raises `OutputError`."""
    order = destination.order
    pixels_sha256 = image.hash_pixels(pixels)
    written = metadata | {"pixels_sha256": pixels_sha256}
    data = image.encode(
        pixels,
        order.output.format,
        quality=order.output.quality,
        metadata=written if order.output.metadata else None,
    )
    path = names.save(data, destination)
    return _identify(path, data, order, pixels_sha256=pixels_sha256)


def describe_file(path: Path, order: Order) -> GeneratedImage:
    """Return what identifies the picture of an order that lies there already."""
    metadata = image.read_metadata(path)
    request = replace(order.request, seed=metadata["request"]["seed"])  # another if none was given
    order = replace(order, request=request)
    data = path.read_bytes()
    return _identify(str(path), data, order, pixels_sha256=metadata["pixels_sha256"])


def _identify(path: str, data: bytes, order: Order, *, pixels_sha256: str) -> GeneratedImage:
    width, height = order.request.size
    return GeneratedImage(
        path=path,
        seed=order.request.seed,
        width=width,
        height=height,
        format=order.output.format,
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        pixels_sha256=pixels_sha256,
    )


def make_metadata(
    engine: Engine, order: Order, given: Ingredients, *, seeded: bool = True
) -> dict[str, Any]:
    """Return what identifies a picture: the order that makes it alone, the model, what computed it.

    `given` is what it is made of beside these; `seeded` tells whether the seed was asked for.
    """
    request = order.request
    plan = engine.plan
    only_if: dict[str, Any] = {"compiled": True} if engine.is_compiled else {}
    if engine.kernels:
        only_if["kernels"] = engine.kernels
    if plan.placement.prepare == "tiled":
        only_if["tiled_inputs"] = True
    return {
        "request": order.to_json() | {"output": None, "preview_every": None},
        "size": list(request.size),
        "model": _describe_model(engine, request),
        "compute": {
            "device": plan.device.partition(":")[0],
            "precision": plan.precision,
            "multiply": engine.multiply,
            "dtypes": plan.dtypes,
            "tiled": plan.placement.decode == "tiled",
        }
        | only_if,
        "lora": loras.name_identities(request.lora, given.adapters),
        "seeded": seeded,
        "versions": fluxcli.versions(),
    } | _describe_pictures(given)


def _describe_pictures(given: Ingredients) -> dict[str, Any]:
    """Return what a picture's metadata say of those that it is made from, if there are some.

    The hashes of their files, by what they are for; and how each control acts, with what its kind's
    preset says.
    """
    controls = [
        {"scale": each.scale, "start": each.start, "end": each.end, "mode": each.mode}
        for each in given.controls
    ]
    described = {"inputs": name_hashes(given.inputs), "controls": controls}
    return {name: value for name, value in described.items() if value}


def _describe_model(engine: Engine, request: GenerationRequest) -> dict[str, Any]:
    """Return a model's name and fingerprint, and those of what the request adds to it."""
    checkpoint = engine.checkpoint
    described = {"name": request.model, "fingerprint": checkpoint.fingerprint}
    parts = {name: part.fingerprint for name, part in checkpoint.parts.items()}
    return described | ({"parts": parts} if parts else {})


# --- what is there already


def find_done(
    engine: Engine, destinations: Sequence[Destination], given: Ingredients, *, nth: int
) -> list[Path | None]:
    """Return the file that each picture of a row is done with, None for those that are to be drawn.

    A picture is done if the file of its name is whole and carries the hash of its request. Names
    that hold other pictures do not count. Of equal pictures the k-th is done with the k-th name;
    the row's first one is the `nth`. All pictures of a row without a seed are equal in this.
    """
    if not destinations[0].seeded:
        slots = _list_slots(engine, destinations[0], given)
        return list(islice(slots, nth - 1, nth - 1 + len(destinations)))
    found = []
    for destination in destinations:
        slots = _list_slots(engine, destination, given)
        found.append(next(islice(slots, nth - 1, None)))
    return found


def _list_slots(
    engine: Engine, destination: Destination, given: Ingredients
) -> Iterator[Path | None]:
    """Yield a picture's names that carry its hash, and None for each that is free; without end."""
    seeded = destination.seeded
    wanted = _make_hashes(engine, destination, given)
    for path in names.list_names(destination):
        if image.carries_hash(path, wanted, seeded=seeded):
            yield path
        elif not os.path.lexists(path):
            yield None
    yield from repeat(None)


def _make_hashes(engine: Engine, destination: Destination, given: Ingredients) -> set[str]:
    """Return the hashes that a picture may carry: computed as planned, or as it may have to be.

    That is in tiles, where memory runs out, and not compiled, where that fails.
    """
    seeded = destination.seeded
    planned = make_metadata(engine, destination.order, given, seeded=seeded)
    compute = planned["compute"]
    without = {key: value for key, value in compute.items() if key != "compiled"}
    found = [compute, compute | {"tiled": True}, without, without | {"tiled": True}]
    if engine.plan.live_bytes.get("prepare"):
        found += [each | {"tiled_inputs": True} for each in found]
    return {image.hash_request(planned | {"compute": each}, seeded=seeded) for each in found}


# --- what is kept of a picture


def keep_latents(engine: Engine, picture: Picture, destination: Destination) -> Path:
    """Write what there is of a picture beside where it would be, or where else it can be written.

    Raises OSError where that is nowhere.
    """
    assert picture.tokens is not None
    seeded = destination.seeded
    metadata = make_metadata(engine, destination.order, picture, seeded=seeded)
    kept = Latents(
        destination.order,
        picture.tokens,
        step=picture.step,
        model=engine.checkpoint.fingerprint,
        request_hash=image.hash_request(metadata, seeded=seeded),
        seeded=seeded,
        inputs=name_hashes(picture.inputs),
    )
    *better, last = _list_targets(destination)
    for target in better:
        with suppress(OSError):
            return latents.save(kept, target, n=destination.n, row=destination.row)
    return latents.save(kept, last, n=destination.n, row=destination.row)


def is_beside(path: Path, destination: Destination) -> bool:
    """Return whether latents lie where their picture would, so that it can be written there."""
    return path.parent == latents.place(destination).parent


def _list_targets(destination: Destination) -> list[Target]:
    """Return where latents of a picture may lie: beside it, else in folders of the user's own."""
    elsewhere = (paths.latents_folder(), Path(tempfile.gettempdir()))
    targets = [Target(folder, names.DEFAULT_TEMPLATE) for folder in elsewhere]
    return [destination.target, *targets]


def find_latents(
    engine: Engine,
    destination: Destination,
    given: Ingredients,
    *,
    taken: Collection[Path | None],
) -> Latents | None:
    """Return what a run before has kept of a picture, None where there is nothing.

    Of an order without a seed it may be any picture, but for the files that are `taken`.
    """
    wanted = _make_hashes(engine, destination, given)
    for target in _list_targets(destination):
        found = latents.find_kept(replace(destination, target=target))
        for path in (path for path in found if path.is_file() and path not in taken):
            with suppress(ExplainedError):  # damaged, or somebody else's
                kept = latents.load(path)
                if kept.request_hash in wanted:
                    return kept
    return None
