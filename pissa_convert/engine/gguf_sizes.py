"""What else could have been made: the size of a GGUF in other types, and how exact its weights would be."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from pissa_convert.engine.factors import FactorFile
from pissa_convert.formats.gguf_types import PLAIN, TYPES, type_bytes
from pissa_convert.plans.gguf.plan import GgufPlan
from pissa_convert.plans.gguf.planning import chosen_type
from pissa_convert.plans.gguf.steps import Encode, GgufSplit
from pissa_convert.report import SizeLine
from pissa_convert.transforms.ggml import Array, can_encode, decode, store

Exact = Callable[[Encode, memoryview], Array]

_OTHERS = ("f16", "q8_0", "q6_k", "q5_0", "q4_k", "q4_0")
_SAMPLES = 6
"""Weights that are encoded in every type."""
_VALUES = 1 << 16
"""Values of each."""


def size_table(plan: GgufPlan, entries: Mapping[str, Mapping[str, Any]], exact: Exact) -> tuple[SizeLine, ...]:
    """The result beside the same weights in other types; nothing where it is not quantised.

    Args:
        entries: the manifest's, of every tensor that was encoded or split.
        exact: the values of a step's rows before they are stored, from the base's bytes.
    """
    steps = [*_matrices(plan)]
    if all(step.stored_kind in PLAIN for step in steps):
        return ()
    made = plan.shard.size + (plan.beside.size if plan.beside is not None else 0)
    what = "this file" if plan.beside is None else "residual and adapter"
    errors = [entries[_key(step)]["relative_error"] for step in steps]
    lines = [SizeLine(what, made, math.sqrt(sum(error**2 for error in errors) / len(errors)))]
    # One more each time, so as not to meet the same layer's part again and again.
    chosen = [steps[(i * len(steps) // _SAMPLES + i) % len(steps)] for i in range(_SAMPLES)]
    with FactorFile(plan.base.file.path) as file:
        samples = [(step.tensor, _sample(step, exact, file)) for step in chosen]
    for outtype in _OTHERS:
        line = _in_type(plan, outtype, samples)
        if line is not None:
            lines.append(line)
    return tuple(lines)


def _matrices(plan: GgufPlan) -> Iterator[Encode | GgufSplit]:
    """The first step of each matrix that was encoded or split."""
    seen = set()
    steps: Iterator[Encode | GgufSplit] = plan.encodings if plan.beside is None else plan.splits
    for step in steps:
        if _key(step) not in seen and step.columns > 1:
            seen.add(_key(step))
            yield step


def _key(step: Encode | GgufSplit) -> str:
    return step.key if isinstance(step, GgufSplit) else step.tensor


def _sample(step: Encode | GgufSplit, exact: Exact, file: FactorFile) -> Array:
    """Some rows as they were before anything was stored."""
    columns, group = step.columns, 1
    if isinstance(step, Encode) and step.treatment.origin is not None:
        group = step.treatment.origin.group
    rows = max(1, _VALUES // columns // group) * group
    rows = min(rows, step.rows)
    data = file.bytes(step.begin, rows * TYPES[step.kind].row_bytes(columns))
    if isinstance(step, GgufSplit):
        return decode(data, step.kind, columns)
    return exact(replace(step, bottom=step.top + rows), data)


def _in_type(plan: GgufPlan, outtype: str, samples: list[tuple[str, Array]]) -> SizeLine | None:
    """The size and error in a type; None where it cannot be written here."""
    size = len(plan.shard.header)
    for tensor in plan.base.file.tensors:
        size += type_bytes(chosen_type(tensor, outtype), tensor.shape)
    total = 0.0
    for name, values in samples:
        kind = chosen_type(plan.base.tensors[name], outtype)
        if not can_encode(kind):
            return None
        stored = memoryview(bytearray(len(values) * TYPES[kind].row_bytes(values.shape[1])))
        total += store(values, kind, stored).relative_error ** 2
    return SizeLine(outtype, size, math.sqrt(total / len(samples)))
