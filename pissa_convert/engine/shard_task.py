"""One shard, made by any process that sees the files: idempotent, so it can be lost and done again, even twice at once.

The task writes the shard under its partial name and the shard's slots of the file beside; names, journal and lock are
the caller's.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pissa_convert.engine.files import PartialFile, partial_path, storage_error
from pissa_convert.engine.journal import Entry
from pissa_convert.engine.ledger import step_entry
from pissa_convert.engine.pipeline import run_pipeline
from pissa_convert.engine.recovery import recover_prefix
from pissa_convert.engine.work import ModelPlan, Shard
from pissa_convert.engine.workers import MakeLanes
from pissa_convert.engine.writer import Sink, StepDone
from pissa_convert.linalg import Backend
from pissa_convert.report import Timings

_PAGE = 4096


@dataclass(frozen=True)
class ShardDone:
    """What a task says of its shard, which is durable under its partial name.

    Attributes:
        entries: the journal's lines of the steps that were done.
        digest, source_digest: of the shard and of what it was made from.
        timings: of the task's stages.
        warnings: see `Workers.warnings`.
    """

    entries: Sequence[Entry]
    digest: str
    source_digest: str
    timings: Timings
    warnings: Sequence[str]


def make_shard(
    plan: ModelPlan, make_lanes: MakeLanes, backend: Backend, number: int, before: Sequence[Entry]
) -> ShardDone:
    """Make the shard of that number.

    Args:
        before: the journal's lines of its steps.

    Raises:
        PissaError: from whichever stage fails first.
    """
    shard, timings = plan.shards[number], Timings()
    entries: list[Entry] = []
    digests: list[str] = []
    with _open_shared(plan) as beside, make_lanes(plan, backend) as make:

        def step_done(work: Shard, step: StepDone) -> None:
            entries.append(step_entry(shard, step))

        def shard_written(work: Shard, source_digest: str, file: PartialFile) -> None:
            if beside is not None:
                beside.sync()
            file.sync()
            digests.extend((work.digest.hexdigest(), source_digest))

        work = recover_prefix(plan, shard, {entry["step"]: entry for entry in before}, beside)
        sink = Sink(beside, step_done, shard_written, lambda nbytes: None)
        run_pipeline([work], plan.dest, make, plan.memory, sink, timings, backend.pinned)
    digest, source_digest = digests
    return ShardDone(entries, digest, source_digest, timings, tuple(backend.warnings))


@contextmanager
def _open_shared(plan: ModelPlan) -> Iterator[SharedFile | None]:
    if plan.beside is None:
        yield None
        return
    with SharedFile(plan.dest / plan.beside.name) as file:
        yield file


class SharedFile:
    """A partial file that exists, of which several machines fill slots of their own.

    Network file systems write and keep whole pages. Slots of two machines may meet within one, so a page is locked
    while it is written: that makes a client write back what it has of it, and read it again. A file system that has no
    such locks shares pages properly or is found out when the file is read back.
    """

    def __init__(self, path: Path) -> None:
        """Open `path`.partial.

        Raises:
            ConversionError: it cannot be opened.
        """
        self.partial = partial_path(path)
        try:
            self.descriptor = os.open(self.partial, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise storage_error(error, self.partial) from error

    def __enter__(self) -> SharedFile:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self.descriptor)

    def write(self, data: memoryview, offset: int) -> None:
        """Write all of `data` at `offset`."""
        begin, end = offset - offset % _PAGE, offset + len(data)
        try:
            with self._locked(begin, end - begin):
                done = 0
                while done < len(data):
                    with data[done:] as rest:
                        done += os.pwrite(self.descriptor, rest, offset + done)
        except OSError as error:
            raise storage_error(error, self.partial) from error

    def sync(self) -> None:
        """Make what was written durable."""
        try:
            os.fsync(self.descriptor)
        except OSError as error:
            raise storage_error(error, self.partial) from error

    @contextmanager
    def _locked(self, begin: int, length: int) -> Iterator[None]:
        with suppress(OSError):
            fcntl.lockf(self.descriptor, fcntl.LOCK_EX, length + _PAGE, begin)
        try:
            yield
        finally:
            with suppress(OSError):
                fcntl.lockf(self.descriptor, fcntl.LOCK_UN, length + _PAGE, begin)
