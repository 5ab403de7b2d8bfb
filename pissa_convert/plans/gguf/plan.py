"""The plan of a model's GGUF that is made by walking another: a template, or a model to merge into."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pissa_convert.formats.adapter_folder import AdapterFolder
from pissa_convert.formats.manifest import (
    FileRecord,
    Fixed,
    blank_records,
    manifest_head,
    manifest_name,
    render_manifest,
    sizes_of,
)
from pissa_convert.linalg import SplitStats
from pissa_convert.memory import MemoryPlan
from pissa_convert.plans.fingerprint import fingerprint
from pissa_convert.plans.gguf.model import BaseGguf
from pissa_convert.plans.gguf.options import GgufOptions, GgufSplitOptions
from pissa_convert.plans.gguf.steps import Encode, GgufSplit
from pissa_convert.plans.gguf.usage import usage
from pissa_convert.plans.steps import Copy, ShardPlan
from pissa_convert.plans.targets import Decision
from pissa_convert.transforms.merge import MergeStats


@dataclass(frozen=True)
class AdapterFile:
    """The GGUF of a split's principal adapter, which the steps fill."""

    name: str
    header: bytes
    size: int


@dataclass(frozen=True)
class GgufPlan:
    """What `convert` would do to make a model's GGUF.

    Attributes:
        to: "gguf", or where a GGUF itself is worked on "merged" or "pissa".
        dest: absolute path of the folder that the files come into.
        alone: the file's name; None for a split, whose folder is the result.
        base: the GGUF that is walked.
        shard: the result, as steps along `base`.
        adapter: what is added, where one is merged.
        beside: the adapter's file of a split.
        backend: does the work.
        decisions: one per tensor of a split.
        read: files beside it that decide the result, by their names in the manifest.
    """

    to: str
    dest: Path
    alone: str | None
    options: GgufOptions | GgufSplitOptions
    base: BaseGguf
    shard: ShardPlan
    read: Mapping[str, Path]
    memory: MemoryPlan
    adapter: AdapterFolder | None = None
    beside: AdapterFile | None = None
    backend: str = "numpy"
    decisions: tuple[Decision, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def head(self) -> dict[str, Any]:
        """What the manifest says of the conversion as a whole."""
        made = {"made": "model"} if self.to == "gguf" else {}
        return manifest_head(self.to, self.backend, {**made, **self.options.as_json()})

    @property
    def shards(self) -> tuple[ShardPlan, ...]:
        """The one file."""
        return (self.shard,)

    @property
    def recorded(self) -> Mapping[str, FileRecord]:
        """Nothing is known of the source before it is read."""
        return {}

    @property
    def texts(self) -> dict[str, bytes]:
        """None."""
        return {}

    @property
    def last_texts(self) -> dict[str, bytes]:
        """None."""
        return {}

    @property
    def copies(self) -> list[str]:
        """None."""
        return []

    @property
    def sources(self) -> dict[str, Path]:
        """Every file that decides the result, by its name in the manifest."""
        return {self.shard.source_name: self.base.file.path, **self.read}

    @property
    def encodings(self) -> Iterator[Encode]:
        """The steps that store rows in a type."""
        return (step for step in self.shard.steps if isinstance(step, Encode))

    @property
    def splits(self) -> Iterator[GgufSplit]:
        """The steps that split a weight."""
        return (step for step in self.shard.steps if isinstance(step, GgufSplit))

    @cached_property
    def output_sizes(self) -> dict[str, int]:
        """Exact size in bytes of every file of the result."""
        sizes = {self.shard.name: self.shard.size}
        if self.beside is not None:
            sizes[self.beside.name] = self.beside.size
        sources, outputs = blank_records(sizes_of(self.sources)), blank_records(sizes)
        stats: dict[str, Any] = {step.key: MergeStats() for step in self.encodings}
        stats |= {step.key: SplitStats.blank(step.spec.rank) for step in self.splits}
        return sizes | {manifest_name(self.alone): len(self.manifest(sources, outputs, stats))}

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What must be unchanged for a partial result to be continued."""
        return fingerprint(self.head, self.sources)

    def manifest(
        self, source: Mapping[str, FileRecord], output: Mapping[str, FileRecord], stats: Mapping[str, Any]
    ) -> bytes:
        """The manifest's text."""
        sums: dict[str, MergeStats] = {}
        kinds: dict[str, str] = {}
        nbytes: dict[str, int] = {}
        for step in self.encodings:
            name = step.tensor
            sums[name] = sums.get(name, MergeStats()) + stats[step.key]
            kinds[name] = step.treatment.kind
            nbytes[name] = nbytes.get(name, 0) + step.stop - step.at
        tensors: dict[str, dict[str, Any]] = {
            name: {
                "file": self.shard.name,
                **({"module": name, "fan_in_fan_out": False} if self.beside is not None else {}),
                "type": kinds[name],
                "bytes": nbytes[name],
                "relative_error": Fixed(total.relative_error),
            }
            for name, total in sums.items()
        }
        tensors |= {step.key: self._split_entry(step, stats[step.key]) for step in self.splits}
        return render_manifest(self.head, source, output, tensors)

    def _split_entry(self, step: GgufSplit, stats: SplitStats) -> dict[str, Any]:
        return {
            "file": self.shard.name,
            "module": step.key.replace(".weight", ""),
            "shape": [step.spec.rows, step.spec.cols],
            "type": step.stored_kind,
            "fan_in_fan_out": False,
            **stats.as_manifest(),
        }

    @property
    def copied(self) -> tuple[str, ...]:
        """Names of the tensors that stay as they are."""
        return tuple(name for step in self.shard.steps if isinstance(step, Copy) for name in step.tensors)

    @property
    def usage(self) -> str:
        """How llama.cpp and Ollama take the result."""
        adapters = [] if self.beside is None else [self.dest / self.beside.name]
        return usage(self.dest / self.shard.name, adapters)

    @property
    def result(self) -> Path:
        """What was asked for: the file, or the folder of a split."""
        return self.dest if self.alone is None else self.dest / self.alone
