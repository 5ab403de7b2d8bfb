"""Lanes: tensors that are transformed at the same time, each lane with its own transform and its own threads."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from pissa_convert.engine.buffers import Buffer
from pissa_convert.engine.work import Transform
from pissa_convert.report import Timings
from pissa_convert.steps import Change, Stats


class Lanes:
    """Begins steps in the order of the calls. A context manager; leaving it drops what has not begun."""

    def __init__(self, transforms: Sequence[Transform], timings: Timings) -> None:
        self._count = len(transforms)
        self._idle: queue.SimpleQueue[Transform] = queue.SimpleQueue()
        for transform in transforms:
            self._idle.put(transform)
        self._threads = ThreadPoolExecutor(self._count, "lane")
        self._timings = timings
        self._lock = threading.Lock()

    def __enter__(self) -> Lanes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    def cancel(self) -> None:
        """Begin nothing more."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def submit(self, step: Change, path: Path, buffer: Buffer, hashed: Future[None]) -> Future[Stats]:
        """Transform a step once its source is hashed: the result takes the source's place in `buffer`."""
        return self._threads.submit(self._run, step, path, buffer, hashed)

    def _run(self, step: Change, path: Path, buffer: Buffer, hashed: Future[None]) -> Stats:
        hashed.result()
        transform = self._idle.get()  # there is one for each thread
        started = time.perf_counter()
        try:
            return transform(step, path, buffer.view)
        finally:
            self._idle.put(transform)
            with self._lock:
                self._timings.compute_seconds += (time.perf_counter() - started) / self._count
