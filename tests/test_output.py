"""Where pictures go: names, templates, refusals before any compute, and files that are whole or
absent.
"""

import errno
import io
import multiprocessing
import os
import shutil
import stat
import sys
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from itertools import count
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxcli.errors import ExitCode, OutputError, UsageError
from fluxcli.pictures import names as output
from fluxcli.request.fields import Order
from tests.support.helpers import changed, order
from tests.support.invariant import Fault, files

REQUEST = order(
    "A Fox, running!", seed=7, preset="tiny", aspect_ratio="2:1", image_size=128, format="png"
)
posix = pytest.mark.skipif(os.name == "nt", reason="POSIX file modes and links")


def target_of(
    text: str | None, *, force: bool = False, **changes: object
) -> tuple[Order, output.Target]:
    given = "format" in changes
    request = changed(REQUEST, output=text, **changes)
    decided = output.read_format(text, given=request.output.format if given else None)
    request = changed(request, format=decided or request.output.format)
    return request, output.parse_target(request.output, force=force)


def save(
    text: str | None, data: bytes = b"new", *, n: int = 1, force: bool = False, **changes: object
) -> str:
    request, target = target_of(text, force=force, **changes)
    output.check_writable(target, request)
    return output.save(data, output.Destination(target, request, n=n))


def refused(text: str, **changes: object) -> str:
    with pytest.raises(UsageError) as caught:
        target_of(text, **changes)
    assert caught.value.exit_code == ExitCode.USAGE
    return f"{caught.value} | {caught.value.hint}"


@pytest.mark.parametrize(
    "text, name",
    [
        (None, "a-fox-running-7.png"),
        ("pics/", "pics/a-fox-running-7.png"),
        ("new/er/", "new/er/a-fox-running-7.png"),
        ("pics", "pics/a-fox-running-7.png"),
        ("x.png", "x.png"),
        ("x.jpeg", "x.jpeg"),
        ("X.WEBP", "X.WEBP"),
        ("deep/er/x.jpg", "deep/er/x.jpg"),
        ("{seed}", "7.png"),
        ("{preset}/{slug}-{n:03d}", "tiny/a-fox-running-001.png"),
        ("{width}x{height}.webp", "128x64.webp"),
        ("{date}/", f"{date.today().isoformat()}/a-fox-running-7.png"),
        ("~/x.png", "HOME/x.png"),
        ("~/pics/", "HOME/pics/a-fox-running-7.png"),
    ],
)
def test_a_picture_has_the_name_that_was_asked_for(text, name):
    Path("pics").mkdir()
    path = save(text)
    assert path == name.replace("HOME", os.environ["HOME"])
    assert Path(path).read_bytes() == b"new"
    assert len(files(Path())) == (0 if "HOME" in name else 1)


@pytest.mark.parametrize(
    "text, format", [("x.jpg", "jpg"), ("x.jpeg", "jpg"), ("x.PNG", "png"), ("{n}.webp", "webp")]
)
def test_the_extension_decides_the_format(text, format):
    assert target_of(text)[0].output.format == format
    assert target_of(text, format=format)[0].output.format == format


@pytest.mark.parametrize(
    "text, changes, word",
    [
        ("x.png", {"format": "jpg"}, "--format"),
        ("x.jpeg", {"format": "webp"}, "--format"),
        ("{seed}.png", {"format": "jpg"}, "--format"),
        ("x.png", {"count": 2}, "x-{seed}.png"),
        ("-", {"count": 2}, "--count"),
        ("x.gif", {}, "jpg, png, webp"),
        ("x", {}, "extension"),
        ("x.", {}, "extension"),
        ("{colour}.png", {}, "{seed}"),
        ("{}.png", {}, "{seed}"),
        ("{seed", {}, "bad template"),
        ("{seed:q}.png", {}, "bad template"),
        ("{seed.real}.png", {}, "{seed}"),
        ("{colour}/x.png", {}, "{seed}"),
        ("{seed:c}.png", {}, "only a width"),
        ("{seed:{n}}.png", {}, "only a width"),
        ("{seed!r}.png", {}, "only a width"),
        ("{slug:>30}.png", {}, "only a width"),
        ("{n:100}.png", {}, "only a width"),
        ("{n:99999999999}.png", {}, "only a width"),
        ("{slug:05d}.png", {}, "bad template"),
        ("{seed[0]}.png", {}, "{seed}"),
        ("{model}.png", {}, "{seed}"),
        ("{seed}/../../x.png", {}, "leads out"),
        ("out/{slug}/..", {}, "leads out"),
        ("{n}/../", {}, "leads out"),
    ],
)
def test_contradictions_and_impossible_names_are_usage_errors(text, changes, word):
    assert word in refused(text, **changes)
    assert files(Path()) == {}


