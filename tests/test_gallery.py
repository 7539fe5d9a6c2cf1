"""The gallery: nothing in a picture's words gets out of its text, and its commands draw what is
shown.
"""

import base64
import hashlib
import json
import re
import shlex
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest

from fluxcli import versions
from fluxcli.cli import generate
from fluxcli.errors import UsageError
from fluxcli.paths import config_folder
from fluxcli.pictures import gallery
from fluxcli.pictures.image import encode, read_metadata
from fluxcli.request.fields import Order
from fluxcli.request.spelling import spell_command
from tests.support.helpers import order, read_pixels
from tests.support.invariant import assert_failed, call

VOID = {"meta", "img", "input", "br", "link"}
PIXELS = np.full((24, 40, 3), (200, 40, 40), np.uint8)
HOSTILE = "</h2></pre><script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp;<!--\x00\x1b ]]>"


def save(path: str, request: dict | Order, pixels: np.ndarray = PIXELS, **more: object) -> Path:
    """A picture that says this of itself."""
    asked = request.to_json() if isinstance(request, Order) else request
    metadata = {"request": asked, "size": [40, 24], "model": {"name": "m", "fingerprint": "f"}}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    shown = {"prompt": "x", "steps": 1, "guidance": None, "seed": 1}
    shown = metadata | {"versions": versions(), "request": shown | asked} | more
    Path(path).write_bytes(encode(pixels, path.rpartition(".")[2], quality=90, metadata=shown))
    return Path(path)


class Page(HTMLParser):
    """What a browser makes of a page; `texts` are by the element that they stand in."""

    def __init__(self, data: bytes) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(data.decode())
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list) -> None:
        assert len(dict(attrs)) == len(attrs)
        self.tags.append((tag, dict(attrs)))
        self.texts.setdefault(tag, []).append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts[self.open[-1]][-1] += data

    def handle_comment(self, data: str) -> None:
        raise AssertionError(data)

    def attributes(self, name: str) -> list[str]:
        return [found[name] for _, found in self.tags if name in found]


def make_page(capsys: pytest.CaptureFixture, folder: str = "pics", *options: str) -> Page:
    made = call(capsys, "gallery", folder, *options)
    assert made.returncode == 0, made.stderr
    return Page(Path(made.stdout.strip()).read_bytes())


def check_is_alone(page: Page) -> None:
    """The page needs nothing beside it, runs its own script alone, and asks no address."""
    assert {tag for tag, _ in page.tags} <= {
        "html", "head", "meta", "title", "style", "body", "header", "h1", "p", "label", "input",
        "main", "section", "h2", "ul", "li", "div", "figure", "a", "img", "figcaption", "b",
        "span", "details", "summary", "pre", "script",
    }  # fmt: skip
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
    assert all(source.startswith("data:image/webp;base64,") for source in page.attributes("src"))
    assert all(link.startswith("./") and ":" not in link for link in page.attributes("href"))
    (policy,) = [found for found in page.attributes("content") if "default-src" in found]
    assert policy.startswith("default-src 'none'; img-src data:;")
    for name in ("style", "script"):
        (content,) = page.texts[name]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in policy
        assert "http" not in content and "url(" not in content and "@import" not in content


def test_every_text_stays_text(capsys):
    request = dict.fromkeys(("prompt", "seed", "model", "preset", HOSTILE), HOSTILE)
    save("pics/a.png", request | {"lora": [HOSTILE], "control": {HOSTILE: HOSTILE}})
    named = "pics/<b onclick=x>'\"&.png"
    save(named, order(HOSTILE.replace("\x00", ""), seed=1))
    page = make_page(capsys)
    check_is_alone(page)
    shown = HOSTILE.replace("\x00", "\ufffd").replace("\x1b", "\ufffd")
    assert shown in page.texts["h2"] and f"seed {shown}" in page.texts["b"]
    assert any(shown in each for each in page.texts["li"])
    assert Path(named).name in page.texts["span"]
    assert len(page.texts["script"]) == 1 and len(page.texts["img"]) == 2


