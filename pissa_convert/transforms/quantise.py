"""Quantise one weight: its 4-bit tensors appear beside it, and A and B where it gets an adapter."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from pissa_convert.errors import WeightError
from pissa_convert.formats.bitsandbytes import fill
from pissa_convert.linalg import Backend, FourBit, FourBitSpec, SplitSpec
from pissa_convert.linalg.native import NativeBackend
from pissa_convert.plans.quant_stats import QuantStats
from pissa_convert.plans.quant_steps import Quantise, Treatment
from pissa_convert.transforms import alternate


@dataclass(frozen=True)
class QuantiseLane:
    """Does the work of a step.

    Attributes:
        backend: its own, that splits.
        quantiser: its own.
        iterations: quantisations of a weight at most.
        compare_loftq: find out what LoftQ's order would have reached, too.
    """

    backend: Backend
    quantiser: NativeBackend
    iterations: int
    compare_loftq: bool

    def __call__(self, step: Quantise, file: Path, buffer: memoryview) -> QuantStats:
        """Quantise the weight that lies at the front of `buffer`, laid out as `step` says.

        Raises:
            WeightError: it holds NaN or infinity, or a factor overflows its dtype; names file and tensor.
        """
        try:
            return self._quantise(step, buffer)
        except WeightError as error:
            raise WeightError(
                error.what, file=file, tensor=step.tensor, expected=error.expected, found=error.found, fix=error.fix
            ) from error

    def _quantise(self, step: Quantise, buffer: memoryview) -> QuantStats:
        form = step.treatment.format
        weight = buffer[step.source]
        if step.treatment.transposed:
            from pissa_convert.transforms.merge import transposed

            weight = memoryview(transposed(weight, form.cols, form.rows))
        base, factors, stats = self.quantise(weight, form, step.treatment.split)
        fill(buffer[step.result], step.stored, base)
        for (part, _), factor in zip(step.beside, factors, strict=True):
            buffer[part] = factor
        return stats

    def quantise(
        self, weight: memoryview, form: FourBitSpec, split: SplitSpec | None
    ) -> tuple[FourBit, tuple[memoryview, ...], QuantStats]:
        """The base of one weight, and its A and B where it gets an adapter.

        Args:
            weight: its bytes, out × in.
        """
        quantiser = self.quantiser
        plain = FourBit.empty(form)
        quantiser.quantise(weight, plain)
        difference = memoryview(bytearray(4 * form.rows * form.cols))
        quantiser.subtract(weight, form.dtype, plain, difference)
        norm, plain_error = quantiser.norm(weight, form.dtype), quantiser.norm(difference, "F32")
        if split is None:
            return plain, (), QuantStats(norm, plain_error, plain_error)
        plain_nuclear, estimated = quantiser.nuclear_norm(difference, form.rows, form.cols)
        del difference, plain
        found = alternate.alternate(weight, split, form, self.iterations, self.backend, quantiser)
        nuclear = self._nuclear_norm(found, form, split)
        stats = QuantStats(norm, found.error, plain_error, nuclear, plain_nuclear)
        stats = replace(stats, iterations=found.iterations, estimated=estimated)
        found.difference = memoryview(b"")
        if self.compare_loftq:
            other = alternate.loftq(weight, split, form, self.iterations, self.backend, quantiser)
            nuclear = self._nuclear_norm(other, form, split)
            stats = replace(stats, loftq_error=other.error, loftq_nuclear=nuclear)
        return found.base, (found.a, found.b), stats

    def _nuclear_norm(self, found: alternate.Adapted, form: FourBitSpec, split: SplitSpec) -> float:
        """Of what is left: nothing in the adapter's directions of the shorter side, but for rounding.

        That of the adapter's dtype is too much to be nothing.
        """
        outside = None
        if split.adapter_dtype == "F32":
            outside = found.b if form.rows <= form.cols else found.a
        value, _ = self.quantiser.nuclear_norm(
            found.difference, form.rows, form.cols, zeros=split.rank, outside=outside
        )
        return value


def workspace_bytes(treatment: Treatment, *, compare_loftq: bool) -> int:
    """Bytes of what a lane holds while it quantises a weight, beside the step's buffer and the backend's own."""
    form, split = treatment.format, treatment.split
    copy = form.value_bytes if treatment.transposed else 0
    plain = FourBit.nbytes(form) + 4 * form.rows * form.cols
    if split is None:
        return copy + plain
    beside = alternate.result_bytes(split, form) if compare_loftq else 0
    return copy + max(plain, alternate.workspace_bytes(split, form) + beside)
