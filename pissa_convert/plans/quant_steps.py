"""The steps of `--to qpissa`: a weight becomes the 4-bit tensors of its residual, or of itself, in its place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pissa_convert.formats.bitsandbytes import Tensor, stored_tensors
from pissa_convert.formats.safetensors import SafetensorsFile, TensorInfo, lay_out
from pissa_convert.linalg import FourBitSpec, SplitSpec
from pissa_convert.plans.quant_stats import QuantStats
from pissa_convert.plans.steps import Step, align, steps_of


@dataclass(frozen=True)
class Treatment:
    """What becomes of one weight.

    Attributes:
        format: how it is stored, as bitsandbytes has it (out × in).
        transposed: the source stores it in × out.
        split: what the alternation starts with; None where there is no adapter.
        slots: places of A and B in the adapter file.
    """

    format: FourBitSpec
    transposed: bool
    split: SplitSpec | None = None
    slots: tuple[TensorInfo, ...] = ()


@dataclass(frozen=True)
class Quantise:
    """One weight.

    Attributes:
        begin, end: in the source shard.
        at, stop: of its 4-bit tensors in the output shard.
        tensor: its name.
        treatment: what becomes of it.
        stored: its 4-bit tensors, which lie one after the other.
    """

    begin: int
    end: int
    at: int
    stop: int
    tensor: str
    treatment: Treatment
    stored: tuple[Tensor, ...]

    @property
    def key(self) -> str:
        """What its statistics are kept under."""
        return self.tensor

    @property
    def source(self) -> slice:
        """The part of the buffer that the weight is read into."""
        return slice(0, self.end - self.begin)

    @property
    def result(self) -> slice:
        """The part of the buffer that goes to the output shard, at `at`."""
        begin = align(self.end - self.begin)
        return slice(begin, begin + self.stop - self.at)

    @property
    def beside(self) -> tuple[tuple[slice, TensorInfo], ...]:
        """The parts for A and B, each with its place in the adapter file; none without an adapter."""
        parts, at = [], align(self.result.stop)
        for slot in self.treatment.slots:
            parts.append((slice(at, at + slot.nbytes), slot))
            at = align(at + slot.nbytes)
        return tuple(parts)

    @property
    def nbytes(self) -> int:
        """Bytes held in memory for it."""
        return int(max(self.result.stop, *(part.stop for part, _ in self.beside), 0))

    def read_stats(self, values: dict[str, Any]) -> QuantStats:
        """Its statistics from their JSON values."""
        return QuantStats(**values)


@dataclass(frozen=True)
class QuantisedShard:
    """The layout of an output shard: header, places of all tensors, and for each treated weight its 4-bit tensors."""

    header: bytes
    places: tuple[TensorInfo, ...]
    stored: Mapping[str, tuple[Tensor, ...]]

    @property
    def size(self) -> int:
        """Of the file, in bytes."""
        return self.places[-1].end if self.places else len(self.header)


def lay_out_shard(shard: SafetensorsFile, treatments: Mapping[str, Treatment]) -> QuantisedShard:
    """Where everything lies after the weights in `treatments` have become 4-bit tensors."""
    tensors: list[Tensor] = []
    stored = {}
    at = 0
    for tensor in shard.tensors:
        if tensor.name in treatments:
            group = stored_tensors(tensor.name, treatments[tensor.name].format, at)
            stored[tensor.name] = tuple(group)
            tensors += group
            at += sum(_nbytes(each) for each in group)
        else:
            tensors.append((tensor.name, tensor.dtype, tensor.shape))
            at += tensor.nbytes
    header, places = lay_out(tensors, shard.metadata)
    return QuantisedShard(header, places, stored)


def _nbytes(tensor: Tensor) -> int:
    return tensor[2][0] * (4 if tensor[1] == "F32" else 1)


def quant_steps(shard: SafetensorsFile, layout: QuantisedShard, treatments: Mapping[str, Treatment]) -> Iterator[Step]:
    """The steps of a shard; what has no treatment is copied."""
    places = {place.name: place for place in layout.places}

    def change(tensor: TensorInfo) -> Iterator[Quantise]:
        if tensor.name in treatments:
            stored = layout.stored[tensor.name]
            first, last = places[stored[0][0]], places[stored[-1][0]]
            treatment = treatments[tensor.name]
            yield Quantise(tensor.begin, tensor.end, first.begin, last.end, tensor.name, treatment, stored)

    return steps_of(shard.tensors, lambda tensor: places[tensor.name].begin, change)
