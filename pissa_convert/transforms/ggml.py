"""Values to GGML's blocks and back: by the `gguf` package's numpy, bit-identical to ggml, and by ggml for K-quants.

K-quants need the optional package `libggml-python`, which carries ggml itself; everything is read by numpy.
"""

from __future__ import annotations

import ctypes
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from pissa_convert.errors import RequestError, WeightError
from pissa_convert.formats.gguf_types import PLAIN, TYPES
from pissa_convert.transforms import bfloat16
from pissa_convert.transforms.merge import MergeStats

Array = np.ndarray[Any, np.dtype[np.float32]]
Bytes = np.ndarray[Any, np.dtype[np.uint8]]

_NUMPY = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
"""Encoded by numpy; for the other quantised types ggml is needed."""

K_QUANTS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")

ENCODED = (*PLAIN, *_NUMPY, *K_QUANTS)
"""What can be written."""

_UNREADABLE = ("I8", "I16", "I32", "I64", "F64")


def can_decode(kind: str) -> bool:
    """Whether `decode` takes the type."""
    return kind not in _UNREADABLE


def can_encode(kind: str) -> bool:
    """Whether `encode` takes the type, here and now."""
    return kind in ENCODED and (kind not in K_QUANTS or _library() is not None)


def check_encodable(kind: str) -> None:
    """Refuse a type that cannot be written, here or at all.

    Raises:
        RequestError: the message says why.
    """
    if kind not in ENCODED:
        raise RequestError(
            "no weights can be written in this type",
            expected=", ".join(map(str.lower, ENCODED)),
            found=kind.lower(),
            fix="choose one of these as --outtype",
        )
    if not can_encode(kind):
        raise RequestError(
            f"{kind.lower()} is written by ggml itself, which is not installed",
            fix="pip install libggml-python, or choose an --outtype such as q5_1 or q8_0",
        )


def decode(data: memoryview, kind: str, columns: int) -> Array:
    """Rows of `columns` values in float32; a copy."""
    if kind == "BF16":
        return bfloat16.widen(np.frombuffer(data, np.uint16).reshape(-1, columns))
    if kind in PLAIN:
        raw = np.frombuffer(data, np.float32 if kind == "F32" else np.float16)
        return raw.reshape(-1, columns).astype(np.float32)
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    blocks = np.frombuffer(data, np.uint8).reshape(-1, TYPES[kind].row_bytes(columns))
    with np.errstate(over="ignore", invalid="ignore"):  # a scale that is no number is found in the values
        values: Array = dequantize(blocks, GGMLQuantizationType(TYPES[kind].number))
    return values


def encode(values: Array, kind: str, out: memoryview) -> None:
    """Fill `out` with the rows of a matrix in a type, as ggml does.

    Raises:
        WeightError: a value is NaN or infinite, or does not fit the type.
    """
    if not np.isfinite(values).all():
        raise WeightError("holds NaN or infinity", fix="repair the checkpoint")
    raw = np.frombuffer(out, np.uint8)
    raw[:] = _encoded(np.ascontiguousarray(values), kind).reshape(-1)
    if not _is_finite(raw, kind):
        raise WeightError("holds a value that overflows", found=kind, fix="choose another --outtype")


def store(values: Array, kind: str, out: memoryview) -> MergeStats:
    """The same, and what it has cost."""
    encode(values, kind, out)
    difference = decode(out, kind, values.shape[1])
    difference -= values
    return MergeStats(float(np.vdot(difference, difference)), float(np.vdot(values, values)))


def _encoded(values: Array, kind: str) -> Bytes:
    if kind == "F32":
        return values.view(np.uint8)
    # The scale of a block below 1e-37 has no reciprocal; what is stored of such values is zero whatever the rest says.
    with np.errstate(over="ignore", invalid="ignore"):
        if kind == "F16":
            return values.astype(np.float16).view(np.uint8)
        if kind == "BF16":
            return bfloat16.narrow(values).view(np.uint8)
        if kind in K_QUANTS:
            return _by_ggml(values, kind)
        from gguf import GGMLQuantizationType
        from gguf.quants import quantize

        blocks: Bytes = quantize(values, GGMLQuantizationType(TYPES[kind].number))
        return blocks


def _is_finite(raw: Bytes, kind: str) -> bool:
    """Whether the values, or the scales of the blocks (float16), are numbers."""
    if kind == "F32":
        return True
    if kind == "BF16":
        return bool(((raw.view(np.uint16) & 0x7F80) != 0x7F80).all())
    if kind in K_QUANTS:
        # Two scales at the front (Q2_K) or first (Q4_K, Q5_K), or one at the end (Q2_K, Q3_K, Q6_K).
        blocks = raw.reshape(-1, TYPES[kind].nbytes)
        scales = blocks[:, -2:] if kind in ("Q3_K", "Q6_K") else blocks[:, -4:] if kind == "Q2_K" else blocks[:, :4]
        return bool(np.isfinite(np.ascontiguousarray(scales).view(np.float16)).all())
    if kind == "F16":
        return bool(np.isfinite(raw.view(np.float16)).all())
    count = 4 if kind in ("Q4_1", "Q5_1") else 2
    scales = raw.reshape(-1, TYPES[kind].nbytes)[:, :count]
    return bool(np.isfinite(np.ascontiguousarray(scales).view(np.float16)).all())


@cache
def _library() -> ctypes.CDLL | None:
    """ggml, as `libggml-python` brings it, or None."""
    spec = importlib.util.find_spec("libggml")
    if spec is None or spec.origin is None:
        return None
    paths = sorted(Path(spec.origin).parent.glob("lib*/libggml-base.so"))
    try:
        library = ctypes.CDLL(str(paths[0]))
        quantize = library.ggml_quantize_chunk
    except (OSError, IndexError, AttributeError):
        return None
    # type, values, blocks, first value, rows, values in a row, importance matrix
    quantize.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    quantize.restype = ctypes.c_size_t
    return library


def _by_ggml(values: Array, kind: str) -> Bytes:
    library = _library()
    assert library is not None  # the plan has asked
    rows, columns = values.shape
    blocks = np.empty((rows, TYPES[kind].row_bytes(columns)), np.uint8)
    written = library.ggml_quantize_chunk(
        TYPES[kind].number, values.ctypes.data, blocks.ctypes.data, 0, rows, columns, None
    )
    assert written == blocks.nbytes
    return blocks
