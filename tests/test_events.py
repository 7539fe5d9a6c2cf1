"""Events on a wire: JSON and back without loss."""

import json
from dataclasses import fields
from typing import get_args

import pytest

from fluxcli import events
from fluxcli.events import (
    Done,
    Event,
    Failed,
    GeneratedImage,
    Kept,
    Notice,
    Phase,
    Preview,
    Saved,
    Skipped,
    Step,
    Summary,
    from_json,
    to_json,
)

IMAGE = GeneratedImage("ein Bär-7.png", 2**64 - 1, 1024, 576, "png", 3, "ab" * 32, "cd" * 32)
SAMPLES = [
    Phase("load", "transformer"),
    Step(3, 28, 2, 4),
    Preview("ein Bär-7.preview.jpg", 3, 28, 2**64 - 1, 7),
    Notice('lost: "…" 🦊'),
    Saved(IMAGE),
    Saved(IMAGE, 7, 2.5),
    Kept("ein Bär-7.latents.safetensors", 2**64 - 1, 7),
    Skipped(7, "ein Bär-7.png"),
    Summary(20, 18, 1, 1, 36, 12.5),
    Done(
        (IMAGE, IMAGE),
        {"prompt": "x", "seed": 1},
        {"device": "cpu"},
        {"total": 1.5},
        {"rss_bytes": 1},
        {"flux": "1"},
    ),
    Failed(6, "cannot write the picture", "-o FOLDER/"),
]


def test_there_is_a_sample_of_every_event():
    assert {type(sample) for sample in SAMPLES} == set(get_args(Event))


@pytest.mark.parametrize("event", SAMPLES, ids=lambda event: type(event).__name__)
def test_an_event_survives_the_wire(event):
    assert from_json(json.loads(json.dumps(to_json(event)))) == event


@pytest.mark.parametrize("kind", get_args(Event))
def test_no_field_is_called_event_and_every_kind_says_what_it_is(kind):
    assert "event" not in {field.name for field in fields(kind)}
    assert kind.__doc__ and kind.__module__ == events.__name__
