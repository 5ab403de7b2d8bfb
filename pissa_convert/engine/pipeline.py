"""Reader → transform → writer, each in its own thread, over the shards in order.

The reader fills buffers; the transform works on one tensor at a time (its backend is parallel inside); the writer, in
the calling thread, appends results in the order of their offsets. So every file is read and written front to back,
its digest needs no second reading, and what is done of it is a prefix. Source and output are hashed beside that, each
in a thread of its own: SHA-256 is slower than a good disk.
"""

from __future__ import annotations

import hashlib
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from pissa_convert.engine.buffers import Buffer, Buffers, Cancelled
from pissa_convert.engine.files import PartialFile
from pissa_convert.engine.hashing import HashThread
from pissa_convert.engine.reading import open_to_read, read_exactly
from pissa_convert.errors import ConversionError
from pissa_convert.linalg import Backend, SplitStats
from pissa_convert.memory import chunks
from pissa_convert.planning import ShardPlan, Split
from pissa_convert.report import Timings
from pissa_convert.transforms.split import split_step


@dataclass
class Shard:
    """A shard in work: its plan, and the prefix of it that an earlier run has finished.

    Attributes:
        expected: size and mtime_ns that the source file had when the work was planned.
        steps_done: leading steps whose output is in place.
        digest: state of the output's SHA-256 after those steps (and the header).
    """

    plan: ShardPlan
    expected: Sequence[int]
    steps_done: int = 0
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)

    @property
    def offset(self) -> int:
        """Bytes of the output that are in place."""
        if not self.steps_done:
            return 0
        return self.plan.steps[self.steps_done - 1].end


@dataclass(frozen=True)
class _Begin:
    shard: Shard


@dataclass(frozen=True)
class _Chunk:
    begin: int
    end: int
    buffer: Buffer
    hashed: Future[None]


@dataclass(frozen=True)
class _Result:
    index: int
    step: Split
    buffer: Buffer
    stats: Future[SplitStats]


@dataclass(frozen=True)
class _End:
    source_digest: Future[str]


_Item = _Begin | _Chunk | _Result | _End | BaseException | None


@dataclass(frozen=True)
class Sink:
    """What the writer reports to: all are called in the writer's (the calling) thread.

    Attributes:
        adapter: the adapter file, whose slots are filled.
        step_done: shard, index of the step, digest of the output so far, digest of A and B, statistics.
        shard_written: shard, digest of the source, its finished but uncommitted file.
        progress: bytes of source whose output is in place since the last call.
    """

    adapter: PartialFile
    step_done: Callable[[Shard, int, str, str, SplitStats], None]
    shard_written: Callable[[Shard, str, PartialFile], None]
    progress: Callable[[int], None]


def run_pipeline(
    shards: Sequence[Shard], dest: Path, backend: Backend, budget: int, sink: Sink, timings: Timings
) -> None:
    """Convert `shards` one after the other into `dest`.

    Raises:
        PissaError: from whichever stage failed first.
        KeyboardInterrupt: passed on once the other stages have stopped.
    """
    buffers = Buffers(budget)
    items: queue.Queue[_Item] = queue.Queue()  # its length is bounded by the budget for what it holds
    with (
        HashThread("hash-source") as source_hash,
        HashThread("hash-output") as output_hash,
        ThreadPoolExecutor(1, "transform") as transform,
    ):
        reader = _Reader(backend, buffers, source_hash, transform, items, timings)
        thread = threading.Thread(target=reader.read_all, args=(shards,), name="reader")
        thread.start()
        try:
            _Writer(dest, buffers, output_hash, sink, timings).write_all(items)
        finally:
            buffers.cancel()
            transform.shutdown(wait=False, cancel_futures=True)
            thread.join()


