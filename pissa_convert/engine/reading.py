"""Reading by position into owned memory: never by mapping, so that what is read cannot change afterwards."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from blake3 import blake3

from pissa_convert.errors import ConversionError, FormatError, PissaError
from pissa_convert.formats.manifest import FileRecord
from pissa_convert.memory import CHUNK, chunks


def read_exactly(descriptor: int, begin: int, view: memoryview, path: Path) -> None:
    """Fill `view` from offset `begin`.

    Raises:
        ConversionError: the file ends too early, or reading fails.
    """
    done = 0
    while done < len(view):
        try:
            count = os.preadv(descriptor, [view[done : done + (1 << 30)]], begin + done)
        except OSError as error:
            raise ConversionError(f"cannot read: {error.strerror or error}", file=path) from error
        if count == 0:
            raise ConversionError(
                "the file has become shorter while it was read",
                file=path,
                expected=f"at least {begin + len(view)} bytes",
                found=begin + done,
                fix="restore it, then run the same command again",
            )
        done += count


def hash_range(descriptor: int, begin: int, end: int, path: Path, digest: blake3, scratch: memoryview) -> None:
    """Feed bytes `begin`:`end` of an open file to `digest` through `scratch` (any size of at least one chunk)."""
    for at, stop in chunks(begin, end):
        view = scratch[: stop - at]
        read_exactly(descriptor, at, view, path)
        digest.update(view)


def open_to_read(path: Path) -> int:
    """A descriptor of an existing file.

    Raises:
        ConversionError: it cannot be opened.
    """
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ConversionError(f"cannot open: {error.strerror}", file=path) from error


def hash_file(path: Path, seen: Callable[[int], None] | None = None) -> FileRecord:
    """Size and BLAKE3 of a file, read in chunks; `seen` is called with the bytes of each.

    Raises:
        ConversionError: it cannot be opened or read.
    """
    digest = blake3()
    descriptor = open_to_read(path)
    scratch = memoryview(bytearray(CHUNK))
    try:
        size = os.fstat(descriptor).st_size
        for begin, end in chunks(0, size):
            hash_range(descriptor, begin, end, path, digest, scratch)
            if seen is not None:
                seen(end - begin)
    finally:
        os.close(descriptor)
    return FileRecord(size, digest.hexdigest())


def digest_findings(path: Path, record: FileRecord, found: FileRecord) -> list[PissaError]:
    """How a file differs from its record in a manifest: nothing, or one finding."""
    if found.size != record.size:
        return [FormatError("the size differs", file=path, expected=f"{record.size} bytes", found=found.size)]
    if found != record:
        return [FormatError("the digest differs", file=path, expected=f"blake3 {record.digest}", found=found.digest)]
    return []


def check_file(path: Path, record: FileRecord, seen: Callable[[int], None] | None = None) -> list[PissaError]:
    """The same for a file that has to be read first, and may be missing."""
    if not path.is_file():
        return [FormatError("the file is missing", file=path)]
    try:
        return digest_findings(path, record, hash_file(path, seen))
    except PissaError as error:
        return [error]
