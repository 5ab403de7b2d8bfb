"""What passes from the reader to the writer, in the order of the bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from pissa_convert.engine.buffers import Buffer
from pissa_convert.linalg import SplitStats
from pissa_convert.steps import ShardPlan, Split

Transform = Callable[[Split, Path, memoryview], SplitStats]
"""Does a step's work on its buffer, which begins with the source's bytes; the source file is named in errors."""


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
        """Bytes of the source that need no more work."""
        if not self.steps_done:
            return 0
        return self.plan.steps[self.steps_done - 1].end


@dataclass(frozen=True)
class Begin:
    """A shard begins."""

    shard: Shard


@dataclass(frozen=True)
class Chunk:
    """Bytes that pass through to `at` of the output; `hashed` says when the source's hash has seen them."""

    at: int
    buffer: Buffer
    hashed: Future[None]


@dataclass(frozen=True)
class Result:
    """A step that is being transformed; with `stats`, its buffer is ready."""

    index: int
    step: Split
    buffer: Buffer
    stats: Future[SplitStats]


@dataclass(frozen=True)
class End:
    """A shard ends."""

    source_digest: Future[str]


Item = Begin | Chunk | Result | End | BaseException | None
"""An exception is the reader's failure, None the end of the work."""
