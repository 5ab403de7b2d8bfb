"""`--to qpissa`: the run around the quantising of weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pissa_convert.engine.lanes import MakeTransform
from pissa_convert.engine.ledger import ProgressCallback
from pissa_convert.engine.run import carry_out
from pissa_convert.engine.workers import Workers
from pissa_convert.linalg import Backend
from pissa_convert.linalg.native import NativeBackend
from pissa_convert.plans.quant_plan import QuantPlan
from pissa_convert.plans.quant_stats import overall
from pissa_convert.report import QuantReport
from pissa_convert.transforms.quantise import QuantiseLane


def run_quantised(
    plan: QuantPlan, workers: Workers, *, overwrite: bool = False, progress: ProgressCallback | None = None
) -> QuantReport:
    """Quantise a model as planned.

    Args:
        plan: what to do.
        workers: do it.
        overwrite: replace an earlier conversion in the destination.
        progress: called from this thread as work is finished.

    Raises:
        PissaError: see the family; after a ConversionError the same call continues where this one stopped.
    """
    done = carry_out(plan, quantising_lanes, workers, overwrite=overwrite, progress=progress)
    adapted = [entry for entry in done.tensors.values() if entry["adapted"]]
    types: dict[str, list[dict[str, Any]]] = {}
    for entry in adapted:
        types.setdefault(entry["module"].rpartition(".")[2], []).append(dict(entry))
    return QuantReport(
        **done.report(plan.dest, workers.warnings),
        tensors={name: dict(entry) for name, entry in done.tensors.items()},
        adapted=overall(adapted),
        by_type={name: overall(entries) for name, entries in types.items()},
    )


@contextmanager
def quantising_lanes(plan: QuantPlan, backend: Backend) -> Iterator[MakeTransform]:
    """Makes lanes that quantise."""
    options = plan.options

    def make(threads: int) -> QuantiseLane:
        lane = backend.with_threads(threads)
        quantiser = lane if isinstance(lane, NativeBackend) else NativeBackend(threads)  # a GPU splits, and no more
        return QuantiseLane(lane, quantiser, options.iterations, options.compare_loftq)

    yield make
