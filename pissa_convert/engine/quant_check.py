"""A shard of a 4-bit base against the source's and the adapter."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pissa_convert.engine.comparison import Adapter
from pissa_convert.engine.side_by_side import Finding, Squares, compare_side_by_side
from pissa_convert.formats.bitsandbytes import unpack
from pissa_convert.formats.manifest import Manifest
from pissa_convert.plans.quant_plan import QuantPlan
from pissa_convert.plans.quant_steps import Quantise
from pissa_convert.plans.steps import ShardPlan
from pissa_convert.transforms.check import read_back, widened

_ROWS = 1 << 20
"""Values that are compared at a time."""


def compare_quantised(
    plan: QuantPlan, shard: ShardPlan, manifest: Manifest, adapter: Adapter, seen: Callable[[int], None]
) -> Finding:
    """Compare a shard of the result with the source's, and both with their records.

    What is measured is ‖W − (Q + s·B·A)‖/‖W‖ of each weight with an adapter, ‖W − Q‖/‖W‖ of the others.
    """

    def measure(step: Quantise, old: memoryview, new: memoryview) -> tuple[str, Squares]:
        return step.tensor, _measure(plan, step, old, new, manifest.tensors[step.tensor]["module"], adapter)

    wrong = "it is not as near to SOURCE's as its record says"
    return compare_side_by_side(shard, plan.dest / shard.name, manifest, seen, measure, wrong, [])


def _measure(
    plan: QuantPlan, step: Quantise, source: memoryview, stored: memoryview, module: str, adapter: Adapter
) -> Squares:
    treatment, form = step.treatment, step.treatment.format
    shape = (form.cols, form.rows) if treatment.transposed else (form.rows, form.cols)
    weight = widened(source, form.dtype, shape)
    if treatment.transposed:
        weight = weight.T
    base = read_back(unpack(stored, step.stored, form))
    a, b = adapter.factors(module) if treatment.split is not None else (None, None)
    error = norm = 0.0
    count = max(1, _ROWS // form.cols)
    for top in range(0, form.rows, count):
        rows = slice(top, top + count)
        difference = weight[rows] - base[rows]
        if b is not None:
            difference -= plan.options.split.scaling * b[rows] @ a
        error += float(np.vdot(difference, difference))
        norm += float(np.vdot(weight[rows], weight[rows]))
    return error, norm