@pytest.mark.parametrize(
    "text, name",
    [
        ("pics/../x.png", "x.png"),
        ("missing/../new/x.png", "new/x.png"),
        ("missing/../{seed}", "7.png"),
        ("link/../x.png", "far/x.png"),
        ("link/../{seed}/", "far/7/a-fox-running-7.png"),
        ("pics/../../{n}", "../1.png"),
    ],
)
def test_a_path_with_parents_is_written_where_it_says(text, name):
    Path("pics").mkdir()
    Path("far/away").mkdir(parents=True)
    Path("link").symlink_to("far/away")
    path = save(text)
    assert path == os.path.realpath(name) and Path(path).read_bytes() == b"new"
    assert not Path("missing").exists()
    Path(path).unlink()


def test_parents_before_a_field_are_the_folder_that_was_named():
    Path("inner").mkdir()
    os.chdir("inner")
    assert save("../pics/{seed}") == "../pics/7.png" and Path("../pics/7.png").exists()
    assert save("{{a}}/{seed}") == "{a}/7.png"


def test_a_link_never_leads_a_field_out_of_its_folder():
    Path("far").mkdir()
    Path("out").mkdir()
    Path("out/a-fox-running").symlink_to("../far")
    with pytest.raises(OutputError, match="leaves its folder"):
        save("out/{slug}/{seed}")
    assert files(Path("far")) == {}
    assert save("out/a-fox-running/{seed}") == "out/a-fox-running/7.png"  # it was said


def test_a_name_with_a_number_is_as_long_as_the_file_system_takes():
    text = "{seed:099}{n:099}{row:053}"
    assert len(save(text)) == 255
    second = save(text)
    assert len(second) == 255 and second.endswith("-2.png")


@pytest.mark.parametrize("text", ["a\nb.png", "a\x1bb.png", "a\x9bb.png", "a\0b.png"])
def test_control_characters_are_no_part_of_a_name(text):
    assert "unknown output" in refused(text)


@pytest.mark.parametrize("prompt", ["con", "NUL", "com1", "LPT9"])
def test_a_slug_is_no_device_of_windows(prompt):
    assert output.make_slug(prompt) == f"image-{prompt.lower()}"


@given(st.text(max_size=200))
def test_a_slug_is_a_short_plain_file_name(prompt):
    name = output.make_slug(prompt)
    assert 1 <= len(name) <= 48 and name == output.make_slug(name)
    assert all(c.isascii() and (c.isalnum() or c == "-") for c in name) and name.strip("-") == name


@pytest.mark.parametrize(
    "prompt, name", [("Ünïcode Bär", "unicode-bar"), ("狐", "image"), ("a" * 99, "a" * 48)]
)
def test_slugs_by_hand(prompt, name):
    assert output.make_slug(prompt) == name


@pytest.mark.parametrize("text", [None, "{slug}", "{preset}.png"])
def test_automatic_names_take_the_next_free_number(text):
    taken = [save(text, b"%d" % k, force=True) for k in range(3)]
    stem = taken[0].removesuffix(".png")
    assert taken == [f"{stem}.png", f"{stem}-2.png", f"{stem}-3.png"]
    assert [Path(name).read_bytes() for name in taken] == [b"0", b"1", b"2"]


def test_an_automatic_name_steps_aside_for_a_folder_and_a_dangling_link():
    Path("7.png").mkdir()
    Path("7-2.png").symlink_to("nowhere")
    assert save("{seed}") == "7-3.png"


def _save_many(folder: str) -> list[str]:
    request, target = target_of(folder)
    return [
        output.save(f"{os.getpid()} {k}".encode(), output.Destination(target, request))
        for k in range(25)
    ]


@posix
def test_racing_processes_and_threads_never_overwrite_each_other(tmp_path):
    folder = f"{tmp_path}/race/"
    with multiprocessing.get_context("fork").Pool(3) as pool, ThreadPoolExecutor(3) as threads:
        runs = pool.map_async(_save_many, [folder] * 3, chunksize=1)
        names = [name for run in threads.map(_save_many, [folder] * 3) for name in run]
        names += [name for run in runs.get(60) for name in run]
    assert len(set(names)) == len(names) == 150
    assert {f"{folder}{name}" for name in files(Path(folder))} == set(names)


def test_an_existing_file_is_refused_before_the_compute_and_replaced_only_with_force():
    Path("x.png").write_bytes(b"old")
    request, target = target_of("x.png")
    with pytest.raises(OutputError, match="exists") as caught:
        output.check_writable(target, request)
    assert caught.value.exit_code == ExitCode.OUTPUT and "--force" in caught.value.hint
    with pytest.raises(OutputError, match=r"kept as x-2\.png"):  # it appeared during the compute
        output.save(b"new", output.Destination(target, request))
    assert files(Path()) == {"x.png": b"old", "x-2.png": b"new"}
    assert save("x.png", force=True) == "x.png"
    assert files(Path()) == {"x.png": b"new", "x-2.png": b"new"}


