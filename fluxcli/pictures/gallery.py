"""A page of a folder's pictures: one file of HTML that needs nothing else and asks nobody.

Pictures of one request, which differ by their seeds, stand side by side. What a file says of
itself may be anybody's: every text is escaped, and the page forbids itself, by its policy of
content, all but its own style and script. numpy and PIL are imported inside functions.
"""

import base64
import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from fluxcli.errors import BadInputFile, UsageError
from fluxcli.pictures import image as images
from fluxcli.pictures.gallery_style import SCRIPT, STYLE
from fluxcli.request.fields import DEFAULTS, Order
from fluxcli.request.spelling import spell_command

if TYPE_CHECKING:
    from PIL import Image

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
GENERATOR = '<meta name="generator" content="flux gallery">'
THUMBNAIL_BYTES = 9_000  # 1,000 of them are 12 MB as base64; larger ones are made smaller
# Longest side in pixels and quality of webp, the best first; of noise the last one takes 2 KB.
THUMBNAILS = ((320, 75), (320, 50), (256, 40), (192, 30), (96, 20))
MAX_PICTURES = 10_000
# What of a request does not make it another picture, or is shown elsewhere.
APART = (
    "prompt", "seed", "count", "output", "format", "quality", "metadata", "preview_every",
    *images.RESOURCES,
)  # fmt: skip
SHOWN_FIRST = ("steps", "guidance", "model", "preset")
SHOWN_BY_SIZE = ("width", "height", "aspect_ratio", "image_size")
# Control characters, which HTML does not take; ends of lines and tabs stay.
NO_TEXT = dict.fromkeys({*range(32), *range(127, 160)} - {9, 10, 13}, "\N{REPLACEMENT CHARACTER}")


@dataclass(frozen=True)
class Entry:
    """One picture of a gallery: where it is, a small webp of it, and what it says of itself."""

    path: Path
    thumbnail: bytes
    width: int  # of the thumbnail, in pixels
    height: int
    metadata: Mapping[str, Any]
    command: str  # that draws it again; "" where its metadata are no order

    @property
    def request(self) -> Mapping[str, Any]:
        """The request as the metadata have it: of any keys and types."""
        found: Mapping[str, Any] = self.metadata["request"]
        return found

    @property
    def group(self) -> str:
        """The same for pictures that only their seeds make another."""
        request = {name: value for name, value in self.request.items() if name not in APART}
        made_of = (self.metadata.get("model"), self.metadata.get("inputs"))
        known = (self.request.get("prompt"), request, *made_of)
        return json.dumps(known, sort_keys=True)


def list_pictures(folder: Path) -> list[Path]:
    """Return the files below a folder that may be pictures, in order; links are not followed.

    Hidden folders are left out. Raises `UsageError` for more than a page can show, and OSError.
    """
    found: list[Path] = []
    for parent, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = sorted(each for each in folders if not each.startswith("."))
        found += [Path(parent, name) for name in sorted(names) if name.lower().endswith(ENDINGS)]
        if len(found) > MAX_PICTURES:
            why = f"more than {MAX_PICTURES:,} pictures"
            raise UsageError(
                "too many for one page", which=folder, why=why, hint="name a subfolder"
            )
    return found


def _raise(error: OSError) -> None:
    raise error


def read_entry(path: Path, config_folder: Path) -> Entry:
    """Read a picture of flux; raises `BadInputFile` for what is none, or says nothing of itself."""
    with images.open_picture(path) as image:
        metadata = images.find_metadata(image, path)
        thumbnail, (width, height) = make_thumbnail(image)
    return Entry(
        path, thumbnail, width, height, metadata, command=_find_command(metadata, config_folder)
    )


def make_thumbnail(image: "Image.Image") -> tuple[bytes, tuple[int, int]]:
    """Return a webp of at most `THUMBNAIL_BYTES`, or the smallest that is tried, and its size."""
    data, size = b"", image.size
    for longest_px, quality in THUMBNAILS:
        small = image.convert("RGB")
        small.thumbnail((longest_px, longest_px))
        buffer = io.BytesIO()
        small.save(buffer, "webp", quality=quality)
        data, size = buffer.getvalue(), small.size
        if len(data) <= THUMBNAIL_BYTES:
            break
    return data, size


def _find_command(metadata: Mapping[str, Any], config_folder: Path) -> str:
    """Return what draws a picture again, "" where its metadata are no order of this flux."""
    try:
        return spell_command(Order.from_json(metadata["request"]), config_folder)
    except (UsageError, KeyError, TypeError, ValueError, AttributeError):
        return ""


