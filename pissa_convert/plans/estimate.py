"""How long the computing of a plan will take, from a moment's measurement on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from pissa_convert.formats.gguf_types import TYPES
from pissa_convert.linalg import Backend, FourBitSpec, SplitSpec
from pissa_convert.linalg.native import NativeBackend
from pissa_convert.plans.gguf.options import GgufSplitOptions
from pissa_convert.plans.gguf.plan import GgufPlan
from pissa_convert.plans.gguf.steps import Encode, GgufSplit
from pissa_convert.plans.lora_plan import LoraPlan
from pissa_convert.plans.merge_plan import MergePlan
from pissa_convert.plans.merge_steps import Dequantise
from pissa_convert.plans.quant_plan import QuantPlan
from pissa_convert.plans.split_plan import Plan
from pissa_convert.transforms.delta import Product, decompose
from pissa_convert.transforms.ggml import can_encode, decode, store
from pissa_convert.transforms.merge import Addition, merge_rows
from pissa_convert.transforms.quantise import QuantiseLane

_SIZE = 1024


def estimate_seconds(plan: Plan, backend: Backend) -> float:
    """Seconds of computing: one small split of the plan's rank and dtype is timed and scaled by the weights' sizes.

    The work of a split grows with its elements; shapes and spectra make it differ by a factor of about two.
    """
    seconds = 0.0
    for width, specs in _by_width(plan).items():
        # CPUs work on weights side by side; a GPU's lanes only hide copying.
        lanes = backend.threads // width if isinstance(backend, NativeBackend) else 1
        seconds += estimate_split_seconds(specs, plan.options.rank, backend.with_threads(width)) / lanes
    return seconds


def _by_width(plan: Plan) -> Mapping[int, list[SplitSpec]]:
    found: dict[int, list[SplitSpec]] = {}
    for step in plan.splits:
        found.setdefault(plan.memory.widths(step.nbytes), []).append(step.spec)
    return found


def estimate_split_seconds(specs: Iterable[SplitSpec], rank: int, backend: Backend) -> float:
    """The same for any splits of that rank."""
    per_element: dict[str, float] = {}
    total = 0.0
    for spec in specs:
        if spec.dtype not in per_element:
            per_element[spec.dtype] = _time_one(backend, spec.dtype, min(rank, _SIZE)) / _SIZE**2
        total += per_element[spec.dtype] * spec.rows * spec.cols
    return total


def estimate_quant_seconds(plan: QuantPlan) -> float:
    """Seconds of computing: one small weight is quantised as the plan says, and scaled by the weights' sizes."""
    options = plan.options
    rank = min(options.split.rank, _SIZE)
    native = NativeBackend(1)
    lane = QuantiseLane(native, native, options.iterations, options.compare_loftq)
    seconds: dict[tuple[str, bool], float] = {}
    total = 0.0
    for step in plan.weights:
        form, adapted = step.treatment.format, step.treatment.split is not None
        kind = form.dtype, adapted
        if kind not in seconds:
            seconds[kind] = _fastest(partial(_quantise_one, lane, form, rank if adapted else 0)) / _SIZE**2
        total += seconds[kind] * form.rows * form.cols
    return total / plan.memory.widths.threads


def _quantise_one(lane: QuantiseLane, like: FourBitSpec, rank: int) -> None:
    form = replace(like, rows=_SIZE, cols=_SIZE)
    split = SplitSpec(_SIZE, _SIZE, form.dtype, rank, 1.0, "F32", False, None, 0) if rank else None
    lane.quantise(memoryview(_matrix(form.dtype).tobytes()), form, split)


