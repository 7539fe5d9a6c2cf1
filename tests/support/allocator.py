"""A model of torch 2.13's caching allocator for CUDA: which bytes a card reserves for live ones.

`Allocator` is the native one, `ExpandableAllocator` the one of `expandable_segments:True`. The
rules are those of `DeviceCachingAllocator` in torch's c10/cuda/CUDACachingAllocator.cpp, the
constants those of c10/core/AllocatorConfig.h: sizes are multiples of 512 bytes, small blocks and
large ones lie in pools of their own, the smallest free block that is large enough is taken and
split, neighbours that are free are merged, and at the cap whole free segments are given back. One
stream, without CUDA graphs. Sizes are in bytes.
"""

import bisect
import itertools
from collections.abc import Iterator

import torch

MIN_BLOCK_BYTES = 512  # kMinBlockSize: every size is a multiple of it
SMALL_BYTES = 1 << 20  # kSmallSize: the largest block of the small pool
SMALL_SEGMENT_BYTES = 2 << 20  # kSmallBuffer
LARGE_SEGMENT_BYTES = 20 << 20  # kLargeBuffer: what blocks below `MIN_LARGE_BYTES` are cut from
MIN_LARGE_BYTES = 10 << 20  # kMinLargeAlloc: from here on a segment is made for one block
LARGE_ROUND_BYTES = 2 << 20  # kRoundLarge: such segments are multiples of it
ADDRESSES = 1 << 50  # bytes of addresses between segments, more than any of them has

# cuBLAS' workspace on cards before sm90, by cublasCommonArgs' default ":4096:2:16:8" of
# aten/src/ATen/cuda/CublasHandlePool.cpp; it stays as long as the process.
CUBLAS_BYTES = (4096 * 2 + 16 * 8) << 10


class Block:
    """A piece of a segment: allocated, free, or addresses without memory (not `mapped`)."""

    __slots__ = ("at", "is_free", "mapped", "next", "previous", "size", "small")

    def __init__(self, at: int, size: int, *, small: bool, mapped: bool = True) -> None:
        self.at = at
        self.size = size
        self.small = small
        self.mapped = mapped
        self.is_free = True
        self.previous: Block | None = None
        self.next: Block | None = None

    def cut(self, size: int) -> "Block":
        """Shorten the block to `size`; returns the rest of it."""
        rest = Block(self.at + size, self.size - size, small=self.small, mapped=self.mapped)
        rest.previous, rest.next = self, self.next
        if self.next:
            self.next.previous = rest
        self.next = rest
        self.size = size
        return rest

    def may_take(self, other: "Block | None") -> bool:
        """Whether a neighbour is free as this block is, with memory or without."""
        return other is not None and other.is_free and other.mapped == self.mapped

    def take_next(self) -> None:
        """Grow by the block that follows."""
        taken = self.next
        assert taken
        self.size += taken.size
        self.next = taken.next
        if self.next:
            self.next.previous = self


class Pool:
    """Free blocks by size, and by address among those of one size."""

    def __init__(self) -> None:
        self._entries: list[tuple[int, int, Block]] = []

    def add(self, block: Block) -> None:
        bisect.insort(self._entries, (block.size, block.at, block))

    def remove(self, block: Block) -> None:
        position = bisect.bisect_left(self._entries, (block.size, block.at))
        del self._entries[position]

    def iterate_from(self, size: int) -> Iterator[Block]:
        """The blocks of at least that size, the smallest first, while the pool does not change."""
        start = bisect.bisect_left(self._entries, (size, 0))
        for position in range(start, len(self._entries)):
            yield self._entries[position][2]


class Allocator:
    """The native allocator: a segment is what the driver was asked for, and goes back as a whole.

    `limit_bytes` is the most that it may reserve, as `set_per_process_memory_fraction` says.
    """

    def __init__(self, limit_bytes: int | None = None) -> None:
        self.limit_bytes = limit_bytes
        self.reserved_bytes = 0
        self.allocated_bytes = 0
        self.peak_reserved_bytes = 0
        self.peak_allocated_bytes = 0
        self.retries = 0  # allocations that needed what was cached
        self._pools = {True: Pool(), False: Pool()}  # by whether blocks are small
        self._starts = itertools.count(ADDRESSES, ADDRESSES)

    def reset_peak(self) -> None:
        """Begin to count peaks anew, as `torch.cuda.reset_peak_memory_stats`."""
        self.peak_reserved_bytes = self.reserved_bytes
        self.peak_allocated_bytes = self.allocated_bytes

    def allocate(self, asked_bytes: int) -> Block | None:
        """A block of at least so many bytes, None for 0. Raises torch.OutOfMemoryError."""
        if asked_bytes == 0:
            return None
        size = _round_up(asked_bytes, MIN_BLOCK_BYTES)
        small = size <= SMALL_BYTES
        block = self._take_free(size, small) or self._grow(size, small)
        if block is None:
            self.retries += 1
            self.empty_cache()
            block = self._grow(size, small)
        if block is None:
            live = f"{self.allocated_bytes} live, {self.reserved_bytes} reserved"
            raise torch.OutOfMemoryError(f"{size} more: {live}, {self.limit_bytes} allowed")
        if self._is_split(block.size - size, small):
            self._pools[small].add(block.cut(size))
        block.is_free = False
        self.allocated_bytes += block.size
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, self.allocated_bytes)
        return block

    def free(self, block: Block | None) -> None:
        """Take a block back into the cache."""
        if block is None:
            return
        self.allocated_bytes -= block.size
        block.is_free = True
        self._put_back(block)

    def empty_cache(self) -> None:
        """Give back to the driver what is free as a whole, as `torch.cuda.empty_cache`."""
        for pool in self._pools.values():
            for block in list(pool.iterate_from(0)):
                if block.previous is None and block.next is None:
                    pool.remove(block)
                    self.reserved_bytes -= block.size

    def _take_free(self, size: int, small: bool) -> Block | None:
        block = next(self._pools[small].iterate_from(size), None)
        if block:
            self._pools[small].remove(block)
        return block

    def _grow(self, size: int, small: bool) -> Block | None:
        """A new segment for a block, None beyond the limit."""
        segment_bytes = _segment_bytes(size, small)
        if not self._has_room(segment_bytes):
            return None
        self._reserve(segment_bytes)
        return Block(next(self._starts), segment_bytes, small=small)

    def _has_room(self, more_bytes: int) -> bool:
        return self.limit_bytes is None or self.reserved_bytes + more_bytes <= self.limit_bytes

    def _reserve(self, more_bytes: int) -> None:
        self.reserved_bytes += more_bytes
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)

    def _is_split(self, left_bytes: int, small: bool) -> bool:
        """Whether the rest of a block becomes a free one (`should_split`)."""
        return left_bytes >= MIN_BLOCK_BYTES if small else left_bytes > SMALL_BYTES

    def _put_back(self, block: Block) -> None:
        """Merge a free block with free neighbours, and remember it (`free_block`)."""
        pool = self._pools[block.small]
        following = block.next
        if following and block.may_take(following):
            self._forget(following)
            block.take_next()
        before = block.previous
        if before and block.may_take(before):
            self._forget(before)
            before.take_next()
            block = before
        if block.mapped:
            pool.add(block)

    def _forget(self, block: Block) -> None:
        if block.mapped:
            self._pools[block.small].remove(block)


