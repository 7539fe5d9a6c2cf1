"""The request: which sizes, ratios and numbers are taken, and what a refusal says."""

import json
import re
from fractions import Fraction

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fluxcli.errors import ExitCode, UsageError
from fluxcli.request import presets
from fluxcli.request.fields import DEFAULTS, MAX_PROMPT_BYTES, PART_OF, GenerationRequest, Order
from fluxcli.request.settings import (
    MAX_SEED,
    SETTINGS,
    Bytes,
    Integer,
    Number,
    Side,
    Texts,
    coerce,
    flag,
)
from fluxcli.request.sizes import ASPECT_RATIOS, MAX_AREA_PX, size_of
from fluxcli.resolve import resolve_order

SIDES = st.integers(4, 256).map(lambda k: k * 16)
RATIOS = st.tuples(st.integers(1, 99999), st.integers(1, 99999)).filter(
    lambda r: max(r) <= 4 * min(r)
)


def made(prompt: str = "a fox", **values: object) -> Order:
    return Order.from_settings(prompt, values)


def refusal(**values: object) -> str:
    with pytest.raises(UsageError) as caught:
        made(**values)
    assert caught.value.exit_code == ExitCode.USAGE
    return f"{caught.value} | {caught.value.hint}"


@given(RATIOS, SIDES)
def test_the_longest_side_is_exact_and_the_other_the_nearest_multiple_of_16(ratio, side):
    width, height = size_of(f"{ratio[0]}:{ratio[1]}", side)
    exact = Fraction(side * min(ratio), max(ratio))
    assert max(width, height) == side and min(width, height) % 16 == 0
    assert abs(min(width, height) - exact) <= 8 and min(width, height) >= 16
    assert width == height or (width > height) == (ratio[0] > ratio[1])


@given(RATIOS, SIDES)
def test_every_ratio_up_to_4_to_1_is_drawn_unless_the_area_is_too_large(ratio, side):
    width, height = size_of(f"{ratio[0]}:{ratio[1]}", side)
    values = {"aspect_ratio": f"{ratio[0]}:{ratio[1]}", "image_size": side}
    if width * height <= MAX_AREA_PX:
        assert made(**values).request.size == (width, height)
        return
    possible = int(re.search(r"--size (\d+) is the largest", refusal(**values))[1])
    assert possible < side and made(**values | {"image_size": possible}).request.size
    refusal(**values | {"image_size": possible + 16})


