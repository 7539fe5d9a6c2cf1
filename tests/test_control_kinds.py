"""Kinds of --control: what their presets say, where their weights are, what is shown of them."""

import json
import re
from pathlib import Path

import pytest

from fluxcli import paths
from fluxcli.errors import ExitCode, UsageError, WeightsUnavailable
from fluxcli.models import controls as resolved
from fluxcli.models.find import HUB_FILE, HUB_ID
from fluxcli.request import controls, presets
from fluxcli.request.inputs import ControlRef
from tests.support.invariant import assert_failed, call

UNION_2 = "Shakker-Labs/FLUX.1-dev-ControlNet-Union-Pro-2.0"
UNION = "Shakker-Labs/FLUX.1-dev-ControlNet-Union-Pro"
XLABS = "XLabs-AI/flux-controlnet-collections:flux-canny-controlnet-v3.safetensors"
# As the publishers advise: repository, scale, end, mode.
ADVISED = {
    "canny": (UNION_2, 0.7, 0.8, None),
    "soft-edge": (UNION_2, 0.7, 0.8, None),
    "depth": (UNION_2, 0.8, 0.8, None),
    "pose": (UNION_2, 0.9, 0.65, None),
    "gray": (UNION_2, 0.9, 0.8, None),
    "union-pro-2": (UNION_2, 0.7, 0.8, None),
    "tile": (UNION, 0.5, 1.0, 1),
    "blur": (UNION, 0.5, 1.0, 3),
    "low-quality": (UNION, 0.5, 1.0, 6),
    "upscaler": ("jasperai/Flux.1-dev-Controlnet-Upscaler", 0.6, 1.0, None),
    "xlabs-canny": (XLABS, 0.7, 1.0, None),
}


def cache(repository: str, *names: str) -> Path:
    """Make a snapshot of a repository in the hub's cache."""
    folder = paths.hub_cache_folder() / f"models--{repository.replace('/', '--')}" / "snapshots"
    for name in names:
        path = folder / ("a" * 40) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    return folder / ("a" * 40)


def cache_network(repository: str) -> Path:
    return cache(repository, "config.json", "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("name", ADVISED)
def test_a_kind_is_as_its_publisher_advises(name):
    repository, scale, end, mode = ADVISED[name]
    model, _, file = repository.partition(":")
    path = cache(model, file) / file if file else cache_network(model)
    found = resolved.resolve_control(ControlRef(name, "x.png"))
    assert found == resolved.ResolvedControl(path, scale, 0.0, end, mode)


def test_every_bundled_kind_is_sound_and_no_presets_name(config_folder):
    kinds = controls.list_kinds(config_folder)
    assert set(kinds) > set(ADVISED) and not set(kinds) & set(presets.list_presets(None))
    for path in kinds.values():
        kind = controls.load_kind(path)
        assert kind.description and 0 < kind.scale <= 1 and 0.6 < kind.end <= 1
        is_of_hub = HUB_ID.fullmatch(kind.repository) or HUB_FILE.fullmatch(kind.repository)
        assert is_of_hub or kind.repository.startswith("bundled/control/")


def test_what_is_said_goes_before_what_is_advised():
    cache_network(UNION_2)
    found = resolved.resolve_control(ControlRef.parse("pose:x.png:0.2:0.1-0.9"))
    assert (found.scale, found.start, found.end) == (0.2, 0.1, 0.9)
    # Half of a span is the kind's, which must fit to the other half.
    with pytest.raises(UsageError, match=r"0\.7-0\.65 are no shares"):
        resolved.resolve_control(ControlRef.parse("kind=pose,image=x.png,start=0.7"))


def test_a_path_or_a_hub_id_is_a_kind_and_acts_fully(tmp_path):
    file = tmp_path / "net.safetensors"
    file.write_bytes(b"x")
    whole = {"scale": 1.0, "start": 0.0, "end": 1.0, "mode": None}
    for kind, path in (
        (str(file), file),
        (str(tmp_path), tmp_path),
        ("me/net", cache_network("me/net")),
        ("me/net:a/x.safetensors", cache("me/net", "a/x.safetensors") / "a/x.safetensors"),
        ("https://huggingface.co/me/net", cache_network("me/net")),
    ):
        assert resolved.resolve_control(ControlRef(kind, "x.png")) == resolved.ResolvedControl(
            path, **whole
        )


@pytest.mark.parametrize(
    ("kind", "hint"),
    [
        ("canny", "flux models download canny"),
        ("me/net", "flux models download me/net"),
        ("me/net:x.safetensors", "flux models download me/net:x.safetensors"),
    ],
)
def test_what_is_not_here_says_what_gets_it(kind, hint):
    with pytest.raises(WeightsUnavailable) as caught:
        resolved.locate(kind)
    assert caught.value.hint == hint and caught.value.exit_code == ExitCode.WEIGHTS


@pytest.mark.parametrize("kind", ["cany", "canny.safetensors", "x/../y", "a b", "bundled/canny"])
def test_an_unknown_kind_is_a_usage_error_with_the_known_ones(kind):
    with pytest.raises(UsageError, match=r"known are .*union-pro-2") as caught:
        resolved.locate(kind)
    assert (kind != "cany") or "'canny'" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "mode"),
    [
        ("kind=union-pro,mode=pose,image=x.png", 4),
        ("kind=union-pro,mode=6,image=x.png", 6),
        ("kind=tile,mode=tile,image=x.png", 1),
        ("tile:x.png", 1),
        ("me/net:x.png", None),
        ("kind=me/net,mode=depth,image=x.png", 2),
        ("kind=me/net,mode=9,image=x.png", 9),
        ("union-pro-2:x.png", None),
    ],
)
def test_modes_have_names_and_numbers(text, mode, config_folder):
    ref = ControlRef.parse(text)
    assert controls.choose_mode(ref, controls.find_kind(ref.kind, config_folder)) == mode


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("union-pro:x.png", "which mode.*canny, tile, depth"),
        ("kind=union-pro,mode=hed,image=x.png", "no such mode.*'hed'"),
        ("kind=me/net,mode=hed,image=x.png", "no such mode.*'hed'"),
        ("kind=canny,mode=hed,image=x.png", "no such mode.*no modes with names, such as 'hed'"),
    ],
)
def test_a_mode_is_asked_for_and_not_guessed(text, words, config_folder):
    ref = ControlRef.parse(text)
    with pytest.raises(UsageError, match=words):
        controls.choose_mode(ref, controls.find_kind(ref.kind, config_folder))


