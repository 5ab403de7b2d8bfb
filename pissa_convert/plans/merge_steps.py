"""The steps of a merge: some rows of a tensor at a time, so that memory does not grow with the tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pissa_convert.formats.adapter_folder import Pair
from pissa_convert.formats.safetensors import SafetensorsFile, TensorInfo
from pissa_convert.plans.quantised_source import StoredWeight
from pissa_convert.plans.steps import Step, align, steps_of
from pissa_convert.transforms.merge import WIDTHS, MergeStats

BLOCK = 16 << 20
"""Bytes of source that one step takes, about."""


@dataclass(frozen=True)
class Change:
    """What an adapter does to a tensor: adds s·B·A or a bias, or puts another in its place; nothing if all are None.

    Attributes:
        pair: the factors.
        transposed: the tensor is stored in × out (Conv1D), or is an embedding.
        is_bias: B's bias is added, and not B·A.
        whole: the adapter's tensor that takes its place.
    """

    pair: Pair | None = None
    transposed: bool = False
    is_bias: bool = False
    whole: TensorInfo | None = None


@dataclass(frozen=True)
class Target:
    """Where rows go and in which dtype, after which change."""

    dtype: str
    change: Change


@dataclass(frozen=True)
class Merge:
    """Rows `top`:`bottom` of one tensor.

    Attributes:
        begin, end: in the source shard.
        at: where the result begins in the output shard.
        tensor: its name.
        columns: values in a row.
        dtype: of the source.
        main: what goes to the output shard.
        head: what goes to the file beside it: the rows of an output head that is tied to this tensor no longer.
        slot: their place there.
    """

    begin: int
    end: int
    at: int
    tensor: str
    top: int
    bottom: int
    columns: int
    dtype: str
    main: Target
    head: Target | None = None
    slot: TensorInfo | None = None

    @property
    def key(self) -> str:
        """What its statistics are kept under."""
        return f"{self.tensor}[{self.top}:{self.bottom}]"

    def _nbytes(self, dtype: str) -> int:
        return (self.bottom - self.top) * self.columns * int(WIDTHS[dtype])

    @property
    def stop(self) -> int:
        """Where the result ends in the output shard."""
        return self.at + self._nbytes(self.main.dtype)

    @property
    def source(self) -> slice:
        """The part of the buffer that the source is read into."""
        return slice(0, self.end - self.begin)

    @property
    def result(self) -> slice:
        """The part of the buffer that goes to the output shard; in place where the dtype stays."""
        at = 0 if self.main.dtype == self.dtype else align(self.end - self.begin)
        return slice(at, at + self._nbytes(self.main.dtype))

    @property
    def beside(self) -> tuple[tuple[slice, TensorInfo], ...]:
        """The part that goes to the file beside the shards."""
        if self.slot is None:
            return ()
        at = align(max(self.result.stop, self.end - self.begin))
        return ((slice(at, at + self.slot.nbytes), self.slot),)

    @property
    def nbytes(self) -> int:
        """Bytes held in memory for it."""
        ends = (self.result.stop, *(part.stop for part, _ in self.beside))
        return max(self.end - self.begin, *map(int, ends))

    def read_stats(self, values: dict[str, Any]) -> MergeStats:
        """Its statistics from their JSON values."""
        return MergeStats(**values)


@dataclass(frozen=True)
class Dequantise:
    """A whole 4-bit weight, which is read back and then merged like any other.

    Attributes:
        begin, end: of its 4-bit tensors in the source shard.
        stored: what they are.
        merge: what becomes of the matrix, whose bytes come to lie behind them in the buffer.
    """

    begin: int
    end: int
    stored: StoredWeight
    merge: Merge

    @property
    def at(self) -> int:
        """Where the result begins in the output shard."""
        return self.merge.at

    @property
    def stop(self) -> int:
        """Where it ends."""
        return self.merge.stop

    @property
    def tensor(self) -> str:
        """The weight's name."""
        return self.merge.tensor

    @property
    def key(self) -> str:
        """What its statistics are kept under."""
        return self.merge.key

    @property
    def source(self) -> slice:
        """The part of the buffer that the source is read into."""
        return slice(0, self.end - self.begin)

    @property
    def matrix(self) -> slice:
        """The part of the buffer that the merge works in."""
        begin = align(self.end - self.begin)
        return slice(begin, begin + self.merge.nbytes)

    @property
    def result(self) -> slice:
        """The part of the buffer that goes to the output shard, at `at`."""
        begin = self.matrix.start
        return slice(begin + self.merge.result.start, begin + self.merge.result.stop)

    @property
    def beside(self) -> tuple[tuple[slice, TensorInfo], ...]:
        """Nothing: an output head is not quantised."""
        return ()

    @property
    def nbytes(self) -> int:
        """Bytes held in memory for it."""
        return int(self.matrix.stop)

    def read_stats(self, values: dict[str, Any]) -> MergeStats:
        """Its statistics from their JSON values."""
        return self.merge.read_stats(values)