@dataclass(frozen=True)
class _Reader:
    backend: Backend
    buffers: Buffers
    hashing: HashThread
    transform: ThreadPoolExecutor
    items: queue.Queue[_Item]
    timings: Timings

    def read_all(self, shards: Sequence[Shard]) -> None:
        try:
            for shard in shards:
                source = open_to_read(shard.plan.source.path)
                try:
                    self._read_shard(shard, source)
                finally:
                    os.close(source)
            self.items.put(None)
        except Cancelled:
            pass
        except BaseException as error:
            self.items.put(error)

    def _read_shard(self, shard: Shard, source: int) -> None:
        self.items.put(_Begin(shard))
        path = shard.plan.source.path
        _check_unchanged(shard, source)
        os.posix_fadvise(source, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        digest = hashlib.sha256()
        self._hash_prefix(shard, source, digest)
        for index, step in enumerate(shard.plan.steps):
            if index < shard.steps_done:
                continue
            if isinstance(step, Split):
                buffer = self.buffers.take(step.nbytes)
                hashed = self._read(source, step.begin, buffer.view[: step.end - step.begin], path, digest)
                stats = self.transform.submit(_transform, step, path, buffer, hashed, self.backend, self.timings)
                self.items.put(_Result(index, step, buffer, stats))
                continue
            for begin, end in chunks(step.begin, step.end):
                buffer = self.buffers.take(end - begin)
                hashed = self._read(source, begin, buffer.view[:], path, digest)
                self.items.put(_Chunk(begin, end, buffer, hashed))
        _check_unchanged(shard, source)
        self.items.put(_End(self.hashing.finish(digest)))

    def _hash_prefix(self, shard: Shard, source: int, digest: hashlib._Hash) -> None:
        """The header, and the source of what an earlier run has done: hashed again, but not worked on again."""
        plan = shard.plan
        header = bytearray(len(plan.source.header))
        self._read(source, 0, memoryview(header), plan.source.path, digest).result()
        if header != plan.source.header:
            raise _changed(plan.source.path)
        for begin, end in chunks(len(header), shard.offset):
            scratch = self.buffers.take(end - begin)
            self._read(source, begin, scratch.view[:], plan.source.path, digest).result()
            self.buffers.give_back(scratch)

    def _read(self, source: int, begin: int, view: memoryview, path: Path, digest: hashlib._Hash) -> Future[None]:
        """Fill `view`, which is then hashed and released; the future says when."""
        started = time.perf_counter()
        for at, end in chunks(0, len(view)):
            piece = view[at:end]
            read_exactly(source, begin + at, piece, path)
            hashed = self.hashing.feed(digest, piece)
        self.timings.read_seconds += time.perf_counter() - started
        self.timings.source_bytes += len(view)
        self.timings.source_hash_seconds = self.hashing.seconds
        view.release()
        return hashed


def _changed(path: Path) -> ConversionError:
    return ConversionError(
        "the source file has changed since the work was planned",
        file=path,
        fix="restore it, or start over with --overwrite",
    )


def _check_unchanged(shard: Shard, source: int) -> None:
    path = shard.plan.source.path
    status = os.fstat(source)
    try:
        same_file = os.path.samestat(status, path.stat())
    except OSError:
        same_file = False
    if not same_file or [status.st_size, status.st_mtime_ns] != list(shard.expected):
        raise _changed(path)


def _transform(
    step: Split, path: Path, buffer: Buffer, hashed: Future[None], backend: Backend, timings: Timings
) -> SplitStats:
    hashed.result()  # the residual takes the weight's place
    started = time.perf_counter()
    try:
        return split_step(step, path, buffer.view, backend)
    finally:
        timings.compute_seconds += time.perf_counter() - started


@dataclass(frozen=True)
class _Writer:
    dest: Path
    buffers: Buffers
    hashing: HashThread
    sink: Sink
    timings: Timings

    def write_all(self, items: queue.Queue[_Item]) -> None:
        while (item := items.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            assert isinstance(item, _Begin)
            with PartialFile(self.dest / item.shard.plan.name, item.shard.plan.source.size) as file:
                self._write_shard(item.shard, file, items)

    def _write_shard(self, shard: Shard, file: PartialFile, items: queue.Queue[_Item]) -> None:
        if not shard.steps_done:
            file.write(shard.plan.source.header, 0)
            shard.digest.update(shard.plan.source.header)
        while True:
            item = items.get()
            if isinstance(item, BaseException):
                raise item
            if isinstance(item, _End):
                source_digest = item.source_digest.result()
                started = time.perf_counter()
                self.sink.shard_written(shard, source_digest, file)
                self.timings.write_seconds += time.perf_counter() - started
                return
            if isinstance(item, _Chunk):
                nbytes = item.end - item.begin
                self._write(file, item.buffer.view[:], item.begin, shard.digest)
                item.hashed.result()
                self.buffers.give_back(item.buffer)
                self.sink.progress(nbytes)
            elif isinstance(item, _Result):
                self._write_result(item, file, shard, item.stats.result())
                self.buffers.give_back(item.buffer)
                self.sink.progress(item.step.end - item.step.begin)
            else:
                raise AssertionError(item)

    def _write(self, file: PartialFile, view: memoryview, offset: int, digest: hashlib._Hash) -> None:
        """Write and hash `view` at the same time, and release it."""
        hashed = self.hashing.feed(digest, view[:])
        started = time.perf_counter()
        file.write(view, offset)
        self.timings.write_seconds += time.perf_counter() - started
        self.timings.written_bytes += len(view)
        view.release()
        hashed.result()
        self.timings.output_hash_seconds = self.hashing.seconds

    def _write_result(self, item: _Result, file: PartialFile, shard: Shard, stats: SplitStats) -> None:
        step, side = item.step, hashlib.sha256()
        residual, a, b = (item.buffer.view[part] for part in step.parts)
        self._write(file, residual, step.begin, shard.digest)
        self._write(self.sink.adapter, a, step.a.begin, side)
        self._write(self.sink.adapter, b, step.b.begin, side)
        # The line comes after the bytes: what it claims can be checked against them, and nothing else is trusted.
        self.sink.step_done(shard, item.index, shard.digest.copy().hexdigest(), side.hexdigest(), stats)
