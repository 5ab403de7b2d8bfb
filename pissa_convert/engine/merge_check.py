"""A merged shard against the model's and the adapter, both read side by side once, front to back."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from blake3 import blake3

from pissa_convert.engine.factors import FactorFile
from pissa_convert.engine.merge import MergeLane, adapter_file
from pissa_convert.engine.reading import digest_findings, open_to_read, read_exactly
from pissa_convert.errors import FormatError, PissaError
from pissa_convert.formats.manifest import FileRecord, Manifest
from pissa_convert.linalg.native import NativeBackend
from pissa_convert.memory import chunks
from pissa_convert.plans.merge_plan import MergePlan
from pissa_convert.plans.merge_steps import Dequantise, Merge
from pissa_convert.plans.steps import Copy, ShardPlan
from pissa_convert.transforms.check import same_bytes, widened

_TOLERANCE = 1.01
"""Measured error over the recorded one."""

_SINGLE = 1e-6
"""What adding up in float32 may have cost."""


class Side:
    """A file that is read in order and hashed on the way."""

    def __init__(self, path: Path, seen: Callable[[int], None]) -> None:
        self.path = path
        self._descriptor = open_to_read(path)
        self._digest = blake3()
        self._seen = seen
        self._size = 0

    def read(self, begin: int, end: int) -> memoryview:
        data = memoryview(bytearray(end - begin))
        read_exactly(self._descriptor, begin, data, self.path)
        self._digest.update(data)
        self._size += len(data)
        self._seen(len(data))
        return data

    def close(self) -> None:
        os.close(self._descriptor)

    @property
    def record(self) -> FileRecord:
        return FileRecord(self._size, self._digest.hexdigest())


def compare_merged(
    plan: MergePlan, shard: ShardPlan, manifest: Manifest, seen: Callable[[int], None]
) -> tuple[list[PissaError], list[float]]:
    """Compare a shard of the result with what the plan makes of the source's, and both with their records.

    Returns:
        What differs, and the measured relative error of each weight that was added to.
    """
    records = manifest.source.get(shard.source_name), manifest.output.get(shard.name)
    for path, size in ((shard.source.path, shard.source.size), (plan.dest / shard.name, shard.size)):
        found = path.stat().st_size if path.is_file() else "no file"
        if found != size:
            return [FormatError("the size differs", file=path, expected=f"{size} bytes", found=found)], []
    old, new = Side(shard.source.path, seen), Side(plan.dest / shard.name, seen)
    try:
        with adapter_file(plan) as factors:
            lane = MergeLane(factors, NativeBackend(1))
            findings, errors = _compare(plan, shard, manifest, lane, (old, new))
    except PissaError as error:
        return [error], []
    finally:
        old.close()
        new.close()
    for side, record in zip((old, new), records, strict=True):
        if record is not None:
            findings += digest_findings(side.path, record, side.record)
    return findings, errors


def _compare(
    plan: MergePlan, shard: ShardPlan, manifest: Manifest, lane: MergeLane, sides: tuple[Side, Side]
) -> tuple[list[PissaError], list[float]]:
    old, new = sides
    findings: list[PissaError] = []
    sums: dict[str, tuple[float, float]] = {}
    old.read(0, len(shard.source.header))
    if new.read(0, len(shard.header)) != shard.header:
        findings.append(FormatError("the header is not what it should be", file=new.path))
    for step in shard.steps:
        if isinstance(step, Copy):
            for begin, end in chunks(step.begin, step.end):
                at = step.at + begin - step.begin
                if not same_bytes(old.read(begin, end), new.read(at, at + end - begin)):
                    found = ", ".join(step.tensors[:2])
                    findings.append(FormatError("what was copied differs from SOURCE's", file=new.path, found=found))
            continue
        assert isinstance(step, Merge | Dequantise)
        buffer = memoryview(bytearray(step.nbytes))
        source, stored = old.read(step.begin, step.end), new.read(step.at, step.stop)
        buffer[step.source] = source
        if isinstance(step, Dequantise):
            lane.read_back(step, buffer)
            buffer, step = buffer[step.matrix], step.merge
            source = memoryview(bytes(buffer[step.source]))
        lane(step, shard.source.path, buffer)
        _compare_head(plan, step, buffer, findings)
        if step.main.change.pair is None:
            if not same_bytes(buffer[step.result], stored):
                findings.append(FormatError("it is not what was to take its place", file=new.path, tensor=step.tensor))
            continue
        error, norm = _measure(step, lane, source, stored)
        before = sums.get(step.tensor, (0.0, 0.0))
        sums[step.tensor] = before[0] + error, before[1] + norm
    errors = {name: math.sqrt(error / norm) if norm else math.sqrt(error) for name, (error, norm) in sums.items()}
    for name, measured in errors.items():
        recorded = manifest.tensors.get(name, {"relative_error": 0.0})["relative_error"]
        if not measured <= _TOLERANCE * recorded + _SINGLE:  # NaN compares false: it must not pass
            findings.append(
                FormatError(
                    "it is not W + s·B·A",
                    file=new.path,
                    tensor=name,
                    expected=f"a relative difference of {recorded:.2e}",
                    found=f"{measured:.2e}",
                )
            )
    return findings, [*errors.values()]


def _measure(step: Merge, lane: MergeLane, source: memoryview, stored: memoryview) -> tuple[float, float]:
    """‖stored − (W + s·B·A)‖² and ‖W + s·B·A‖² of some rows, in float64."""
    shape = (step.bottom - step.top, step.columns)
    old, dtype = lane.rows_before(step, step.main, source)
    exact = widened(old, dtype, shape)
    addition = lane.addition(step, step.main)
    if addition is not None:
        exact += addition.left.astype(np.float64) @ addition.right.astype(np.float64)
    difference = widened(stored, step.main.dtype, shape) - exact
    return float(np.vdot(difference, difference)), float(np.vdot(exact, exact))


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
