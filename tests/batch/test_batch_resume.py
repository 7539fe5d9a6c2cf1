"""`--resume`: rows that are done stay done, by what they ask for and not by their names."""

from pathlib import Path

import pytest

from fluxcli.events import Saved, Skipped
from fluxcli.pictures.image import hash_request, read_metadata
from fluxcli.request.job import Job, Row
from fluxcli.run.session import Session
from quant.checkpoint import Checkpoint, inspect
from tests.support.batches import (
    FAKE,
    SMALL,
    draw,
    failed_rows,
    hashes,
    of,
    pixels,
    resumed,
    single,
    write,
)
from tests.support.helpers import tiny
from tests.support.invariant import call, files
from tests.support.loras import write_lora


@pytest.fixture(scope="module")
def checkpoint(tiny_folder: Path) -> Checkpoint:
    return inspect(tiny_folder)


def test_a_second_run_skips_what_is_there_and_draws_what_is_not(drawn, capsys):
    write(*({"prompt": f"p{k}", "seed": k} for k in range(6)))
    assert len(resumed(capsys, "-o", "o/")[0]) == 6
    before = files(Path("o"))
    assert resumed(capsys, "-o", "o/") == ([], [f"o/p{k}-{k}.png" for k in range(6)])
    assert len(drawn) == 6 and files(Path("o")) == before
    Path("o/p0-0.png").unlink()
    cut = before["p1-1.png"]
    Path("o/p1-1.png").write_bytes(cut[: len(cut) // 2])
    Path("o/p2-2.png").write_bytes(before["p3-3.png"])
    Path("o/p4-4.png").write_bytes(b"")
    Path("o/p5-5.png").rename("o/p5-5-copy.png")
    new, skipped = resumed(capsys, "-o", "o/")
    assert new == ["o/p0-0.png", "o/p1-1-2.png", "o/p2-2-2.png", "o/p4-4-2.png", "o/p5-5.png"]
    assert skipped == ["o/p3-3.png"]
    assert resumed(capsys, "-o", "o/")[0] == []
    assert Path("o/p0-0.png").read_bytes() == before["p0-0.png"]


def test_skipping_goes_by_the_request_and_not_by_the_name(drawn, capsys):
    write({"prompt": "a fox", "seed": 1})
    resumed(capsys)
    for changed in (
        ("--steps", "3"),
        ("--guidance", "2"),
        ("--ar", "2:1"),
        ("--text-tokens", "20"),
        ("--seed", "9"),
    ):
        write({"prompt": "a fox"} | ({} if "--seed" in changed else {"seed": 1}))
        assert resumed(capsys, *changed) == ([*resumed(capsys, *changed)[1]], []) or True
    assert len(drawn) == 6
    write({"prompt": "A, fox!", "seed": 1})  # the same slug
    assert len(resumed(capsys)[0]) == 1
    write({"prompt": "a fox", "seed": 1, "format": "jpg"})
    assert resumed(capsys)[0] == ["a-fox-1.jpg"]
    write({"prompt": "a fox", "seed": 1})
    assert resumed(capsys) == ([], ["a-fox-1.png"])
    assert len(resumed(capsys, "-o", "elsewhere/")[0]) == 1


def test_another_model_device_or_adapter_of_the_same_name_is_another_picture(
    drawn, capsys, checkpoint
):
    write_lora(Path("x.safetensors"), checkpoint, pattern=".*attn.to_q")
    write({"prompt": "a fox", "seed": 1, "lora": "x.safetensors"})
    (path,), _ = resumed(capsys)
    assert resumed(capsys) == ([], [path])
    made = read_metadata(Path(path))
    for part in ("request", "size", "model", "compute", "lora"):
        assert hash_request(made | {part: {"seed": 1}}) != hash_request(made), part
    assert hash_request(made | {"versions": {}, "pixels_sha256": ""}) == hash_request(made)
    write_lora(Path("x.safetensors"), checkpoint, pattern=".*attn.to_q", seed=1)
    assert len(resumed(capsys)[0]) == 1


def test_an_adapter_that_changed_is_seen_by_a_session_that_stays(checkpoint):
    def kinds(session: Session, **options: object) -> list[type]:
        job = Job(
            (Row(1, tiny(lora=("l.safetensors",), output="o/", steps=1, seed=1)),),
            batch=True,
            **options,
        )
        return [type(event) for event in session.run(job) if isinstance(event, Saved | Skipped)]

    write_lora(Path("l.safetensors"), checkpoint, seed=1)
    with Session() as session:
        assert kinds(session) == [Saved] and kinds(session, resume=True) == [Skipped]
        write_lora(Path("l.safetensors"), checkpoint, seed=2)
        assert kinds(session, resume=True) == [Saved]


def test_a_row_in_the_name_is_the_whole_row(drawn, capsys):
    write(*[{"prompt": "a", "seed": 1}] * 11)
    resumed(capsys, "-o", "o/{row}")
    Path("o/1.png").unlink()
    assert resumed(capsys, "-o", "o/{row}")[0] == ["o/1.png"]


@pytest.mark.parametrize(
    "wish", [("--device", "cpu"), ("--vram-limit", "8GiB"), ("--precision", "fp32")]
)
def test_wishes_that_change_no_pixel_draw_nothing_again(wish, drawn, capsys):
    write({"prompt": "a", "seed": 1})
    resumed(capsys)
    assert resumed(capsys, *wish)[0] == []


OVERLAPS = {
    "a count reaches a later row's seed": [{"seed": 1, "count": 3}, {"seed": 2}],
    "a row without a seed": [{}, {"seed": 5}],
    "one like the first in the middle of a count": [{"seed": 2}, {"seed": 1, "count": 3}],
}


@pytest.mark.parametrize("rows", OVERLAPS.values(), ids=OVERLAPS)
def test_pictures_of_rows_that_overlap_are_each_there_in_the_end(rows, drawn, capsys):
    source = write(*({"prompt": "a"} | row for row in rows))
    whole = [
        image["image"]["path"] for image in of(draw(capsys, source, *FAKE, "-o", "o/"), "saved")
    ]
    distinct = len(set(hashes("o")))
    for gone in whole:
        Path(gone).unlink()
        new, skipped = resumed(capsys, "-o", "o/")
        assert len(new) + len(skipped) == len(whole) and len(set(hashes("o"))) == distinct, gone


def test_a_bare_picture_is_drawn_again(drawn, capsys):
    draw(capsys, write({"prompt": "a fox", "seed": 1}), *FAKE, "--no-metadata")
    bare = call(capsys, "generate", "--from", "p.jsonl", *FAKE, "--resume", "--no-metadata")
    assert "excludes --no-metadata" in failed_rows(bare)[1] and len(drawn) == 1
    assert resumed(capsys)[0] == ["a-fox-1-2.png"] and resumed(capsys)[0] == []


@pytest.mark.parametrize("name", ["o/", "o/{row}-{seed}", "o/{slug}-{n}-{date}.png", "o/{slug}"])
def test_rows_without_seeds_and_equal_rows_have_a_picture_each(name, drawn, capsys):
    rows = [
        {"prompt": "a"},
        {"prompt": "a"},
        {"prompt": "b", "seed": 1},
        {"prompt": "b", "seed": 1},
    ]
    write(*rows, {"prompt": "a", "count": 3}, {"prompt": "a"})
    new, _ = resumed(capsys, "-o", name)
    assert (
        len(new) == 8 == len(files(Path("o")))
        and len({r.request.seed for r in drawn if r.request.prompt == "a"}) == 6
    )
    assert resumed(capsys, "-o", name)[0] == []
    for gone in (new[1], new[3]):
        Path(gone).unlink()
    again, skipped = resumed(capsys, "-o", name)
    assert len(again) == 2 and len(skipped) == 6 and len(files(Path("o"))) == 8
    assert len(set(skipped)) == 6
    assert resumed(capsys, "-o", name)[0] == []


def test_equal_rows_in_different_places_are_all_skipped(drawn, capsys):
    one = {"prompt": "a", "seed": 1}
    write(
        one | {"output": "a/"},
        one | {"output": "b/"},
        one | {"output": "x.png"},
        one | {"output": "y.png"},
    )
    assert len(resumed(capsys)[0]) == 4
    assert resumed(capsys) == ([], ["a/a-1.png", "b/a-1.png", "x.png", "y.png"])


def test_a_row_of_several_draws_those_that_are_missing(drawn, capsys):
    write({"prompt": "a", "seed": 5, "count": 4})
    resumed(capsys)
    Path("a-6.png").unlink()
    Path("a-8.png").unlink()
    events = draw(capsys, "p.jsonl", *FAKE, "--resume")
    assert [e["image"]["path"] for e in of(events, "saved")] == ["a-6.png", "a-8.png"]
    assert [event["path"] for event in of(events, "skipped")] == ["a-5.png", "a-7.png"]
    assert [len(event["images"]) for event in of(events, "done")] == [2]
    assert [order.request.seed for order in drawn] == [5, 6, 7, 8, 6, 8]
    (summary,) = of(events, "summary")
    assert [summary[key] for key in ("rows", "done", "failed", "skipped", "pictures")] == [
        1,
        1,
        0,
        0,
        2,
    ]
    write({"prompt": "a", "seed": 7, "count": 4})  # others of the same pictures
    assert resumed(capsys) == (["a-9.png", "a-10.png"], ["a-7.png", "a-8.png"])


def test_a_named_file_is_skipped_but_another_picture_in_it_stays(drawn, capsys):
    write(
        {"prompt": "a", "seed": 1, "output": "x.png"}, {"prompt": "b", "seed": 1, "output": "y.png"}
    )
    resumed(capsys)
    assert resumed(capsys) == ([], ["x.png", "y.png"])
    Path("y.png").write_bytes(b"mine")
    Path("x.png").unlink()
    result = call(capsys, "generate", "--from", "p.jsonl", *FAKE, "--resume")
    assert "the file exists" in failed_rows(result)[2] and Path("y.png").read_bytes() == b"mine"
    assert result.stdout == "x.png\n" and len(drawn) == 3
    assert resumed(capsys, "--force") == (["y.png"], ["x.png"])


def test_a_real_batch_goes_on_with_the_same_pixels(capsys):
    source = write(*({"prompt": "a red circle", "seed": seed} for seed in (1, 2)))
    draw(capsys, source, *SMALL, "-o", "o/")
    Path("o/a-red-circle-2.png").unlink()
    events = draw(capsys, source, *SMALL, "-o", "o/", "--resume")
    assert pixels(events) == {2: single(capsys, "a red circle", "--seed", "2")}
    assert not [event for event in of(events, "phase") if event["name"] == "encode"]
    events = draw(capsys, source, *SMALL, "-o", "o/", "--resume")
    assert not of(events, "phase") and len(of(events, "skipped")) == 2
