"""What a notebook or a program imports: pictures as PIL images, and a model that stays loaded.

The command line's own path: `resolve` makes orders, `run.session` plans them and drives the engine,
`run.saving` writes files. This module adds only classes and functions in front of that, so that the
same settings give the same pixels. docs/python.md shows it. Knows no terminal.
"""

import io
import os
import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from fluxcli.errors import UsageError
from fluxcli.events import Event
from fluxcli.paths import config_folder
from fluxcli.pictures import kept_inputs
from fluxcli.request import presets
from fluxcli.request.fields import Order
from fluxcli.request.inputs import PICTURE_SETTINGS, ControlRef, ReduxRef
from fluxcli.request.settings import coerce_all, find_name
from fluxcli.resolve import build_order, resolve_order

if TYPE_CHECKING:
    from PIL.Image import Image

    from fluxcli.engine.picture import Picture
    from fluxcli.plan.placement import MemoryPlan
    from fluxcli.run.session import Session

INFO_KEY = "flux"  # of an image's `info`: how it was made
PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16")
UNPLANNED_PROMPT = "a plan"  # what is planned does not depend on the prompt

OnEvent = Callable[["Event | PreviewReady"], object]


@dataclass(frozen=True)
class PreviewReady:
    """What picture `position` of `total` (from 1) will be, after step `index` of `steps`.

    `image` is a small PIL image. These come with the setting `preview_every`.
    """

    image: "Image"
    index: int
    steps: int
    position: int
    total: int


@dataclass(frozen=True)
class ImageReady:
    """A picture is finished: `image` is a PIL image, picture `position` of `total` (from 1)."""

    image: "Image"
    position: int
    total: int


def generate(prompt: str, *, on_event: OnEvent | None = None, **settings: Any) -> "Image":
    """Draw one picture and return it as a PIL image.

    `settings` are those of the command line, by the names of its settings files: `preset`, `model`,
    `steps`, `size`, `ar`, `seed`, `lora` and so on. `on_event` is called with each event. The model
    is loaded for this picture alone; `Flux` keeps it. Raises `FluxError` and `QuantError`.
    """
    count = settings.pop("count", 1)
    if count != 1:
        raise UsageError(
            "generate draws one picture",
            which=f"count={count}",
            hint="fluxcli.Flux(...).generate(prompt, count=...) draws several",
        )
    with Flux(**settings) as flux:
        (image,) = flux.generate(prompt, on_event=on_event)
    return image


class Flux:
    """A model that stays loaded between pictures, and the settings of all of them.

    Use it in a `with` block, or call `close`: that gives the memory back. Other processes may use
    the device between two calls, and while the caller of `events` holds an image.
    """

    def __init__(self, model: str | None = None, **settings: Any) -> None:
        """Take the name of a preset, or a model as -m takes it, and settings for every picture.

        Loads nothing. Raises `UsageError` for settings that are unknown or cannot be.
        """
        said = dict(settings)
        if model is not None:
            is_preset = model in presets.list_presets(config_folder())
            said["preset" if is_preset else "model"] = model
        self._settings = presets.overlay({}, _name_settings(said))
        self._session: Session | None = None
        # Wrong settings are refused here, and not at the first picture.
        resolve_order(UNPLANNED_PROMPT, self._settings)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop the model and give its memory back; the next call loads it again."""
        if self._session is not None:
            self._session.evict()
            self._session.release()

    def plan(self, **settings: Any) -> "MemoryPlan":
        """Return what would be done: precision, placement, bytes, seconds and the reasons.

        Loads no weights. Raises `DoesNotFit` where nothing fits.
        """
        order = self._resolve(UNPLANNED_PROMPT, settings)
        prepared = _drain(self._open_session().prepare(order, lock=False))
        return prepared.plan

    def generate(
        self, prompt: str, *, on_event: OnEvent | None = None, **settings: Any
    ) -> list["Image"]:
        """Draw `count` pictures, with the seeds `seed`, `seed` + 1 and so on; return PIL images.

        `on_event` is called with each event but the images. Raises `FluxError` and `QuantError`;
        whatever is raised has the images that were finished before as its `images`.
        """
        images: list[Image] = []
        try:
            for event in self.events(prompt, **settings):
                if isinstance(event, ImageReady):
                    images.append(event.image)
                elif on_event is not None:
                    on_event(event)
        except BaseException as error:
            error.images = images  # type: ignore[attr-defined]
            raise
        return images

    def events(self, prompt: str, **settings: Any) -> Iterator[Event | PreviewReady | ImageReady]:
        """Yield what happens, as it happens, and an `ImageReady` for each picture.

        With `preview_every` a `PreviewReady` comes after every so many steps.

        Closing the generator stops after the current step. Raises `FluxError` and `QuantError`.
        """
        said = self._resolve(prompt, settings)
        order = said.with_seed()
        total = order.output.count
        session = self._open_session()

        from fluxcli.engine.engine import Denoised, Drawn
        from fluxcli.engine.preview import Estimated
        from fluxcli.run.saving import make_metadata
        from fluxcli.run.session import draw_pictures

        try:
            prepared = yield from session.prepare(order)
            engine = session.open_engine(prepared, prompt_cache=True)
            orders = {}
            for k in range(total):
                one = order.picture(k)
                picture = prepared.make_picture(one.request, position=k + 1, total=total)
                picture.preview_every = order.output.preview_every
                orders[picture] = one
            with closing(draw_pictures(engine, list(orders))) as drawing:
                for event in drawing:
                    if isinstance(event, Denoised):
                        continue
                    if isinstance(event, Estimated):
                        yield _make_preview(event.picture, event.pixels)
                        continue
                    if not isinstance(event, Drawn):
                        yield event
                        continue
                    picture = event.picture
                    metadata = make_metadata(
                        engine,
                        orders[picture],
                        prepared,
                        seeded=said.request.seed >= 0,
                    )
                    image = _make_image(picture.pixels, metadata)
                    yield ImageReady(image, picture.position, total)
        finally:
            session.release()

    def save(
        self, image: "Image", output: str | None = None, *, force: bool = False, **settings: Any
    ) -> str:
        """Write an image of `generate` or `events` as the command line would; return its path.

        `output` is a file, a folder or a template, None for the current folder; `settings` may be
        format, quality and metadata. Raises `UsageError` for an image that flux did not make or
        that was changed since, and `OutputError` where it cannot be written.
        """
        import numpy as np

        from fluxcli.pictures import names
        from fluxcli.pictures.image import hash_pixels
        from fluxcli.run.saving import save_pixels

        made = image.info.get(INFO_KEY)
        pixels = np.asarray(image)
        if made is None:
            raise UsageError(
                "not an image of flux",
                why="it does not say how it was made",
                hint="image.save(...) writes it",
            )
        if hash_pixels(pixels) != made["pixels_sha256"]:
            raise UsageError(
                "the image was changed",
                why="its metadata would not be true",
                hint="image.save(...) writes it without",
            )
        metadata = made["metadata"]
        drawn = Order.from_json(metadata["request"])
        said = _name_settings(settings) | {"output": output}
        values = presets.overlay(drawn.settings(), said)
        order = build_order(drawn.request.prompt, values, said)
        target = names.parse_target(order.output, force=force)
        names.check_writable(target, order)
        destination = names.Destination(target, order, seeded=metadata["seeded"])
        metadata = metadata | {"request": order.to_json() | {"output": None, "preview_every": None}}
        return save_pixels(pixels, destination, metadata).path

    def _resolve(self, prompt: str, settings: Mapping[str, Any]) -> Order:
        """Return the order of a prompt, with what was said at the call and the settings of all."""
        given = presets.override(self._settings, _name_settings(settings))
        return resolve_order(prompt, given)

    def _open_session(self) -> "Session":
        """Return the session of this model; raises `DeviceUnusable` where torch is broken."""
        from fluxcli.engine.check import check_torch

        if self._session is None:
            check_torch()
            from fluxcli.run.session import Session

            self._session = Session()
        return self._session


def _name_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by their field names; raises `UsageError` for unknown or wrong ones."""
    keys = {find_name(key, where=key): key for key in settings}
    said = {name: _name_pictures(name, settings[key]) for name, key in keys.items()}
    return coerce_all(said, lambda name: keys.get(name, "size"))


