"""Output files. A file grows as NAME.partial beside its final name, and gets its name only when it is durable."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from pissa_convert.errors import ConversionError

PARTIAL = ".partial"

_WINDOW = 64 << 20
"""Bytes after which written pages are sent to the disk and dropped: dirty pages never pile up to a stall or an OOM."""

_SYNC_WAIT_BEFORE, _SYNC_WRITE, _SYNC_WAIT_AFTER = 1, 2, 4


def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    try:
        function = ctypes.CDLL(None, use_errno=True).sync_file_range
    except (OSError, AttributeError, TypeError):
        return None
    function.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    function.restype = ctypes.c_int
    return function


_start_writing = _sync_file_range()


def storage_error(error: OSError, path: Path) -> ConversionError:
    """The one-line error for a failed write; what was done so far can be resumed."""
    fix = "run the same command again to continue"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        fix = "make room, then run the same command again to continue"
    return ConversionError(f"cannot write: {error.strerror or error}", file=path, fix=fix)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class PartialFile:
    """A file of known size that is being written at planned offsets.

    Use as a context manager: leaving it closes the descriptor and keeps what was written, to be resumed.
    """

    def __init__(self, path: Path, size: int) -> None:
        """Create or reopen `path`.partial and reserve its whole size, so that a full disk shows here.

        Raises:
            ConversionError: the file cannot be created or the space is not there.
        """
        self.path, self.size = path, size
        self.partial = path.with_name(path.name + PARTIAL)
        self._dirty_begin = self._dirty_end = 0
        self._sending: tuple[int, int] | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.descriptor = os.open(self.partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise storage_error(error, self.partial) from error
        try:
            if os.fstat(self.descriptor).st_size != size:
                os.ftruncate(self.descriptor, 0)
            if size:
                os.posix_fallocate(self.descriptor, 0, size)
        except OSError as error:
            os.close(self.descriptor)
            self.partial.unlink(missing_ok=True)  # holds nothing yet, and would hold disk space
            raise storage_error(error, self.partial) from error

    def __enter__(self) -> PartialFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def write(self, data: memoryview | bytes, offset: int) -> None:
        """Write all of `data` at `offset`."""
        done = 0
        with memoryview(data) as view:
            while done < len(view):
                with view[done : done + _WINDOW] as piece:
                    try:
                        count = os.pwrite(self.descriptor, piece, offset + done)
                    except OSError as error:
                        raise storage_error(error, self.partial) from error
                self._wrote(offset + done, offset + done + count)
                done += count

    def copy_range(self, source: int, begin: int, end: int, data: memoryview) -> None:
        """Copy `begin`:`end` of an open source file to the same offsets, inside the kernel where it can.

        `data` holds the same bytes, for file systems that cannot copy between these two files.
        """
        at = begin
        try:
            while at < end:
                copied = os.copy_file_range(source, self.descriptor, end - at, at, at)
                if copied == 0:
                    break  # some file systems answer 0 instead of refusing
                at += copied
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM):
                raise storage_error(error, self.partial) from error
        self._wrote(begin, at)
        if at < end:
            self.write(data[at - begin :], at)

    def _wrote(self, begin: int, end: int) -> None:
        if begin != self._dirty_end:
            self._dirty_begin = begin  # a new run; the former is left to the next fsync
        self._dirty_end = end
        if self._dirty_end - self._dirty_begin >= _WINDOW:
            self._flush_window()

    def _flush_window(self) -> None:
        """Start writing this window out, wait for the one before, and drop that from the page cache."""
        window = (self._dirty_begin, self._dirty_end - self._dirty_begin)
        self._dirty_begin = self._dirty_end
        if _start_writing is None:
            os.fdatasync(self.descriptor)
            os.posix_fadvise(self.descriptor, *window, os.POSIX_FADV_DONTNEED)
            return
        _start_writing(self.descriptor, *window, _SYNC_WRITE)
        if self._sending is not None:
            # Errors of the write-back are reported by fsync at the commit as well; this is only pacing.
            _start_writing(self.descriptor, *self._sending, _SYNC_WAIT_BEFORE | _SYNC_WRITE | _SYNC_WAIT_AFTER)
            os.posix_fadvise(self.descriptor, *self._sending, os.POSIX_FADV_DONTNEED)
        self._sending = window

    def sync(self) -> None:
        """Make what was written durable.

        After a failed fsync the page cache may hold bytes that the disk does not, and they would read back as good:
        nothing of the file can be trusted, so it is removed and will be redone.
        """
        try:
            os.fsync(self.descriptor)
        except OSError as error:
            self.close()
            self.partial.unlink(missing_ok=True)
            raise storage_error(error, self.partial) from error

    def commit(self) -> None:
        """fsync, rename to the final name, fsync the folder."""
        self.sync()
        os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        self.close()
        try:
            os.replace(self.partial, self.path)
            sync_folder(self.path.parent)
        except OSError as error:
            raise storage_error(error, self.path) from error


def write_file(path: Path, data: bytes) -> None:
    """Write a small file durably under its final name."""
    with PartialFile(path, len(data)) as file:
        file.write(data, 0)
        file.commit()
