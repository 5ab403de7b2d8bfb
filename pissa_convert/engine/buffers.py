"""Bytes in flight: owned buffers under one budget, so that memory is bounded whatever the speeds of the stages."""

from __future__ import annotations

import bisect
import mmap
import threading
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
    """An arena of as many bytes as the budget: hands out what fits, and makes the taker wait otherwise.

    A buffer lies as far in front as it fits, so that the same pages are used over and over: getting new ones costs as
    much as reading the weights into them, and on a virtual machine several times that. The pipeline gives buffers back
    in about the order in which it takes them, so the free bytes stay in few pieces.
    """

    def __init__(self, budget: int) -> None:
        self._capacity = budget
        # Private: a shared mapping, which is mmap's default, is a file in memory and gets no huge pages.
        arena = mmap.mmap(-1, budget, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            arena.madvise(mmap.MADV_HUGEPAGE)  # 512 times fewer page faults
        self._arena = memoryview(arena)
        self._buffers: list[Buffer] = []  # in the order of their places
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

    def take_now(self, nbytes: int, *, at: int = 0, holders: int = 1) -> Buffer | None:
        """The same without waiting: None where there is no room."""
        with self._changed:
            return self._take(nbytes, at, holders)

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
        bisect.insort(self._buffers, buffer, key=lambda held: held.begin)
        return buffer

    def _place(self, size: int) -> int | None:
        """The first place where `size` bytes are free in one piece, if there is one."""
        begin = 0
        for buffer in self._buffers:
            if buffer.begin - begin >= size:
                break
            begin = buffer.end
        return begin if begin + size <= self._capacity else None

    def give_back(self, buffer: Buffer) -> None:
        """Return a buffer; who calls this may not look at it any more."""
        with self._changed:
            buffer.holders -= 1
            if buffer.holders:
                return
            buffer.view.release()
            self._buffers.remove(buffer)
            self._changed.notify_all()

    def cancel(self) -> None:
        """Wake every waiting taker with `Cancelled`."""
        with self._changed:
            self._cancelled = True
            self._changed.notify_all()
