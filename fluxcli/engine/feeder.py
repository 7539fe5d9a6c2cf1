"""Brings bytes to a CUDA device that it cannot fetch by itself: of files, and of RAM that is not
pinned.

A thread fills two pinned buffers in turn and launches the copies out of them, so that one is filled
while the device fetches the other. Before it fills a buffer again, the thread waits until the copy
out of it is done. Who launches kernels never waits for the device: only for the thread, and only
where what it launches next needs bytes whose copy is not launched yet. From there on streams and
events keep the order.

Where the driver pins nothing at all, the thread makes pageable copies, and waits for each. What
fails in the thread is raised where its work is waited for. Sizes are in bytes.
"""

import threading
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from fluxcli.engine.pinned import pin
from quant.codecs import Fill, fill_from

BUFFER_BYTES = 32 << 20
BUFFERS = 2
THREAD = "feeder"  # what the thread's name begins with


class Copy(NamedTuple):
    """A copy from RAM to a device on a stream: after one event, and before another."""

    target: Tensor
    source: Tensor
    stream: torch.cuda.Stream
    after: torch.cuda.Event
    copied: torch.cuda.Event  # is recorded when the copy is launched


class Feeder:
    """The thread of one device and its buffers; both are made when they are first needed.

    They go with the feeder: what waits for the thread then is dropped, what it is doing is waited
    for.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._made: _Buffers | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=THREAD)
        weakref.finalize(self, _end, self._thread)

    @property
    def _buffers(self) -> "_Buffers":
        if self._made is None:
            self._made = _Buffers(self._device)
        return self._made

    def bring(self, size_bytes: int, fill: Fill) -> Tensor:
        """Return so many new bytes on the device, by copies on the current stream.

        The thread has `fill` fill buffer after buffer. Raises what that raises.
        """
        target = torch.empty(size_bytes, dtype=torch.uint8, device=self._device)
        stream = torch.cuda.current_stream(self._device)
        self._thread.submit(_carry, self._buffers, target, fill, stream=stream).result()
        return target

    def begin(self, copy: Copy) -> Future[None]:
        """Let the thread launch a copy after all that it was given before.

        The future is done when the copy is launched, and raises what prevented that.
        """
        # The thread holds no reference to the feeder, which would keep it and the thread alive.
        return self._thread.submit(launch, copy, self._buffers)


def make_feeder(device: str) -> Feeder | None:
    """The feeder of a device as torch names it; None where copies are plain ones."""
    return Feeder(device) if device.startswith("cuda") else None


class _Buffers:
    """Pinned buffers that take turns. Only the thread takes them."""

    def __init__(self, device: str) -> None:
        self._all = [torch.empty(BUFFER_BYTES, dtype=torch.uint8) for _ in range(BUFFERS)]
        self.are_pinned = all(pin(buffer, BUFFER_BYTES, device) for buffer in self._all)
        # The thread sleeps while it waits for one.
        self._copied = [torch.cuda.Event(blocking=True) for _ in range(BUFFERS)]
        self._next = 0

    def take(self) -> tuple[Tensor, torch.cuda.Event]:
        """The buffer whose turn it is, and the event to record after the copy out of it."""
        index = self._next
        self._next = (index + 1) % BUFFERS
        self._copied[index].synchronize()
        return self._all[index], self._copied[index]


def _carry(buffers: _Buffers, target: Tensor, fill: Fill, *, stream: torch.cuda.Stream) -> None:
    """Fill bytes of the device through the buffers, on a stream."""
    with torch.cuda.stream(stream):
        for start in range(0, target.numel(), BUFFER_BYTES):
            part = target[start : start + BUFFER_BYTES]
            buffer, copied = buffers.take()
            source = buffer[: part.numel()]
            fill(source, start)
            part.copy_(source, non_blocking=buffers.are_pinned)
            copied.record(stream)


def launch(copy: Copy, buffers: _Buffers | None = None) -> None:
    """Launch a copy; through the buffers, if there are some, where its source is not pinned."""
    copy.stream.wait_event(copy.after)
    if buffers and buffers.are_pinned and not copy.source.is_pinned():
        _carry(buffers, copy.target, fill_from(copy.source), stream=copy.stream)
    else:
        with torch.cuda.stream(copy.stream):
            copy.target.copy_(copy.source, non_blocking=True)
    copy.target.record_stream(copy.stream)  # it may be freed while the copy is under way
    copy.copied.record(copy.stream)


def _end(thread: ThreadPoolExecutor) -> None:
    """End a feeder's thread; the thread itself may be who collects the garbage."""
    is_feeder = threading.current_thread().name.startswith(THREAD)
    thread.shutdown(wait=not is_feeder, cancel_futures=True)
