"""Bytes in flight: owned buffers under one budget, so that memory is bounded whatever the speeds of the stages."""

from __future__ import annotations

import mmap
import threading


class Cancelled(Exception):
    """Another stage has failed or the user interrupted; the stage that sees this just returns."""


class Buffers:
    """Hands out buffers while their sum stays within the budget, and makes the taker wait otherwise.

    Buffers are anonymous mappings: giving one back returns its pages to the system at once, which an allocator's
    heap does not promise.
    """

    def __init__(self, budget: int) -> None:
        self._budget = self._free = budget
        self._changed = threading.Condition()
        self._cancelled = False

    def take(self, nbytes: int) -> mmap.mmap:
        """A zeroed buffer of `nbytes` bytes, once they fit (waits until then).

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
        buffer = mmap.mmap(-1, max(nbytes, 1))
        if nbytes >= 4 << 20 and hasattr(mmap, "MADV_HUGEPAGE"):
            buffer.madvise(mmap.MADV_HUGEPAGE)  # 512 times fewer page faults
        return buffer

    def give_back(self, buffer: mmap.mmap, nbytes: int) -> None:
        """Unmap a buffer that was taken with `nbytes`. No view of it may be left."""
        buffer.close()
        with self._changed:
            self._free += nbytes
            self._changed.notify_all()

    def cancel(self) -> None:
        """Wake every waiting taker with `Cancelled`."""
        with self._changed:
            self._cancelled = True
            self._changed.notify_all()
