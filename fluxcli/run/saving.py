"""Pictures that were drawn become files: their metadata, their encoding, their names."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import fluxcli
from fluxcli.engine.engine import Engine
from fluxcli.engine.picture import Picture
from fluxcli.events import GeneratedImage
from fluxcli.models import loras
from fluxcli.pictures import image, names
from fluxcli.request.fields import Order
from quant.lora import Adapter


@dataclass(frozen=True)
class Destination:
    """Where one picture goes, and what it is called by."""

    order: Order  # of this picture alone
    target: names.Target
    n: int = 1  # of its row's pictures, for its name
    row: int = 0  # of the batch, 0 outside one
    seeded: bool = True  # the seed was asked for


def save(picture: Picture, destination: Destination, engine: Engine) -> GeneratedImage:
    """Write a picture that has its pixels; raises `OutputError`."""
    order = destination.order
    pixels = picture.pixels
    assert pixels is not None, "the picture is not drawn"
    digest = image.pixels_sha256(pixels)
    metadata = None
    if order.output.metadata:
        metadata = make_metadata(engine, order, picture.adapters, seeded=destination.seeded)
        metadata["pixels_sha256"] = digest
    data = image.encode(
        pixels, order.output.format, quality=order.output.quality, metadata=metadata
    )
    path = names.save(data, destination.target, order, destination.n, destination.row)
    width, height = order.request.size
    return GeneratedImage(
        path=path,
        seed=order.request.seed,
        width=width,
        height=height,
        format=order.output.format,
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        pixels_sha256=digest,
    )


def make_metadata(
    engine: Engine, order: Order, adapters: Sequence[Adapter], *, seeded: bool = True
) -> dict:
    """What identifies a picture: the order that makes it alone, the model, what computed it.

    `seeded` tells whether the seed was asked for.
    """
    request = order.request
    plan = engine.plan
    return {
        "request": order.to_json() | {"output": None},
        "size": list(request.size),
        "model": {"name": request.model, "fingerprint": engine.checkpoint.fingerprint},
        "compute": {
            "device": plan.device.partition(":")[0],
            "precision": plan.precision,
            "multiply": engine.multiply,
            "dtypes": plan.dtypes,
            "tiled": plan.placement.decode == "tiled",
        },
        "lora": loras.name_identities(request.lora, adapters),
        "seeded": seeded,
        "versions": fluxcli.versions(),
    }
