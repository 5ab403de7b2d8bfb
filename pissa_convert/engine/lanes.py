"""Lanes: tensors that are transformed at the same time, each lane with its own transform and its own threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from pissa_convert.engine.buffers import Buffer, Cancelled
from pissa_convert.engine.hashing import Ticket
from pissa_convert.engine.work import Transform
from pissa_convert.memory import Widths
from pissa_convert.plans.steps import Change, Stats
from pissa_convert.report import Timings

MakeTransform = Callable[[int], Transform]
"""From a number of threads to a transform that works with so many; two of them share nothing that they change."""


class Lanes:
    """Begins steps in the order of the calls, as threads become free. A context manager.

    A wide step waits until all its threads are free, and what comes after it waits too: so it is never passed over.
    Leaving drops what has not begun.
    """

    def __init__(self, make: MakeTransform, widths: Widths, timings: Timings) -> None:
        self._make, self._widths, self._timings = make, widths, timings
        self._idle: dict[int, list[Transform]] = {}
        self._threads = ThreadPoolExecutor(widths.threads, "lane")
        self._changed = threading.Condition()
        self._free = widths.threads
        self._submitted = self._begun = 0
        self._is_cancelled = False

    def __enter__(self) -> Lanes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    def cancel(self) -> None:
        """Begin nothing more."""
        with self._changed:
            self._is_cancelled = True
            self._changed.notify_all()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def submit(self, step: Change, path: Path, buffer: Buffer, hashed: Ticket) -> Future[Stats]:
        """Transform a step once its source is hashed: the result takes the source's place in `buffer`."""
        place = self._submitted
        self._submitted += 1
        return self._threads.submit(self._run, place, step, path, buffer, hashed)

    def _run(self, place: int, step: Change, path: Path, buffer: Buffer, hashed: Ticket) -> Stats:
        width = self._widths(step.nbytes)
        hashed.result()
        with self._lane(place, width) as transform:
            started = time.perf_counter()
            stats = transform(step, path, buffer.view)
            seconds = (time.perf_counter() - started) * width / self._widths.threads
        with self._changed:
            self._timings.compute_seconds += seconds
        return stats

    @contextmanager
    def _lane(self, place: int, width: int) -> Iterator[Transform]:
        """A transform of so many threads, once it is this step's turn and they are free."""
        with self._changed:
            self._changed.wait_for(lambda: (self._begun == place and self._free >= width) or self._is_cancelled)
            if self._is_cancelled:
                raise Cancelled
            self._begun += 1
            self._free -= width
            self._changed.notify_all()
            idle = self._idle.setdefault(width, [])
            transform = idle.pop() if idle else self._make(width)
        try:
            yield transform
        finally:
            with self._changed:
                idle.append(transform)
                self._free += width
                self._changed.notify_all()