class ExpandableAllocator(Allocator):
    """The allocator of expandable segments: one range of addresses a pool, mapped page by page.

    A free block can grow into the addresses behind it, and whole pages that are free go back.
    """

    def __init__(self, limit_bytes: int | None = None) -> None:
        super().__init__(limit_bytes)
        self._first = {  # of each range; blocks are merged into the one before, so that it stays
            small: Block(next(self._starts), ADDRESSES // 2, small=small, mapped=False)
            for small in (True, False)
        }

    def _is_split(self, left_bytes: int, small: bool) -> bool:
        return left_bytes >= MIN_BLOCK_BYTES

    def _take_free(self, size: int, small: bool) -> Block | None:
        """The smallest free block that fits, and of these one that cannot grow (`get_free_block`).

        A block counts as large as it can become.
        """
        fitting = self._pools[small].iterate_from(size)
        taken = next(fitting, None)
        if taken is None:
            return None
        for block in fitting:
            if _possible_bytes(block) >= _possible_bytes(taken):
                break
            taken = block
        self._pools[small].remove(taken)
        return taken

    def _grow(self, size: int, small: bool) -> Block | None:
        """The lowest addresses with room for a block, mapped (`try_allocate_expandable_block`)."""
        if not self._has_room(_segment_bytes(size, small)):
            return None
        block = self._find_addresses(size, small)
        if not block.mapped:
            block = self._map(block, min(block.size, size))
        while block.size < size:
            assert block.next
            block = self._map(block.next, min(size - block.size, block.next.size))
        self._pools[small].remove(block)
        return block

    def _find_addresses(self, size: int, small: bool) -> Block:
        """The first block without memory behind which, or around which, so much is free."""
        block: Block | None = self._first[small]
        while block:
            if not block.mapped:
                start = block
                if block.previous and block.previous.is_free:
                    start = block.previous
                if _free_bytes_from(start) >= size:
                    return start
            block = block.next
        raise AssertionError("the addresses have an end")

    def _map(self, block: Block, size: int) -> Block:
        """Give memory to the start of a block (`map_block`); returns the free block that it is."""
        mapped_bytes = min(block.size, _round_up(size, _page_bytes(block.small)))
        if mapped_bytes < block.size:
            block.cut(mapped_bytes)
        block.mapped = True
        self._reserve(mapped_bytes)
        before = block.previous
        grown = before if before and block.may_take(before) else block
        self._put_back(block)
        return grown

    def empty_cache(self) -> None:
        """Give back every page that is free as a whole (`unmap_block`)."""
        for small, pool in self._pools.items():
            page_bytes = _page_bytes(small)
            for block in list(pool.iterate_from(0)):
                start = _round_up(block.at, page_bytes)
                end = (block.at + block.size) // page_bytes * page_bytes
                if start >= end:
                    continue
                pool.remove(block)
                unmapped = block
                if start > block.at:
                    unmapped = block.cut(start - block.at)
                    pool.add(block)
                if unmapped.at + unmapped.size > end:
                    pool.add(unmapped.cut(end - start))
                unmapped.mapped = False
                self.reserved_bytes -= unmapped.size
                self._put_back(unmapped)


def _round_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _page_bytes(small: bool) -> int:
    return SMALL_SEGMENT_BYTES if small else LARGE_SEGMENT_BYTES


def _segment_bytes(size: int, small: bool) -> int:
    """What the driver is asked for where a block needs a segment (`get_allocation_size`)."""
    if small:
        return SMALL_SEGMENT_BYTES
    if size < MIN_LARGE_BYTES:
        return LARGE_SEGMENT_BYTES
    return _round_up(size, LARGE_ROUND_BYTES)


def _possible_bytes(block: Block) -> int:
    """What a free block has, and could have without moving."""
    following = block.next
    if following and not following.mapped:
        return block.size + following.size
    return block.size


def _free_bytes_from(block: Block | None) -> int:
    """The bytes that follow each other from a block on, free or without memory."""
    found = 0
    while block and block.is_free:
        found += block.size
        block = block.next
    return found
