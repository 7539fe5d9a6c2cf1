"""Something that listens at the worker's socket and says what it is told to say."""

import contextlib
import json
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Listener
from pathlib import Path

PROTOCOL = 2
ACCEPTED = {"accepted": PROTOCOL}
STEP = {"event": "step", "index": 1, "total": 2, "image": 1, "images": 1}
IMAGE = {
    "path": "x.png", "seed": 1, "width": 64, "height": 64,
    "format": "png", "bytes": 5, "sha256": "a", "pixels_sha256": "b",
}  # fmt: skip
# What no worker of this version answers to a job, each a list of frames.
LIES: dict[str, list[object]] = {
    "no-object": [[]],
    "no-json": [b"\xff{"],
    "accepts-a-text": [{"accepted": "2"}],
    "accepts-nothing": [{}],
    "refuses-a-number": [{"refused": 5}],
    "ends-at-once": [ACCEPTED, {"end": True}],
    "ends-with-a-text": [ACCEPTED, {"end": "yes"}],
    "says-nothing": [ACCEPTED, {}],
    "alive-in-words": [ACCEPTED, {"alive": "yes"}],
    "event-of-a-list": [ACCEPTED, {"event": ["step"]}],
    "event-unknown": [ACCEPTED, {"event": "dance"}],
    "step-in-words": [ACCEPTED, STEP | {"index": "1"}],
    "step-zero": [ACCEPTED, STEP | {"index": 0}],
    "step-true": [ACCEPTED, STEP | {"total": True}],
    "step-with-more": [ACCEPTED, STEP | {"more": 1}],
    "notice-of-nothing": [ACCEPTED, {"event": "notice", "message": None}],
    "saved-nothing": [ACCEPTED, {"event": "saved", "image": None}],
    "saved-a-number": [ACCEPTED, {"event": "saved", "image": IMAGE | {"path": 5}}],
    "saved-in-words": [ACCEPTED, {"event": "saved", "image": IMAGE, "seconds": "1"}],
    "failed-with-0": [ACCEPTED, {"event": "failed", "exit_code": 0, "message": "", "hint": ""}],
    "failed-with-99": [ACCEPTED, {"event": "failed", "exit_code": 99, "message": "", "hint": ""}],
    "failed-in-words": [ACCEPTED, {"event": "failed", "exit_code": "2", "message": "", "hint": ""}],
    "answers-instead": [ACCEPTED, {"answer": {"pid": 1}}],
    "half-a-frame": [ACCEPTED, None],
}
# What no worker answers to a question about it.
WRONG_ANSWERS: list[object] = [5, None, [], {}, {"pid": "1"}, {"pid": 1, "idle_limit_s": "x"}]


@contextlib.contextmanager
def listening(path: Path, frames: Sequence[object]) -> Iterator[list[dict]]:
    """Listen at a path and give every client these frames; yields what the clients said.

    None is the beginning of a frame without its end. Connections stay open.
    """
    path.parent.mkdir(mode=0o700, exist_ok=True)
    said: list[dict] = []
    kept = []
    listener = Listener(str(path), "AF_UNIX")

    def serve() -> None:
        while True:
            try:
                connection = listener.accept()
            except OSError:
                return
            kept.append(connection)
            with contextlib.suppress(OSError, EOFError):
                said.append(json.loads(connection.recv_bytes()))
                for frame in frames:
                    if frame is None:
                        connection._send(b"\0\0\1\0{")
                    elif isinstance(frame, bytes):
                        connection.send_bytes(frame)
                    else:
                        connection.send_bytes(json.dumps(frame).encode())

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield said
    finally:
        with contextlib.suppress(OSError):
            listener.close()
        for connection in kept:
            connection.close()
        time.sleep(0)
