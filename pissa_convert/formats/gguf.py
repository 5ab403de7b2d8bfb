"""GGUF: keys and values, the tensors' names, and the tensors' bytes, each beginning at a multiple of an alignment.

Like safetensors it is read by hand, and its header is hostile until checked: every count, length, dimension and offset
is held against the bytes that there are before it is used. The rules are those of llama.cpp (`ggml/src/gguf.cpp`);
stricter are: nothing may be there twice, no tensor is empty, and the data must end with the file.
"""

from __future__ import annotations

import math
import os
import stat
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pissa_convert.errors import FormatError
from pissa_convert.formats.gguf_types import NAMES, TYPES, type_bytes
from pissa_convert.formats.safetensors import TensorInfo

MAGIC = b"GGUF"
MAX_HEADER = 1 << 29
"""Bytes; tokenizers of 256,000 tokens have some 20 million."""

_VERSIONS = (2, 3)
_MAX_NAME = 63
_MAX_KEY = 65535
_ALIGNMENT = "general.alignment"
_MAX_ALIGNMENT = 1 << 20
_PIECE = 1 << 22
_KEPT = 4096
"""Arrays of more numbers than this are not looked into."""

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
UINT32, FLOAT32, STRING = 4, 6, _STRING

_DAMAGED = "the file is damaged or not GGUF: download it again"


@dataclass(frozen=True)
class GgufFile:
    """A file's layout.

    Attributes:
        size: of the whole file in bytes.
        header: its first bytes verbatim, up to the first tensor.
        values: of every key: a number, a string, a tuple of numbers, or None for an array that was not looked into.
        pairs: every key's bytes, key, type and value, verbatim and in order.
        alignment: what the tensors' offsets are multiples of.
        tensors: in the order of their bytes; rows come first in a shape, as in numpy; `dtype` is a GGML type.
    """

    path: Path
    size: int
    header: bytes
    values: Mapping[str, Any]
    pairs: Mapping[str, bytes]
    alignment: int
    tensors: tuple[TensorInfo, ...]

    def stop(self, tensor: TensorInfo) -> int:
        """Where a tensor's padding ends, too."""
        return min(self.size, padded(tensor.end, self.alignment))


