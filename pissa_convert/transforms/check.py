"""Does W_res + s·B·A give W? Some rows at a time, in float64, with nothing taken on trust from the split itself."""

from __future__ import annotations

from typing import Any

import numpy as np

from pissa_convert import _core
from pissa_convert.linalg import FourBit
from pissa_convert.transforms import bfloat16

_Array = np.ndarray[Any, np.dtype[Any]]


def widened(data: memoryview, dtype: str, shape: tuple[int, ...]) -> _Array:
    """Bytes of "F32", "F16" or "BF16" as a float64 array."""
    if dtype == "BF16":
        return bfloat16.widen(np.frombuffer(data, np.uint16)).reshape(shape).astype(float)
    kinds: dict[str, Any] = {"F32": np.float32, "F16": np.float16}
    return np.frombuffer(data, kinds[dtype]).reshape(shape).astype(float)


def read_back(stored: FourBit) -> _Array:
    """A 4-bit weight as a float32 array (out × in), by its tables and in the dtype that bitsandbytes gives it."""
    spec = stored.spec
    packed = np.frombuffer(stored.packed, np.uint8)
    codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[: spec.rows * spec.cols]
    values = np.array(_core.code_values(spec.code), np.float32)[codes]
    values *= np.repeat(np.frombuffer(stored.absmax, np.float32), 64)[: len(values)]
    if spec.dtype == "BF16":
        values = bfloat16.widen(bfloat16.narrow(values))
    elif spec.dtype == "F16":
        values = values.astype(np.float16).astype(np.float32)
    return values.reshape(spec.rows, spec.cols)


def squared_error(weight: _Array, residual: _Array, left: _Array, right: _Array) -> tuple[float, float]:
    """‖W − W_res − left·right‖² and ‖W‖² over some rows of W; `left` (rows × r) holds the scaling."""
    difference = weight - residual
    difference -= left @ right
    return float(np.vdot(difference, difference)), float(np.vdot(weight, weight))


def same_bytes(first: memoryview, second: memoryview) -> bool:
    """Whether two ranges of equal length hold the same."""
    return bool((np.frombuffer(first, np.uint8) == np.frombuffer(second, np.uint8)).all())
