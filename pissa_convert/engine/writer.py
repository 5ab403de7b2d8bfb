"""The writer: appends results in the order of their offsets, so that what is done of a file is a prefix of it."""

from __future__ import annotations

import hashlib
import queue
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pissa_convert.engine.buffers import Buffers
from pissa_convert.engine.files import PartialFile
from pissa_convert.engine.hashing import HashThread
from pissa_convert.engine.work import Begin, Chunk, End, Item, Result, Shard, Slots
from pissa_convert.report import Timings
from pissa_convert.steps import Stats


@dataclass(frozen=True)
class Sink:
    """What the writer reports to: all are called in the writer's (the calling) thread.

    Attributes:
        beside: the adapter or another file of the result's own, whose slots are filled; None where there is none.
        step_done: shard, index of the step, digest of the output so far, digest of A and B, statistics.
        shard_written: shard, digest of the source, its finished but uncommitted file.
        progress: bytes of source whose output is in place since the last call.
    """

    beside: Slots | None
    step_done: Callable[[Shard, int, str, str, Stats], None]
    shard_written: Callable[[Shard, str, PartialFile], None]
    progress: Callable[[int], None]


@dataclass(frozen=True)
class Writer:
    """Takes the reader's items, waits for each one's result, and writes it."""

    dest: Path
    buffers: Buffers
    hashing: HashThread
    sink: Sink
    timings: Timings

    def write_all(self, items: queue.Queue[Item]) -> None:
        """Write until the end of the work.

        Raises:
            PissaError: from whichever stage failed first.
        """
        while (item := items.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            assert isinstance(item, Begin)
            plan = item.shard.plan
            with PartialFile(self.dest / plan.name, plan.size) as file:
                self._write_shard(item.shard, file, items)

    def _write_shard(self, shard: Shard, file: PartialFile, items: queue.Queue[Item]) -> None:
        if not shard.steps_done:
            file.write(shard.plan.header, 0)
            shard.digest.update(shard.plan.header)
        while True:
            item = items.get()
            if isinstance(item, BaseException):
                raise item
            if isinstance(item, End):
                source_digest = item.source_digest.result()
                started = time.perf_counter()
                self.sink.shard_written(shard, source_digest, file)
                self.timings.write_seconds += time.perf_counter() - started
                return
            if isinstance(item, Chunk):
                nbytes = len(item.buffer.view)
                self._write(file, item.buffer.view[:], item.at, shard.digest)
                item.hashed.result()
            elif isinstance(item, Result):
                nbytes = item.step.end - item.step.begin
                self._write_result(item, file, shard, item.stats.result())
            else:
                raise AssertionError(item)
            self.buffers.give_back(item.buffer)
            self.sink.progress(nbytes)

    def _write(self, file: Slots, view: memoryview, offset: int, digest: hashlib._Hash) -> None:
        """Write and hash `view` at the same time, and release it."""
        hashed = self.hashing.feed(digest, view[:])
        started = time.perf_counter()
        file.write(view, offset)
        self.timings.write_seconds += time.perf_counter() - started
        self.timings.written_bytes += len(view)
        view.release()
        hashed.result()
        self.timings.output_hash_seconds = self.hashing.seconds

    def _write_result(self, item: Result, file: PartialFile, shard: Shard, stats: Stats) -> None:
        step, side = item.step, hashlib.sha256()
        self._write(file, item.buffer.view[step.result], step.at, shard.digest)
        for part, slot in step.beside:
            assert self.sink.beside is not None
            self._write(self.sink.beside, item.buffer.view[part], slot.begin, side)
        # The line comes after the bytes: what it claims can be checked against them, and nothing else is trusted.
        self.sink.step_done(shard, item.index, shard.digest.copy().hexdigest(), side.hexdigest(), stats)
