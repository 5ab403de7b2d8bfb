"""One conversion, from an empty or interrupted destination to a complete one.

The order of commits is the promise: shards one by one, then the adapter, then the auxiliary files, then the index,
config.json and last the manifest. A folder that *loads* is therefore whole, and until the manifest is there the
journal says what is done and the same command continues.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from blake3 import blake3

from pissa_convert.engine.conduct import Entries, Outcome, conduct
from pissa_convert.engine.files import PartialFile, write_file
from pissa_convert.engine.journal import Journal
from pissa_convert.engine.lanes import MakeTransform
from pissa_convert.engine.ledger import Ledger, ProgressCallback
from pissa_convert.engine.reading import hash_file, hash_range, read_exactly
from pissa_convert.engine.recovery import recover
from pissa_convert.engine.work import ModelPlan
from pissa_convert.engine.workers import MakeLanes, Workers, open_beside
from pissa_convert.errors import ConversionError
from pissa_convert.formats.manifest import FileRecord, manifest_name, read_manifest
from pissa_convert.linalg import Backend
from pissa_convert.memory import CHUNK, chunks
from pissa_convert.plans.fingerprint import identity
from pissa_convert.plans.split_plan import Plan
from pissa_convert.plans.steps import changes_of
from pissa_convert.report import SplitReport, Timings
from pissa_convert.transforms.split import split_step


def run(
    plan: Plan, workers: Workers, *, overwrite: bool = False, progress: ProgressCallback | None = None
) -> SplitReport:
    """Split a model as planned.

    Args:
        plan: what to do.
        workers: do the splits, with the backend that was planned with.
        overwrite: replace an earlier conversion in the destination.
        progress: called from this thread as work is finished.

    Raises:
        PissaError: see the family; after a ConversionError the same call continues where this one stopped.
    """
    done = carry_out(plan, split_lanes, workers, overwrite=overwrite, progress=progress)
    return SplitReport(
        **done.report(plan.dest, workers.warnings),
        tensors=len(done.tensors),
        relative_error=max(entry["relative_error"] for entry in done.tensors.values()),
        estimated_deficit=max(entry["estimated_deficit"] for entry in done.tensors.values()),
    )


@contextmanager
def split_lanes(plan: Plan, backend: Backend) -> Iterator[MakeTransform]:
    """Makes lanes that split."""
    yield lambda threads: partial(split_step, backend=backend.with_threads(threads))


def carry_out(
    plan: ModelPlan,
    make_lanes: MakeLanes,
    workers: Workers,
    *,
    overwrite: bool = False,
    progress: ProgressCallback | None = None,
) -> Outcome:
    """Make the folder that a plan describes, or what is missing of it.

    Args:
        plan: what to do.
        make_lanes: the plan's transforms.
        workers: who uses them.
        overwrite, progress: as for `run`.

    Raises:
        PissaError: see the family; after a ConversionError the same call continues where this one stopped.
    """

    def convert(journal: Journal, timings: Timings) -> Entries:
        return _convert(plan, make_lanes, workers, journal, timings, progress)

    return conduct(plan, overwrite, convert)


def _convert(
    plan: ModelPlan,
    make_lanes: MakeLanes,
    workers: Workers,
    journal: Journal,
    timings: Timings,
    progress: ProgressCallback | None,
) -> Entries:
    with open_beside(plan) as beside:
        if beside is not None and plan.beside is not None:
            beside.write(plan.beside.header, 0)
        remaining, done = recover(plan, journal.entries, beside)
    left = sum(work.plan.source.size - work.offset for work in remaining)
    ledger = Ledger(plan, journal, done, sum(shard.source.size for shard in plan.shards) - left, timings, progress)
    workers.work(plan, make_lanes, remaining, ledger)
    with open_beside(plan) as beside:  # again: other machines may have written to it
        if beside is not None and plan.beside is not None:
            done.outputs[plan.beside.name] = _commit_beside(plan, beside, done.side)
    for name, path in plan.sources.items():
        if name not in done.sources:
            done.sources[name] = _hash_unchanged(plan, name, path)
    for name, text in plan.texts.items():
        done.outputs[name] = write_file(plan.dest / name, text)
    for name in plan.copies:
        done.outputs[name] = _copy_file(plan, name, done.sources[name])
    for name, text in plan.last_texts.items():
        done.outputs[name] = write_file(plan.dest / name, text)
    manifest = plan.dest / manifest_name(plan.alone)
    write_file(manifest, plan.manifest(done.sources, done.outputs, done.stats))
    return read_manifest(manifest).tensors


def _hash_unchanged(plan: ModelPlan, name: str, path: Path) -> FileRecord:
    """The record of a file that lanes read by position: what they read is what is hashed now."""
    record = hash_file(path)
    if identity(path) != list(plan.fingerprint[f"source file {name}"]):
        raise ConversionError(
            "the file has changed during the work", file=path, fix="restore it, or start over with --overwrite"
        )
    return record


def _commit_beside(plan: ModelPlan, file: PartialFile, sides: Mapping[str, str]) -> FileRecord:
    """Read the file beside the shards back, which proves each slot and gives its digest, and commit it.

    Its slots lie in the order of the steps.
    """
    whole, at = blake3(), 0
    scratch = memoryview(bytearray(CHUNK))
    for step in changes_of(plan.shards):
        side = blake3()
        for _, slot in step.beside:
            hash_range(file.descriptor, at, slot.begin, file.partial, whole, scratch)
            for begin, at in chunks(slot.begin, slot.end):
                view = scratch[: at - begin]
                read_exactly(file.descriptor, begin, view, file.partial)
                side.update(view)
                whole.update(view)
        if side.hexdigest() != sides[step.key]:
            raise ConversionError(
                "what was written reads back differently",
                file=file.partial,
                tensor=step.tensor,
                fix="check the disk, then run the same command again to continue",
            )
    hash_range(file.descriptor, at, file.size, file.partial, whole, scratch)
    file.commit()
    return FileRecord(file.size, whole.hexdigest())


def _copy_file(plan: ModelPlan, name: str, record: FileRecord) -> FileRecord:
    """Copy an auxiliary file; what is written must be what was hashed."""
    digest = blake3()
    source = plan.sources[name]
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
