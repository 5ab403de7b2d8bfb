"""Split one weight of a GGUF: decoded, split, and its residual encoded again, some rows at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from pissa_convert.linalg import Backend, SplitStats
from pissa_convert.plans.gguf.steps import VALUES, GgufSplit
from pissa_convert.transforms.ggml import decode, store
from pissa_convert.transforms.merge import MergeStats


def split_gguf(step: GgufSplit, buffer: memoryview, backend: Backend) -> SplitStats:
    """Split the rows at the front of `buffer`, laid out as `step` says.

    Returns:
        The statistics; relative_error is that of the residual as it is stored, in its own type.

    Raises:
        WeightError: a value cannot be split or stored.
    """
    (a, _), (b, _) = step.beside
    work = buffer[step.work]
    if step.in_place:
        return backend.split(work, buffer[a], buffer[b], step.spec)
    columns = step.spec.cols
    values = np.frombuffer(work, np.float32).reshape(-1, columns)
    norm = 0.0
    for rows in _pieces(step):
        values[rows] = decode(_rows(buffer[step.source], step, rows), step.kind, columns)
        norm += float(np.vdot(values[rows], values[rows]))
    stats = backend.split(work, buffer[a], buffer[b], step.spec)
    cost = MergeStats()
    for rows in _pieces(step):
        cost += store(values[rows], step.stored_kind, _rows(buffer[step.stored], step, rows))
    return replace(stats, relative_error=math.sqrt(cost.error / norm) if norm else 0.0)


def _pieces(step: GgufSplit) -> Iterator[slice]:
    """Some rows at a time."""
    count = max(1, VALUES // step.spec.cols)
    return (slice(top, min(top + count, step.spec.rows)) for top in range(0, step.spec.rows, count))


def _rows(data: memoryview, step: GgufSplit, rows: slice) -> memoryview:
    width = len(data) // step.spec.rows
    return data[rows.start * width : rows.stop * width]
