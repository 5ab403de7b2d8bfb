"""Output files. A file grows as NAME.partial beside its final name, and gets its name only when it is durable."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from blake3 import blake3

from pissa_convert.errors import ConversionError
from pissa_convert.formats.manifest import FileRecord

PARTIAL = ".partial"

_BLOCK = 4096
"""Offsets, lengths and addresses of direct writes are multiples of this: at least what any disk asks for."""

_STAGE = 4 << 20
"""Bytes of one direct write."""

_DIRECT_MINIMUM = 256 << 10
"""Less than this is left to the page cache."""

_WINDOW = 64 << 20
"""Where writes go through the page cache: bytes after which they are waited for and dropped from it."""


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


def partial_path(path: Path) -> Path:
    """Where a file grows before it gets its name."""
    return path.with_name(path.name + PARTIAL)


def take_name(path: Path) -> None:
    """Give a durable partial file its final name, durably.

    Raises:
        ConversionError: it cannot be renamed.
    """
    try:
        os.replace(partial_path(path), path)
        sync_folder(path.parent)
    except OSError as error:
        raise storage_error(error, path) from error


class PartialFile:
    """A file of known size that is being written at planned offsets.

    Large writes go to the disk directly (O_DIRECT): written data never fills the page cache, where its dirty pages
    would stall or kill other processes, and copying it there would cost as much time as the rest of the work. Where
    the file system refuses that, they go through the page cache, which is flushed and dropped window by window.

    Use as a context manager: leaving it closes the descriptors and keeps what was written, to be resumed.
    """

    def __init__(self, path: Path, size: int) -> None:
        """Create or reopen `path`.partial and reserve its whole size, so that a full disk shows here.

        Raises:
            ConversionError: the file cannot be created or the space is not there.
        """
        self.path, self.size = path, size
        self.partial = partial_path(path)
        self._unflushed = 0
        self._direct = -1
        self._stage: mmap.mmap | None = None
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
        if size >= _DIRECT_MINIMUM:
            self._open_direct()

    def _open_direct(self) -> None:
        # Some file systems refuse here, others at the first write; some systems do not have it.
        with suppress(OSError, AttributeError):
            self._direct = os.open(self.partial, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
            self._stage = mmap.mmap(-1, _STAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    def _close_direct(self) -> None:
        if self._stage is not None:
            self._stage.close()
            self._stage = None
        if self._direct >= 0:
            os.close(self._direct)
            self._direct = -1

    def __enter__(self) -> PartialFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._close_direct()
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def write(self, data: memoryview | bytes, offset: int) -> None:
        """Write all of `data` at `offset`."""
        with memoryview(data) as view:
            begin = done = min(-offset % _BLOCK, len(view))
            try:
                if self._stage is not None and len(view) - begin >= _DIRECT_MINIMUM:
                    with view[begin:] as rest:
                        done += self._write_blocks(rest, offset + begin)
                if done > begin:
                    self._write_cached(view, 0, begin, offset)
                    self._write_cached(view, done, len(view), offset)
                else:
                    self._write_cached(view, 0, len(view), offset)
            except OSError as error:
                raise storage_error(error, self.partial) from error

    def _write_blocks(self, view: memoryview, offset: int) -> int:
        """Write the whole blocks of `view` past the page cache; returns how many bytes of it that were."""
        assert self._stage is not None
        end = len(view) // _BLOCK * _BLOCK
        is_aligned = not view.readonly and ctypes.addressof(ctypes.c_byte.from_buffer(view)) % _BLOCK == 0
        done = 0
        with memoryview(self._stage) as stage:
            while done < end:
                count = min(_STAGE, end - done)
                if not is_aligned:
                    stage[:count] = view[done : done + count]
                with view[done : done + count] if is_aligned else stage[:count] as piece:
                    try:
                        written = os.pwrite(self._direct, piece, offset + done)
                    except OSError as error:
                        if error.errno != errno.EINVAL:
                            raise
                        written = 0
                if written % _BLOCK or not written:
                    break  # this file system does not take it; the rest goes through the page cache
                done += written
        if done < end:
            self._close_direct()
        return done

    def _write_cached(self, view: memoryview, begin: int, end: int, offset: int) -> None:
        while begin < end:
            with view[begin : min(begin + _WINDOW, end)] as piece:
                count = os.pwrite(self.descriptor, piece, offset + begin)
            begin += count
            self._unflushed += count
            if self._unflushed >= _WINDOW:
                self._unflushed = 0
                os.fdatasync(self.descriptor)
                os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

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
        take_name(self.path)


def write_file(path: Path, data: bytes) -> FileRecord:
    """Write a small file durably under its final name."""
    with PartialFile(path, len(data)) as file:
        file.write(data, 0)
        file.commit()
    return FileRecord(len(data), blake3(data).hexdigest())
