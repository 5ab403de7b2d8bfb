"""The reader: every shard front to back, into buffers, on to the hash and the lanes."""

from __future__ import annotations

import os
import queue
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from blake3 import blake3

from pissa_convert.engine.buffers import Buffer, Buffers, Cancelled
from pissa_convert.engine.hashing import Hashing, Ticket
from pissa_convert.engine.lanes import Lanes
from pissa_convert.engine.reading import hash_file, open_to_read, read_exactly
from pissa_convert.engine.work import Begin, Chunk, End, Item, Result, Shard
from pissa_convert.errors import ConversionError
from pissa_convert.memory import CHUNK, chunks
from pissa_convert.plans.steps import Copy
from pissa_convert.report import Timings


@dataclass(frozen=True)
class Reader:
    """Puts the work on `items`, and on `lanes` what is to be transformed."""

    buffers: Buffers
    hashing: Hashing
    lanes: Lanes
    items: queue.Queue[Item]
    timings: Timings

    def read_all(self, shards: Sequence[Shard]) -> None:
        """Read the shards one after the other; an error is the last item."""
        try:
            for shard in shards:
                source = open_to_read(shard.plan.source.path)
                try:
                    self._read_shard(shard, source)
                finally:
                    os.close(source)
            self.items.put(None)
        except (Cancelled, CancelledError):
            pass
        except BaseException as error:
            self.items.put(error)

    def _read_shard(self, shard: Shard, source: int) -> None:
        self.items.put(Begin(shard))
        path = shard.plan.source.path
        before = _check_unchanged(shard, source)
        os.posix_fadvise(source, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        digest = blake3()
        hashed = self._hash_prefix(shard, source, digest)
        for index, step in enumerate(shard.plan.steps):
            if index < shard.steps_done:
                continue
            if isinstance(step, Copy):
                hashed = self._read_copy(shard, step, source, digest, alike=index == 0 and shard.begins_alike)
            else:
                buffer = self.buffers.take(step.nbytes, at=step.at - step.result.start, holders=Result.HOLDERS)
                hashed = self._read(source, step.begin, buffer.view[: step.end - step.begin], path, digest)
                self.items.put(Result(index, step, buffer, hashed, self.lanes.submit(step, path, buffer, hashed)))
        after = _check_unchanged(shard, source)
        # A file can be written to and get its old mtime back, but not its ctime, which a mere chmod changes too.
        if after.st_ctime_ns != before.st_ctime_ns and hash_file(path).digest != hashed.result():
            raise _changed(path, "while it was read")
        self.items.put(End(hashed))

    def _read_copy(self, shard: Shard, step: Copy, source: int, digest: blake3, *, alike: bool) -> Ticket:
        for begin, end in chunks(step.begin, step.end):
            at = step.at + begin - step.begin
            buffer = self.buffers.take(end - begin, at=at, holders=Chunk.HOLDERS_ALIKE if alike else Chunk.HOLDERS)

            def then(buffer: Buffer = buffer, is_last: bool = end == step.end) -> None:
                self.buffers.give_back(buffer)
                if alike and is_last:
                    shard.digest = digest.copy()

            hashed = self._read(source, begin, buffer.view[:], shard.plan.source.path, digest, then)
            self.items.put(Chunk(at, buffer, hashed if alike else None))
        return hashed

    def _hash_prefix(self, shard: Shard, source: int, digest: blake3) -> Ticket:
        """The header, and the source of what an earlier run has done: hashed again, but not worked on again."""
        plan = shard.plan
        header = bytearray(len(plan.source.header))
        hashed = self._read(source, 0, memoryview(header), plan.source.path, digest)
        hashed.result()
        if header != plan.source.header:
            raise _changed(plan.source.path, "since the work was planned")
        # What lies between two tensors may be longer than any buffer that the plan has accounted for.
        size = min(CHUNK, self.buffers.largest)
        for begin in range(len(header), shard.offset, size):
            scratch = self.buffers.take(min(size, shard.offset - begin))
            give_back = partial(self.buffers.give_back, scratch)
            hashed = self._read(source, begin, scratch.view[:], plan.source.path, digest, give_back)
        if shard.source_digest not in (None, hashed.result()):
            raise _changed(plan.source.path, "since the interrupted run")
        return hashed

    def _read(
        self,
        source: int,
        begin: int,
        view: memoryview,
        path: Path,
        digest: blake3,
        then: Callable[[], None] | None = None,
    ) -> Ticket:
        """Fill `view`, which is then hashed and released, and `then` called; the ticket says when."""
        started = time.perf_counter()
        for at, end in chunks(0, len(view)):
            piece = view[at:end]
            read_exactly(source, begin + at, piece, path)
            last = then if end == len(view) else None
            hashed = self.hashing.source.feed(digest, piece, last)
        self.timings.read_seconds += time.perf_counter() - started
        self.timings.source_bytes += len(view)
        self.timings.hash_seconds = self.hashing.seconds
        view.release()
        return hashed


def _changed(path: Path, since: str) -> ConversionError:
    return ConversionError(
        f"the source file has changed {since}", file=path, fix="restore it, or start over with --overwrite"
    )


def _check_unchanged(shard: Shard, source: int) -> os.stat_result:
    path = shard.plan.source.path
    status = os.fstat(source)
    try:
        same_file = os.path.samestat(status, path.stat())
    except OSError:
        same_file = False
    if not same_file or [status.st_size, status.st_mtime_ns] != list(shard.expected):
        raise _changed(path, "since the work was planned")
    return status
