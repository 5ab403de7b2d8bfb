"""What of an interrupted run can be kept. Nothing is believed because it exists, only because its digest fits."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from blake3 import blake3

from pissa_convert.engine.files import partial_path
from pissa_convert.engine.journal import Entry
from pissa_convert.engine.reading import hash_file, hash_range, read_exactly
from pissa_convert.engine.work import ModelPlan, Shard, Slots
from pissa_convert.formats.manifest import FileRecord
from pissa_convert.memory import CHUNK
from pissa_convert.plans.steps import Change, Copy, ShardPlan, Stats


@dataclass
class Progress:
    """What is done, as the journal says and the files confirm.

    Attributes:
        stats: of each transformed step that is done, by its key.
        side: digest of what each of these has in the file beside the shards.
        sources, outputs: records of committed shards.
    """

    stats: dict[str, Stats] = field(default_factory=dict)
    side: dict[str, str] = field(default_factory=dict)
    sources: dict[str, FileRecord] = field(default_factory=dict)
    outputs: dict[str, FileRecord] = field(default_factory=dict)


def side_digest(file: Slots | None, step: Change) -> str:
    """blake3 of what a step has in the file beside the shards (A and B, for a split), as it lies there."""
    digest = blake3()
    for _, slot in step.beside:
        data = memoryview(bytearray(slot.nbytes))
        assert file is not None
        read_exactly(file.descriptor, slot.begin, data, file.partial)
        digest.update(data)
    return digest.hexdigest()


def reopen(path: Path) -> None:
    """Take the final name off a file that has to be worked on again."""
    if path.exists():
        os.replace(path, partial_path(path))


def recover(plan: ModelPlan, entries: list[Entry], beside: Slots | None) -> tuple[list[Shard], Progress]:
    """The shards that are still to be worked on, each with the prefix that can be kept, and what is done."""
    steps: dict[str, dict[int, Entry]] = {}
    committed: dict[str, Entry] = {}
    for entry in entries:
        if "step" in entry:
            steps.setdefault(entry["shard"], {})[entry["step"]] = entry
        elif "committed" in entry:
            committed[entry["committed"]] = entry
    progress = Progress()
    remaining = []
    for shard in plan.shards:
        done = steps.get(shard.name, {})
        path = plan.dest / shard.name
        if shard.name in committed and _is_whole(shard, path, committed[shard.name], done, beside):
            output = committed[shard.name]
            progress.sources[shard.source_name] = FileRecord(shard.source.size, output["source_digest"])
            progress.outputs[shard.name] = FileRecord(shard.size, output["digest"])
            _keep(shard, len(shard.steps), done, progress)
            continue
        reopen(path)
        work = recover_prefix(plan, shard, done, beside)
        _keep(shard, work.steps_done, done, progress)
        remaining.append(work)
    return remaining, progress


def _is_whole(shard: ShardPlan, path: Path, entry: Entry, done: dict[int, Entry], beside: Slots | None) -> bool:
    if not path.is_file() or hash_file(path) != FileRecord(shard.size, entry["digest"]):
        return False
    return all(
        index in done and side_digest(beside, step) == done[index]["side"]
        for index, step in enumerate(shard.steps)
        if not isinstance(step, Copy)
    )


def _keep(shard: ShardPlan, steps_done: int, done: dict[int, Entry], progress: Progress) -> None:
    for index, step in enumerate(shard.steps[:steps_done]):
        if not isinstance(step, Copy):
            progress.stats[step.key] = step.read_stats(done[index]["stats"])
            progress.side[step.key] = done[index]["side"]


def recover_prefix(plan: ModelPlan, shard: ShardPlan, done: Mapping[int, Entry], beside: Slots | None) -> Shard:
    """Follow the partial file from its start for as long as its running digest is what `done`, by step, says of it."""
    path = plan.dest / shard.name
    expected = plan.fingerprint[f"source file {shard.source_name}"]
    fresh = Shard(shard, expected)
    partial = partial_path(path)
    if not done or not partial.is_file() or partial.stat().st_size != shard.size:
        return fresh
    scratch = memoryview(bytearray(CHUNK))
    digest = blake3()
    kept = fresh
    descriptor = os.open(partial, os.O_RDONLY | os.O_CLOEXEC)
    try:
        hash_range(descriptor, 0, len(shard.header), partial, digest, scratch)
        for index, step in enumerate(shard.steps):
            if not isinstance(step, Copy) and index not in done:
                break
            hash_range(descriptor, step.at, step.stop, partial, digest, scratch)
            if not isinstance(step, Copy):
                entry = done[index]
                if digest.hexdigest() != entry["digest"] or side_digest(beside, step) != entry["side"]:
                    break
                kept = Shard(shard, expected, index + 1, digest.copy(), entry["source"])
    finally:
        os.close(descriptor)
    return kept
