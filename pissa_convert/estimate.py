"""How long the computing of a plan will take, from a moment's measurement on this machine."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from pissa_convert.linalg import SplitSpec
from pissa_convert.linalg.native import NativeBackend
from pissa_convert.planning import Plan

_SIZE = 1024


def estimate_seconds(plan: Plan, threads: int | None = None) -> float:
    """Seconds of computing: one small split of the plan's rank and dtype is timed and scaled by the weights' sizes.

    The work of a split grows with its elements; shapes and spectra make it differ by a factor of about two.
    """
    backend = NativeBackend(threads)
    rank = min(plan.options.rank, _SIZE)
    per_element: dict[str, float] = {}
    total = 0.0
    for step in plan.splits:
        dtype = step.spec.dtype
        if dtype not in per_element:
            per_element[dtype] = _time_one(backend, dtype, rank) / _SIZE**2
        total += per_element[dtype] * step.spec.rows * step.spec.cols
    return total


def _time_one(backend: NativeBackend, dtype: str, rank: int) -> float:
    generator = np.random.default_rng(0)
    matrix = generator.standard_normal((_SIZE, _SIZE), np.float32)
    matrix *= np.linspace(4, 1, _SIZE, dtype=np.float32) ** 2
    raw: np.ndarray[Any, np.dtype[Any]] = matrix
    if dtype == "F16":
        raw = matrix.astype(np.float16)
    elif dtype == "BF16":
        raw = (matrix.view(np.uint32) >> 16).astype(np.uint16)
    spec = SplitSpec(_SIZE, _SIZE, dtype, rank, 1.0, "F32", False, None, 0)
    a, b = bytearray(4 * rank * _SIZE), bytearray(4 * rank * _SIZE)
    seconds = []
    for _ in range(3):
        work = raw.copy().data
        started = time.perf_counter()
        backend.split(work, memoryview(a), memoryview(b), spec)
        seconds.append(time.perf_counter() - started)
    return min(seconds)
