"""Bytes in flight: owned buffers under one budget, so that memory is bounded whatever the speeds of the stages."""

from __future__ import annotations

import mmap
import threading
from collections import deque
from dataclasses import dataclass

_PAGE = 4096


class Cancelled(Exception):
    """Another stage has failed or the user interrupted; the stage that sees this just returns."""


@dataclass(eq=False)
class Buffer:
    """Bytes `begin`:`end` of the arena; `view` is as long as was asked for and begins at a page."""

    view: memoryview
    begin: int
    end: int
    is_held: bool = True


class Buffers:
    """A ring of as many bytes as the budget: hands out what fits, and makes the taker wait otherwise.

    The pipeline gives buffers back in about the order in which it takes them, so the free bytes stay in one piece. The
    same pages are used over and over: getting new ones, zeroed, costs as much as reading the weights into them.
    """

    def __init__(self, budget: int) -> None:
        self._capacity = -(-budget // _PAGE) * _PAGE
        # Private: a shared mapping, which is mmap's default, is a file in memory and gets no huge pages.
        arena = mmap.mmap(-1, self._capacity, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            arena.madvise(mmap.MADV_HUGEPAGE)  # 512 times fewer page faults
        self._arena = memoryview(arena)
        self._buffers: deque[Buffer] = deque()
        self._changed = threading.Condition()
        self._cancelled = False

    def take(self, nbytes: int) -> Buffer:
        """A buffer of `nbytes` bytes of any content, once they fit (waits until then).

        Raises:
            Cancelled: `cancel` was called.
            ValueError: it can never fit; the plan's budget covers every buffer that the plan needs.
        """
        size = -(-max(nbytes, 1) // _PAGE) * _PAGE
        if size > self._capacity:
            raise ValueError(f"a buffer of {nbytes} bytes in a budget of {self._capacity}")
        with self._changed:
            while (begin := self._place(size)) is None and not self._cancelled:
                self._changed.wait()
            if begin is None or self._cancelled:
                raise Cancelled
            buffer = Buffer(self._arena[begin : begin + nbytes], begin, begin + size)
            self._buffers.append(buffer)
        return buffer

    def _place(self, size: int) -> int | None:
        """Where `size` bytes are free in one piece, if anywhere."""
        if not self._buffers:
            return 0
        first, end = self._buffers[0].begin, self._buffers[-1].end
        if first < end:  # taken is first:end
            if end + size <= self._capacity:
                return end
            return 0 if size <= first else None
        return end if end + size <= first else None  # free is end:first

    def give_back(self, buffer: Buffer) -> None:
        """Return a buffer; nothing may look at it any more."""
        buffer.view.release()
        with self._changed:
            buffer.is_held = False
            while self._buffers and not self._buffers[0].is_held:
                self._buffers.popleft()
            self._changed.notify_all()

    def cancel(self) -> None:
        """Wake every waiting taker with `Cancelled`."""
        with self._changed:
            self._cancelled = True
            self._changed.notify_all()
