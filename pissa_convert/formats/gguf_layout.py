"""Writing a GGUF's header: the places of its tensors follow from their names, types and shapes."""

from __future__ import annotations

import struct
from collections.abc import Iterable

from pissa_convert.formats.gguf import FLOAT32, MAGIC, UINT32, padded
from pissa_convert.formats.gguf_types import TYPES, type_bytes
from pissa_convert.formats.safetensors import TensorInfo

_CODES = {UINT32: "I", FLOAT32: "f"}


def encode_pair(key: str, value: str | float, kind: int) -> bytes:
    """A key and its value, a string, UINT32 or FLOAT32, as they lie in a file."""
    encoded = _string(value) if isinstance(value, str) else struct.pack(f"<{_CODES[kind]}", value)
    return _string(key) + struct.pack("<I", kind) + encoded


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def lay_out(
    pairs: Iterable[bytes], tensors: Iterable[tuple[str, str, tuple[int, ...]]], alignment: int = 32
) -> tuple[bytes, tuple[TensorInfo, ...]]:
    """The header for keys and tensors (name, type, shape) one after the other in the given order, and their places.

    The data of each is followed by zeros up to a multiple of the alignment, that of the last one too.
    """
    pairs, wanted = list(pairs), list(tensors)
    head = [MAGIC, struct.pack("<IQQ", 3, len(wanted), len(pairs)), *pairs]
    spans = []
    at = 0
    for name, kind, shape in wanted:
        dims = tuple(reversed(shape))
        head.append(_string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, TYPES[kind].number, at))
        end = at + type_bytes(kind, shape)
        spans.append((name, kind, shape, at, end))
        at = padded(end, alignment)
    header = b"".join(head)
    header += bytes(-len(header) % alignment)
    begin = len(header)
    return header, tuple(TensorInfo(name, kind, shape, begin + a, begin + b) for name, kind, shape, a, b in spans)
