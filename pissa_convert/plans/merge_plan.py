"""The plan of `--to merged`: every tensor's change and place, and the files of the result."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pissa_convert import __version__
from pissa_convert.formats.adapter import CONFIG_NAME, WEIGHTS_NAME
from pissa_convert.formats.adapter_folder import AdapterFolder
from pissa_convert.formats.checkpoint import INDEX_NAME, Checkpoint
from pissa_convert.formats.manifest import (
    MANIFEST_NAME,
    FileRecord,
    Fixed,
    blank_records,
    manifest_head,
    render_manifest,
    sizes_of,
)
from pissa_convert.formats.merged_texts import merged_card, merged_config, merged_index
from pissa_convert.formats.model_card import CARD_NAME
from pissa_convert.formats.safetensors import SafetensorsFile, TensorInfo, lay_out
from pissa_convert.memory import MemoryPlan
from pissa_convert.options import ADAPTER_DTYPES, MergeOptions
from pissa_convert.plans.fingerprint import fingerprint
from pissa_convert.plans.merge_changes import HEAD, Changes
from pissa_convert.plans.merge_steps import Change, Dequantise, Merge
from pissa_convert.plans.quantised_source import is_stored_plainly
from pissa_convert.plans.split_plan import ADAPTER_FOLDER
from pissa_convert.plans.steps import ShardPlan
from pissa_convert.plans.targets import SPLITTABLE
from pissa_convert.transforms.merge import MergeStats

HEAD_FILE = "model-head.safetensors"
"""Where an output head goes that was tied and is so no longer."""

TWO_FILES = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
"""The same for a model of one file, beside which an index would not be looked at."""

ADAPTER_PREFIX = "--adapter/"
"""What the adapter's files are called in the manifest."""


@dataclass(frozen=True)
class HeadFile:
    """The shard of a head of its own."""

    name: str
    header: bytes
    size: int
    slot: TensorInfo


