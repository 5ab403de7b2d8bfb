"""Is a finished folder what its manifest says, and does it, with its adapter, give the model that it was made from?

Without the source, every file is hashed. With it, source and result are read side by side once: both are hashed,
what was copied is compared byte by byte, and for every split weight W − (W_res + s·B·A) is formed some rows at a
time. Memory is that of a few chunks and one weight's A and B per worker, whatever the model's size.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits

from pissa_convert.engine.journal import journal_name
from pissa_convert.engine.side_by_side import Finding
from pissa_convert.engine.verify_jobs import Origins, jobs
from pissa_convert.errors import DamageError, FormatError, PissaError, RequestError
from pissa_convert.formats.manifest import MANIFEST_NAME, Manifest, manifest_name, read_manifest
from pissa_convert.memory import peak_resident_bytes

_WORKERS = 4
"""Files in work at once: hashing is bound by one CPU each, and every worker holds some chunks."""

Progress = Callable[[int, int], None]
"""Called with the bytes that are checked and the bytes in all, one call at a time, from a worker's thread."""


@dataclass(frozen=True)
class Verification:
    """What `verify` found in order.

    Attributes:
        dest: the folder.
        to: what was made.
        files: files whose digests fit.
        tensors: split weights (modules of a LoRA, merged weights) that were compared; 0 without a source.
        relative_error: largest ‖W − (W_res + s·B·A)‖ / ‖W‖ (‖ΔW − B·A‖ / ‖ΔW‖, the rounding of W + s·B·A) among
            them, as measured now; None without a source.
        unexpected: files in the folder that the manifest does not name, relative; nothing is known of them.
        wall_seconds: it took.
        peak_memory: largest resident set of this process so far, in bytes, or None where it cannot be read.
    """

    dest: Path
    to: str
    files: int
    tensors: int
    relative_error: float | None
    unexpected: tuple[str, ...]
    wall_seconds: float
    peak_memory: int | None

    def as_json(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {**asdict(self), "dest": str(self.dest)}


def verify(dest: Path, origins: Origins, *, threads: int, progress: Progress | None = None) -> Verification:
    """Check a finished conversion; nothing is written.

    Args:
        dest: the folder or file that `convert` made.
        origins: what it was made from, to compare with.
        threads: at most this many files are read at once.
        progress: told of the bytes that are done.

    Raises:
        RequestError: there is no finished conversion in `dest`, or `source` is no folder.
        DamageError: something differs; it lists everything that does.
    """
    started = time.perf_counter()
    folder, alone = (dest, None) if dest.is_dir() else (dest.parent, dest.name)
    _check_request(dest, folder, alone, origins.source)
    try:
        manifest = read_manifest(folder / manifest_name(alone))
    except FormatError as error:
        raise DamageError(dest, [error]) from error
    origins.check(manifest, dest)
    seen = _Counter(_bytes_to_read(manifest, origins.source), progress)
    findings: list[PissaError] = []
    errors: list[float] = []
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(min(threads, _WORKERS), "verify") as pool:
        try:
            for found, measured in pool.map(_done, jobs(folder, origins, manifest, seen)):
                findings += found
                errors += measured
        except BaseException:
            seen.cancelled = True
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if findings:
        raise DamageError(dest, findings)
    return Verification(
        dest=dest,
        to=manifest.head["to"],
        files=len(manifest.output) + 1,
        tensors=len(errors),
        relative_error=max(errors, default=None),
        unexpected=_unexpected(dest, manifest) if alone is None else (),
        wall_seconds=time.perf_counter() - started,
        peak_memory=peak_resident_bytes(),
    )


def _done(job: Callable[[], Finding]) -> Finding:
    """What a job finds; that it cannot go on is a finding too."""
    try:
        return job()
    except PissaError as error:
        return [error], []


def _check_request(dest: Path, folder: Path, alone: str | None, source: Path | None) -> None:
    if not (folder / manifest_name(alone)).is_file():
        if (folder / journal_name(alone)).exists():
            fix = "run the command that made it again to continue, then verify"
            raise RequestError("the conversion in DEST is unfinished", file=dest, fix=fix)
        fix = "give a folder or file that pissa-convert has made"
        expected = manifest_name(alone)
        raise RequestError("there is no finished conversion in DEST", file=dest, expected=expected, fix=fix)
    if source is not None and not (source.is_dir() or (source.suffix == ".gguf" and source.is_file())):
        fix = "give what DEST was made from"
        raise RequestError("--source is neither a folder nor a GGUF", file=source, fix=fix)


class _Counter:
    """Adds up the workers' bytes for the caller's progress."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._done, self._total, self._progress = 0, total, progress
        self._lock = threading.Lock()
        self.cancelled = False

    def __call__(self, nbytes: int) -> None:
        if self.cancelled:
            raise KeyboardInterrupt  # the workers stop at their next chunk
        if self._progress is not None:
            with self._lock:
                self._done += nbytes
                self._progress(self._done, self._total)


def _bytes_to_read(manifest: Manifest, source: Path | None) -> int:
    files = [*manifest.output.values(), *(manifest.source.values() if source is not None else ())]
    return sum(record.size for record in files)


def _unexpected(dest: Path, manifest: Manifest) -> tuple[str, ...]:
    files = (path for path in dest.rglob("*") if not path.is_dir())
    names = {path.relative_to(dest).as_posix() for path in files}
    return tuple(sorted(names - manifest.output.keys() - {MANIFEST_NAME}))
