"""Bytes in flight: owned buffers under one budget, so that memory is bounded whatever the speeds of the stages."""

from __future__ import annotations

import mmap
import threading
from collections import deque


class Cancelled(Exception):
    """Another stage has failed or the user interrupted; the stage that sees this just returns."""


class Buffers:
    """Hands out buffers while their sum stays within the budget, and makes the taker wait otherwise.

    Buffers are anonymous mappings. One that was given back is kept for the next taker of the same size, as a model's
    weights come in few sizes and touching new pages costs about as much as reading them from the disk; it is unmapped
    as soon as its room is needed, which returns its pages at once, as an allocator's heap does not promise.
    """

    def __init__(self, budget: int) -> None:
        self._budget = self._free = budget
        self._idle: deque[tuple[int, mmap.mmap]] = deque()
        self._changed = threading.Condition()
        self._cancelled = False

    def take(self, nbytes: int) -> mmap.mmap:
        """A buffer of `nbytes` bytes of any content, once they fit (waits until then).

        Raises:
            Cancelled: `cancel` was called.
            ValueError: it can never fit; the plan's budget covers every buffer that the plan needs.
        """
        if nbytes > self._budget:
            raise ValueError(f"a buffer of {nbytes} bytes in a budget of {self._budget}")
        with self._changed:
            self._changed.wait_for(lambda: self._cancelled or nbytes <= self._free)
            if self._cancelled:
                raise Cancelled
            self._free -= nbytes
            for index, (size, buffer) in enumerate(self._idle):
                if size == nbytes:
                    del self._idle[index]
                    return buffer
            self._make_room()
        # Private: a shared mapping, which is mmap's default, is a file in memory and gets no huge pages.
        buffer = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if nbytes >= 4 << 20 and hasattr(mmap, "MADV_HUGEPAGE"):
            buffer.madvise(mmap.MADV_HUGEPAGE)  # 512 times fewer page faults
        return buffer

    def _make_room(self) -> None:
        """Unmap idle buffers, the longest unused first, until they fit beside what is taken."""
        idle = sum(size for size, _ in self._idle)
        while idle > self._free:
            size, buffer = self._idle.popleft()
            buffer.close()
            idle -= size

    def give_back(self, buffer: mmap.mmap, nbytes: int) -> None:
        """Return a buffer that was taken with `nbytes`. No view of it may be left."""
        with self._changed:
            self._free += nbytes
            self._idle.append((nbytes, buffer))
            self._changed.notify_all()

    def cancel(self) -> None:
        """Wake every waiting taker with `Cancelled`."""
        with self._changed:
            self._cancelled = True
            self._changed.notify_all()
