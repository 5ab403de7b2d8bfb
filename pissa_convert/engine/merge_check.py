"""A merged shard against the model's and the adapter."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pissa_convert.engine.factors import FactorFile
from pissa_convert.engine.merge import MergeLane, adapter_file
from pissa_convert.engine.side_by_side import Finding, Squares, compare_side_by_side, squares
from pissa_convert.errors import FormatError, PissaError
from pissa_convert.formats.manifest import Manifest
from pissa_convert.linalg.native import NativeBackend
from pissa_convert.plans.merge_plan import MergePlan
from pissa_convert.plans.merge_steps import Dequantise, Merge
from pissa_convert.plans.steps import ShardPlan
from pissa_convert.transforms.check import same_bytes, widened


def compare_merged(plan: MergePlan, shard: ShardPlan, manifest: Manifest, seen: Callable[[int], None]) -> Finding:
    """Compare a shard of the result with what the plan makes of the source's, and both with their records."""
    stored = plan.dest / shard.name
    findings: list[PissaError] = []
    with adapter_file(plan) as factors:
        lane = MergeLane(factors, NativeBackend(1))

        def measure(step: Merge | Dequantise, old: memoryview, new: memoryview) -> tuple[str, Squares] | None:
            buffer = memoryview(bytearray(step.nbytes))
            buffer[step.source] = old
            if isinstance(step, Dequantise):
                lane.read_back(step, buffer)
                buffer, step = buffer[step.matrix], step.merge
                old = memoryview(bytes(buffer[step.source]))
            lane(step, shard.source.path, buffer)
            _compare_head(plan, step, buffer, findings)
            if step.main.change.pair is not None:
                return step.tensor, _measure(step, lane, old, new)
            if not same_bytes(buffer[step.result], new):
                findings.append(FormatError("it is not what was to take its place", file=stored, tensor=step.tensor))
            return None

        return compare_side_by_side(shard, stored, manifest, seen, measure, "it is not W + s·B·A", findings)


def _measure(step: Merge, lane: MergeLane, source: memoryview, stored: memoryview) -> Squares:
    """Stored rows against W + s·B·A."""
    shape = (step.bottom - step.top, step.columns)
    old, dtype = lane.rows_before(step, step.main, source)
    exact = widened(old, dtype, shape)
    addition = lane.addition(step, step.main)
    if addition is not None:
        exact += addition.left.astype(np.float64) @ addition.right.astype(np.float64)
    return squares(exact, widened(stored, step.main.dtype, shape))


def _compare_head(plan: MergePlan, step: Merge, buffer: memoryview, findings: list[PissaError]) -> None:
    """The rows of an untied head; added up again by the same code, they may differ in a last bit on another CPU."""
    if plan.beside is None:
        return
    for part, slot in step.beside:
        with FactorFile(plan.dest / plan.beside.name) as file:
            stored = file.rows(slot, 0, slot.shape[0])
        made = widened(buffer[part], slot.dtype, slot.shape)
        if not np.linalg.norm(stored - made) <= 1e-3 * np.linalg.norm(made):
            findings.append(FormatError("its rows differ", file=plan.dest / plan.beside.name, tensor=slot.name))
