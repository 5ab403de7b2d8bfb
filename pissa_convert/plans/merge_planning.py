"""`--to merged`: what becomes of every tensor of a model that an adapter is added to, decided from headers alone."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

from pissa_convert.errors import RequestError
from pissa_convert.formats.adapter_folder import open_adapter
from pissa_convert.formats.checkpoint import Checkpoint, open_checkpoint
from pissa_convert.formats.safetensors import SafetensorsFile, lay_out
from pissa_convert.memory import Widths, plan_memory
from pissa_convert.options import MergeOptions, RunOptions
from pissa_convert.plans.architectures import read_architecture
from pissa_convert.plans.merge_changes import HEAD, Changes, find_changes
from pissa_convert.plans.merge_plan import HEAD_FILE, TWO_FILES, HeadFile, MergePlan, new_dtype, shard_tensors
from pissa_convert.plans.merge_steps import Change, Dequantise, Target, Treatment, merge_steps
from pissa_convert.plans.quantised_source import StoredWeight, as_matrices, quantised_manifest
from pissa_convert.plans.split_plan import check_destination
from pissa_convert.plans.steps import ShardPlan, changes_of, flights
from pissa_convert.plans.targets import refuse_quantised

_SCRATCH = 8 << 20
"""Bytes of float32 arrays that a lane works with."""


def plan_merge(
    source: str | os.PathLike[str],
    adapter: str | os.PathLike[str] | None,
    dest: str | os.PathLike[str],
    options: MergeOptions,
    run: RunOptions,
    threads: int,
) -> MergePlan:
    """Read the headers of model and adapter and decide everything.

    Args:
        adapter: None to read a 4-bit model back as it is.

    Raises:
        RequestError: they do not fit together, or DEST cannot be used.
    """
    root, target = Path(source).resolve(), Path(os.path.abspath(dest))
    folder = None if adapter is None else open_adapter(Path(adapter), "--adapter")
    for read in (root, *([] if folder is None else [folder.root.resolve()])):
        check_destination(read, target)
    checkpoint = open_checkpoint(root)
    manifest = quantised_manifest(checkpoint)
    stored: Mapping[str, StoredWeight] = {}
    if manifest is not None:
        checkpoint, stored = as_matrices(checkpoint, manifest)
    elif folder is None:
        fix = "give the result of --to qpissa, or --adapter"
        raise RequestError("--exact-base reads a 4-bit base back, and SOURCE is none", file=root, fix=fix)
    known = [(tensor.name, tensor.dtype, tensor.shape) for tensor in checkpoint.tensors]
    refuse_quantised(known, checkpoint.config)
    architecture = read_architecture(checkpoint.config, [name for name, _, _ in known])
    changes = Changes({}) if folder is None else find_changes(checkpoint, architecture, folder)
    beside = _head_file(checkpoint, changes, options.dtype)
    shards = tuple(_shard_plan(shard, changes, beside, options.dtype, stored) for shard in checkpoint.shards)
    # Each lane holds both factors, in float64 while they are read.
    pairs = () if folder is None else folder.pairs.values()
    factors = max((2 * 8 * pair.rank * (pair.size_in + pair.size_out) for pair in pairs), default=0)
    return MergePlan(
        source=root,
        dest=target,
        options=options,
        checkpoint=checkpoint,
        adapter=folder,
        changes=changes,
        shards=shards,
        beside=beside,
        memory=plan_memory(flights(shards), partial(_workspace, shards, factors + _SCRATCH), threads, run.max_memory),
        recorded={},
        quantised=len(stored),
    )


def _workspace(shards: Iterable[ShardPlan], lane: int, widths: Widths) -> int:
    """Bytes that the lanes take beside the rows; more threads in one do not make it larger."""

    def needed(step: object, threads: int) -> int:
        return lane + (step.merge.end if isinstance(step, Dequantise) and step.stored.transposed else 0)

    return widths.total((step.nbytes, partial(needed, step)) for step in changes_of(shards))


def _shard_plan(
    shard: SafetensorsFile,
    changes: Changes,
    beside: HeadFile | None,
    dtype: str | None,
    stored: Mapping[str, StoredWeight],
) -> ShardPlan:
    header, places = shard_tensors(shard, dtype)
    treatments = {}
    for tensor in shard.tensors:
        change, new = changes.tensors.get(tensor.name), new_dtype(tensor, dtype)
        is_tied = beside is not None and tensor.name == changes.tied_to
        if tensor.nbytes and (change is not None or is_tied or new != tensor.dtype or tensor.name in stored):
            head = Target(new, changes.head) if is_tied and changes.head is not None else None
            slot = beside.slot if is_tied and beside is not None else None
            treatments[tensor.name] = Treatment(Target(new, change or Change()), head, slot, stored.get(tensor.name))
    steps = merge_steps(shard, {place.name: place for place in places}, treatments)
    alone = beside is not None and beside.name in TWO_FILES
    size = places[-1].end if places else len(header)
    return ShardPlan(shard, header, size, tuple(steps), TWO_FILES[0] if alone else None)


def _head_file(checkpoint: Checkpoint, changes: Changes, dtype: str | None) -> HeadFile | None:
    if changes.head is None:
        return None
    if isinstance(checkpoint.config.get("text_config"), Mapping) or HEAD_FILE in checkpoint.auxiliary:
        raise RequestError(
            "the adapter parts an output head from the embedding that it is tied to, in a model of several parts",
            file=checkpoint.root,
            fix="untie and save that model first",
        )
    embedding = next(tensor for tensor in checkpoint.tensors if tensor.name == changes.tied_to)
    header, places = lay_out([(HEAD, new_dtype(embedding, dtype), embedding.shape)], {"format": "pt"})
    name = HEAD_FILE if len(checkpoint.shards) > 1 else TWO_FILES[1]
    return HeadFile(name, header, places[0].end, places[0])