def write(config_folder: Path, name: str, text: str) -> None:
    path = config_folder / "presets" / "control" / f"{name}.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_a_user_adds_kinds_and_changes_bundled_ones(config_folder):
    write(config_folder, "mine", 'repository = "me/net"\nscale = 0.3\nmodes = { tile = 4 }\n')
    write(config_folder, "canny", 'repository = "me/net"\n')
    folder = cache_network("me/net")
    assert resolved.resolve_control(ControlRef("mine", "x")) == resolved.ResolvedControl(
        folder, 0.3, 0.0, 1.0, 4
    )
    assert resolved.resolve_control(ControlRef("canny", "x")).path == folder


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("scale = 0.7\n", "wrong value.*repository is a text"),
        ('repository = ""\n', "wrong value"),
        ('repository = "a/b"\nscale = "much"\n', "wrong value"),
        ('repository = "a/b"\nscale = true\n', "wrong value"),
        ('repository = "a/b"\nmodes = [1]\n', "wrong value"),
        ('repository = "a/b"\nmodes = { a = "b" }\n', "wrong value"),
        ('repository = "a/b"\nmodel = "c"\n', "unknown setting.*'model'"),
        ('repository = "a/b"\nscale = 11\n', "not in 0 to 10"),
        ('repository = "a/b"\nstart = 0.9\nend = 0.1\n', "no shares"),
        ("repository =\n", "malformed TOML"),
    ],
)
def test_a_kind_that_cannot_be_is_named(text, words, config_folder, capsys):
    write(config_folder, "mine", text)
    with pytest.raises(UsageError, match=words) as caught:
        controls.find_kind("mine", config_folder)
    assert "mine.toml" in str(caught.value)
    result = call(capsys, "presets")
    assert result.returncode == 0 and "flux: control mine: " in result.stderr


def test_kinds_are_listed_and_shown(capsys):
    rows = call(capsys, "presets").stdout.splitlines()
    assert any(re.match(r"--control canny +edges", row) for row in rows)
    listed = json.loads(call(capsys, "presets", "--json").stdout)
    assert listed["--control"]["pose"] == {
        "description": "a pose, as DWPose draws it",
        "repository": UNION_2,
        "scale": 0.9,
        "start": 0.0,
        "end": 0.65,
    }
    shown = call(capsys, "presets", "union-pro").stdout
    assert UNION in shown and "tile" in shown and "union-pro.toml" in shown
    assert "did you mean" in assert_failed(call(capsys, "presets", "drafft"), ExitCode.USAGE)


def test_what_is_computed_of_a_photo():
    computed = {name: resolved.computed_map(name) for name in ("canny", "xlabs-canny", "depth")}
    assert computed == {"canny": "canny", "xlabs-canny": "canny", "depth": "depth"}
    assert resolved.computed_map("edges") == "canny"
    for name in ("pose", "union-pro-2", "me/canny", "/nets/canny", "soft-edge", "x.canny"):
        assert resolved.computed_map(name) == ""
