"""What passes from the reader to the writer, in the order of the bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from blake3 import blake3

from pissa_convert.engine.buffers import Buffer
from pissa_convert.engine.destination import Work
from pissa_convert.engine.hashing import Ticket
from pissa_convert.formats.manifest import FileRecord
from pissa_convert.memory import MemoryPlan
from pissa_convert.plans.steps import Change, Copy, ShardPlan, Stats

Transform = Callable[[Any, Path, memoryview], Stats]
"""Does a step's work on its buffer, which begins with the source's bytes; the source file is named in errors."""


class Slots(Protocol):
    """The file beside the shards while its slots are filled."""

    @property
    def partial(self) -> Path:
        """What it is called meanwhile."""

    @property
    def descriptor(self) -> int:
        """To read it by."""

    def write(self, data: memoryview, offset: int) -> None:
        """Write all of `data` at `offset`."""


class FilePlan(Protocol):
    """A file of the result's own, beside the shards: its header is known, and steps fill the rest."""

    @property
    def name(self) -> str:
        """Relative to the destination."""

    @property
    def header(self) -> bytes:
        """Its first bytes."""

    @property
    def size(self) -> int:
        """In bytes."""


class ModelPlan(Work, Protocol):
    """What the engine asks of a plan that walks a model's shards, of whichever target."""

    @property
    def head(self) -> Mapping[str, Any]:
        """What the manifest says of the conversion as a whole."""

    @property
    def sources(self) -> Mapping[str, Path]:
        """Every file that decides the result, by its name in the manifest."""

    @property
    def shards(self) -> tuple[ShardPlan, ...]:
        """The output shards in order."""

    @property
    def beside(self) -> FilePlan | None:
        """The file beside them, if there is one."""

    @property
    def memory(self) -> MemoryPlan:
        """Bytes in flight and lanes."""

    @property
    def recorded(self) -> Mapping[str, FileRecord]:
        """What source shards must be, as far as that is known."""

    @property
    def texts(self) -> Mapping[str, bytes]:
        """Small files that are made, in the order of their commits."""

    @property
    def copies(self) -> Sequence[str]:
        """Files that are copied, by their names in `sources`; after the texts, what makes the folder load last."""

    @property
    def last_texts(self) -> Mapping[str, bytes]:
        """Small files that are made in place of copies that make the folder load, committed after the copies."""

    def manifest(
        self, source: Mapping[str, FileRecord], output: Mapping[str, FileRecord], stats: Mapping[str, Any]
    ) -> bytes:
        """The manifest's text from what only the work can tell."""


@dataclass
class Shard:
    """A shard in work: its plan, and the prefix of it that an earlier run has finished.

    Attributes:
        expected: size and mtime_ns that the source file had when the work was planned.
        steps_done: leading steps whose output is in place.
        digest: state of the output's BLAKE3 after those steps (and the header).
        source_digest: the source's at that place when they were done; None where none are.
    """

    plan: ShardPlan
    expected: Sequence[int]
    steps_done: int = 0
    digest: blake3 = field(default_factory=blake3)
    source_digest: str | None = None

    @property
    def begins_alike(self) -> bool:
        """Header and first step are the source's, and nothing is done yet: up to there both have one digest."""
        plan = self.plan
        first = plan.steps[0] if plan.steps and not self.steps_done else None
        return isinstance(first, Copy) and first.begin < first.end and plan.header == plan.source.header

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
    """Bytes that pass through to `at` of the output; `alike`: their hashing, where the source's is the output's too."""

    HOLDERS: ClassVar[int] = 3  # of the buffer: the hashing of source and output, and the writer
    HOLDERS_ALIKE: ClassVar[int] = 2

    at: int
    buffer: Buffer
    alike: Ticket | None


@dataclass(frozen=True)
class Result:
    """A step that is being transformed; with `stats`, its buffer is ready. `hashed`: its source."""

    HOLDERS: ClassVar[int] = 2  # of the buffer after that: the hashing of the output, and the writer

    index: int
    step: Change
    buffer: Buffer
    hashed: Ticket
    stats: Future[Stats]


@dataclass(frozen=True)
class End:
    """A shard ends; `hashed`: all of its source."""

    hashed: Ticket


Item = Begin | Chunk | Result | End | BaseException | None
"""An exception is the reader's failure, None the end of the work."""
