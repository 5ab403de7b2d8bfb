"""The journal: what is already done, one line per fact, each line with its own digest.

A line that was torn by a crash, or has a flipped bit, ends the journal: what it and later lines said is done again.
The open journal is also the lock that keeps a second process out of the same destination.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from pissa_convert.engine.files import storage_error, sync_folder
from pissa_convert.errors import RequestError

JOURNAL_NAME = ".pissa-convert.journal"

Entry = dict[str, Any]


def journal_name(alone: str | None) -> str:
    """What the journal is called in the folder of a result, or beside a result that is one file of that name."""
    return JOURNAL_NAME if alone is None else f".{alone}{JOURNAL_NAME}"


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest()[:32].encode()


def _parse(line: bytes) -> Entry | None:
    digest, _, text = line.partition(b" ")
    if not line.endswith(b"\n") or digest != _digest(text[:-1]):
        return None
    entry = json.loads(text)
    return entry if isinstance(entry, dict) else None


def _read_entries(data: bytes) -> tuple[list[Entry], int]:
    """The entries of the longest valid prefix, and its length in bytes."""
    entries, valid = [], 0
    for line in data.splitlines(keepends=True):
        entry = _parse(line)
        if entry is None:
            break
        entries.append(entry)
        valid += len(line)
    return entries, valid


def _result_of(journal: Path) -> Path:
    return journal.parent / journal.name.removesuffix(JOURNAL_NAME).removeprefix(".")


def _open_locked(path: Path) -> int:
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise storage_error(error, path) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
            os.close(descriptor)  # its owner finished and removed it between our open and our lock
        except OSError as error:
            os.close(descriptor)
            raise RequestError(
                "another pissa-convert is working on this DEST", file=_result_of(path), fix="wait for it to finish"
            ) from error


class Journal:
    """An append-only record in the destination folder. A context manager; leaving it releases the lock."""

    def __init__(self, folder: Path, alone: str | None = None) -> None:
        """Open or create the journal and lock it.

        Args:
            folder: of the result.
            alone: the result's name, where it is one file.

        Raises:
            RequestError: another process is working on this destination.
            ConversionError: the journal cannot be written.
        """
        self.path = folder / journal_name(alone)
        self._descriptor = _open_locked(self.path)
        size = os.fstat(self._descriptor).st_size
        self.entries, valid = _read_entries(os.pread(self._descriptor, size, 0))
        os.ftruncate(self._descriptor, valid)
        os.lseek(self._descriptor, valid, os.SEEK_SET)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    def append(self, entry: Entry, *, durable: bool = False) -> None:
        """Add a line; with `durable`, return only when it is on disk."""
        text = json.dumps(entry, separators=(",", ":")).encode()
        try:
            line = _digest(text) + b" " + text + b"\n"
            if os.write(self._descriptor, line) != len(line):
                raise OSError(28, "No space left on device")
            if durable:
                os.fsync(self._descriptor)
        except OSError as error:
            raise storage_error(error, self.path) from error
        self.entries.append(entry)

    def restart(self) -> None:
        """Forget everything."""
        os.ftruncate(self._descriptor, 0)
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        self.entries = []

    def remove(self) -> None:
        """The work is complete: remove the journal."""
        self.path.unlink()
        sync_folder(self.path.parent)
