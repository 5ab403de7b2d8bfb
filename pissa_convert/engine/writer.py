"""The writer: appends results in the order of their offsets, so that what is done of a file is a prefix of it."""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from blake3 import blake3

from pissa_convert.engine.buffers import Buffer, Buffers
from pissa_convert.engine.files import PartialFile
from pissa_convert.engine.hashing import Hashing, Ticket
from pissa_convert.engine.work import Begin, Chunk, End, Item, Result, Shard, Slots
from pissa_convert.plans.steps import Stats
from pissa_convert.report import Timings


@dataclass(frozen=True)
class StepDone:
    """A step whose bytes are in place.

    Attributes:
        index: of the step in its shard.
        source, output: BLAKE3 of the source shard and of the output shard up to the step's end.
        side: of what it has in the file beside the shards.
    """

    index: int
    source: str
    output: str
    side: str
    stats: Stats


@dataclass(frozen=True)
class Sink:
    """What the writer reports to: all are called in the writer's (the calling) thread.

    Attributes:
        beside: the adapter or another file of the result's own, whose slots are filled; None where there is none.
        step_done: shard, and what is known of one of its steps.
        shard_written: shard, digest of the source, its finished but uncommitted file.
        progress: bytes of source whose output is in place since the last call.
    """

    beside: Slots | None
    step_done: Callable[[Shard, StepDone], None]
    shard_written: Callable[[Shard, str, PartialFile], None]
    progress: Callable[[int], None]


class Writer:
    """Takes the reader's items, waits for each one's result, and writes it.

    What is written is settled (its line goes to the journal, its progress is told) when it is hashed too, which the
    writer does not wait for as long as there is more to write.
    """

    def __init__(self, dest: Path, buffers: Buffers, hashing: Hashing, sink: Sink, timings: Timings) -> None:
        self._dest, self._buffers, self._hashing = dest, buffers, hashing
        self._sink, self._timings = sink, timings
        self._unsettled: deque[tuple[Ticket, Callable[[], None]]] = deque()

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
            with PartialFile(self._dest / plan.name, plan.size) as file:
                self._write_shard(item.shard, file, items)

    def _write_shard(self, shard: Shard, file: PartialFile, items: queue.Queue[Item]) -> None:
        if not shard.steps_done:
            file.write(shard.plan.header, 0)
            if not shard.begins_alike:
                shard.digest.update(shard.plan.header)
        while True:
            if items.empty():
                self._settle(wait=True)
            item = items.get()
            if isinstance(item, BaseException):
                raise item
            if isinstance(item, End):
                self._settle(wait=True)
                digest = item.hashed.result()
                started = time.perf_counter()
                self._sink.shard_written(shard, digest, file)
                self._timings.write_seconds += time.perf_counter() - started
                return
            if isinstance(item, Chunk):
                self._write_chunk(item, file, shard)
            elif isinstance(item, Result):
                self._write_result(item, file, shard, item.stats.result())
            else:
                raise AssertionError(item)
            self._buffers.give_back(item.buffer)
            self._settle(wait=False)

    def _settle(self, *, wait: bool) -> None:
        while self._unsettled and (wait or self._unsettled[0][0].done()):
            hashed, finish = self._unsettled.popleft()
            hashed.result()
            finish()

    def _write_chunk(self, item: Chunk, file: PartialFile, shard: Shard) -> None:
        nbytes = len(item.buffer.view)
        hashed = item.alike or self._hash(shard, item.buffer.view[:], item.buffer)
        self._write(file, item.buffer.view[:], item.at)
        self._unsettled.append((hashed, partial(self._sink.progress, nbytes)))

    def _write_result(self, item: Result, file: PartialFile, shard: Shard, stats: Stats) -> None:
        step, side = item.step, blake3()
        hashed = self._hash(shard, item.buffer.view[step.result], item.buffer)
        self._write(file, item.buffer.view[step.result], step.at)
        for part, slot in step.beside:
            assert self._sink.beside is not None
            side.update(item.buffer.view[part])
            self._write(self._sink.beside, item.buffer.view[part], slot.begin)

        def finish() -> None:
            # The line comes after the bytes: what it claims can be checked against them, and nothing else is trusted.
            done = StepDone(item.index, item.hashed.result(), hashed.result(), side.hexdigest(), stats)
            self._sink.step_done(shard, done)
            self._sink.progress(step.end - step.begin)

        self._unsettled.append((hashed, finish))

    def _hash(self, shard: Shard, view: memoryview, buffer: Buffer) -> Ticket:
        """Hash `view` as the output's next bytes, and give the buffer back then."""
        give_back = partial(self._buffers.give_back, buffer)
        return self._hashing.output.feed(shard.digest, view, give_back)

    def _write(self, file: Slots, view: memoryview, offset: int) -> None:
        """Write `view` and release it."""
        started = time.perf_counter()
        file.write(view, offset)
        self._timings.write_seconds += time.perf_counter() - started
        self._timings.written_bytes += len(view)
        self._timings.hash_seconds = self._hashing.seconds
        view.release()
