"""Bytes in flight: owned buffers under one budget, so that memory is bounded whatever the speeds of the stages."""

from __future__ import annotations

import mmap
import threading
from collections import deque
from dataclasses import dataclass

from pissa_convert.memory import PAGE, footprint

_ELEMENT = 8
"""Bytes of the widest value: a buffer begins at a multiple, whatever lies in the file."""


class Cancelled(Exception):
    """Another stage has failed or the user interrupted; the stage that sees this just returns."""


@dataclass(eq=False)
class Buffer:
    """Bytes `begin`:`end` of the arena, `view` among them; `holders` have to give it back until it is free."""

    view: memoryview
    begin: int
    end: int
    holders: int


class Buffers:
    """A ring of as many bytes as the budget: hands out what fits, and makes the taker wait otherwise.

    The pipeline gives buffers back in about the order in which it takes them, so the free bytes stay in one piece. The
    same pages are used over and over: getting new ones, zeroed, costs as much as reading the weights into them. And
    all of them are used, whatever the speeds, so the peak of memory can be predicted.
    """

    def __init__(self, budget: int) -> None:
        self._capacity = budget
        # Private: a shared mapping, which is mmap's default, is a file in memory and gets no huge pages.
        arena = mmap.mmap(-1, budget, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            arena.madvise(mmap.MADV_HUGEPAGE)  # 512 times fewer page faults
        self._arena = memoryview(arena)
        self._buffers: deque[Buffer] = deque()
        self._last = 0  # end of the buffer that was taken last
        self._changed = threading.Condition()
        self._cancelled = False

    @property
    def memory(self) -> memoryview:
        """All of it."""
        return self._arena

    @property
    def largest(self) -> int:
        """Bytes of the largest buffer that can be taken."""
        return self._capacity // PAGE * PAGE - footprint(0)

    def take(self, nbytes: int, *, at: int = 0, holders: int = 1) -> Buffer:
        """A buffer of `nbytes` bytes of any content, once they fit (waits until then).

        Args:
            at: where the bytes lie in a file: the buffer begins as far into a page, so that the disk can take them
                from where they are.
            holders: that will each give it back.

        Raises:
            Cancelled: `cancel` was called.
            ValueError: it can never fit; the plan's budget covers every buffer that the plan needs.
        """
        with self._changed:
            while (buffer := self._take(nbytes, at, holders)) is None:
                self._changed.wait()
        return buffer

    def _take(self, nbytes: int, at: int, holders: int) -> Buffer | None:
        size = footprint(nbytes)
        if size > self._capacity:
            raise ValueError(f"a buffer of {nbytes} bytes in a budget of {self._capacity}")
        if self._cancelled:
            raise Cancelled
        begin = self._place(size)
        if begin is None:
            return None
        first = begin + (at % PAGE if at % _ELEMENT == 0 else 0)
        buffer = Buffer(self._arena[first : first + nbytes], begin, begin + size, holders)
        self._buffers.append(buffer)
        self._last = buffer.end
        return buffer

    def _place(self, size: int) -> int | None:
        """Where `size` bytes are free in one piece, if anywhere."""
        if not self._buffers:
            return self._last if self._last + size <= self._capacity else 0
        first, end = self._buffers[0].begin, self._buffers[-1].end
        if first < end:  # taken is first:end
            if end + size <= self._capacity:
                return end
            return 0 if size <= first else None
        return end if end + size <= first else None  # free is end:first

    def give_back(self, buffer: Buffer) -> None:
        """Return a buffer; who calls this may not look at it any more."""
        with self._changed:
            buffer.holders -= 1
            if buffer.holders:
                return
            buffer.view.release()
            while self._buffers and not self._buffers[0].holders:
                self._buffers.popleft()
            self._changed.notify_all()

    def cancel(self) -> None:
        """Wake every waiting taker with `Cancelled`."""
        with self._changed:
            self._cancelled = True
            self._changed.notify_all()
