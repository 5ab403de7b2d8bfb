"""W + s·B·A for some rows of a weight: read as float32, added up in float32, rounded once."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pissa_convert.errors import WeightError
from pissa_convert.transforms import bfloat16

Array = np.ndarray[Any, np.dtype[np.float32]]

_VALUES = 1 << 18
"""Values that are worked on at a time: the few arrays of them stay in the cache."""

_RAW: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}

WIDTHS = {name: np.dtype(kind).itemsize for name, kind in _RAW.items()}
"""Bytes of a value."""


@dataclass(frozen=True)
class MergeStats:
    """Sums over the values that an adapter changed.

    Attributes:
        error: of (stored − exact)², where exact is before the rounding.
        norm: of exact².
    """

    error: float = 0.0
    norm: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)

    @property
    def relative_error(self) -> float:
        """‖stored − exact‖ / ‖exact‖."""
        return math.sqrt(self.error / self.norm) if self.norm else 0.0

    def __add__(self, other: MergeStats) -> MergeStats:
        return MergeStats(self.error + other.error, self.norm + other.norm)


@dataclass(frozen=True)
class Addition:
    """left·right, which is added to some rows; left holds the scaling.

    Attributes:
        left: (rows × k).
        right: (k × columns).
    """

    left: Array
    right: Array


def merge_rows(
    old: memoryview, old_dtype: str, new: memoryview, new_dtype: str, columns: int, addition: Addition | None
) -> MergeStats:
    """Fill `new` with the rows in `old` and what is added to them.

    Args:
        old: rows of `columns` values in "F32", "F16" or "BF16".
        new: as many in `new_dtype`; it may be `old` itself where the dtypes are the same.
        addition: None to change the dtype alone.

    Raises:
        WeightError: a value that is added to is NaN or infinite, or a finite one does not fit the new dtype.
    """
    before = np.frombuffer(old, _RAW[old_dtype]).reshape(-1, columns)
    after = np.frombuffer(new, _RAW[new_dtype]).reshape(-1, columns)
    step = max(1, _VALUES // columns)
    stats = MergeStats()
    for top in range(0, len(before), step):
        rows = slice(top, top + step)
        values = _float32(before[rows], old_dtype)
        if addition is not None:
            if not np.isfinite(values).all():
                raise WeightError("holds NaN or infinity", fix="repair the checkpoint")
            values = values + addition.left[rows] @ addition.right
        _store(values, new_dtype, after[rows])
        if addition is not None:
            stats += _stats(values, _float32(after[rows], new_dtype))
    return stats


def _float32(raw: Any, dtype: str) -> Array:
    values: Array = bfloat16.widen(raw) if dtype == "BF16" else raw.astype(np.float32, copy=False)
    return values


def _store(values: Array, dtype: str, out: Any) -> None:
    if dtype == "BF16":
        out[...] = bfloat16.narrow(values)
        infinite = (out & 0x7FFF) == 0x7F80
    else:
        with np.errstate(over="ignore"):
            out[...] = values
        infinite = np.isinf(out)
    if infinite.any() and np.isfinite(values[infinite]).any():
        raise WeightError("holds a value that overflows", found=dtype, fix="choose another --dtype")


def _stats(exact: Array, stored: Array) -> MergeStats:
    difference = stored - exact
    return MergeStats(float(np.vdot(difference, difference)), float(np.vdot(exact, exact)))


def transposed(matrix: memoryview, rows: int, columns: int) -> bytes:
    """The bytes of a matrix, cols × rows instead of rows × cols."""
    width = len(matrix) // (rows * columns)
    values: Any = np.frombuffer(matrix, f"u{width}")
    return bytes(values.reshape(rows, columns).T.tobytes())
