"""The plan of a model's GGUF that is made by walking another: a template, or a model to merge into."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pissa_convert.fingerprint import fingerprint
from pissa_convert.formats.manifest import (
    FileRecord,
    Fixed,
    blank_records,
    manifest_head,
    manifest_name,
    render_manifest,
    sizes_of,
)
from pissa_convert.gguf_model import BaseGguf
from pissa_convert.gguf_options import GgufOptions
from pissa_convert.gguf_steps import Encode
from pissa_convert.gguf_usage import usage
from pissa_convert.memory import MemoryPlan
from pissa_convert.steps import Copy, ShardPlan
from pissa_convert.transforms.merge import MergeStats


@dataclass(frozen=True)
class GgufPlan:
    """What `convert` would do to make a model's GGUF.

    Attributes:
        to: "gguf", or "merged" where a GGUF is merged.
        dest: absolute path of the folder that the file comes into.
        alone: the file's name.
        base: the GGUF that is walked.
        shard: the result, as steps along `base`.
        read: files beside it that decide the result, by their names in the manifest.
    """

    to: str
    dest: Path
    alone: str
    options: GgufOptions
    base: BaseGguf
    shard: ShardPlan
    read: Mapping[str, Path]
    memory: MemoryPlan
    warnings: tuple[str, ...] = ()

    @property
    def head(self) -> dict[str, Any]:
        """What the manifest says of the conversion as a whole."""
        return manifest_head(self.to, "numpy", {"made": "model", **self.options.as_json()})

    @property
    def shards(self) -> tuple[ShardPlan, ...]:
        """The one file."""
        return (self.shard,)

    @property
    def beside(self) -> None:
        """Nothing goes elsewhere."""
        return

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
        """The steps that are no copies."""
        return (step for step in self.shard.steps if isinstance(step, Encode))

    @cached_property
    def output_sizes(self) -> dict[str, int]:
        """Exact size in bytes of every file of the result."""
        sizes = {self.alone: self.shard.size}
        sources, outputs = blank_records(sizes_of(self.sources)), blank_records(sizes)
        stats = {step.key: MergeStats() for step in self.encodings}
        return sizes | {manifest_name(self.alone): len(self.manifest(sources, outputs, stats))}

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What must be unchanged for a partial result to be continued."""
        return fingerprint(self.head, self.sources)

    def manifest(
        self, source: Mapping[str, FileRecord], output: Mapping[str, FileRecord], stats: Mapping[str, MergeStats]
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
        tensors = {
            name: {
                "file": self.alone,
                "type": kinds[name],
                "bytes": nbytes[name],
                "relative_error": Fixed(total.relative_error),
            }
            for name, total in sums.items()
        }
        return render_manifest(self.head, source, output, tensors)

    @property
    def copied(self) -> tuple[str, ...]:
        """Names of the tensors that stay as they are."""
        return tuple(name for step in self.shard.steps if isinstance(step, Copy) for name in step.tensors)

    @property
    def usage(self) -> str:
        """How llama.cpp and Ollama take the result."""
        return usage(self.dest / self.alone)
