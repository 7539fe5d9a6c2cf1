"""Presets and settings: which layer wins, what is refused, and that it says where it stood."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fluxcli.errors import ExitCode, UsageError
from fluxcli.request import presets
from fluxcli.request.fields import Order
from fluxcli.request.settings import SETTINGS
from tests.support.invariant import call

BUNDLED = (
    "canny-dev", "canny-lora", "depth-dev", "depth-lora", "dev", "draft", "fill", "hyper",
    "kontext", "krea", "quality", "redux", "schnell", "tiny", "turbo",
)  # fmt: skip
VALUES = {
    "steps": st.integers(1, 1000),
    "seed": st.integers(0, 2**63),
    "guidance": st.floats(0, 100),
    "quality": st.integers(1, 100),
    "format": st.sampled_from(["jpg", "png", "webp"]),
    "text_tokens": st.integers(1, 512),
    "metadata": st.booleans(),
}
LAYER = st.fixed_dictionaries({}, optional=VALUES)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def toml(layer):
    literals = {True: "true", False: "false"}
    lines = [f"{k} = {literals[v] if isinstance(v, bool) else repr(v)}" for k, v in layer.items()]
    return "\n".join(lines) + "\n"


def merge(folder, flags=None, **environment):
    return presets.merge(flags or {}, folder, environment)


def refusal(folder, flags=None, **environment):
    with pytest.raises(UsageError) as caught:
        merge(folder, flags, **environment)
    assert caught.value.exit_code == ExitCode.USAGE
    return f"{caught.value} | {caught.value.hint}"


def test_the_bundled_presets_are_these(config_folder):
    assert tuple(presets.list_presets(config_folder)) == BUNDLED


@pytest.mark.parametrize("name", BUNDLED)
def test_a_bundled_preset_makes_a_request_and_describes_itself(name, config_folder):
    merged = merge(config_folder, {"preset": name})
    assert Order.from_settings("a fox", merged.values).preset == name
    assert set(merged.values) == set(SETTINGS) == set(merged.origins)
    assert presets.load(name, config_folder).description


def test_dev_is_the_default_and_as_published(config_folder):
    request = Order.from_settings("a fox", merge(config_folder).values)
    assert (request.preset, request.request.model) == ("dev", "black-forest-labs/FLUX.1-dev")
    assert (
        request.request.steps,
        request.request.guidance,
        request.request.size,
        request.request.text_tokens,
    ) == (
        28,
        3.5,
        (1024, 1024),
        512,
    )
    assert (request.output.format, request.output.quality, request.request.seed) == ("jpg", 80, -1)


def test_schnell_takes_four_steps_and_no_guidance(config_folder):
    request = Order.from_settings("a fox", merge(config_folder, {"preset": "schnell"}).values)
    assert (request.request.steps, request.request.guidance, request.request.text_tokens) == (
        4,
        None,
        256,
    )


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=LAYER, preset=LAYER, variables=LAYER, flags=LAYER)
def test_the_strongest_layer_that_names_a_key_wins_and_is_its_origin(
    config_folder, config, preset, variables, flags
):
    write(config_folder / "config.toml", 'preset = "mine"\n' + toml(config))
    write(config_folder / "presets" / "mine.toml", toml(preset))
    environment = {f"FLUX_{key.upper()}": str(value) for key, value in variables.items()}
    merged = merge(config_folder, {key: str(value) for key, value in flags.items()}, **environment)
    default = merge(config_folder / "nowhere").values
    for key in VALUES:
        layers = [
            (flags, presets.flag(key)),
            (variables, f"FLUX_{key.upper()}"),
            (preset, "preset mine"),
        ]
        layers += [(config, "config.toml"), ({key: default[key]}, None)]
        value, origin = next((layer[key], origin) for layer, origin in layers if key in layer)
        assert merged.values[key] == value
        assert origin is None or merged.origins[key] == origin
    assert Order.from_settings("a fox", merged.values)


@pytest.mark.parametrize("stronger", ["preset", "variables", "flags"])
def test_a_later_size_replaces_the_other_kind_of_an_earlier_layer(stronger, config_folder):
    def size(config, late):
        write(config_folder / "config.toml", 'preset = "mine"\n' + toml(config))
        write(config_folder / "presets" / "mine.toml", toml(late if stronger == "preset" else {}))
        flags = late if stronger == "flags" else {}
        variables = {f"FLUX_{key.upper()}": str(value) for key, value in late.items()}
        return Order.from_settings(
            "a fox",
            merge(config_folder, flags, **(variables if stronger == "variables" else {})).values,
        ).request.size

    pixels, ratio = {"width": 512, "height": 256}, {"aspect_ratio": "2:1", "image_size": 640}
    assert size(pixels, ratio) == (640, 320)
    assert size(ratio, pixels) == (512, 256)
    assert size(pixels, {"aspect_ratio": "1:1"})[0] == size(pixels, {"aspect_ratio": "1:1"})[1]


def test_both_kinds_of_size_in_one_layer_exclude_each_other(config_folder):
    assert "exclude" in refusal(config_folder, {"width": 512, "height": 512, "aspect_ratio": "1:1"})
    assert "exclude" in refusal(config_folder, FLUX_WIDTH="512", FLUX_IMAGE_SIZE="512")


def test_a_preset_extends_another_and_shows_which_said_what(config_folder):
    write(config_folder / "presets" / "a.toml", 'extends = "b"\nsteps = 7\n')
    write(config_folder / "presets" / "b.toml", 'extends = "krea"\nguidance = 2\n')
    merged = merge(config_folder, {"preset": "a"})
    origins = {
        key: merged.origins[key] for key in ("steps", "guidance", "model", "text_tokens", "preset")
    }
    assert origins == {
        "steps": "preset a",
        "guidance": "preset b",
        "model": "preset krea",
        "text_tokens": "preset dev",
        "preset": "--preset",
    }


def test_presets_that_extend_each_other_are_refused(config_folder):
    write(config_folder / "presets" / "a.toml", 'extends = "b"\n')
    write(config_folder / "presets" / "b.toml", 'extends = "a"\n')
    assert "round" in refusal(config_folder, {"preset": "a"})


def test_a_users_preset_hides_the_bundled_one(config_folder):
    write(config_folder / "presets" / "dev.toml", "steps = 3\n")
    assert merge(config_folder).values["steps"] == 3


def test_a_byte_order_mark_is_no_part_of_the_settings(config_folder):
    write(config_folder / "config.toml", "\ufeffsteps = 3\r\n")
    write(config_folder / "presets" / "dev.toml", "")
    assert merge(config_folder).values["steps"] == 3


@pytest.mark.parametrize("place", ["config.toml", "presets/dev.toml"])
@pytest.mark.parametrize(
    "text, words",
    [
        ("steps = 3\nsteps = = 4\n", ["line 2", "malformed TOML"]),
        ("stepps = 3\n", ["stepps", "'steps'"]),
        ("steps = 'many'\n", ["steps", "many", "whole number"]),
        ("guidance = [1]\n", ["guidance", "a number"]),
        ("metadata = 1\n", ["metadata", "true or false"]),
        ("quality = 101\n", ["quality", "1 to 100"]),
        ("aspect_ratio = '0:9'\n", ["0:9"]),
        ("image_size = 100\n", ["96 and 112"]),
        ("format = 'gif'\n", ["gif"]),
        ("prompt = 'a fox'\n", ["prompt"]),
        ("[steps]\nx = 1\n", ["steps"]),
    ],
)
def test_a_defect_in_a_file_is_named_with_its_place(place, text, words, config_folder):
    path = write(config_folder / place, text)
    message = refusal(config_folder)
    assert str(path) in message and all(word in message for word in words)


def test_a_file_that_is_no_text_is_refused(config_folder):
    write(config_folder / "config.toml", "").write_bytes(b"steps = '\xff'")
    assert "config.toml" in refusal(config_folder)
    (config_folder / "config.toml").unlink()
    (config_folder / "presets" / "dev.toml").mkdir(parents=True)
    assert "dev.toml" in refusal(config_folder)


@pytest.mark.parametrize(
    "key, value", [("extends", "3"), ("description", "[]"), ("preset", "'dev'")]
)
def test_what_a_preset_says_of_itself_is_checked(key, value, config_folder):
    write(config_folder / "presets" / "dev.toml", f"{key} = {value}\n")
    assert key in refusal(config_folder)


def test_an_unknown_preset_comes_with_the_nearest_or_all(config_folder):
    assert "did you mean 'schnell'" in refusal(config_folder, {"preset": "schnel"})
    assert all(name in refusal(config_folder, {"preset": "zzzz"}) for name in BUNDLED)
    write(config_folder / "presets" / "a.toml", 'extends = "draftt"\n')
    assert "did you mean 'draft'" in refusal(config_folder, {"preset": "a"})


@pytest.mark.parametrize(
    "name, value",
    [
        ("FLUX_STEPS", "x"),
        ("FLUX_STEPS", "0"),
        ("FLUX_GUIDANCE", "nan"),
        ("FLUX_METADATA", "perhaps"),
        ("FLUX_IMAGE_SIZE", "1000"),
        ("FLUX_ASPECT_RATIO", "wide"),
        ("FLUX_FORMAT", "gif"),
    ],
)
def test_a_wrong_variable_is_refused_by_its_name(name, value, config_folder):
    assert name in refusal(config_folder, **{name: value})


def test_variables_of_other_programs_and_empty_ones_say_nothing(config_folder):
    assert merge(
        config_folder, FLUX_STEPS="", FLUX_CAPACITOR="1.21", FLUXX="1", STEPS="3"
    ) == merge(config_folder)
    assert "did you mean FLUX_STEPS" in refusal(config_folder, FLUX_STEPPS="3")


@pytest.mark.parametrize("kind", ["absent", "a file", "unreadable"])
def test_without_a_settings_folder_defaults_hold(kind, config_folder, monkeypatch):
    expected = merge(config_folder)
    if kind == "a file":
        write(config_folder, "x")
    if kind == "unreadable":
        write(config_folder / "config.toml", "steps = 3")
        denied = PermissionError(13, "Permission denied")
        real = Path.stat

        def stat(path, **options):
            if config_folder in path.parents:
                raise denied
            return real(path, **options)

        monkeypatch.setattr(Path, "stat", stat)
    assert merge(config_folder) == expected


def test_a_users_preset_may_extend_the_bundled_one_of_its_name(config_folder):
    (config_folder / "presets").mkdir(parents=True)
    (config_folder / "presets" / "dev.toml").write_text('extends = "dev"\nsteps = 9\n')
    values = presets.merge({}, config_folder, {}).values
    assert (values["steps"], values["guidance"], values["text_tokens"]) == (9, 3.5, 512)


def test_the_flags_words_are_settings_too(config_folder):
    config_folder.mkdir(parents=True)
    (config_folder / "config.toml").write_text('ar = "16:9"\n')
    values = presets.merge({"preset": "tiny"}, config_folder, {"FLUX_SIZE": "256"}).values
    assert (values["aspect_ratio"], values["image_size"]) == ("16:9", 256)


@pytest.mark.parametrize(
    "variable, near", [("FLUX_STPES", "FLUX_STEPS"), ("FLUX_GUIDENCE", "FLUX_GUIDANCE")]
)
def test_a_misspelt_variable_is_an_error_with_the_nearest(config_folder, variable, near):
    with pytest.raises(UsageError, match=variable) as caught:
        presets.merge({}, config_folder, {variable: "3"})
    assert near in caught.value.hint


def test_a_broken_preset_does_not_hide_the_others(config_folder, capsys):
    (config_folder / "presets").mkdir(parents=True)
    (config_folder / "presets" / "mine.toml").write_text("stpes = 3\n")
    result = call(capsys, "presets")
    assert result.returncode == 0
    assert "tiny" in result.stdout and "mine" not in result.stdout
    assert "mine" in result.stderr and "steps" in result.stderr + str(presets.SETTINGS)


def test_toml_nested_without_end_is_a_usage_error(config_folder):
    config_folder.mkdir(parents=True)
    (config_folder / "config.toml").write_text("a = " + "[" * 100_000)
    with pytest.raises(UsageError):
        presets.merge({}, config_folder, {})


def test_a_bundled_preset_is_stronger_than_config_only_where_it_was_asked_for(config_folder):
    write(config_folder / "config.toml", "steps = 3\nquality = 90\n")
    assert merge(config_folder).values["steps"] == 3
    assert merge(config_folder, {"preset": "tiny"}).values["steps"] == 10
    assert merge(config_folder, FLUX_PRESET="quality").values["steps"] == 50
    assert presets.find_hidden({"preset": "tiny"}, config_folder) == ["steps"]
    assert presets.find_hidden({}, config_folder) == []


def test_of_a_preset_of_ones_own_what_it_extends_is_weaker_than_config(config_folder):
    write(config_folder / "config.toml", 'preset = "mine"\nsteps = 3\nguidance = 2.0\n')
    write(config_folder / "presets" / "mine.toml", 'extends = "dev"\nguidance = 5.0\n')
    values = merge(config_folder).values
    assert (values["steps"], values["guidance"]) == (3, 5.0)


def test_errors_call_a_setting_as_options_do(config_folder):
    write(config_folder / "config.toml", "image_size = 1000\n")
    assert "unknown" not in (text := refusal(config_folder)) and "992" in text
    write(config_folder / "config.toml", 'size = "big"\n')
    assert "size is 'big'" in (text := refusal(config_folder)) and "image_size" not in text
    write(config_folder / "config.toml", "zzz = 1\n")
    assert " ar size " in (text := refusal(config_folder)) and "aspect_ratio" not in text
    write(config_folder / "config.toml", "steps = 1\n")
    write(config_folder / "presets" / "mine.toml", "zzz = 1\n")
    assert "description extends" in refusal(config_folder, {"preset": "mine"})
