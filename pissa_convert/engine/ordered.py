"""Work whose results are written in order, front to back: a few items at once, each written once.

For results that are short to make: what was interrupted is made again from its start.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from blake3 import blake3

from pissa_convert.engine.files import PartialFile
from pissa_convert.formats.manifest import FileRecord
from pissa_convert.report import Timings

ProgressCallback = Callable[[int, int, Timings], None]

_Item = TypeVar("_Item")
_Given = TypeVar("_Given")
_Made = TypeVar("_Made")


def in_order(
    items: Iterable[_Item],
    read: Callable[[_Item], _Given],
    work: Callable[[_Given], _Made],
    in_flight: int,
    timings: Timings,
) -> Iterator[tuple[_Item, _Made]]:
    """Each item with what `work` makes of what `read` gives for it, in the order of the items.

    Args:
        read: called in this thread, item after item.
        work: called in threads of its own, for `in_flight` items at once.
    """
    waiting: deque[tuple[_Item, Future[_Made]]] = deque()

    def first() -> tuple[_Item, _Made]:
        started = time.perf_counter()
        item, future = waiting.popleft()
        made = future.result()
        timings.compute_seconds += time.perf_counter() - started
        return item, made

    with ThreadPoolExecutor(in_flight, "ordered") as pool:
        try:
            for item in items:
                if len(waiting) == in_flight:
                    yield first()
                started = time.perf_counter()
                given = read(item)
                timings.read_seconds += time.perf_counter() - started
                waiting.append((item, pool.submit(work, given)))
            while waiting:
                yield first()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


class Appender:
    """Writes a file front to back, and hashes it on the way."""

    def __init__(self, file: PartialFile, timings: Timings, progress: ProgressCallback | None) -> None:
        self._file, self._timings, self._progress = file, timings, progress
        self._digest = blake3()
        self._end = 0

    def write(self, data: bytes | memoryview, begin: int) -> None:
        """Write `data` at `begin`; what lies between it and the data before is zeros."""
        started = time.perf_counter()
        if begin > self._end:
            self.write(bytes(begin - self._end), self._end)
        self._file.write(data, begin)
        self._digest.update(data)
        self._end = begin + len(data)
        self._timings.write_seconds += time.perf_counter() - started
        self._timings.written_bytes += len(data)
        if self._progress is not None:
            self._progress(self._end, self._file.size, self._timings)

    @property
    def record(self) -> FileRecord:
        """Of what was written."""
        return FileRecord(self._end, self._digest.hexdigest())