@pytest.mark.parametrize(
    "request_",
    [{"seed": None}, {"seed": [1], "prompt": {"a": 1}}, {"seed": 1e300}, {"prompt": "\ud800"}],
)
def test_metadata_of_any_types_are_shown(capsys, request_):
    save("pics/a.webp", request_ | {"steps": "many"})
    page = make_page(capsys)
    check_is_alone(page)
    assert "no request" in page.texts["p"][-1]


def test_seeds_stand_side_by_side_and_other_requests_apart(capsys):
    fox = order("a fox", seed=3, steps=4)
    save("pics/a.png", fox)
    save("pics/deep/b.jpg", order("a fox", seed=1, steps=4, format="jpg", quality=70))
    save("pics/c.png", order("a fox", seed=2, steps=5))
    save("pics/d.png", order("an owl", seed=1, steps=4))
    save("pics/.hidden/e.png", fox)
    page = make_page(capsys)
    assert page.texts["h2"] == ["a fox", "a fox", "an owl"]
    assert page.texts["b"] == ["seed 1", "seed 3", "seed 2", "seed 1"]
    assert page.texts["span"][:2] == ["b.jpg", "a.png"]
    assert "4 pictures of 3 requests" in page.texts["p"]
    save("changed/a.png", fox, inputs={"image": "0" * 64})
    save("changed/b.png", fox, inputs={"image": "1" * 64})
    assert "2 pictures of 2 requests" in make_page(capsys, "changed").texts["p"]
    links = [Path("pics", unquote(link)) for link in page.attributes("href")]
    assert all(link.is_file() for link in links)


def test_links_lead_from_where_the_page_is(capsys):
    save("pics/100% ä ?#.png", order("a fox", seed=3))
    page = make_page(capsys, "pics", "-o", "pages/all.html")
    (link,) = page.attributes("href")
    assert Path("pages", unquote(link)).is_file() and "?" not in link and "#" not in link


def test_a_thousand_pictures_of_noise_fit_into_20_mb():
    noise = np.random.default_rng(0).integers(0, 256, (1024, 1024, 3), dtype=np.uint8)
    save("x.png", order("x" * 300, seed=1), noise)
    entry = gallery.read_entry(Path("x.png"), config_folder())
    many = [
        replace(
            entry, metadata=entry.metadata | {"request": entry.request | {"prompt": f"{k:300}"}}
        )
        for k in range(1000)
    ]
    page = gallery.make_page(many, title="noise", folder=Path())
    assert len(page) < 20e6 and page.count(b"<section>") == 1000


def test_a_thumbnail_has_the_pictures_ratio_and_colour(capsys):
    save("pics/a.png", order("a fox", seed=3), np.repeat(PIXELS.repeat(20, 0), 20, 1))
    page = make_page(capsys)
    (found,) = [attributes for tag, attributes in page.tags if tag == "img"]
    assert (found["width"], found["height"]) == ("320", "192")
    Path("x.webp").write_bytes(base64.b64decode(found["src"].partition(",")[2]))
    pixels = read_pixels(Path("x.webp"))
    assert pixels.shape == (192, 320, 3) and np.abs(pixels - PIXELS[0, 0].astype(int)).max() < 8


def test_its_command_draws_the_picture_again(capsys):
    made = call(
        capsys, "generate", "it's a \"red\" circle", "-p", "tiny", "--size", "64", "--steps", "2",
        "--ar", "16:9", "--guidance", "2", "--seed", "5", "-n", "2", "-o", "pics/",
    )  # fmt: skip
    page = make_page(capsys)
    for path, command in zip(made.stdout.split(), page.texts["pre"], strict=True):
        again = call(capsys, *shlex.split(command)[1:], "-o", f"again/{Path(path).name}")
        assert np.array_equal(read_pixels(Path(again.stdout.strip())), read_pixels(Path(path)))
        before, after = read_metadata(Path(path)), read_metadata(Path(again.stdout.strip()))
        assert before["pixels_sha256"] == after["pixels_sha256"]


