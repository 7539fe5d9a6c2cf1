"""The Python face: pixels and files are the command line's, its page runs, importing it costs
nothing.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fluxcli
from fluxcli.errors import ExitCode
from fluxcli.events import Step
from fluxcli.pictures.image import read_metadata
from tests.support.helpers import ROOT, read_pixels
from tests.support.invariant import call

PAGE = ROOT / "docs" / "python.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
PROMPT = "a red circle on a blue background"
SMALL = {"preset": "tiny", "size": 64, "steps": 2, "text_tokens": 16}
SMALL_OPTIONS = ("-p", "tiny", "--size", "64", "--steps", "2", "--text-tokens", "16")


def test_importing_it_loads_nothing_but_the_standard_library():
    code = "import sys; before = set(sys.modules)\nimport fluxcli\n"
    code += "dir(fluxcli); fluxcli.errors, fluxcli.events\n"
    code += "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert set(run.stdout.split()) <= set(sys.stdlib_module_names) | {"fluxcli", "quant"}


def test_every_name_of_the_face_is_there_and_others_are_not():
    for name in fluxcli.__all__:
        assert getattr(fluxcli, name) is not None
    with pytest.raises(AttributeError, match="Flacks"):
        _ = fluxcli.Flacks


def test_the_page_runs_from_top_to_bottom():
    space: dict = {}
    assert len(EXAMPLES) >= 6
    for example in EXAMPLES:
        exec(compile(example, str(PAGE), "exec"), space)
    assert Path("triangle.png").is_file() and space["path"].startswith("out/")


def test_its_pixels_are_the_command_lines(capsys):
    image = fluxcli.generate(PROMPT, seed=3, **SMALL)
    assert (
        call(capsys, "generate", PROMPT, *SMALL_OPTIONS, "--seed", "3", "-o", "x.png").returncode
        == 0
    )
    assert np.array_equal(np.asarray(image), read_pixels(Path("x.png")))


def test_a_saved_image_is_the_file_that_the_command_line_writes(capsys):
    with fluxcli.Flux("tiny", size=64, steps=2, text_tokens=16) as flux:
        (image,) = flux.generate(PROMPT, seed=3)
        path = flux.save(image, "api/", format="jpg", quality=90)
        again = flux.save(image, "api/", format="jpg", quality=90)
    assert path == "api/a-red-circle-on-a-blue-background-3.jpg"
    assert again == "api/a-red-circle-on-a-blue-background-3-2.jpg"
    made = call(
        capsys,
        "generate",
        PROMPT,
        *SMALL_OPTIONS,
        "--seed",
        "3",
        "--format",
        "jpg",
        "--quality",
        "90",
        "-o",
        "cli/",
    )
    assert Path(made.stdout.strip()).read_bytes() == Path(path).read_bytes()


def test_several_pictures_load_the_model_once_and_have_seeds_in_a_row():
    loaded = []

    def watch(event: object) -> None:
        if isinstance(event, fluxcli.events.Phase) and event.name == "load":
            loaded.append(event.detail)

    with fluxcli.Flux("tiny", size=64, steps=2, text_tokens=16) as flux:
        first = flux.generate(PROMPT, seed=4, count=2, on_event=watch)
        (second,) = flux.generate(PROMPT, seed=5, on_event=watch)
    assert loaded.count("transformer") == 1
    assert np.array_equal(np.asarray(first[1]), np.asarray(second))
    assert not np.array_equal(np.asarray(first[0]), np.asarray(second))


def test_a_call_may_change_the_settings_of_all():
    with fluxcli.Flux("tiny", ar="2:1", size=64, steps=2) as flux:
        assert flux.generate(PROMPT)[0].size == (64, 32)
        assert flux.generate(PROMPT, width=32, height=64)[0].size == (32, 64)
        assert flux.plan().precision == "fp32" != flux.plan(precision="bf16").precision


def test_a_model_is_taken_as_well_as_a_preset(tiny_folder):
    with fluxcli.Flux(str(tiny_folder), size=64, steps=2, text_tokens=16) as flux:
        (image,) = flux.generate(PROMPT, seed=1)
    assert image.size == (64, 64)


def test_leaving_the_loop_stops_the_run():
    with fluxcli.Flux("tiny", size=64, steps=50) as flux:
        for event in flux.events(PROMPT):
            if isinstance(event, fluxcli.events.Step):
                break
        assert flux.generate(PROMPT, steps=1)


def test_what_ends_several_pictures_has_those_that_were_finished():
    def stop(event: object) -> None:
        if isinstance(event, Step) and (event.image, event.index) == (3, 1):
            raise KeyboardInterrupt

    with fluxcli.Flux(**SMALL) as flux:
        expected = flux.generate(PROMPT, seed=5, count=2)
        with pytest.raises(KeyboardInterrupt) as caught:
            flux.generate(PROMPT, seed=5, count=4, on_event=stop)
    found = caught.value.images
    assert [image.tobytes() for image in found] == [image.tobytes() for image in expected]


def test_wrong_settings_are_usage_errors_before_anything_is_loaded():
    for wrong in ({"steps": 0}, {"stpes": 3}, {"precision": "fp5"}, {"preset": "nobody"}):
        with pytest.raises(fluxcli.FluxError) as caught:
            fluxcli.Flux(**wrong)
        assert caught.value.exit_code == ExitCode.USAGE
    with pytest.raises(fluxcli.FluxError, match="one picture"):
        fluxcli.generate(PROMPT, count=2, **SMALL)


def test_an_image_that_was_changed_or_is_not_of_flux_is_not_saved():
    from PIL import Image

    with fluxcli.Flux("tiny", size=64, steps=1) as flux:
        (image,) = flux.generate(PROMPT, seed=1)
        info = image.info
        image.putpixel((0, 0), (1, 2, 3))
        image.info.update(info)
        for wrong in (image, Image.new("RGB", (64, 64))):
            with pytest.raises(fluxcli.FluxError, match="image"):
                flux.save(wrong, "x.png")
    assert not Path("x.png").exists()


def test_what_is_saved_can_be_replayed(capsys):
    with fluxcli.Flux("tiny", size=64, steps=2) as flux:
        (image,) = flux.generate(PROMPT)
        path = flux.save(image, "x.png")
    assert json.dumps(read_metadata(Path(path))["request"]["seed"])
    assert call(capsys, "replay", path, "--check").stdout.strip() == "x.png: identical"
