"""A shard of a result and of its source, read side by side once, and held against one another and their records."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from pissa_convert.engine.reading import digest_findings, open_to_read, read_exactly
from pissa_convert.errors import FormatError, PissaError
from pissa_convert.formats.manifest import FileRecord, Manifest
from pissa_convert.memory import chunks
from pissa_convert.plans.steps import Copy, ShardPlan
from pissa_convert.transforms.check import same_bytes

_TOLERANCE = 1.01
"""Measured error over the recorded one."""

_SINGLE = 1e-6
"""What adding up in float32 may have cost."""

Finding = tuple[list[PissaError], list[float]]
"""What differs, and the measured relative error of each weight."""

Squares = tuple[float, float]
"""‖stored − exact‖² and ‖exact‖² of some values, in float64."""

Measure = Callable[[Any, memoryview, memoryview], tuple[str, Squares] | None]
"""From a step and its bytes on both sides to the weight's name in the manifest and what to add to its squares; None
where there is nothing to measure."""


class Side:
    """A file that is read in order and hashed on the way."""

    def __init__(self, path: Path, seen: Callable[[int], None]) -> None:
        self.path = path
        self._descriptor = open_to_read(path)
        self._digest = blake3()
        self._seen = seen
        self._size = 0

    def read(self, begin: int, end: int) -> memoryview:
        """The next bytes, in memory of their own."""
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
        """Of what was read."""
        return FileRecord(self._size, self._digest.hexdigest())


def compare_side_by_side(
    shard: ShardPlan,
    stored: Path,
    manifest: Manifest,
    seen: Callable[[int], None],
    measure: Measure,
    wrong: str,
    findings: list[PissaError],
) -> Finding:
    """Compare a shard with its source.

    Args:
        shard: as planned.
        stored: its file.
        seen: called with the bytes that were read.
        measure: compares the steps that are no copies.
        wrong: what is said of a weight whose error is more than recorded.
        findings: of this shard; `measure` may add some.
    """
    paths = shard.source.path, stored
    for path, size in zip(paths, (shard.source.size, shard.size), strict=True):
        found = path.stat().st_size if path.is_file() else "no file"
        if found != size:
            return [FormatError("the size differs", file=path, expected=f"{size} bytes", found=found)], []
    sides = Side(paths[0], seen), Side(paths[1], seen)
    errors: dict[str, float] = {}
    try:
        errors = _walk(shard, sides, measure, findings)
    except PissaError as error:
        return [*findings, error], []
    finally:
        for side in sides:
            side.close()
    for name, measured in errors.items():
        findings += judged(name, measured, manifest, stored, wrong)
    records = manifest.source.get(shard.source_name), manifest.output.get(shard.name)
    for side, record in zip(sides, records, strict=True):
        if record is not None:
            findings += digest_findings(side.path, record, side.record)
    return findings, [*errors.values()]


def _walk(shard: ShardPlan, sides: tuple[Side, Side], measure: Measure, findings: list[PissaError]) -> dict[str, float]:
    old, new = sides
    sums: dict[str, Squares] = {}
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
        measured = measure(step, old.read(step.begin, step.end), new.read(step.at, step.stop))
        if measured is not None:
            name, (off, norm) = measured
            before = sums.get(name, (0.0, 0.0))
            sums[name] = before[0] + off, before[1] + norm
    return {name: relative(squares) for name, squares in sums.items()}


def relative(squares: Squares) -> float:
    """‖stored − exact‖ / ‖exact‖; the difference itself where that would divide by zero."""
    off, norm = squares
    return math.sqrt(off / norm) if norm else math.sqrt(off)


def judged(name: str, measured: float, manifest: Manifest, path: Path, wrong: str) -> list[PissaError]:
    """What is to be said of a weight's error: nothing where it is what the manifest records."""
    recorded = manifest.tensors.get(name, {"relative_error": 0.0})["relative_error"]
    if measured <= _TOLERANCE * recorded + _SINGLE:  # NaN compares false: it must not pass
        return []
    expected, found = f"a relative difference of {recorded:.2e}", f"{measured:.2e}"
    return [FormatError(wrong, file=path, tensor=name, expected=expected, found=found)]


def squares(exact: Any, stored: Any) -> Squares:
    """Of two arrays of one shape."""
    exact = exact.astype(np.float64)
    off = stored - exact
    return float(np.vdot(off, off)), float(np.vdot(exact, exact))
