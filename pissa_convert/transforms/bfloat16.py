"""bfloat16, which numpy has not: its bit patterns travel as uint16, the upper half of float32's."""

from __future__ import annotations

from typing import Any

import numpy as np

_Array = np.ndarray[Any, np.dtype[Any]]


def widen(bits: _Array) -> np.ndarray[Any, np.dtype[np.float32]]:
    """uint16 patterns as float32, exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray[Any, np.dtype[np.float32]]) -> np.ndarray[Any, np.dtype[np.uint16]]:
    """float32 as patterns, to the nearest, ties to even; what is no number stays none."""
    bits = values.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)
