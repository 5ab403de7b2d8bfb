"""`--to merged`: a lane that adds an adapter to rows of a model, and the run around it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from pissa_convert.engine.factors import FactorFile
from pissa_convert.engine.lanes import MakeTransform
from pissa_convert.engine.ledger import ProgressCallback
from pissa_convert.engine.run import carry_out
from pissa_convert.engine.workers import Workers
from pissa_convert.errors import WeightError
from pissa_convert.formats.bitsandbytes import unpack
from pissa_convert.formats.safetensors import TensorInfo
from pissa_convert.linalg import Backend
from pissa_convert.linalg.native import NativeBackend
from pissa_convert.plans.merge_plan import MergePlan
from pissa_convert.plans.merge_steps import Dequantise, Merge, Target
from pissa_convert.report import MergeReport
from pissa_convert.transforms.merge import WIDTHS, Addition, Array, MergeStats, merge_rows, transposed


def run_merge(
    plan: MergePlan, workers: Workers, *, overwrite: bool = False, progress: ProgressCallback | None = None
) -> MergeReport:
    """Merge as planned.

    Args:
        plan: what to do.
        workers: do it.
        overwrite: replace an earlier conversion in the destination.
        progress: called from this thread as work is finished.

    Raises:
        PissaError: see the family; after a ConversionError the same call continues where this one stopped.
    """
    done = carry_out(plan, merge_lanes, workers, overwrite=overwrite, progress=progress)
    return MergeReport(
        **done.report(plan.dest, plan.warnings),
        tensors=len(done.tensors),
        relative_error=max((entry["relative_error"] for entry in done.tensors.values()), default=0.0),
    )


@contextmanager
def merge_lanes(plan: MergePlan, backend: Backend) -> Iterator[MakeTransform]:
    """Makes lanes that merge, with one BLAS thread in each: so the number of lanes changes no byte."""
    with adapter_file(plan) as factors, threadpool_limits(1, user_api="blas"):
        quantiser = NativeBackend(backend.threads)
        yield lambda threads: MergeLane(factors, quantiser)


def adapter_file(plan: MergePlan) -> AbstractContextManager[FactorFile | None]:
    """The adapter's tensors, where there is one."""
    return nullcontext() if plan.adapter is None else FactorFile(plan.adapter.file.path)


@dataclass
class MergeLane:
    """Does the work of a step; the factor that all rows of a tensor share is read once for rows in a row."""

    adapter: FactorFile | None
    quantiser: NativeBackend
    _shared: tuple[str, Array] | None = field(default=None, repr=False)

    @property
    def factors(self) -> FactorFile:
        """The adapter's: only steps that change something ask."""
        assert self.adapter is not None
        return self.adapter

    def __call__(self, step: Merge | Dequantise, file: Path, buffer: memoryview) -> MergeStats:
        """Turn the rows at the front of `buffer` into what `step` says.

        Raises:
            WeightError: a value cannot be merged; names file and tensor.
        """
        try:
            if isinstance(step, Dequantise):
                self.read_back(step, buffer)
                return self(step.merge, file, buffer[step.matrix])
            stats = MergeStats()
            for part, _ in step.beside:  # before the rows themselves change
                assert step.head is not None
                stats += self._fill(step, step.head, buffer, buffer[part])
            return stats + self._fill(step, step.main, buffer, buffer[step.result])
        except WeightError as error:
            raise WeightError(
                error.what,
                file=error.file or file,
                tensor=error.tensor or step.tensor,
                found=error.found,
                fix=error.fix,
            ) from error

    def read_back(self, step: Dequantise, buffer: memoryview) -> None:
        """Put the matrix that is stored at the front of `buffer` where the merge expects it.

        Raises:
            WeightError: what is stored is damaged.
        """
        stored, matrix = step.stored, buffer[step.matrix][step.merge.source]
        base = unpack(buffer[step.source], stored.tensors, stored.form)
        if not stored.transposed:
            self.quantiser.dequantise(base, matrix)
            return
        turned = memoryview(bytearray(len(matrix)))
        self.quantiser.dequantise(base, turned)
        matrix[:] = transposed(turned, stored.form.rows, stored.form.cols)

    def _fill(self, step: Merge, target: Target, buffer: memoryview, out: memoryview) -> MergeStats:
        old, dtype = self.rows_before(step, target, buffer[step.source])
        return merge_rows(old, dtype, out, target.dtype, step.columns, self.addition(step, target))

    def rows_before(self, step: Merge, target: Target, source: memoryview) -> tuple[memoryview, str]:
        """The rows that are added to, and their dtype: the model's, or the adapter's in their place."""
        whole = target.change.whole
        if whole is None:
            return source, step.dtype
        width = step.columns * WIDTHS[whole.dtype]
        return self.factors.raw(whole, step.top * width, step.bottom * width), whole.dtype

    def addition(self, step: Merge, target: Target) -> Addition | None:
        """What is added to a step's rows."""
        pair = target.change.pair
        if pair is None:
            return None
        rows = slice(step.top, step.bottom)
        if target.change.is_bias:
            return Addition(_single(self.factors.bias(pair)[rows, None]), np.ones((1, 1), np.float32))
        if target.change.transposed:
            left = self.factors.values(pair.a)[:, rows].T
            right = self._remember(pair.b, lambda: pair.scaling * self.factors.values(pair.b).T)
        else:
            left = pair.scaling * self.factors.rows(pair.b, step.top, step.bottom)
            right = self._remember(pair.a, lambda: self.factors.values(pair.a))
        return Addition(_single(left), right)

    def _remember(self, tensor: TensorInfo, read: Callable[[], np.ndarray]) -> Array:
        if self._shared is None or self._shared[0] != tensor.name:
            self._shared = tensor.name, _single(read())
        return self._shared[1]


def _single(values: np.ndarray) -> Array:
    return np.ascontiguousarray(values, np.float32)
