"""Is a finished folder what its manifest says, and does it, with its adapter, give the model that it was made from?

Without the source, every file is hashed. With it, source and result are read side by side once: both are hashed,
what was copied is compared byte by byte, and for every split weight W − (W_res + s·B·A) is formed some rows at a
time. Memory is that of a few chunks and one weight's A and B per worker, whatever the model's size.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pissa_convert.engine.comparison import Adapter, compare_shard
from pissa_convert.engine.journal import JOURNAL_NAME
from pissa_convert.engine.lora_check import compare_lora
from pissa_convert.engine.reading import check_file
from pissa_convert.errors import DamageError, FormatError, PissaError, RequestError
from pissa_convert.formats.adapter import WEIGHTS_NAME
from pissa_convert.formats.checkpoint import check_inside
from pissa_convert.formats.manifest import MANIFEST_NAME, FileRecord, Manifest, read_manifest
from pissa_convert.formats.model_card import CARD_NAME
from pissa_convert.init_planning import stored_init
from pissa_convert.memory import peak_resident_bytes
from pissa_convert.planning import ADAPTER_FOLDER

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
        tensors: split weights (modules of a LoRA) that were compared with the source's; 0 without a source.
        relative_error: largest ‖W − (W_res + s·B·A)‖ / ‖W‖ (‖ΔW − B·A‖ / ‖ΔW‖) among them, as measured now; None
            without a source.
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


def verify(
    dest: Path,
    source: Path | None = None,
    init: Path | None = None,
    *,
    threads: int,
    progress: Progress | None = None,
) -> Verification:
    """Check a finished conversion; nothing is written.

    Args:
        dest: the folder that `convert` made.
        source: the model or adapter that it was made from, to compare with.
        init: for a LoRA, the initial adapter.
        threads: at most this many files are read at once.
        progress: told of the bytes that are done.

    Raises:
        RequestError: there is no finished conversion in `dest`, or `source` is no folder.
        DamageError: something differs; it lists everything that does.
    """
    started = time.perf_counter()
    _check_request(dest, source)
    try:
        manifest = read_manifest(dest / MANIFEST_NAME)
    except FormatError as error:
        raise DamageError(dest, [error]) from error
    _check_comparison(manifest, dest, source, init)
    seen = _Counter(_bytes_to_read(manifest, source), progress)
    findings: list[PissaError] = []
    errors: list[float] = []
    with ThreadPoolExecutor(min(threads, _WORKERS), "verify") as pool:
        try:
            for found, measured in pool.map(lambda job: job(), _jobs(dest, source, init, manifest, seen)):
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
        unexpected=_unexpected(dest, manifest),
        wall_seconds=time.perf_counter() - started,
        peak_memory=peak_resident_bytes(),
    )


def _check_request(dest: Path, source: Path | None) -> None:
    if not (dest / MANIFEST_NAME).is_file():
        if (dest / JOURNAL_NAME).exists():
            fix = "run the command that made it again to continue, then verify"
            raise RequestError("the conversion in DEST is unfinished", file=dest, fix=fix)
        fix = "give a folder that --to pissa has made"
        raise RequestError("there is no finished conversion in DEST", file=dest, expected=MANIFEST_NAME, fix=fix)
    if source is not None and not source.is_dir():
        fix = "give the folder of the model that DEST was made from"
        raise RequestError("--source is not a folder", file=source, fix=fix)


def _check_comparison(manifest: Manifest, dest: Path, source: Path | None, init: Path | None) -> None:
    """Refuse to compare with what the result was not made from."""
    is_lora = manifest.head["to"] == "lora"
    if init is not None and not is_lora:
        raise RequestError("--init goes with the result of --to lora", file=dest)
    if is_lora and (source is None) != (init is None):
        raise RequestError(
            "a LoRA is compared with two adapters",
            file=dest,
            fix="give the trained one as --source and the one before training as --init",
        )


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


_Finding = tuple[list[PissaError], list[float]]


def _shards(manifest: Manifest) -> set[str]:
    return {name for name in manifest.output if name in manifest.source and name.endswith(".safetensors")}


def _bytes_to_read(manifest: Manifest, source: Path | None) -> int:
    files = [*manifest.output.values(), *(manifest.source.values() if source is not None else ())]
    return sum(record.size for record in files)


def _jobs(
    dest: Path, source: Path | None, init: Path | None, manifest: Manifest, seen: Callable[[int], None]
) -> Iterator[Callable[[], _Finding]]:
    """One job per file of the result, or per pair of files where the source is there to compare with."""
    if manifest.head["to"] == "lora":
        for name, record in manifest.output.items():
            yield partial(_check_output, dest / name, record, seen)
        if source is not None and init is not None:
            for root, prefix in ((source, "trained/"), (stored_init(init).folder, "init/")):
                for name, record in manifest.source.items():
                    if name.startswith(prefix):
                        yield partial(_check_output, root / name.removeprefix(prefix), record, seen)
            yield partial(compare_lora, dest, source, init, manifest)
        return
    shards = _shards(manifest) if source is not None else set()
    if source is not None:
        for name, record in manifest.source.items():
            if name not in shards:
                yield partial(_check_source, source, name, record, manifest, seen)
        try:
            adapter = Adapter(dest / ADAPTER_FOLDER / WEIGHTS_NAME)
        except PissaError:
            shards = set()  # the adapter's own check names it; without it there is nothing to compare
        for name in sorted(shards):
            yield partial(compare_shard, source, dest, name, manifest, adapter, seen)
    for name, record in manifest.output.items():
        if name not in shards:
            yield partial(_check_output, dest / name, record, seen)


def _check_output(path: Path, record: FileRecord, seen: Callable[[int], None]) -> _Finding:
    return check_file(path, record, seen), []


def _check_source(
    source: Path, name: str, record: FileRecord, manifest: Manifest, seen: Callable[[int], None]
) -> _Finding:
    """A file beside the weights: it must be what was converted, and the result's copy of it must be the same."""
    try:
        check_inside(source, source / name)
    except PissaError as error:
        return [error], []
    findings = check_file(source / name, record, seen)
    if name in manifest.output and name != CARD_NAME and manifest.output[name] != record:
        findings.append(FormatError("the manifest says that it was copied, with another digest", file=source / name))
    return findings, []


