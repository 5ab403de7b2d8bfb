"""safetensors: an 8-byte length, a JSON header, and the tensors' bytes one after the other.

The format is read by hand because surgery needs byte ranges and the header's own bytes, from the header alone, and
because a header is hostile until checked. Rules as in the reference implementation (huggingface/safetensors,
`safetensors/src/tensor.rs`); stricter are: duplicate keys and trailing bytes of any kind are refused.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pissa_convert.errors import FormatError
from pissa_convert.formats.strict_json import parse_object

MAX_HEADER = 100_000_000
"""The reference implementation's limit, in bytes."""

DTYPE_BITS: dict[str, int] = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(
        ("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"),
        8,
    ),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}

_DAMAGED = "the file is damaged or not safetensors: download it again"


@dataclass(frozen=True)
class TensorInfo:
    """A tensor and its bytes: `begin` and `end` count from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Length of the data in bytes."""
        return self.end - self.begin


@dataclass(frozen=True)
class SafetensorsFile:
    """A file's layout.

    Attributes:
        size: of the whole file in bytes.
        header: its first bytes verbatim, length field included; the data begins at `len(header)`.
        tensors: in the order of their bytes, which they cover without gaps up to `size`.
    """

    path: Path
    size: int
    header: bytes
    metadata: Mapping[str, str]
    tensors: tuple[TensorInfo, ...]


def read_header(path: Path) -> SafetensorsFile:
    """Read and check a file's header; no tensor data is read.

    Raises:
        FormatError: the file is not safetensors, or does not hold what its header says.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise FormatError(f"cannot open: {error.strerror}", file=path) from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise FormatError("is not a regular file", file=path)
        size = status.st_size
        start = os.pread(descriptor, 8, 0)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > size - 8:
            raise FormatError(
                "the header is cut short", file=path, expected=f"{length + 8} bytes", found=size, fix=_DAMAGED
            )
        if length > MAX_HEADER:
            raise FormatError(
                "the header is too large", file=path, expected=f"at most {MAX_HEADER} bytes", found=length, fix=_DAMAGED
            )
        header = start
        while len(header) < 8 + length:
            piece = os.pread(descriptor, 8 + length - len(header), len(header))
            if not piece:
                raise FormatError("the header is cut short", file=path, fix=_DAMAGED)
            header += piece
    except OSError as error:
        raise FormatError(f"cannot read: {error.strerror}", file=path) from error
    finally:
        os.close(descriptor)
    entries = parse_object(header[8:], path, "the header")
    metadata = _metadata(entries.pop("__metadata__", {}), path)
    tensors = sorted(
        (_tensor(name, entry, len(header), path) for name, entry in entries.items()),
        key=lambda tensor: (tensor.begin, tensor.end),
    )
    _check_layout(tensors, len(header), size, path)
    return SafetensorsFile(path, size, header, metadata, tuple(tensors))


def _metadata(value: Any, path: Path) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise FormatError("__metadata__ must map strings to strings", file=path, fix=_DAMAGED)
    return value


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _tensor(name: str, entry: Any, data_begin: int, path: Path) -> TensorInfo:
    def wrong(what: str, **detail: object) -> FormatError:
        return FormatError(what, file=path, tensor=name, fix=_DAMAGED, **detail)

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise wrong("its header entry is malformed", expected="dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise FormatError(
            "unknown dtype", file=path, tensor=name, expected=", ".join(DTYPE_BITS), found=str(dtype)[:40]
        )
    if not isinstance(shape, list) or not all(map(_is_count, shape)):
        raise wrong("its shape is malformed", expected="a list of sizes", found=str(shape)[:80])
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise wrong("its data_offsets are malformed", expected="two offsets", found=str(offsets)[:80])
    begin, end = offsets
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits >= 2**66 or bits % 8:
        raise wrong("its shape and dtype give no whole number of bytes below 2^63", found=f"{dtype} {shape}"[:80])
    if end - begin != bits // 8:
        raise wrong("its data has the wrong length", expected=f"{bits // 8} bytes", found=end - begin)
    return TensorInfo(name, dtype, tuple(shape), data_begin + begin, data_begin + end)


def _check_layout(tensors: list[TensorInfo], data_begin: int, size: int, path: Path) -> None:
    """The data must be covered exactly: no overlap, no hole, nothing before or after."""
    at = data_begin
    for tensor in tensors:
        if tensor.begin != at:
            what = "its data overlaps another's" if tensor.begin < at else "there is a hole before its data"
            raise FormatError(
                what, file=path, tensor=tensor.name, expected=f"offset {at}", found=tensor.begin, fix=_DAMAGED
            )
        at = tensor.end
    if at != size:
        what = "the data is cut short" if at > size else "there are bytes after the data"
        raise FormatError(what, file=path, expected=f"{at} bytes", found=size, fix=_DAMAGED)


def lay_out(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, tuple[TensorInfo, ...]]:
    """The header for tensors (name, dtype, shape) laid one after the other in the given order, and their places."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    spans = []
    at = 0
    for name, dtype, shape in tensors:
        begin, at = at, at + math.prod(shape) * DTYPE_BITS[dtype] // 8
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, at]}
        spans.append((name, dtype, shape, begin, at))
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned
    header = len(text).to_bytes(8, "little") + text
    return header, tuple(
        TensorInfo(name, dtype, shape, len(header) + begin, len(header) + end)
        for name, dtype, shape, begin, end in spans
    )