ORDERS = {
    "plain": {},
    "a dash": {"prompt": "-v is a fox"},
    "words": {"prompt": "$(rm -rf /)\n'x' \"y\" `z` \\ \u202e 🦊"},
    "another size": {"width": 640, "height": 368},
    "no guidance": {"guidance": None, "preset": "schnell"},
    "adapters": {"lora": ["/l/ink: a.safetensors:0.5", "/l/b.safetensors"], "preset": "turbo"},
    "pictures": {"image": "/p/a b.png", "mask": "/p/m.png", "strength": 0.7, "mask_feather": 8,
                 "width": 64, "height": 96},
    "controls": {"control": ["kind=canny,image=/p/x:y.png,scale=0.7,end=0.8"], "width": 64,
                 "height": 64},
    "looks": {"redux": ["/p/x.png:0.5", "/p/y.png"], "negative_prompt": "rain", "true_cfg": 2.5},
    "machine": {"vram_limit": 8 << 30, "precision": "fp8", "offload": "stream", "device": "cpu",
                "compile": True},
    "file": {"metadata": False, "format": "webp", "quality": 33},
    "a preset that is gone": {"preset": "of-somebody", "steps": 9},
}  # fmt: skip


@pytest.mark.parametrize("name", ORDERS)
def test_the_command_means_the_order(name, monkeypatch, capsys):
    said = dict(ORDERS[name])
    expected = order(str(said.pop("prompt", "a fox")), seed=7, **said)
    command = spell_command(expected, config_folder())
    drawn: list[Order] = []
    monkeypatch.setattr(generate, "draw", lambda order, *_, **__: drawn.append(order) or 0)
    made = call(capsys, *shlex.split(command)[1:])
    assert made.returncode == 0, (command, made.stderr)
    found = drawn[0].to_json()
    wanted = expected.to_json()
    if name == "a preset that is gone":
        found["preset"] = "of-somebody"
    assert found == wanted, command


def test_config_toml_is_known_to_the_command(monkeypatch, capsys):
    config_folder().mkdir(parents=True)
    (config_folder() / "config.toml").write_text("vram_limit = '4GiB'\nquality = 50\n")
    expected = order("a fox", seed=7, quality=80)
    command = spell_command(expected, config_folder())
    assert "--quality 80" in command


def test_the_page_is_replaced_and_files_of_others_are_not(capsys):
    save("pics/a.png", order("a fox", seed=3))
    for count in (1, 2):
        save(f"pics/{count}.png", order("a fox", seed=count))
        assert len(make_page(capsys).texts["img"]) == count + 1
    Path("x.html").write_text("mine")
    for output in ("x.html", "pics", "pics/a.png/x.html"):
        assert_failed(call(capsys, "gallery", "pics", "-o", output), 6)
    assert Path("x.html").read_text() == "mine"
    assert len(make_page(capsys, "pics", "-o", "x.html", "--force").texts["img"]) == 3


def test_what_is_no_picture_of_flux_is_left_out_and_said(capsys):
    save("pics/a.png", order("a fox", seed=3))
    Path("pics/damaged.png").write_bytes(b"\x89PNG")
    Path("pics/bare.jpg").write_bytes(encode(PIXELS, "jpg", quality=80, metadata=None))
    Path("pics/note.txt").write_text("x")
    made = call(capsys, "gallery", "pics", "--json")
    shown = json.loads(made.stdout)
    assert shown["pictures"] == 1 and sorted(shown["left_out"]) == [
        "pics/bare.jpg",
        "pics/damaged.png",
    ]
    assert "2 files without flux metadata" in made.stderr
    Path("pics/a.png").unlink()
    Path(shown["path"]).unlink()
    assert "2 files" in assert_failed(call(capsys, "gallery", "pics"), 4)
    assert not list(Path("pics").glob("*.html"))


def test_a_folder_that_is_none_or_too_large(capsys, monkeypatch):
    assert_failed(call(capsys, "gallery", "nowhere"), 2)
    Path("pics").mkdir()
    assert_failed(call(capsys, "gallery", "pics"), 4)
    monkeypatch.setattr(gallery, "MAX_PICTURES", 1)
    for name in ("a", "b"):
        save(f"pics/{name}.png", order("a fox", seed=3))
    with pytest.raises(UsageError, match="too many"):
        gallery.list_pictures(Path("pics"))


def test_the_search_knows_the_ids_of_the_page(capsys):
    save("pics/a.png", order("a fox", seed=3))
    page = make_page(capsys)
    wanted = set(re.findall(r'getElementById\("(\w+)"\)', page.texts["script"][0]))
    assert wanted == set(page.attributes("id")) == {"search", "count"}
