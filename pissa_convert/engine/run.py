"""One conversion, from an empty or interrupted destination to a complete one.

The order of commits is the promise: shards one by one, then the adapter, then the auxiliary files, then the index,
config.json and last the manifest. A folder that *loads* is therefore whole, and until the manifest is there the
journal says what is done and the same command continues.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from pissa_convert.engine import destination
from pissa_convert.engine.destination import State
from pissa_convert.engine.files import PartialFile, storage_error, write_file
from pissa_convert.engine.journal import Journal
from pissa_convert.engine.pipeline import run_pipeline
from pissa_convert.engine.reading import hash_file, hash_range, read_exactly
from pissa_convert.engine.recovery import recover, reopen, side_digest
from pissa_convert.engine.verify import verify_complete
from pissa_convert.engine.work import Shard
from pissa_convert.engine.writer import Sink
from pissa_convert.errors import ConversionError
from pissa_convert.formats.manifest import MANIFEST_NAME, FileRecord
from pissa_convert.linalg import Backend, SplitStats
from pissa_convert.memory import CHUNK, chunks, peak_resident_bytes
from pissa_convert.planning import Plan, manifest
from pissa_convert.report import Report, Timings
from pissa_convert.transforms.split import split_step

ProgressCallback = Callable[[int, int, Timings], None]
"""Called with the bytes of source that are done, the bytes in all, and the stages' timings so far."""


def run(plan: Plan, backend: Backend, *, overwrite: bool = False, progress: ProgressCallback | None = None) -> Report:
    """Carry out a plan.

    Args:
        plan: what to do.
        backend: does the splits, in as many lanes as the plan has; the one that was planned with.
        overwrite: replace an earlier conversion in the destination.
        progress: called from this thread as work is finished.

    Raises:
        PissaError: see the family; after a ConversionError the same call continues where this one stopped.
    """
    started = time.perf_counter()
    timings = Timings()
    destination.check(plan, overwrite)
    try:
        plan.dest.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(error, plan.dest) from error
    with Journal(plan.dest) as journal:
        state = destination.begin(plan, journal, overwrite)
        if state is State.COMPLETE:
            try:
                tensors = verify_complete(plan.dest, plan.head, plan.sources)
            finally:
                journal.remove()
        else:
            tensors = _convert(plan, backend, journal, timings, progress)
    return Report(
        dest=plan.dest,
        tensors=len(tensors),
        resumed=state is State.RESUMED,
        complete_before=state is State.COMPLETE,
        wall_seconds=time.perf_counter() - started,
        timings=timings,
        relative_error=max(item["relative_error"] for item in tensors.values()),
        estimated_deficit=max(item["estimated_deficit"] for item in tensors.values()),
        peak_memory=peak_resident_bytes(),
    )


def _convert(
    plan: Plan, backend: Backend, journal: Journal, timings: Timings, progress: ProgressCallback | None
) -> Mapping[str, Mapping[str, Any]]:
    adapter_path = plan.dest / plan.adapter.name
    reopen(adapter_path)
    with PartialFile(adapter_path, plan.adapter.size) as adapter:
        adapter.write(plan.adapter.header, 0)
        remaining, done = recover(plan, journal.entries, adapter)
        finished = plan.source_bytes - sum(work.plan.source.size - work.offset for work in remaining)

        def report_progress(nbytes: int) -> None:
            nonlocal finished
            finished += nbytes
            if progress is not None:
                progress(finished, plan.source_bytes, timings)

        def step_done(shard: Shard, index: int, sha256: str, side: str, stats: SplitStats) -> None:
            tensor = shard.plan.steps[index].tensor  # type: ignore[union-attr]
            done.stats[tensor], done.side[tensor] = stats, side
            entry = {"shard": shard.plan.name, "step": index, "sha256": sha256, "side": side, "stats": stats.as_json()}
            journal.append(entry)

        def shard_written(shard: Shard, source_sha256: str, file: PartialFile) -> None:
            adapter.sync()  # A and B of this shard must not be behind its residual
            file.commit()
            name, sha256 = shard.plan.name, shard.digest.hexdigest()
            journal.append({"committed": name, "sha256": sha256, "source_sha256": source_sha256}, durable=True)
            done.sources[name] = FileRecord(shard.plan.source.size, source_sha256)
            done.outputs[name] = FileRecord(shard.plan.size, sha256)
            report_progress(len(shard.plan.source.header))

        report_progress(0)
        sink = Sink(adapter, step_done, shard_written, report_progress)
        transforms = [partial(split_step, backend=lane) for lane in backend.share(plan.memory.lanes)]
        run_pipeline(remaining, plan.dest, transforms, plan.memory.budget, sink, timings)
        done.outputs[plan.adapter.name] = _commit_adapter(plan, adapter, done.side)
    for name in plan.checkpoint.auxiliary:
        done.sources[name] = hash_file(plan.source / name)
    for name in plan.texts:
        done.outputs[name] = _write_text(plan, name)
    for name in plan.copies:
        done.outputs[name] = _copy_file(plan, name, done.sources[name])
    tensors = {name: done.stats[name] for name in done.side}
    text = manifest(plan, done.sources, done.outputs, tensors)
    write_file(plan.dest / MANIFEST_NAME, text)
    journal.remove()
    return {name: stats.as_json() for name, stats in tensors.items()}


def _commit_adapter(plan: Plan, adapter: PartialFile, sides: Mapping[str, str]) -> FileRecord:
    """Read the adapter back, which proves each slot and gives the file's digest, and commit it."""
    for step in plan.splits:
        if side_digest(adapter, step) != sides[step.tensor]:
            raise ConversionError(
                "A and B read back differently from how they were written",
                file=adapter.partial,
                tensor=step.tensor,
                fix="check the disk, then run the same command again to continue",
            )
    digest = hashlib.sha256()
    hash_range(adapter.descriptor, 0, adapter.size, adapter.partial, digest, memoryview(bytearray(CHUNK)))
    adapter.commit()
    return FileRecord(adapter.size, digest.hexdigest())


def _write_text(plan: Plan, name: str) -> FileRecord:
    data = plan.texts[name]
    write_file(plan.dest / name, data)
    return FileRecord(len(data), hashlib.sha256(data).hexdigest())


def _copy_file(plan: Plan, name: str, record: FileRecord) -> FileRecord:
    """Copy an auxiliary file; what is written must be what was hashed."""
    digest = hashlib.sha256()
    source = plan.source / name
    with open(source, "rb", buffering=0) as reader, PartialFile(plan.dest / name, record.size) as file:
        for begin, end in chunks(0, record.size):
            data = memoryview(bytearray(end - begin))
            read_exactly(reader.fileno(), begin, data, source)
            digest.update(data)
            file.write(data, begin)
        if FileRecord(record.size, digest.hexdigest()) != record or reader.seek(0, 2) != record.size:
            raise ConversionError("the source file has changed during the work", file=source)
        file.commit()
    return record