@posix
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_a_new_file_has_the_mode_of_the_umask(mask):
    before = os.umask(mask)
    try:
        save("x.png")
        save(None)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in Path().glob("*.png")} == {0o666 & ~mask}


@posix
def test_force_writes_a_links_target_and_keeps_its_mode():
    Path("real").mkdir()
    Path("real/x.png").write_bytes(b"old")
    Path("real/x.png").chmod(0o640)
    Path("x.png").symlink_to("real/x.png")
    save("x.png", force=True)
    assert Path("x.png").is_symlink() and Path("real/x.png").read_bytes() == b"new"
    assert stat.S_IMODE(Path("real/x.png").stat().st_mode) == 0o640
    Path("y.png").symlink_to("new/y.png")
    save("y.png", force=True)
    assert files(Path("new")) == {"y.png": b"new"}


def _cannot_write(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    real = os.open
    monkeypatch.setattr(
        os, "open", lambda path, flags, *rest: refuse() if flags & os.O_CREAT else real(path, flags)
    )


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EACCES])
@pytest.mark.parametrize("text", [None, "x.png", "pics/"])
def test_a_folder_that_takes_no_file_is_found_before_the_compute(code, text, monkeypatch):
    _cannot_write(code, monkeypatch)
    request, target = target_of(text)
    with pytest.raises(OutputError, match="cannot write") as caught:
        output.check_writable(target, request)
    assert caught.value.exit_code == ExitCode.OUTPUT and files(Path()) == {}


def test_a_full_disk_is_found_before_the_compute(monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1000))
    request, target = target_of("x.png")
    with pytest.raises(OutputError, match=r"disk is full.*needs .* MiB, 0 MiB are free"):
        output.check_writable(target, request)
    assert files(Path()) == {}


@pytest.mark.parametrize(
    "text", ["file/x.png", "file/", f"{'a' * 300}.png", f"{'a' * 300}/", "{n:090}" * 3]
)
def test_a_name_that_cannot_be_is_found_before_the_compute(text):
    Path("file").write_bytes(b"old")
    with pytest.raises(OutputError, match="cannot write"):
        save(text)
    assert files(Path()) == {"file": b"old"}


def test_a_name_as_long_as_the_file_system_takes_is_taken():
    for name in ("a" * 251 + ".png", "🦊" * 62 + ".png"):
        assert save(name) == name


@pytest.mark.parametrize("stdout, error", [(None, OutputError), ("terminal", UsageError)])
def test_stdout_takes_a_picture_unless_closed_or_a_terminal(stdout, error, monkeypatch):
    request, target = target_of("-")
    pipe = io.TextIOWrapper(io.BytesIO())
    monkeypatch.setattr(sys, "stdout", pipe)
    output.check_writable(target, request)
    assert (
        output.save(b"\x89PNG", output.Destination(target, request)) == "-"
        and pipe.buffer.getvalue() == b"\x89PNG"
    )
    if stdout:
        monkeypatch.setattr(pipe, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stdout", pipe if stdout else None)
    with pytest.raises(error):
        output.check_writable(target, request)


@pytest.mark.parametrize("text, move", [("x.png", "replace"), (None, "link")])
def test_the_data_is_on_disk_before_the_name_and_the_name_before_the_end(text, move, monkeypatch):
    request, target = target_of(text, force=True)
    hook = Fault(0, _fail).install(monkeypatch)
    output.save(b"new", output.Destination(target, request))
    names = [name for name in hook.names if name in ("write", "fsync", move)]
    assert names == ["write", "write", "fsync", move, "fsync"]


def _fail(_name: str) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def _stop(_name: str) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("fault, error", [(_fail, OutputError), (_stop, KeyboardInterrupt)])
@pytest.mark.parametrize("text, before", [("x.png", b"old"), (None, None)])
@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_a_fault_at_any_call_leaves_the_old_file_or_the_new_one_whole(
    text, before, fault, error, links, monkeypatch
):
    name = text or "a-fox-running-7.png"
    for k in count(1):
        for path in Path().iterdir():
            path.unlink()
        if before:
            Path(name).write_bytes(before)
        with monkeypatch.context() as patch:
            if not links:
                patch.setattr(
                    os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "no links"))
                )
            hook = Fault(k, lambda call: None if call == "unlink" else fault(call)).install(patch)
            try:
                save(text, b"a new picture", force=True)
            except error:
                assert files(Path()) in ({name: before} if before else {}, {name: b"a new picture"})
        if hook.count < k:
            break
    assert k > 10 and files(Path()) == {name: b"a new picture"}


def test_the_check_leaves_nothing_behind_and_looks_at_the_nearest_folder_that_exists():
    request, target = target_of("new/deeper/{seed}/")
    output.check_writable(target, request)
    assert not list(Path().iterdir())
    assert save("new/deeper/{seed}/").startswith("new/deeper/")