def _unexpected(dest: Path, manifest: Manifest) -> tuple[str, ...]:
    files = (path for path in dest.rglob("*") if not path.is_dir())
    names = {path.relative_to(dest).as_posix() for path in files}
    return tuple(sorted(names - manifest.output.keys() - {MANIFEST_NAME}))


def verify_complete(
    dest: Path, head: Mapping[str, Any], sources: Mapping[str, Path], derived: Collection[str] = ()
) -> Mapping[str, Mapping[str, Any]]:
    """Check that a finished destination is what a plan would make, by the digests of every file on both sides.

    Args:
        head: what the plan says of the conversion as a whole.
        sources: the files that it reads, by their names in the manifest.
        derived: names of records there that are of no file.

    Returns:
        The manifest's entry of each weight or module.

    Raises:
        RequestError: it is not; the message names the first difference.
    """
    manifest = read_manifest(dest / MANIFEST_NAME)
    fix = "choose a new folder, or replace this one with --overwrite"
    for name, value in head.items():
        if manifest.head[name] != json.loads(json.dumps(value)):
            raise RequestError(
                f"DEST holds a finished conversion with another {name}",
                file=dest,
                expected=json.dumps(manifest.head[name]),
                found=json.dumps(value),
                fix=fix,
            )
    read = [(sources.get(name, Path(name)), record) for name, record in manifest.source.items() if name not in derived]
    for path, record in [*read, *((dest / name, record) for name, record in manifest.output.items())]:
        for finding in check_file(path, record):
            raise RequestError("a file differs from what DEST's manifest says", found=finding, fix=fix)
    return manifest.tensors
