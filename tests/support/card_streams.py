"""Streams and events of the card that is not there, and the races between them.

Every stream has a vector clock: what of each stream has happened before whatever it does next. A
kernel ticks the clock of its stream; events, waits and synchronizations hand clocks on. `Races`
keeps who last read and wrote every storage, and reports an access that nothing orders after them.
What is asynchronous happens as late as streams allow: when a kernel of its stream is launched, or
when somebody waits for it. So an order that nobody asked for changes values as well.
"""

import itertools
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import UntypedStorage

Clock = Counter[int]  # by the number of a stream
LOCK = threading.RLock()  # threads launch into one card


def hand_on(clock: Clock, known: Clock) -> None:
    """Let a clock know what another one knows."""
    with LOCK:
        for number, time in known.items():
            clock[number] = max(clock[number], time)


class Stream:
    """An order of work on one card; mostly it is done as it comes, see `postpone`."""

    numbers = itertools.count()

    def __init__(self, streams: "Streams", index: int) -> None:
        self.number = next(Stream.numbers)
        self.device = torch.device("cuda", index)
        self.clock: Clock = Counter()
        self.streams = streams
        self._postponed: deque[tuple[int, Callable[[], None]]] = deque()

    def tick(self) -> int:
        """Begin the next thing that this stream does, which the host launches now; its time."""
        with LOCK:
            hand_on(self.clock, self.streams.host)
            self.clock[self.number] += 1
            return self.clock[self.number]

    def postpone(self, work: Callable[[], None]) -> None:
        """Do the work at the clock's time, as late as can be."""
        self._postponed.append((self.clock[self.number], work))

    def catch_up(self, until: int | None = None) -> None:
        """Do what was postponed, up to a time of this stream, one thread after the other."""
        with LOCK:
            while self._postponed and (until is None or self._postponed[0][0] <= until):
                self._postponed.popleft()[1]()

    # --- as torch.cuda.Stream

    def wait_event(self, event: "Event") -> None:
        """Do what comes next after what the event stands for."""
        self.tick()
        hand_on(self.clock, event.clock)
        self.postpone(event.reach)

    def wait_stream(self, other: "Stream") -> None:
        """Do what comes next after what the other stream has been given."""
        self.wait_event(other.record_event())

    def record_event(self, event: "Event | None" = None) -> "Event":
        """An event that stands for all that this stream has been given."""
        event = event or Event(self.streams)
        event.record(self)
        return event

    def synchronize(self) -> None:
        """Make the host wait for all that this stream has been given."""
        self.streams.report_wait("Stream.synchronize")
        self.finish()

    def query(self) -> bool:
        """Whether all is done; it is, from now on."""
        self.finish()
        return True

    def finish(self) -> None:
        """Do all; from now on the host knows of it."""
        self.catch_up()
        hand_on(self.streams.host, self.clock)


class Event:
    """What a stream had been given when it was recorded; an event never recorded stands for
    nothing.
    """

    def __init__(self, streams: "Streams", *, enable_timing: bool = False) -> None:
        self.clock: Clock = Counter()
        self.enable_timing = enable_timing
        self._streams = streams
        self._stream: Stream | None = None
        self._recorded_s = 0.0

    def record(self, stream: Stream | None = None) -> None:
        """Stand for what the stream, or the current one, has been given so far."""
        self._stream = stream or self._streams.current()
        self._recorded_s = time.perf_counter()
        with LOCK:
            self.clock = self._stream.clock.copy()

    def reach(self) -> None:
        """Do what it stands for."""
        if self._stream:
            self._stream.catch_up(self.clock[self._stream.number])

    def wait(self, stream: Stream | None = None) -> None:
        """Make a stream, or the current one, wait for what it stands for."""
        (stream or self._streams.current()).wait_event(self)

    def elapsed_time(self, end: "Event") -> float:
        """Milliseconds between two records, of the host's clock; raises where CUDA would."""
        for event in (self, end):
            if not event.enable_timing or event._stream is None:
                raise RuntimeError("events were not recorded, or not made for timing")
            if any(self._streams.host[number] < at for number, at in event.clock.items()):
                raise torch.AcceleratorError("CUDA error: device not ready")
        return (end._recorded_s - self._recorded_s) * 1e3

    def synchronize(self) -> None:
        """Make the host wait for what it stands for."""
        self._streams.report_wait("Event.synchronize")
        self.query()

    def query(self) -> bool:
        """Whether it is reached; it is, from now on."""
        self.reach()
        hand_on(self._streams.host, self.clock)
        return True


