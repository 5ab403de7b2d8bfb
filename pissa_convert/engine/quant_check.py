"""A shard of a 4-bit base against the source's and the adapter, read side by side once, front to back."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pissa_convert.engine.comparison import Adapter
from pissa_convert.engine.merge_check import Side
from pissa_convert.engine.reading import digest_findings
from pissa_convert.errors import FormatError, PissaError
from pissa_convert.formats.bitsandbytes import unpack
from pissa_convert.formats.manifest import Manifest
from pissa_convert.memory import chunks
from pissa_convert.plans.quant_plan import QuantPlan
from pissa_convert.plans.quant_steps import Quantise
from pissa_convert.plans.steps import Copy, ShardPlan
from pissa_convert.transforms.check import read_back, same_bytes, widened

_TOLERANCE = 1.01
"""Measured error over the recorded one."""

_ROWS = 1 << 20
"""Values that are compared at a time."""


def compare_quantised(
    plan: QuantPlan, shard: ShardPlan, manifest: Manifest, adapter: Adapter, seen: Callable[[int], None]
) -> tuple[list[PissaError], list[float]]:
    """Compare a shard of the result with the source's, and both with their records.

    Returns:
        What differs, and the measured ‖W − (Q + s·B·A)‖/‖W‖ of each weight with an adapter (‖W − Q‖/‖W‖ without).
    """
    paths = shard.source.path, plan.dest / shard.name
    for path, size in zip(paths, (shard.source.size, shard.size), strict=True):
        found = path.stat().st_size if path.is_file() else "no file"
        if found != size:
            return [FormatError("the size differs", file=path, expected=f"{size} bytes", found=found)], []
    sides = Side(paths[0], seen), Side(paths[1], seen)
    findings: list[PissaError] = []
    errors: list[float] = []
    try:
        _compare(plan, shard, manifest, adapter, sides, findings, errors)
    except PissaError as error:
        findings.append(error)
        return findings, errors
    finally:
        for side in sides:
            side.close()
    for side, record in zip(sides, (manifest.source[shard.source_name], manifest.output[shard.name]), strict=True):
        findings += digest_findings(side.path, record, side.record)
    return findings, errors


def _compare(
    plan: QuantPlan,
    shard: ShardPlan,
    manifest: Manifest,
    adapter: Adapter,
    sides: tuple[Side, Side],
    findings: list[PissaError],
    errors: list[float],
) -> None:
    old, new = sides
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
        assert isinstance(step, Quantise)
        source, stored = old.read(step.begin, step.end), new.read(step.at, step.stop)
        measured = _relative_error(plan, step, source, stored, manifest.tensors[step.tensor]["module"], adapter)
        errors.append(measured)
        recorded = manifest.tensors[step.tensor]["relative_error"]
        if not measured <= _TOLERANCE * recorded:  # NaN compares false: it must not pass
            findings.append(_finding(new.path, step, recorded, measured))


def _finding(path: Path, step: Quantise, recorded: float, measured: float) -> FormatError:
    return FormatError(
        "it is not as near to SOURCE's as its record says",
        file=path,
        tensor=step.tensor,
        expected=f"‖W − (Q + s·B·A)‖/‖W‖ of {recorded:.2e}",
        found=f"{measured:.2e}",
    )


def _relative_error(
    plan: QuantPlan, step: Quantise, source: memoryview, stored: memoryview, module: str, adapter: Adapter
) -> float:
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
    return math.sqrt(error / norm) if norm else math.sqrt(error)