def padded(offset: int, alignment: int) -> int:
    """The next multiple of the alignment."""
    return -(-offset // alignment) * alignment


class _Cursor:
    """Reads a header front to back, never past the end of the file or the limit."""

    def __init__(self, descriptor: int, size: int, path: Path) -> None:
        self._descriptor, self._size, self.path = descriptor, size, path
        self.data = bytearray()
        self.at = 0

    def wrong(self, what: str, **detail: object) -> FormatError:
        return FormatError(what, file=self.path, fix=_DAMAGED, **detail)  # type: ignore[arg-type]

    def skip(self, count: int) -> int:
        """Where the next `count` bytes begin; they are read."""
        begin, self.at = self.at, self.at + count
        if self.at > self._size:
            raise self.wrong("the header is cut short", expected=f"at least {self.at} bytes"[:60], found=self._size)
        if self.at > MAX_HEADER:
            raise self.wrong("the header is too large", expected=f"at most {MAX_HEADER} bytes")
        while len(self.data) < self.at:
            piece = os.pread(self._descriptor, max(_PIECE, self.at - len(self.data)), len(self.data))
            if not piece:
                raise self.wrong("the header is cut short")
            self.data += piece
        return begin

    def number(self, code: str) -> Any:
        begin = self.skip(struct.calcsize(code))
        return struct.unpack_from(f"<{code}", self.data, begin)[0]

    def text(self, limit: int, what: str) -> str:
        length = self.number("Q")
        if length > limit:
            raise self.wrong(f"{what} is too long", expected=f"at most {limit} bytes", found=length)
        begin = self.skip(length)
        try:
            return self.data[begin : self.at].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.wrong(f"{what} is not UTF-8 ({error.reason})") from None

    def name(self, limit: int, what: str) -> str:
        """A text that ends nowhere earlier for whoever reads it in C."""
        text = self.text(limit, what)
        if "\0" in text:
            raise self.wrong(f"{what} has a zero byte in it", found=text[:200])
        return text

    def value(self, key: str) -> Any:
        kind = self.number("I")
        if kind == _STRING:
            return self.text(MAX_HEADER, f"the value of '{key}'")
        if kind == _ARRAY:
            return self._array(key)
        if kind not in _SCALARS:
            raise self.wrong(f"the value of '{key}' has an unknown type", found=kind)
        return self.number(_SCALARS[kind])

    def _array(self, key: str) -> Any:
        kind, count = self.number("I"), self.number("Q")
        if kind == _STRING:
            # Each takes 8 bytes at least, so a count that is a lie ends at the end of the file.
            for _ in range(count):
                self.skip(self.number("Q"))
            return None
        if kind not in _SCALARS:
            raise self.wrong(f"the array '{key}' has an unknown type", found=kind)
        width = struct.calcsize(_SCALARS[kind])
        if count > MAX_HEADER:
            raise self.wrong(f"the array '{key}' is too long", found=count)
        begin = self.skip(width * count)
        return None if count > _KEPT else struct.unpack_from(f"<{count}{_SCALARS[kind]}", self.data, begin)


def read_gguf(path: Path) -> GgufFile:
    """Read and check a file's header; no tensor data is read.

    Raises:
        FormatError: the file is not GGUF, or does not hold what its header says.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise FormatError(f"cannot open: {error.strerror}", file=path) from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise FormatError("is not a regular file", file=path)
        return _parse(_Cursor(descriptor, status.st_size, path), status.st_size)
    except OSError as error:
        raise FormatError(f"cannot read: {error.strerror}", file=path) from error
    finally:
        os.close(descriptor)


def _parse(cursor: _Cursor, size: int) -> GgufFile:
    begin = cursor.skip(4)
    if cursor.data[begin:4] != MAGIC:
        raise cursor.wrong("is not GGUF", expected="its first four bytes GGUF", found=repr(bytes(cursor.data[:4])))
    version = cursor.number("I")
    if version not in _VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
        what = "is a big-endian GGUF" if swapped else "has a version of GGUF that is not known here"
        raise FormatError(what, file=cursor.path, expected="version 2 or 3, little-endian", found=version)
    tensor_count, pair_count = cursor.number("Q"), cursor.number("Q")
    values, pairs = _pairs(cursor, pair_count)
    alignment, pair = values.get(_ALIGNMENT, 32), pairs.get(_ALIGNMENT)
    # llama.cpp aborts where it is of another type.
    is_uint32 = pair is None or pair.startswith(struct.pack("<I", UINT32), 8 + len(_ALIGNMENT))
    if not is_uint32 or not 0 < alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
        raise cursor.wrong("general.alignment is malformed", expected="a power of two", found=str(alignment)[:40])
    entries: dict[str, _Entry] = {}
    for _ in _counted(tensor_count):
        entry = _entry(cursor)
        if entry[0] in entries:
            raise cursor.wrong("is there twice", tensor=entry[0])
        entries[entry[0]] = entry
    if not entries:
        raise cursor.wrong("there are no tensors in it")
    data_begin = padded(cursor.at, alignment)
    if data_begin > size:
        raise cursor.wrong("the data is cut short", expected=f"at least {data_begin} bytes", found=size)
    cursor.skip(data_begin - cursor.at)
    tensors = _places(cursor, [*entries.values()], data_begin, alignment, size)
    return GgufFile(cursor.path, size, bytes(cursor.data[:data_begin]), values, pairs, alignment, tensors)


def _counted(count: int) -> Iterable[int]:
    """A count from a file, which may be larger than `range` takes; the cursor ends the loop at the file's end."""
    return range(min(count, 1 << 62))


def _pairs(cursor: _Cursor, count: int) -> tuple[dict[str, Any], dict[str, bytes]]:
    values: dict[str, Any] = {}
    pairs: dict[str, bytes] = {}
    for _ in _counted(count):
        begin = cursor.at
        key = cursor.name(_MAX_KEY, "a key")
        if key in values:
            raise cursor.wrong("a key is there twice", found=key[:200])
        values[key] = cursor.value(key)
        pairs[key] = bytes(cursor.data[begin : cursor.at])
    return values, pairs


_Entry = tuple[str, str, tuple[int, ...], int]


def _entry(cursor: _Cursor) -> _Entry:
    """Name, type, shape and offset of a tensor."""
    name = cursor.name(_MAX_NAME, "a tensor's name")
    count = cursor.number("I")
    if not 0 < count <= 4:
        raise cursor.wrong("has an odd number of dimensions", tensor=name, expected="1 to 4", found=count)
    dims = [cursor.number("Q") for _ in range(count)]
    number = cursor.number("I")
    if number not in NAMES:
        raise FormatError("has a type that is not known here", file=cursor.path, tensor=name, found=f"type {number}")
    kind = NAMES[number]
    if 0 in dims or math.prod(dims) >= 2**60 or dims[0] % TYPES[kind].block:
        raise cursor.wrong("has a malformed shape", tensor=name, found=f"{kind} {dims}"[:100])
    return name, kind, tuple(reversed(dims)), cursor.number("Q")


def _places(
    cursor: _Cursor, entries: list[_Entry], data_begin: int, alignment: int, size: int
) -> tuple[TensorInfo, ...]:
    """The data must follow in the order of the entries, as llama.cpp asks, and fill the file."""
    tensors = []
    at = data_begin
    for name, kind, shape, offset in entries:
        if data_begin + offset != at:
            expected = at - data_begin
            raise cursor.wrong("its data is not where it should be", tensor=name, expected=expected, found=offset)
        end = at + type_bytes(kind, shape)
        if end > size:
            raise cursor.wrong("the data is cut short", tensor=name, expected=f"{end} bytes", found=size)
        tensors.append(TensorInfo(name, kind, shape, at, end))
        at = padded(end, alignment)
    if size > at:
        raise cursor.wrong("there are bytes after the data", expected=f"{at} bytes", found=size)
    return tuple(tensors)