def _time_one(backend: Backend, dtype: str, rank: int) -> float:
    raw = _matrix(dtype)
    spec = SplitSpec(_SIZE, _SIZE, dtype, rank, 1.0, "F32", False, None, 0)
    a, b = bytearray(4 * rank * _SIZE), bytearray(4 * rank * _SIZE)
    seconds = []
    for _ in range(3):
        work = raw.copy().data
        started = time.perf_counter()
        backend.split(work, memoryview(a), memoryview(b), spec)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _matrix(dtype: str) -> np.ndarray[Any, np.dtype[Any]]:
    """Leading directions as a language model has them, over a bulk of noise."""
    generator = np.random.default_rng(0)
    left, right = (generator.standard_normal((_SIZE, _SIZE // 4), np.float32) for _ in "lr")
    matrix = left * np.arange(1, _SIZE // 4 + 1, dtype=np.float32) ** -0.4 @ right.T
    matrix += 4 * generator.standard_normal((_SIZE, _SIZE), np.float32)
    raw: np.ndarray[Any, np.dtype[Any]] = matrix
    if dtype == "F16":
        raw = matrix.astype(np.float16)
    elif dtype == "BF16":
        raw = (matrix.view(np.uint32) >> 16).astype(np.uint16)
    return raw


def estimate_lora_seconds(plan: LoraPlan) -> float:
    """Seconds of computing: one module of the plan's largest rank is timed and scaled by sides and ranks."""

    def work(side: float, rank: int) -> float:
        return side * rank**2

    rank = max(module.trained.rank + module.init.rank for module in plan.modules)
    generator = np.random.default_rng(0)
    product = Product(generator.standard_normal((_SIZE, rank)), generator.standard_normal((rank, _SIZE)))
    with threadpool_limits(1, user_api="blas"):
        each = _fastest(lambda: decompose(product).factors(rank)) / work(2 * _SIZE, rank)
    total = sum(
        work(module.trained.size_out + module.trained.size_in, module.trained.rank + module.init.rank)
        for module in plan.modules
    )
    return each * total / plan.in_flight


def estimate_merge_seconds(plan: MergePlan) -> float:
    """Seconds of computing: some rows of the plan's largest rank are timed and scaled by the values that change."""
    pairs = {} if plan.adapter is None else plan.adapter.pairs
    rank = max((pair.rank for pair in pairs.values()), default=1)
    rows = memoryview(bytearray(2 * _SIZE**2))
    addition = Addition(np.zeros((_SIZE, rank), np.float32), np.zeros((rank, _SIZE), np.float32))
    with threadpool_limits(1, user_api="blas"):
        each = _fastest(lambda: merge_rows(rows, "BF16", rows, "BF16", _SIZE, addition)) / _SIZE**2
    steps = [step.merge if isinstance(step, Dequantise) else step for step in plan.merges]
    return each * sum((step.bottom - step.top) * step.columns for step in steps) / plan.memory.widths.threads


def estimate_gguf_seconds(plan: GgufPlan, backend: Backend) -> float:
    """Seconds of computing: some rows of each pair of types are decoded and encoded, and splits timed as a split's."""
    values = np.random.default_rng(0).standard_normal((_SIZE // 4, _SIZE), np.float32)
    each: dict[tuple[str, str], float] = {}
    total = 0.0
    steps: list[Encode | GgufSplit] = [*plan.encodings, *plan.splits]
    for step in steps:
        types = step.kind if can_encode(step.kind) else "Q4_0", step.stored_kind
        if types not in each:
            each[types] = _recode_seconds(values, *types) / values.size
        total += each[types] * step.rows * step.columns / plan.memory.widths.threads
    if isinstance(plan.options, GgufSplitOptions):
        total += estimate_split_seconds((step.spec for step in plan.splits), plan.options.split.rank, backend)
    return total


def _recode_seconds(values: np.ndarray[Any, np.dtype[np.float32]], old: str, new: str) -> float:
    columns = values.shape[1]
    source, stored = (
        memoryview(bytearray(values.size // columns * TYPES[kind].row_bytes(columns))) for kind in (old, new)
    )
    store(values, old, source)

    def recode() -> None:
        store(decode(source, old, columns), new, stored)

    return _fastest(recode)


def _fastest(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