class Streams:
    """All streams of the cards, which of them is current in each thread, and the host's clock."""

    def __init__(self, cards: int, report_wait: Callable[[str], None]) -> None:
        """`report_wait` hears where the host waits, and for what."""
        self.report_wait = report_wait
        self.host: Clock = Counter()
        self.mains = [Stream(self, index) for index in range(cards)]
        self._all = list(self.mains)
        self._local = threading.local()

    def make(self, index: int) -> Stream:
        """Another stream of a card."""
        stream = Stream(self, index)
        self._all.append(stream)
        return stream

    @property
    def entered(self) -> list[Stream]:
        """The streams that this thread has entered and not left, the innermost last."""
        if not hasattr(self._local, "entered"):
            self._local.entered = []
        return self._local.entered

    @property
    def current_index(self) -> int:
        """The number of this thread's current card."""
        return self.entered[-1].device.index if self.entered else 0

    def current(self, index: int | None = None) -> Stream:
        """The stream into which this thread launches what it does on a card."""
        if index is None:
            index = self.current_index
        for stream in reversed(self.entered):
            if stream.device.index == index:
                return stream
        return self.mains[index]

    def finish(self, index: int) -> None:
        """Do all that a card has been given."""
        for stream in self._all:
            if stream.device.index == index:
                stream.finish()


class Access(NamedTuple):
    """A stream's last access to a storage."""

    time: int
    what: str


class Races:
    """Who read and wrote which storage of a card, and whether something orders them."""

    def __init__(self, report: Callable[[str], None]) -> None:
        self._report = report
        self._write: dict[int, tuple[int, Access]] = {}  # (stream, access) by storage
        self._reads: dict[int, dict[int, Access]] = {}  # by storage and stream
        self._recorded: dict[int, set[int]] = {}  # the streams of record_stream by storage

    def note(
        self,
        what: str,
        stream: Stream,
        *,
        reads: Iterable[UntypedStorage] = (),
        writes: Iterable[UntypedStorage] = (),
    ) -> None:
        """A stream does something with storages, at the next tick of its clock."""
        access = Access(stream.tick(), what)
        for storage in reads:
            key = self._know(storage, stream)
            self._check_write("read after write", stream, key, what=what)
            self._reads[key][stream.number] = access
        for storage in writes:
            key = self._know(storage, stream)
            self._check_write("write after write", stream, key, what=what)
            for other, read in self._reads[key].items():
                if stream.clock[other] < read.time:
                    self._say("write after read", stream, what, before=read.what)
            self._write[key] = (stream.number, access)
            self._reads[key] = {}

    def record_stream(self, storage: UntypedStorage, stream: Stream) -> None:
        """The storage, once it is freed, is not given out before the stream has used it."""
        self._know(storage, stream)
        self._recorded.setdefault(storage._cdata, set()).add(stream.number)

    def _know(self, storage: UntypedStorage, stream: Stream) -> int:
        """The storage's key, until it is freed."""
        key = storage._cdata
        if key not in self._reads:
            self._reads[key] = {}
            main = stream.streams.mains[stream.device.index]
            weakref.finalize(storage, self._free, key, main).atexit = False
        return key

    def _check_write(self, kind: str, stream: Stream, key: int, *, what: str) -> None:
        if key in self._write:
            other, write = self._write[key]
            if stream.clock[other] < write.time:
                self._say(kind, stream, what, before=write.what)

    def _free(self, key: int, main: Stream) -> None:
        """A storage goes back to the allocator, which gives it to the main stream's next."""
        used = self._reads.pop(key)
        if key in self._write:
            stream, write = self._write.pop(key)
            used[stream] = max(write, used.get(stream, write))
        recorded = self._recorded.pop(key, set())
        known = main.clock | main.streams.host
        for stream, access in used.items():
            if stream not in recorded and known[stream] < access.time:
                self._say("freed while in use", main, "the allocator", before=access.what)

    def _say(self, kind: str, stream: Stream, what: str, *, before: str) -> None:
        self._report(f"race, {kind}: {what} on stream {stream.number}, not ordered after {before}")
