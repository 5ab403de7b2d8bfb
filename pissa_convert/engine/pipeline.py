"""Reader → transform → writer, each in its own thread, over the shards in order.

The reader fills buffers and hashes the source; the transform works on one tensor at a time (its backend is parallel
inside); the writer, in the calling thread, appends results in the order of their offsets and hashes the output. So
every file is read and written front to back, its digest needs no second reading, and what is done of it is a prefix.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from pissa_convert.engine.buffers import Buffers, Cancelled
from pissa_convert.engine.files import PartialFile
from pissa_convert.engine.reading import hash_range, open_to_read, read_exactly
from pissa_convert.errors import ConversionError
from pissa_convert.linalg import Backend, SplitStats
from pissa_convert.memory import CHUNK, chunks
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
    source: int


@dataclass(frozen=True)
class _Chunk:
    begin: int
    end: int
    buffer: mmap.mmap


@dataclass(frozen=True)
class _Result:
    index: int
    step: Split
    buffer: mmap.mmap
    stats: Future[SplitStats]


@dataclass(frozen=True)
class _End:
    source_digest: str


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
    with ThreadPoolExecutor(1, "transform") as transform:
        reader = threading.Thread(
            target=_read_all, args=(shards, backend, buffers, transform, items, timings), name="reader"
        )
        reader.start()
        try:
            _write_all(items, dest, buffers, sink, timings)
        finally:
            buffers.cancel()
            transform.shutdown(wait=False, cancel_futures=True)
            reader.join()
            while not items.empty():  # after a failure: sources that the writer never came to
                if isinstance(item := items.get(), _Begin):
                    os.close(item.source)


def _read_all(
    shards: Sequence[Shard],
    backend: Backend,
    buffers: Buffers,
    transform: ThreadPoolExecutor,
    items: queue.Queue[_Item],
    timings: Timings,
) -> None:
    try:
        for shard in shards:
            _read_shard(shard, backend, buffers, transform, items, timings)
        items.put(None)
    except Cancelled:
        pass
    except BaseException as error:
        items.put(error)


def _read_shard(
    shard: Shard,
    backend: Backend,
    buffers: Buffers,
    transform: ThreadPoolExecutor,
    items: queue.Queue[_Item],
    timings: Timings,
) -> None:
    path = shard.plan.source.path
    source = open_to_read(path)
    items.put(_Begin(shard, source))  # the writer closes it: it copies from it later
    _check_unchanged(shard, source)
    os.posix_fadvise(source, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    digest = hashlib.sha256()
    _hash_prefix(shard, source, digest, buffers, timings)
    for index, step in enumerate(shard.plan.steps):
        if index < shard.steps_done:
            continue
        if isinstance(step, Split):
            buffer = buffers.take(step.nbytes)
            _read(source, step.begin, memoryview(buffer)[: step.end - step.begin], path, digest, timings)
            items.put(_Result(index, step, buffer, transform.submit(_transform, step, path, buffer, backend, timings)))
            continue
        for begin, end in chunks(step.begin, step.end):
            buffer = buffers.take(end - begin)
            _read(source, begin, memoryview(buffer)[: end - begin], path, digest, timings)
            items.put(_Chunk(begin, end, buffer))
    _check_unchanged(shard, source)
    items.put(_End(digest.hexdigest()))


def _hash_prefix(shard: Shard, source: int, digest: hashlib._Hash, buffers: Buffers, timings: Timings) -> None:
    """The header, and the source of what an earlier run has done: hashed again, but not worked on again."""
    plan = shard.plan
    header = bytearray(len(plan.source.header))
    _read(source, 0, memoryview(header), plan.source.path, digest, timings)
    if header != plan.source.header:
        raise _changed(plan.source.path)
    if shard.offset > len(header):
        scratch = buffers.take(CHUNK)
        started = time.perf_counter()
        hash_range(source, len(header), shard.offset, plan.source.path, digest, memoryview(scratch))
        timings.read_seconds += time.perf_counter() - started
        timings.source_bytes += shard.offset - len(header)
        buffers.give_back(scratch, CHUNK)


def _read(source: int, begin: int, view: memoryview, path: Path, digest: hashlib._Hash, timings: Timings) -> None:
    started = time.perf_counter()
    read_exactly(source, begin, view, path)
    digest.update(view)
    timings.read_seconds += time.perf_counter() - started
    timings.source_bytes += len(view)


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


def _transform(step: Split, path: Path, buffer: mmap.mmap, backend: Backend, timings: Timings) -> SplitStats:
    started = time.perf_counter()
    try:
        return split_step(step, path, memoryview(buffer), backend)
    finally:
        timings.compute_seconds += time.perf_counter() - started


def _write_all(items: queue.Queue[_Item], dest: Path, buffers: Buffers, sink: Sink, timings: Timings) -> None:
    while (item := items.get()) is not None:
        if isinstance(item, BaseException):
            raise item
        assert isinstance(item, _Begin)
        try:
            with PartialFile(dest / item.shard.plan.name, item.shard.plan.source.size) as file:
                _write_shard(item, file, items, buffers, sink, timings)
        finally:
            os.close(item.source)


def _write_shard(
    begin: _Begin, file: PartialFile, items: queue.Queue[_Item], buffers: Buffers, sink: Sink, timings: Timings
) -> None:
    shard, digest = begin.shard, begin.shard.digest
    if not shard.steps_done:
        file.write(shard.plan.source.header, 0)
        digest.update(shard.plan.source.header)
    while True:
        item = items.get()
        if isinstance(item, BaseException):
            raise item
        if isinstance(item, _End):
            started = time.perf_counter()
            sink.shard_written(shard, item.source_digest, file)
            timings.write_seconds += time.perf_counter() - started
            return
        if isinstance(item, _Chunk):
            nbytes = item.end - item.begin
            started = time.perf_counter()
            view = memoryview(item.buffer)[:nbytes]
            file.copy_range(begin.source, item.begin, item.end, view)
            digest.update(view)
            view.release()
            timings.write_seconds += time.perf_counter() - started
            timings.written_bytes += nbytes
            sink.progress(nbytes)
        elif isinstance(item, _Result):
            stats = item.stats.result()
            started = time.perf_counter()
            nbytes = _write_result(item, file, digest, sink, shard, stats)
            timings.write_seconds += time.perf_counter() - started
            timings.written_bytes += nbytes
            sink.progress(item.step.end - item.step.begin)
        else:
            raise AssertionError(item)
        buffers.give_back(item.buffer, item.step.nbytes if isinstance(item, _Result) else nbytes)


def _write_result(
    item: _Result, file: PartialFile, digest: hashlib._Hash, sink: Sink, shard: Shard, stats: SplitStats
) -> int:
    step = item.step
    with memoryview(item.buffer) as view:
        residual, a, b = (view[part] for part in step.parts)
        file.write(residual, step.begin)
        digest.update(residual)
        sink.adapter.write(a, step.a.begin)
        sink.adapter.write(b, step.b.begin)
        side = hashlib.sha256(a)
        side.update(b)
        written = len(residual) + len(a) + len(b)
        for part in (residual, a, b):
            part.release()
    # The line comes after the bytes: what it claims can be checked against them, and nothing else is trusted.
    sink.step_done(shard, item.index, digest.copy().hexdigest(), side.hexdigest(), stats)
    return written