def _make_preview(picture: "Picture", pixels: Any) -> PreviewReady:
    """Return what is handed out of an estimate: pixels (h, w, 3) uint8."""
    from PIL import Image

    image = Image.fromarray(pixels)
    steps = picture.request.steps_taken
    return PreviewReady(image, picture.taken, steps, picture.position, total=picture.total)


def _name_pictures(name: str, value: Any) -> Any:
    """Return the value of a setting with names of files where it has pictures.

    A picture may be a PIL image, which is kept in the user's cache, or a path. Those of `redux` and
    `control` may be mappings: {"image": ..., "strength": 0.5}, {"kind": "canny", "image": ...}.
    """
    if name not in PICTURE_SETTINGS or value is None:
        return value
    if name in ("image", "mask"):
        return _name_picture(value)
    items = value if isinstance(value, list | tuple) else [value]
    if name == "reference":
        return tuple(_name_picture(item) for item in items)
    kind = ReduxRef if name == "redux" else ControlRef
    return tuple(_make_ref(kind, item) for item in items)


def _make_ref(kind: type[ReduxRef] | type[ControlRef], item: Any) -> ReduxRef | ControlRef:
    """Return a picture with what is said of it, from a text, a mapping or a picture alone."""
    if isinstance(item, kind):
        return item
    if isinstance(item, str):
        return kind.parse(item, where="settings")
    said = dict(item) if isinstance(item, Mapping) else {"image": item}
    if "image" in said:
        said["image"] = _name_picture(said["image"])
    try:
        made = kind(**said)
        return kind.parse(str(made), where="settings")
    except TypeError as error:
        why = f"{item!r:.60}"
        hint = '{"kind": "canny", "image": "photo.jpg"}'
        raise UsageError("no picture", which=kind.__name__, why=why, hint=hint) from error


def _name_picture(picture: Any) -> Any:
    """Return the path of a picture, which of an image in memory is a file in the user's cache."""
    if isinstance(picture, os.PathLike):
        return os.fspath(picture)
    pil = sys.modules.get("PIL.Image")  # who has not imported it has no image of it
    if pil is None or not isinstance(picture, pil.Image):
        return picture
    from PIL import ImageOps

    turned = ImageOps.exif_transpose(picture)
    if turned.mode not in PNG_MODES:
        turned = turned.convert("RGB")
    file = io.BytesIO()
    turned.save(file, "png")
    return str(kept_inputs.keep(file.getvalue()))


def _make_image(pixels: Any, metadata: dict[str, Any]) -> "Image":
    """Return the PIL image of pixels (H, W, 3) uint8, which says in its `info` how it was made."""
    from PIL import Image

    from fluxcli.pictures.image import hash_pixels

    image = Image.fromarray(pixels, "RGB")
    image.info[INFO_KEY] = {"metadata": metadata, "pixels_sha256": hash_pixels(pixels)}
    return image


def _drain(run: Generator[Event, None, Any]) -> Any:
    """Run a generator to its end without looking at its events; return its result."""
    while True:
        try:
            next(run)
        except StopIteration as finished:
            return finished.value
