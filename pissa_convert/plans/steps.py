"""The steps of a shard: which bytes of the source are read, what becomes of them, and where in the result they go.

A step that is not a `Copy` names its transform's work: its bytes lie in one buffer, which the transform changes, and
then go from there to the output shard and, beside it, to the adapter or another file of the result's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pissa_convert.formats.safetensors import SafetensorsFile, TensorInfo
from pissa_convert.linalg import SplitSpec, SplitStats
from pissa_convert.memory import chunks


def align(offset: int) -> int:
    """The next place in a buffer where values of any kind may begin."""
    return -(-offset // 64) * 64


class Stats(Protocol):
    """What a transform says of its work; the same on every run."""

    def as_json(self) -> dict[str, Any]:
        """JSON-ready values, from which the step can make it again."""


class Change(Protocol):
    """A step whose bytes are transformed."""

    @property
    def begin(self) -> int:
        """In the source shard."""

    @property
    def end(self) -> int:
        """In the source shard."""

    @property
    def at(self) -> int:
        """Where the result begins in the output shard."""

    @property
    def stop(self) -> int:
        """Where it ends."""

    @property
    def tensor(self) -> str:
        """The tensor's name, for messages."""

    @property
    def key(self) -> str:
        """What its statistics are kept under."""

    @property
    def nbytes(self) -> int:
        """Bytes held in memory for it."""

    @property
    def result(self) -> slice:
        """The part of the buffer that goes to the output shard, at `at`."""

    @property
    def beside(self) -> tuple[tuple[slice, TensorInfo], ...]:
        """The parts of the buffer that go to the file beside the shards, each with its place there."""

    def read_stats(self, values: dict[str, Any]) -> Stats:
        """Its statistics from their JSON values."""


@dataclass(frozen=True)
class Copy:
    """A byte range that passes through unchanged: a run of adjacent tensors.

    Attributes:
        begin, end: in the source shard.
        at: where it begins in the output shard.
        tensors: their names.
    """

    begin: int
    end: int
    at: int
    tensors: tuple[str, ...]

    @property
    def stop(self) -> int:
        """Where it ends in the output shard."""
        return self.at + self.end - self.begin


@dataclass(frozen=True)
class Split:
    """One weight: its bytes become the residual in place, and A and B fill their slots of the adapter file.

    Attributes:
        begin, end: in the source shard.
        at: where the residual begins in the output shard.
        tensor: its name.
        spec: what the transform does.
        a, b: places of A and B in the adapter file.
    """

    begin: int
    end: int
    at: int
    tensor: str
    spec: SplitSpec
    a: TensorInfo
    b: TensorInfo

    @property
    def stop(self) -> int:
        """Where the residual ends in the output shard."""
        return self.at + self.end - self.begin

    @property
    def key(self) -> str:
        """What its statistics are kept under."""
        return self.tensor

    @property
    def parts(self) -> tuple[slice, slice, slice]:
        """Where the weight (which becomes the residual in place), A and B lie in this step's one buffer."""
        a_at = align(self.end - self.begin)
        b_at = align(a_at + self.a.nbytes)
        return slice(0, self.end - self.begin), slice(a_at, a_at + self.a.nbytes), slice(b_at, b_at + self.b.nbytes)

    @property
    def nbytes(self) -> int:
        """Bytes held in memory for it."""
        return int(self.parts[2].stop)

    @property
    def result(self) -> slice:
        """The part of the buffer that goes to the output shard, at `at`."""
        return self.parts[0]

    @property
    def beside(self) -> tuple[tuple[slice, TensorInfo], ...]:
        """The parts of the buffer that go to the adapter file, each with its place there."""
        return (self.parts[1], self.a), (self.parts[2], self.b)

    def read_stats(self, values: dict[str, Any]) -> SplitStats:
        """Its statistics from their JSON values."""
        return SplitStats.from_json(values)


Step = Copy | Change


class SourceFile(Protocol):
    """A file of tensors, of whichever format."""

    @property
    def path(self) -> Path:
        """Where it lies."""

    @property
    def size(self) -> int:
        """In bytes."""

    @property
    def header(self) -> bytes:
        """Its first bytes, up to the first tensor."""

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """In the order of their bytes."""


@dataclass(frozen=True)
class ShardPlan:
    """One output shard: its header, then its steps in the order of their bytes, without gaps.

    Attributes:
        source: the shard it is made from.
        header: of the output: length and JSON.
        size: of the output in bytes.
        steps: in the order of both files.
        renamed: the output's name where it is not the source's.
    """

    source: SourceFile
    header: bytes
    size: int
    steps: tuple[Step, ...]
    renamed: str | None = None

    @property
    def name(self) -> str:
        """Of the output."""
        return self.renamed or self.source.path.name

    @property
    def source_name(self) -> str:
        return self.source.path.name


def split_steps(
    shard: SafetensorsFile, specs: Mapping[str, SplitSpec], slots: Mapping[str, tuple[TensorInfo, TensorInfo]]
) -> Iterator[Step]:
    """The steps that split the tensors named in `specs` and copy the others.

    A residual is as long as its weight, so every tensor stays where it is.
    """

    def split(tensor: TensorInfo) -> Iterator[Change]:
        if tensor.name in specs:
            yield Split(tensor.begin, tensor.end, tensor.begin, tensor.name, specs[tensor.name], *slots[tensor.name])

    return steps_of(shard.tensors, lambda tensor: tensor.begin, split)


def steps_of(
    tensors: Iterable[TensorInfo], place: Callable[[TensorInfo], int], changes: Callable[[TensorInfo], Iterator[Change]]
) -> Iterator[Step]:
    """The steps of a shard.

    Args:
        tensors: in the order of the source's bytes, which is that of the output's.
        place: where a tensor begins in the output shard.
        changes: the steps that make it up; where there are none it is copied.
    """
    passing: list[TensorInfo] = []
    for tensor in tensors:
        steps = list(changes(tensor))
        if steps and passing:
            yield _copy(passing, place)
            passing = []
        yield from steps
        if not steps:
            passing.append(tensor)
    if passing:
        yield _copy(passing, place)


def _copy(tensors: list[TensorInfo], place: Callable[[TensorInfo], int]) -> Copy:
    return Copy(tensors[0].begin, tensors[-1].end, place(tensors[0]), tuple(tensor.name for tensor in tensors))


def changes_of(shards: Iterable[ShardPlan]) -> Iterator[Change]:
    """The steps whose bytes are transformed."""
    return (step for shard in shards for step in shard.steps if not isinstance(step, Copy))


def flights(shards: Iterable[ShardPlan]) -> Iterator[int]:
    """Bytes held for each piece of work in the order in which they are taken."""
    for shard in shards:
        for step in shard.steps:
            if isinstance(step, Copy):
                yield from (end - begin for begin, end in chunks(step.begin, step.end))
            else:
                yield step.nbytes