@dataclass(frozen=True)
class MergePlan:
    """What `convert(to="merged")` would do.

    Attributes:
        source, dest: absolute paths.
        adapter: what is merged; None where a 4-bit model is only read back.
        changes: what it does to each tensor.
        shards: the output shards in order.
        beside: the shard of an output head that was tied, where it is no longer.
        recorded: what source shards must be, as far as the adapter's provenance tells.
        warnings: what the user should look into.
        quantised: weights that are read back from 4 bits.
    """

    source: Path
    dest: Path
    options: MergeOptions
    checkpoint: Checkpoint
    adapter: AdapterFolder | None
    changes: Changes
    shards: tuple[ShardPlan, ...]
    beside: HeadFile | None
    memory: MemoryPlan
    recorded: Mapping[str, FileRecord]
    warnings: tuple[str, ...] = ()
    quantised: int = 0
    to: str = "merged"

    @property
    def alone(self) -> None:
        """The folder is the result."""
        return

    @property
    def head(self) -> dict[str, Any]:
        """What the manifest says of the conversion as a whole."""
        return manifest_head(self.to, "numpy", self.options.as_json())

    @property
    def auxiliary(self) -> list[str]:
        """The model's files beside its weights; those of a split (its manifest and adapter) end here."""
        names = self.checkpoint.auxiliary
        return [name for name in names if name != MANIFEST_NAME and not name.startswith(f"{ADAPTER_FOLDER}/")]

    @property
    def sources(self) -> dict[str, Path]:
        """Every file that decides the result, by its name in the manifest."""
        model = {name: self.source / name for name in (*(shard.source_name for shard in self.shards), *self.auxiliary)}
        if self.adapter is None:
            return model
        root = self.adapter.root
        return model | {f"{ADAPTER_PREFIX}{name}": root / name for name in (CONFIG_NAME, WEIGHTS_NAME)}

    @cached_property
    def texts(self) -> dict[str, bytes]:
        """The model card."""
        original = (self.source / CARD_NAME).read_bytes() if CARD_NAME in self.auxiliary else None
        changed = None if self.adapter is None else len(self.changes.tensors)
        return {CARD_NAME: merged_card(original, changed, self.options.dtype, __version__)}

    @cached_property
    def last_texts(self) -> dict[str, bytes]:
        """The index and config.json where they change."""
        texts = {}
        untied, resized = self.beside is not None, self.options.dtype is not None or self.quantised > 0
        if untied or (resized and self.checkpoint.index is not None):
            old = (self.source / INDEX_NAME).read_bytes() if self.checkpoint.index else None
            texts[INDEX_NAME] = merged_index(old, self._placed)
        if "config.json" in self.auxiliary and (untied or resized):
            text = (self.source / "config.json").read_bytes()
            texts["config.json"] = merged_config(text, self.options.dtype, untied)
        return texts

    @property
    def _placed(self) -> dict[str, list[tuple[str, int]]]:
        """Name and bytes of each tensor, by file."""
        placed = {
            shard.name: [(tensor.name, tensor.nbytes) for tensor in shard_tensors(source, self.options.dtype)[1]]
            for shard, source in zip(self.shards, self.checkpoint.shards, strict=True)
        }
        return placed | ({self.beside.name: [(HEAD, self.beside.slot.nbytes)]} if self.beside else {})

    @property
    def copies(self) -> list[str]:
        """Auxiliary files that are copied, in the order of their commits: what makes the folder load comes last."""
        made = {**self.texts, **self.last_texts}
        return self.checkpoint.loading_last(name for name in self.auxiliary if name not in made)

    @cached_property
    def output_sizes(self) -> dict[str, int]:
        """Exact size in bytes of every file of the result."""
        sizes = {shard.name: shard.size for shard in self.shards}
        if self.beside is not None:
            sizes[self.beside.name] = self.beside.size
        sizes |= {name: len(text) for name, text in {**self.texts, **self.last_texts}.items()}
        sizes |= sizes_of({name: self.sources[name] for name in self.copies})
        sources, outputs = blank_records(sizes_of(self.sources)), blank_records(sizes)
        stats = {step.key: MergeStats() for step in self.merges}
        return sizes | {MANIFEST_NAME: len(self.manifest(sources, outputs, stats))}

    @property
    def merges(self) -> Iterator[Merge | Dequantise]:
        """All steps that change something."""
        return (step for shard in self.shards for step in shard.steps if isinstance(step, Merge | Dequantise))

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What must be unchanged for a partial result to be continued."""
        return fingerprint(self.head, self.sources)

    def manifest(
        self, source: Mapping[str, FileRecord], output: Mapping[str, FileRecord], stats: Mapping[str, MergeStats]
    ) -> bytes:
        """The text of `pissa_convert.json`; the engine supplies what only the work can tell."""
        homes = {tensor.name: shard.name for shard in self.shards for tensor in shard.source.tensors}
        sums = dict.fromkeys(self.changes.tensors, MergeStats())
        for step in self.merges:
            if step.tensor in sums:
                sums[step.tensor] += stats[step.key]
        tensors = {
            name: {
                "file": homes[name],
                "change": describe(self.changes.tensors[name]),
                "relative_error": Fixed(total.relative_error),
            }
            for name, total in sums.items()
        }
        return render_manifest(self.head, source, output, tensors)


def describe(change: Change) -> str:
    """A change in a few words."""
    if change.whole is not None:
        return "replaced by the adapter's"
    if change.pair is None:
        return "as it was"
    return "bias added" if change.is_bias else f"s·B·A of rank {change.pair.rank} added"


def shard_tensors(shard: SafetensorsFile, dtype: str | None) -> tuple[bytes, tuple[TensorInfo, ...]]:
    """The header of a merged shard and its tensors' places; the source's own where no dtype changes."""
    if all(new_dtype(tensor, dtype) == tensor.dtype and is_stored_plainly(tensor) for tensor in shard.tensors):
        return shard.header, shard.tensors
    return lay_out(((t.name, new_dtype(t, dtype), t.shape) for t in shard.tensors), shard.metadata)


def new_dtype(tensor: TensorInfo, dtype: str | None) -> str:
    """What a tensor is stored in."""
    return ADAPTER_DTYPES[dtype] if dtype is not None and tensor.dtype in SPLITTABLE else tensor.dtype