# --- the page


def make_page(entries: Sequence[Entry], *, title: str, folder: Path) -> bytes:
    """Return the page of these pictures, UTF-8, for a file in `folder`, which links start from."""
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.group, []).append(entry)
    parts = [_begin_page(title, pictures=len(entries), requests=len(groups))]
    for together in groups.values():
        parts.append(_make_section(sorted(together, key=_sort_key), folder))
    parts.append(f"</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n")
    return "".join(parts).encode("utf-8", "replace")


def is_own_page(path: Path) -> bool:
    """Return whether a file is a page that this module has made; it may be replaced."""
    try:
        with path.open("rb") as file:
            return GENERATOR.encode() in file.read(1000)
    except OSError:
        return False


def _begin_page(title: str, *, pictures: int, requests: int) -> str:
    policy = "; ".join(
        [
            "default-src 'none'",
            "img-src data:",
            f"style-src '{_hash(STYLE)}'",
            f"script-src '{_hash(SCRIPT)}'",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
    count = f"{_count(pictures, 'picture')} of {_count(requests, 'request')}"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
{GENERATOR}
<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{_text(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>{_text(title)}</h1>
<p id="count" data-all="{count}" aria-live="polite">{count}</p>
<label id="search" hidden>Search <input type="search" placeholder="prompt, seed, model ..."></label>
</header>
<main>
"""


def _hash(content: str) -> str:
    """Return the source expression by which a policy allows inline content (CSP 3, 2.3.1)."""
    digest = hashlib.sha256(content.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def _make_section(entries: Sequence[Entry], folder: Path) -> str:
    """Return the part of a page with the pictures of one request."""
    first = entries[0]
    settings = "".join(f"<li>{_text(each)}</li>" for each in _list_settings(first))
    figures = "".join(_make_figure(entry, folder) for entry in entries)
    prompt = _text(first.request.get("prompt") or "(no prompt)")
    return (
        f'<section>\n<h2 dir="auto">{prompt}</h2>\n<ul>{settings}</ul>\n'
        f'<div class="pictures">\n{figures}</div>\n</section>\n'
    )


def _make_figure(entry: Entry, folder: Path) -> str:
    data = base64.b64encode(entry.thumbnail).decode()
    link = quote(os.fsencode(os.path.relpath(entry.path, folder)))
    seed = _text(entry.request.get("seed"))
    again = "<p>Its metadata are no request of this flux.</p>"
    if entry.command:
        again = f"<pre>{_text(entry.command)}</pre>"
    return (
        f'<figure>\n<a href="./{link}"><img src="data:image/webp;base64,{data}" '
        f'width="{entry.width}" height="{entry.height}" alt="seed {seed}"></a>\n'
        f'<figcaption><b>seed {seed}</b> <span dir="auto">{_text(entry.path.name)}</span>'
        f"<details><summary>draw it again</summary>{again}</details></figcaption>\n</figure>\n"
    )


def _list_settings(entry: Entry) -> Iterator[str]:
    """Yield what pictures of one request have in common, for people; of others' files anything."""
    request = entry.request
    size = entry.metadata.get("size")
    if isinstance(size, list):
        yield "x".join(str(side) for side in size)
    for name in SHOWN_FIRST:
        if request.get(name) is not None:
            yield f"{name} {_spell(request[name])}"
    for name, value in request.items():
        is_shown = name in (*SHOWN_FIRST, *SHOWN_BY_SIZE, *APART)
        is_unset = value in (None, [], False) or value == DEFAULTS.get(name)
        if not is_shown and not is_unset:
            yield f"{name.replace('_', ' ')} {_spell(value)}"


def _spell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return ", ".join(_spell(each) for each in value)
    return str(value)


def _text(value: object) -> str:
    """Return any value as text of a page, which nothing in it can end."""
    return escape(str(value).translate(NO_TEXT))


def _sort_key(entry: Entry) -> tuple[float, str]:
    """By seed, and whatever else it may be, by name."""
    seed = entry.request.get("seed")
    return (seed if isinstance(seed, int) else float("inf")), str(entry.path)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def read_entries(
    paths: Sequence[Path], config_folder: Path
) -> Iterator[tuple[Path, Entry | BadInputFile]]:
    """Yield each file with what it is in a gallery, or why it is not in it."""
    for path in paths:
        try:
            yield path, read_entry(path, config_folder)
        except BadInputFile as error:
            yield path, error
