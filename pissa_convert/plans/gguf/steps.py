"""The steps that walk a GGUF: some rows of a tensor at a time become the same rows of the result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pissa_convert.formats.gguf import GgufFile, padded
from pissa_convert.formats.gguf_types import TYPES
from pissa_convert.formats.safetensors import TensorInfo
from pissa_convert.linalg import SplitSpec, SplitStats
from pissa_convert.plans.gguf.adapter import AdaptedTensor
from pissa_convert.plans.gguf.origins import Origin, as_rows
from pissa_convert.plans.steps import Change, Step, align, steps_of
from pissa_convert.transforms.merge import MergeStats

VALUES = 1 << 20
"""Values that one step takes, about."""


@dataclass(frozen=True)
class Treatment:
    """What becomes of a tensor.

    Attributes:
        kind: the type that it is stored in.
        origin: where its values come from, where that is not the GGUF itself.
        added: what an adapter adds to it.
    """

    kind: str
    origin: Origin | None = None
    added: AdaptedTensor | None = None


@dataclass(frozen=True)
class Encode:
    """Rows `top`:`bottom` of one tensor.

    Attributes:
        begin, end: in the source GGUF; with the padding after the last rows.
        at: where the result begins.
        tensor: its name.
        columns: values in a row.
        kind: type in the source.
        treatment: what becomes of them.
        padding: zeros that follow the result.
    """

    begin: int
    end: int
    at: int
    tensor: str
    top: int
    bottom: int
    columns: int
    kind: str
    treatment: Treatment
    padding: int

    @property
    def key(self) -> str:
        """What its statistics are kept under."""
        return f"{self.tensor}[{self.top}:{self.bottom}]"

    @property
    def rows(self) -> int:
        """How many they are."""
        return self.bottom - self.top

    @property
    def stored_kind(self) -> str:
        """Type in the result."""
        return self.treatment.kind

    def _nbytes(self, kind: str) -> int:
        return self.rows * TYPES[kind].row_bytes(self.columns)

    @property
    def stop(self) -> int:
        """Where the result ends."""
        return self.at + self._nbytes(self.stored_kind) + self.padding

    @property
    def source(self) -> slice:
        """The part of the buffer that holds the rows as they were, without padding."""
        return slice(0, self._nbytes(self.kind))

    @property
    def stored(self) -> slice:
        """The part that the rows go to."""
        at = align(self.end - self.begin)
        return slice(at, at + self._nbytes(self.stored_kind))

    @property
    def result(self) -> slice:
        """The same with the padding."""
        return slice(self.stored.start, self.stored.stop + self.padding)

    @property
    def beside(self) -> tuple[tuple[slice, TensorInfo], ...]:
        """Nothing goes elsewhere."""
        return ()

    @property
    def nbytes(self) -> int:
        """Bytes held in memory for it."""
        return int(self.result.stop)

    def read_stats(self, values: dict[str, Any]) -> MergeStats:
        """Its statistics from their JSON values."""
        return MergeStats(**values)


def gguf_steps(
    source: GgufFile, places: Mapping[str, TensorInfo], changes: Callable[[TensorInfo], Iterator[Change]]
) -> tuple[Step, ...]:
    """The steps of a GGUF, padding included: those of `changes`, and copies of the tensors that it has none for."""
    spans = (
        TensorInfo(tensor.name, tensor.dtype, tensor.shape, tensor.begin, source.stop(tensor))
        for tensor in source.tensors
    )
    return tuple(steps_of(spans, lambda tensor: places[tensor.name].begin, changes))


def encode_steps(place: TensorInfo, tensor: TensorInfo, treatment: Treatment, alignment: int) -> Iterator[Encode]:
    """The steps of one tensor; `tensor` is its span with padding."""
    rows, columns = as_rows(tensor.shape)
    old, new = TYPES[tensor.dtype].row_bytes(columns), TYPES[treatment.kind].row_bytes(columns)
    # Steps end where an expert ends, and hold whole heads.
    part = tensor.shape[-2] if len(tensor.shape) > 1 else rows
    group = treatment.origin.group if treatment.origin is not None else 1
    count = min(part, max(1, VALUES // columns // group) * group)
    for first in range(0, rows, part):
        for top in range(first, first + part, count):
            bottom = min(first + part, top + count)
            is_last = bottom == rows
            at = place.begin + top * new
            yield Encode(
                begin=tensor.begin + top * old,
                end=tensor.end if is_last else tensor.begin + bottom * old,
                at=at,
                tensor=tensor.name,
                top=top,
                bottom=bottom,
                columns=columns,
                kind=tensor.dtype,
                treatment=treatment,
                padding=padded(place.end, alignment) - place.end if is_last else 0,
            )


@dataclass(frozen=True)
class GgufSplit:
    """One weight, or that of one expert: its rows become the residual's, and A and B go to the adapter's GGUF.

    Attributes:
        begin, end: in the source GGUF; with the padding after a tensor's last rows.
        at: where the residual begins.
        tensor: its name.
        key: what its statistics are kept under; with the expert's number where there are several.
        spec: what the transform does, in the dtype that it works in.
        kind, stored_kind: types in the source and in the residual.
        padding: zeros that follow the residual.
        a, b: places of A and B in the adapter's GGUF.
    """

    begin: int
    end: int
    at: int
    tensor: str
    key: str
    spec: SplitSpec
    kind: str
    stored_kind: str
    padding: int
    a: TensorInfo
    b: TensorInfo

    @property
    def rows(self) -> int:
        """Of the weight."""
        return self.spec.rows

    @property
    def columns(self) -> int:
        """Values in a row."""
        return self.spec.cols

    def _nbytes(self, kind: str) -> int:
        return self.rows * TYPES[kind].row_bytes(self.columns)

    @property
    def in_place(self) -> bool:
        """Whether the transform works on the bytes as they lie."""
        return self.kind == self.stored_kind == self.spec.dtype

    @property
    def stop(self) -> int:
        """Where the residual ends, with padding."""
        return self.at + self._nbytes(self.stored_kind) + self.padding

    @property
    def source(self) -> slice:
        """The part of the buffer that holds the rows as they were, without padding."""
        return slice(0, self._nbytes(self.kind))

    @property
    def work(self) -> slice:
        """The part that the transform works on."""
        at = 0 if self.in_place else align(self.end - self.begin)
        return slice(at, at + self._nbytes(self.spec.dtype))

    @property
    def stored(self) -> slice:
        """The part that the residual goes to."""
        at = 0 if self.in_place else align(self.work.stop)
        return slice(at, at + self._nbytes(self.stored_kind))

    @property
    def result(self) -> slice:
        """The same with the padding."""
        return slice(self.stored.start, self.stored.stop + self.padding)

    @property
    def beside(self) -> tuple[tuple[slice, TensorInfo], ...]:
        """The parts that go to the adapter's GGUF, each with its place there."""
        a_at = align(max(self.result.stop, self.end - self.begin))
        b_at = align(a_at + self.a.nbytes)
        return (slice(a_at, a_at + self.a.nbytes), self.a), (slice(b_at, b_at + self.b.nbytes), self.b)

    @property
    def nbytes(self) -> int:
        """Bytes held in memory for it."""
        return int(self.beside[1][0].stop)

    def read_stats(self, values: dict[str, Any]) -> SplitStats:
        """Its statistics from their JSON values."""
        return SplitStats.from_json(values)
