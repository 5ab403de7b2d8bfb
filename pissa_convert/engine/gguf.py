"""A model's GGUF by the way of every model: what a lane does, and the run around it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from pissa_convert.engine.model_rows import ModelRows
from pissa_convert.engine.run import Outcome, ProgressCallback, carry_out
from pissa_convert.errors import WeightError
from pissa_convert.gguf_plan import GgufPlan
from pissa_convert.gguf_steps import Encode
from pissa_convert.memory import peak_resident_bytes
from pissa_convert.report import GgufReport
from pissa_convert.transforms.ggml import Array, decode, encode
from pissa_convert.transforms.merge import MergeStats


def run_gguf(plan: GgufPlan, *, overwrite: bool = False, progress: ProgressCallback | None = None) -> GgufReport:
    """Make a model's GGUF as planned.

    Args:
        overwrite: replace an earlier conversion.
        progress: called from this thread as work is finished.

    Raises:
        PissaError: see the family; after a ConversionError the same call continues where this one stopped.
    """
    # One BLAS thread in each lane: so the number of lanes changes no byte.
    with ExitStack() as stack, threadpool_limits(1, user_api="blas"):
        done = carry_out(plan, gguf_lanes(plan, plan.memory.lanes, stack), overwrite=overwrite, progress=progress)
    return gguf_report(plan, done)


def gguf_report(plan: GgufPlan, done: Outcome) -> GgufReport:
    """What is said of a finished run."""
    return GgufReport(
        dest=plan.dest / plan.alone,
        tensors=len(done.tensors),
        resumed=done.resumed,
        complete_before=done.complete_before,
        wall_seconds=done.wall_seconds,
        timings=done.timings,
        relative_error=max((entry["relative_error"] for entry in done.tensors.values()), default=0.0),
        peak_memory=peak_resident_bytes(),
        warnings=plan.warnings,
        usage=plan.usage,
    )


def gguf_lanes(plan: GgufPlan, count: int, stack: ExitStack) -> Sequence[GgufLane]:
    """Lanes that share the files they read, which `stack` closes."""
    model = stack.enter_context(ModelRows())
    model.open_all([step.treatment.origin for step in plan.encodings if step.treatment.origin is not None])
    return [GgufLane(model) for _ in range(count)]


@dataclass
class GgufLane:
    """Does the work of a step."""

    model: ModelRows

    def __call__(self, step: Encode, file: Path, buffer: memoryview) -> MergeStats:
        """Turn the rows at the front of `buffer` into what `step` says.

        Raises:
            WeightError: a value cannot be stored; names file and tensor.
        """
        try:
            exact = self.exact(step, buffer[step.source])
            stored = buffer[step.stored]
            encode(exact, step.treatment.kind, stored)
            np.frombuffer(buffer[step.stored.stop : step.result.stop], np.uint8)[:] = 0
            return measure(exact, decode(stored, step.treatment.kind, step.columns))
        except WeightError as error:
            raise WeightError(
                error.what,
                file=error.file or file,
                tensor=error.tensor or step.tensor,
                found=error.found,
                fix=error.fix,
            ) from error

    def exact(self, step: Encode, source: memoryview) -> Array:
        """The rows before they are stored, float32."""
        origin = step.treatment.origin
        if origin is not None:
            return self.model.rows(origin, step.top, step.bottom)
        return decode(source, step.kind, step.columns)


def measure(exact: Array, stored: Array) -> MergeStats:
    """What storing has cost."""
    difference = stored - exact
    return MergeStats(float(np.vdot(difference, difference)), float(np.vdot(exact, exact)))
