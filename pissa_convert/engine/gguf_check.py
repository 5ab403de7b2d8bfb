"""A GGUF against what it was made from: all is planned again, and what is stored held against what it should be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from pissa_convert.engine.factors import FactorFile
from pissa_convert.engine.gguf import GgufLane, gguf_lanes
from pissa_convert.engine.gguf_adapter import matrices, products_of, with_known_ranks
from pissa_convert.engine.side_by_side import Finding, Squares, compare_side_by_side, judged, relative, squares
from pissa_convert.errors import FormatError, PissaError, RequestError
from pissa_convert.formats.gguf_types import TYPES
from pissa_convert.formats.manifest import Manifest
from pissa_convert.formats.safetensors import TensorInfo
from pissa_convert.linalg.native import NativeBackend
from pissa_convert.options import RunOptions
from pissa_convert.plans.gguf.adapter_plan import GgufAdapterPlan
from pissa_convert.plans.gguf.plan import GgufPlan
from pissa_convert.plans.gguf.requests import plan_merged_gguf, plan_split_gguf, plan_to_gguf
from pissa_convert.plans.gguf.steps import Encode, GgufSplit
from pissa_convert.report import Timings
from pissa_convert.transforms.delta import Product, difference, exact_norm
from pissa_convert.transforms.ggml import decode

_WRONG = "its values are not what they should be"


def plan_again(source: Path, dest: Path, manifest: Manifest, given: Mapping[str, Path]) -> GgufPlan | GgufAdapterPlan:
    """The plan that the manifest's options and the given files make.

    Args:
        dest: the folder of the result.

    Raises:
        RequestError: they make none.
    """
    to, options = manifest.head["to"], dict(manifest.head["options"])
    made = options.pop("made", None)
    if ("uniform_rank" in options) != ("init" in given) and made == "adapter":
        said = "was made with --init" if "uniform_rank" in options else "was made without --init"
        raise RequestError(f"the result {said}", file=dest / next(iter(manifest.output)), fix="give the same again")
    known = {name: value for name, value in options.items() if value is not None and name not in _DERIVED}
    run, wanted = RunOptions(threads=1), {**known, **given}
    if to == "pissa":
        return plan_split_gguf(source, dest, wanted, run, NativeBackend(1))
    place = dest / next(iter(manifest.output))
    return (plan_merged_gguf if to == "merged" else plan_to_gguf)(source, place, wanted, run, 1)


_DERIVED = ("dtype", "base_error")
"""What is recorded of the LoRA that is made on the way, which nobody chose."""


def compare_gguf(plan: GgufPlan, manifest: Manifest, seen: Callable[[int], None]) -> Finding:
    """Compare a model's GGUF, step by step, with what the plan makes of its sources, and both with their records."""
    with ExitStack() as stack:
        lane = stack.enter_context(gguf_lanes(plan, NativeBackend(1)))(1)
        adapter = stack.enter_context(FactorFile(plan.dest / plan.beside.name)) if plan.beside else None

        def measure(step: Encode | GgufSplit, old: memoryview, new: memoryview) -> tuple[str, Squares]:
            if isinstance(step, Encode):
                return step.tensor, _encoded(step, lane, old, new)
            assert adapter is not None
            return step.key, _split(step, old, new, adapter)

        shard = plan.shard
        return compare_side_by_side(shard, plan.dest / shard.name, manifest, seen, measure, _WRONG, [])


def _encoded(step: Encode, lane: GgufLane, source: memoryview, stored: memoryview) -> Squares:
    exact = lane.exact(step, source[step.source])
    size = step.stored.stop - step.stored.start
    return squares(exact, decode(stored[:size], step.treatment.kind, step.columns))


def _split(step: GgufSplit, source: memoryview, stored: memoryview, adapter: FactorFile) -> Squares:
    """W against W_res + s·B·A."""
    a, b = adapter.values(step.a), step.spec.scaling * adapter.values(step.b)
    rows, columns = step.spec.rows, step.spec.cols
    old, new = (TYPES[kind].row_bytes(columns) for kind in (step.kind, step.stored_kind))
    count = max(1, (1 << 20) // columns)
    total = (0.0, 0.0)
    for top in range(0, rows, count):
        bottom = min(rows, top + count)
        weight = decode(source[top * old : bottom * old], step.kind, columns)
        residual = decode(stored[top * new : bottom * new], step.stored_kind, columns)
        off, norm = squares(weight, residual + b[top:bottom] @ a)
        total = total[0] + off, total[1] + norm
    return total


def compare_gguf_adapter(plan: GgufAdapterPlan, manifest: Manifest) -> Finding:
    """Compare every tensor's B·A with what the adapters make it."""
    plan = with_known_ranks(plan, Timings())
    path = plan.dest / plan.alone
    size = path.stat().st_size if path.is_file() else "no file"
    if size != plan.size:
        return [FormatError("the size differs", file=path, expected=f"{plan.size} bytes", found=size)], []
    findings: list[PissaError] = []
    errors = []
    with FactorFile(path) as stored, products_of(plan) as products:
        if stored.bytes(0, len(plan.header)) != plan.header:
            findings.append(FormatError("the header is not what it should be", file=path))
        for tensor in plan.tensors:
            lost: list[float] = []

            def product(module: str, lost: list[float] = lost) -> Product:
                made, tail = products(module)
                lost.append(tail**2)
                return made

            exact = tensor.factors(product)
            a, b = (_values(stored, slot) for slot in plan.slots[tensor.name])
            off = norm = sum(lost)
            for whole, meant in zip(matrices(*exact), matrices(a, b), strict=True):
                off += exact_norm(difference(whole, meant)) ** 2
                norm += whole.norm**2
            errors.append(relative((off, norm)))
            findings += judged(tensor.name, errors[-1], manifest, path, _WRONG)
    return findings, errors


def _values(file: FactorFile, slot: TensorInfo) -> Any:
    columns = slot.shape[-1]
    return decode(file.raw(slot, 0, slot.nbytes), slot.dtype, columns).astype(np.float64).reshape(slot.shape)