TOO_MANY = st.integers(129, 256).flatmap(
    lambda w: st.tuples(st.just(w), st.integers(32768 // w + 1, 256))
)


@given(TOO_MANY)
def test_pixels_that_are_too_many_come_with_the_most_that_are_possible(tokens):
    width, height = (16 * side for side in tokens)
    values = re.search(
        r"--width (\d+) --height (\d+) is the largest", refusal(width=width, height=height)
    ).groups()
    smaller = tuple(map(int, values))
    assert made(width=smaller[0], height=smaller[1]).request.size == smaller


@pytest.mark.parametrize("ratio", ASPECT_RATIOS)
def test_the_published_ratios_are_taken(ratio):
    width, height = made(aspect_ratio=ratio).request.size
    wide, high = map(int, ratio.split(":"))
    assert max(width, height) == 1024 and abs(width / height - wide / high) < 0.04


@pytest.mark.parametrize(
    "ratio, size, expected",
    [
        ("16:9", 1024, (1024, 576)),
        ("9:21", 1024, (432, 1024)),
        ("2.39:1", 1024, (1024, 432)),
        ("4:1", 80, (80, 16)),
    ],
)
def test_sizes_by_hand(ratio, size, expected):
    assert made(aspect_ratio=ratio, image_size=size).request.size == expected


@pytest.mark.parametrize(
    "ratio",
    ["0:9", "9:0", "a:b", "1e9:1", "", ":", "16x9", "16:9:1", "-1:1", "nan:1", "1:4.0001", "5:1"],
)
def test_what_is_no_ratio_is_refused_by_its_flag(ratio):
    assert "--ar" in refusal(aspect_ratio=ratio)


@given(st.integers(-(10**12), 10**12))
def test_a_refused_size_comes_with_the_nearest_that_are_possible(value):
    assume(not (64 <= value <= 4096 and value % 16 == 0))
    named = [int(n) for n in re.findall(r"\d+", refusal(image_size=value).partition("nearest")[2])]
    possible = range(64, 4097, 16)
    assert named and all(n in possible for n in named)
    distance = min(abs(value - n) for n in named)
    assert distance == min(
        abs(value - n) for n in (max(64, min(4096, value // 16 * 16 + d)) for d in (0, 16))
    )
    if 64 < value < 4096:
        assert len(named) == 2 and named[0] < value < named[1] and named[1] - named[0] == 16


@pytest.mark.parametrize(
    "width, height, flags",
    [
        (100, 512, "--width"),
        (512, 0, "--height"),
        (512, -16, "--height"),
        (4112, 1024, "--width"),
        (10**9, 16, "--width"),
        (2048, 496, "2048x496"),
        (48, 48, "48x48"),
        (4096, 4096, "4096x4096"),
        (512, None, "--height"),
    ],
)
def test_impossible_pixels_are_refused(width, height, flags):
    assert flags in refusal(width=width, height=height)


@pytest.mark.parametrize("prompt", ["", " ", "\n\t ", "\u2003\u00a0"])
def test_a_blank_prompt_is_refused(prompt):
    assert "empty" in refusal(prompt=prompt)


def test_a_prompt_is_text_of_bounded_length():
    assert GenerationRequest("x" * MAX_PROMPT_BYTES).prompt
    assert "too long" in refusal(prompt="x" * (MAX_PROMPT_BYTES + 1))
    assert "too long" in refusal(prompt="🦊" * (MAX_PROMPT_BYTES // 4 + 1))
    assert "not valid text" in refusal(prompt="a\ud800b")


@pytest.mark.parametrize(
    "name, value",
    [
        ("steps", 0),
        ("steps", 1001),
        ("guidance", float("nan")),
        ("guidance", float("inf")),
        ("guidance", -0.1),
        ("quality", 0),
        ("quality", 101),
        ("seed", -2),
        ("seed", 2**64),
        ("count", 0),
        ("count", 10_001),
        ("text_tokens", 0),
        ("text_tokens", 513),
        ("format", "gif"),
        ("format", "PNG "),
        ("device", "cuda:x"),
        ("device", "gpu"),
    ],
)
def test_numbers_and_names_out_of_range_are_refused_by_their_flag(name, value):
    assert flag(name) in refusal(**{name: value})


RANGES = {
    name: row.kind
    for name, row in SETTINGS.items()
    if isinstance(row.kind, Integer | Number | Bytes | Side)
}


@pytest.mark.parametrize(
    "name", [name for name, kind in RANGES.items() if not isinstance(kind, Side)]
)
def test_both_ends_of_a_range_are_taken(name):
    for value in (RANGES[name].low, RANGES[name].high):
        changes = {name: value} | ({"count": 1} if name == "seed" else {})
        assert made(**changes).settings()[name] == value


def test_every_setting_is_a_field_and_every_field_a_setting():
    assert set(DEFAULTS) == set(SETTINGS) == set(PART_OF) - {"prompt"} | {"preset"}


def test_the_last_seed_of_a_series_is_in_range():
    assert made(seed=MAX_SEED - 2, count=3).picture(2).request.seed == MAX_SEED
    assert "seed" in refusal(seed=MAX_SEED - 1, count=3)


@given(st.integers(0, 2**63), st.integers(1, 50), st.data())
def test_picture_k_is_the_order_of_seed_plus_k_alone(seed, count, data):
    order = made(seed=seed, count=count, output="x/")
    k = data.draw(st.integers(0, count - 1))
    assert order.picture(k) == made(seed=seed + k)


def test_a_random_seed_is_drawn_once_and_a_given_one_kept():
    seeds = {made().with_seed().request.seed for _ in range(20)}
    assert len(seeds) > 1 and all(0 <= seed < 2**32 for seed in seeds)
    assert made(seed=0).with_seed().request.seed == 0


ORDERS = st.builds(
    made,
    prompt=st.text(st.characters(codec="utf-8"), min_size=1, max_size=80).filter(str.strip),
    steps=st.integers(1, 1000),
    guidance=st.none() | st.floats(0, 100),
    seed=st.integers(-1, 2**63),
    count=st.integers(1, 9),
    aspect_ratio=st.sampled_from(ASPECT_RATIOS),
    image_size=st.integers(4, 128).map(lambda k: k * 16),
    format=st.sampled_from(["jpg", "png", "webp"]),
    metadata=st.booleans(),
    output=st.none()
    | st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1, max_size=20),
)


@given(ORDERS)
def test_an_order_survives_json(order):
    assert Order.from_json(json.loads(json.dumps(order.to_json()))) == order


@given(ORDERS)
def test_the_text_of_a_setting_means_its_value(order):
    for key, value in order.settings().items():
        if value is not None:
            assert coerce(key, value, where="x") == value
            assert (
                isinstance(SETTINGS[key].kind, Texts) or coerce(key, str(value), where="x") == value
            )
    assert coerce("guidance", "none", where="x") is None


@pytest.mark.parametrize(
    "name, value",
    [
        ("steps", "x"),
        ("steps", 2.5),
        ("steps", True),
        ("steps", []),
        ("guidance", "nan"),
        ("guidance", "much"),
        ("metadata", 1),
        ("metadata", "perhaps"),
        ("model", 3),
        ("format", None),
        ("width", "1e3"),
        ("seed", ""),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_where_it_stood(name, value):
    with pytest.raises(UsageError, match=r"here\.toml") as caught:
        coerce(name, value, where="here.toml")
    assert name in str(caught.value)


@pytest.mark.parametrize(
    "typo, meant", [("step", "steps"), ("guidence", "guidance"), ("aspect", "aspect_ratio")]
)
def test_an_unknown_setting_comes_with_the_nearest(typo, meant):
    with pytest.raises(UsageError, match=typo) as caught:
        coerce(typo, 1, where="here.toml")
    assert meant in caught.value.hint


@pytest.mark.parametrize(
    "given, size",
    [
        ({"image_size": "1024x768"}, (1024, 768)),
        ({"image_size": " 1024 X 768 "}, (1024, 768)),
        ({"image_size": "1024*768"}, (1024, 768)),
        ({"image_size": "1024\u00d7768"}, (1024, 768)),
        ({"width": "1024"}, (1024, 1024)),
        ({"height": 512}, (512, 512)),
        ({"width": 1024, "aspect_ratio": "16:9"}, (1024, 576)),
        ({"height": 1024, "aspect_ratio": "2:3"}, (688, 1024)),
    ],
)
def test_a_size_is_said_in_many_ways(given, size):
    assert resolve_order("a fox", {"preset": "tiny", **given}).request.size == size


def test_a_rows_size_goes_before_the_command_lines():
    for common, row, size in [
        ({"aspect_ratio": "16:9"}, {"width": 1024}, (1024, 576)),
        ({"image_size": "1024x768"}, {"aspect_ratio": "1:1", "image_size": 512}, (512, 512)),
        ({"image_size": 512}, {"width": 256, "height": 128}, (256, 128)),
        ({"width": 512}, {"height": 256}, (512, 256)),
        ({"aspect_ratio": "16:9", "width": 512}, {"height": 256}, (512, 256)),
    ]:
        given = presets.override(common, row)
        assert resolve_order("a fox", {"preset": "tiny", **given}).request.size == size
