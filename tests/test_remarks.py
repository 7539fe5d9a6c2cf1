"""What is said of prompts and sizes beyond a model, compared with what the engine used."""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from fluxcli.engine import bundled
from fluxcli.engine.text import load_tokenizers, tokenize
from fluxcli.request import syntax
from training import data

LORA_TAG = "<lora:ink:0.8>"


@pytest.fixture(scope="module")
def tokenizers(tiny_folder: Path):
    return load_tokenizers(tiny_folder)


def test_the_words_are_those_of_the_training():
    rng = random.Random(0)
    sentences = [data.any_prompt(fact, rng) for fact in data.all_facts() for _ in range(20)]
    words = {word for sentence in sentences for word in re.findall(r"\w+", sentence.lower())}
    assert words == bundled.WORDS
    assert not [words for each in sentences if (words := bundled.find_unknown_words(each))]


def test_a_known_word_is_one_token_of_t5_and_an_unknown_one_is_spelled(tokenizers):
    pieces = {word: tokenizers.t5.tokenize(word) for word in bundled.WORDS | {"fox", "Snow", "RED"}}
    unknown = bundled.find_unknown_words(" ".join(pieces))
    assert sorted(unknown) == ["RED", "Snow", "fox"]
    for word, found in pieces.items():
        assert (len(found) == 1) == (word not in unknown), (word, found)


def test_what_t5_has_no_token_for_is_named(tokenizers):
    ids = tokenize(tokenizers, "a red 🦊 circle on 雪 ground", 24)
    assert ids.unknown == "🦊 雪"
    assert ids.t5.tolist()[0].count(tokenizers.t5.unk_token_id) == 2
    assert tokenize(tokenizers, "a red circle", 24).unknown == ""


@pytest.mark.parametrize(
    ("prompt", "word"),
    {
        LORA_TAG: "--lora ink:0.8",
        "<lora:my ink>": "--lora 'my ink:1'",
        "<LYCO:x:0.5:0.2>": "--lora x:0.5",
        "<hypernet:x:1>": "hypernet",
        "embedding:bad-hands": "embedding",
        "a (red:1.3) circle": "weights",
        "a ((red)) circle": "weights",
        "a red++ circle": "weights",
        "a [red:blue:0.5] circle": "[from:to:0.5]",
        "a [red|blue] circle": "[from:to:0.5]",
        "a {red|blue} circle": "--from",
        "a __colour__ circle": "--from",
        "a red circle BREAK on blue": "BREAK",
        "a red circle AND a star": "AND",
        "a circle\nNegative prompt: blue": "negative prompt",
    }.items(),
)
def test_a_form_of_another_tool_is_named_and_read_as_text(prompt, word, tokenizers):
    (notice,) = syntax.list_notices(prompt)
    assert word in notice
    if "does nothing here but add" in notice:  # then all of it is in what T5 reads
        ids = tokenize(tokenizers, prompt, 64).t5[0]
        read = tokenizers.t5.decode(ids, skip_special_tokens=True)
        assert re.sub(r"\s", "", read) == re.sub(r"\s", "", prompt)


@pytest.mark.parametrize(
    "prompt",
    [
        "a fox (red) at 1:30 [sic] and a hen: both - one",
        "ROCK AND ROLL",
        "a heartbreak, a well-known C++ book -- one",
        "x < y > z, <b>bold</b>, {one}, snake_case",
    ],
)
def test_plain_text_is_left_alone(prompt):
    assert not list(syntax.list_notices(prompt))


@pytest.fixture
def drawn(flux: Callable) -> Callable[..., tuple[str, dict]]:
    """Draw a quick picture; what stderr said, and the picture's metadata."""

    def draw(prompt: str, *options: str) -> tuple[str, dict]:
        quick = ("-p", "tiny", "--steps", "1", "--text-tokens", "24", "--seed", "1", "--json")
        result = flux("generate", prompt, *quick, *options, "-o", "drawn/")
        assert result.returncode == 0, result.stderr
        return result.stderr, json.loads(result.stdout)

    return draw


def test_beyond_the_bundled_model_is_said_each_time(drawn):
    for _ in range(2):  # from the prompt cache, too
        said, _ = drawn("a fox in the snow", "--size", "64")
        assert "does not know these words: fox, snow\n" in said and "knows only" in said
        assert "px" not in said
    said, _ = drawn("a red circle", "--size", "272")
    assert "does not know" not in said and "up to 256 px" in said and "best at 128" in said


def test_unknown_text_is_said_from_the_cache_too(drawn):
    for _ in range(2):
        assert "🦊" in drawn("a red 🦊", "--size", "64")[0]


def test_a_lora_tag_does_nothing_and_its_option_is_named(drawn):
    said, about = drawn(f"a red circle {LORA_TAG}", "--size", "64")
    assert "--lora ink:0.8" in said and about["request"]["lora"] == []
    assert about["request"]["prompt"].endswith(LORA_TAG)