@dataclass(frozen=True)
class Treatment:
    """What becomes of one tensor: its rows' targets; `head_slot` is the whole head's place, `stored` a 4-bit weight."""

    main: Target
    head: Target | None = None
    head_slot: TensorInfo | None = None
    stored: StoredWeight | None = None


def merge_steps(
    shard: SafetensorsFile, places: Mapping[str, TensorInfo], treatments: Mapping[str, Treatment]
) -> Iterator[Step]:
    """The steps of a shard.

    Args:
        places: where each tensor lies in the output shard.
        treatments: of the tensors that are changed; the others are copied.
    """

    def rows(tensor: TensorInfo) -> Iterator[Merge | Dequantise]:
        treatment = treatments.get(tensor.name)
        if treatment is not None and treatment.stored is not None:
            yield _whole(tensor, places[tensor.name], treatment.main, treatment.stored)
        elif treatment is not None:
            yield from _rows(tensor, places[tensor.name], treatment)

    return steps_of(shard.tensors, lambda tensor: places[tensor.name].begin, rows)


def as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns: a vector is a column, and what has more dimensions is cut along the first."""
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


def _rows(tensor: TensorInfo, place: TensorInfo, treatment: Treatment) -> Iterator[Merge]:
    rows, columns = as_matrix(tensor.shape)
    width, new_width = columns * WIDTHS[tensor.dtype], columns * WIDTHS[treatment.main.dtype]
    count = max(1, BLOCK // width)
    for top in range(0, rows, count):
        bottom = min(rows, top + count)
        slot = None
        if treatment.head is not None and treatment.head_slot is not None:
            slot = _row_slot(treatment.head_slot, top, bottom, columns * WIDTHS[treatment.head.dtype])
        yield Merge(
            begin=tensor.begin + top * width,
            end=tensor.begin + bottom * width,
            at=place.begin + top * new_width,
            tensor=tensor.name,
            top=top,
            bottom=bottom,
            columns=columns,
            dtype=tensor.dtype,
            main=treatment.main,
            head=treatment.head,
            slot=slot,
        )


def _whole(tensor: TensorInfo, place: TensorInfo, main: Target, stored: StoredWeight) -> Dequantise:
    rows, columns = tensor.shape
    nbytes = rows * columns * WIDTHS[tensor.dtype]
    merge = Merge(0, nbytes, place.begin, tensor.name, 0, rows, columns, tensor.dtype, main)
    return Dequantise(tensor.begin, tensor.end, stored, merge)


def _row_slot(whole: TensorInfo, top: int, bottom: int, width: int) -> TensorInfo:
    shape = (bottom - top, *whole.shape[1:])
    return TensorInfo(whole.name, whole.dtype, shape, whole.begin + top * width, whole.begin + bottom * width)
