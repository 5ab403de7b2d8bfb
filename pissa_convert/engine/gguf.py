"""A model's GGUF by the way of every model: what a lane does, and the run around it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from pissa_convert.engine.factors import FactorFile
from pissa_convert.engine.gguf_sizes import size_table
from pissa_convert.engine.ledger import ProgressCallback
from pissa_convert.engine.model_rows import ModelRows
from pissa_convert.engine.run import carry_out
from pissa_convert.engine.workers import Workers
from pissa_convert.errors import WeightError
from pissa_convert.linalg import Backend
from pissa_convert.linalg.native import NativeBackend
from pissa_convert.plans.gguf.adapter import AdaptedTensor
from pissa_convert.plans.gguf.plan import GgufPlan
from pissa_convert.plans.gguf.steps import Encode, GgufSplit
from pissa_convert.plans.steps import Stats
from pissa_convert.report import GgufReport
from pissa_convert.transforms.delta import Product
from pissa_convert.transforms.ggml import Array, decode, store
from pissa_convert.transforms.gguf_split import split_gguf
from pissa_convert.transforms.merge import MergeStats


def run_gguf(
    plan: GgufPlan, workers: Workers, *, overwrite: bool = False, progress: ProgressCallback | None = None
) -> GgufReport:
    """Make a model's GGUF as planned.

    Args:
        workers: do it, with the backend that was planned with where there are splits.
        overwrite: replace an earlier conversion.
        progress: called from this thread as work is finished.

    Raises:
        PissaError: see the family; after a ConversionError the same call continues where this one stopped.
    """
    done = carry_out(plan, gguf_lanes, workers, overwrite=overwrite, progress=progress)
    with gguf_lanes(plan, NativeBackend(1)) as make:
        sizes = size_table(plan, done.tensors, make(1).exact)
    return GgufReport(
        **done.report(plan.result, plan.warnings),
        tensors=len(done.tensors),
        relative_error=max((entry["relative_error"] for entry in done.tensors.values()), default=0.0),
        usage=plan.usage,
        sizes=sizes,
    )


@contextmanager
def gguf_lanes(plan: GgufPlan, backend: Backend) -> Iterator[Callable[[int], GgufLane]]:
    """Makes a lane of so many threads, with one BLAS thread: so the number of lanes changes no byte.

    Lanes share the files they read.
    """
    with ExitStack() as stack, threadpool_limits(1, user_api="blas"):
        model = stack.enter_context(ModelRows())
        model.open_all([step.treatment.origin for step in plan.encodings if step.treatment.origin is not None])
        products: Products | None = None
        if plan.adapter is not None:
            pairs, factors = plan.adapter.pairs, stack.enter_context(FactorFile(plan.adapter.file.path))

            def products(module: str) -> Product:
                return factors.product(pairs[module])

        yield lambda threads: GgufLane(model, backend.with_threads(threads), products)


Products = Callable[[str], Product]
"""s·B and A of a module, by its name."""


@dataclass
class GgufLane:
    """Does the work of a step; the factors that all rows of a tensor share are made once for rows in a row."""

    model: ModelRows
    backend: Backend
    products: Products | None = None
    _shared: tuple[str, Array, Array] | None = field(default=None, repr=False)

    def __call__(self, step: Encode | GgufSplit, file: Path, buffer: memoryview) -> Stats:
        """Turn the rows at the front of `buffer` into what `step` says.

        Raises:
            WeightError: a value cannot be stored; names file and tensor.
        """
        try:
            stats = (
                split_gguf(step, buffer, self.backend) if isinstance(step, GgufSplit) else self._encode(step, buffer)
            )
            np.frombuffer(buffer[step.stored.stop : step.result.stop], np.uint8)[:] = 0
            return stats
        except WeightError as error:
            raise WeightError(
                error.what,
                file=error.file or file,
                tensor=error.tensor or step.tensor,
                found=error.found,
                fix=error.fix,
            ) from error

    def _encode(self, step: Encode, buffer: memoryview) -> MergeStats:
        exact, kind = self.exact(step, buffer[step.source]), step.treatment.kind
        return store(exact, kind, buffer[step.stored])

    def exact(self, step: Encode, source: memoryview) -> Array:
        """The rows before they are stored, float32."""
        origin = step.treatment.origin
        if origin is not None:
            return self.model.rows(origin, step.top, step.bottom)
        values = decode(source, step.kind, step.columns)
        if step.treatment.added is None:
            return values
        a, b = self._factors(step.treatment.added)
        expert, top = divmod(step.top, b.shape[-2])
        if a.ndim > 2:
            a, b = a[expert], b[expert]
        values += b[top : top + step.bottom - step.top] @ a
        return values

    def _factors(self, added: AdaptedTensor) -> tuple[Array, Array]:
        if self._shared is None or self._shared[0] != added.name:
            assert self.products is not None
            a, b = added.factors(self.products)
            self._shared = added.name, a.astype(np.float32), b.astype(np.float32)
        return self._shared[1:]
