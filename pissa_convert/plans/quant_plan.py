"""The plan of `--to qpissa`: every tensor's decision and place, and the files of the result."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pissa_convert import __version__
from pissa_convert.formats.bitsandbytes import quantization_config
from pissa_convert.formats.checkpoint import INDEX_NAME, Checkpoint
from pissa_convert.formats.manifest import (
    MANIFEST_NAME,
    FileRecord,
    blank_records,
    manifest_head,
    render_manifest,
    sizes_of,
)
from pissa_convert.formats.merged_texts import merged_index
from pissa_convert.formats.model_card import CARD_NAME
from pissa_convert.formats.quant_card import quantised_card
from pissa_convert.formats.safetensors import TensorInfo
from pissa_convert.memory import MemoryPlan
from pissa_convert.options import QuantOptions
from pissa_convert.plans.fingerprint import fingerprint
from pissa_convert.plans.quant_stats import QuantStats
from pissa_convert.plans.quant_steps import Quantise
from pissa_convert.plans.split_plan import ADAPTER_CONFIG, AdapterPlan
from pissa_convert.plans.steps import ShardPlan
from pissa_convert.plans.targets import Decision


@dataclass(frozen=True)
class QuantPlan:
    """What `convert(to="qpissa")` would do.

    Attributes:
        source, dest: absolute paths.
        decisions: one per tensor, with the reason.
        shards: the output shards in order.
        places: of their tensors, by shard.
        adapter: the adapter file.
        skipped: the config's `llm_int8_skip_modules`.
        backend: name of the linear-algebra backend and its kernel.
    """

    source: Path
    dest: Path
    options: QuantOptions
    checkpoint: Checkpoint
    decisions: tuple[Decision, ...]
    shards: tuple[ShardPlan, ...]
    places: Mapping[str, tuple[TensorInfo, ...]]
    adapter: AdapterPlan
    skipped: list[str] | None
    memory: MemoryPlan
    backend: str
    to: str = "qpissa"

    @property
    def alone(self) -> None:
        """The folder is the result."""
        return

    @property
    def weights(self) -> Iterator[Quantise]:
        """Everything that is quantised."""
        return (step for shard in self.shards for step in shard.steps if isinstance(step, Quantise))

    @property
    def beside(self) -> AdapterPlan:
        """The file that steps fill beside the shards."""
        return self.adapter

    @property
    def recorded(self) -> Mapping[str, FileRecord]:
        """Nothing is known of the source before it is read."""
        return {}

    @property
    def head(self) -> dict[str, Any]:
        """What the manifest says of the conversion as a whole."""
        return manifest_head(self.to, self.backend, self.options.as_json())

    @property
    def sources(self) -> dict[str, Path]:
        """Every file that is read, by its name in the manifest."""
        names = [*(shard.source_name for shard in self.shards), *self.checkpoint.auxiliary]
        return {name: self.source / name for name in sorted(names)}

    @cached_property
    def texts(self) -> dict[str, bytes]:
        """Small files that are written by us, in the order of their commits."""
        original = (self.source / CARD_NAME).read_bytes() if CARD_NAME in self.checkpoint.auxiliary else None
        adapted = sum(bool(step.treatment.slots) for step in self.weights)
        architectures = self.checkpoint.config.get("architectures") or []
        card = quantised_card(original, self.options, adapted, architectures, __version__)
        return {CARD_NAME: card, ADAPTER_CONFIG: self.adapter.config.encode()}

    @cached_property
    def last_texts(self) -> dict[str, bytes]:
        """The index, where there is one, and config.json."""
        texts = {}
        if self.checkpoint.index is not None:
            placed = {name: [(place.name, place.nbytes) for place in places] for name, places in self.places.items()}
            texts[INDEX_NAME] = merged_index((self.source / INDEX_NAME).read_bytes(), placed)
        options = self.options
        quantisation = quantization_config(options.quant, options.double_quant, options.compute_dtype, self.skipped)
        config = dict(self.checkpoint.config) | {"quantization_config": quantisation}
        texts["config.json"] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
        return texts

    @property
    def copies(self) -> list[str]:
        """Auxiliary files that are copied, in the order of their commits."""
        made = {**self.texts, **self.last_texts}
        return self.checkpoint.loading_last(name for name in self.checkpoint.auxiliary if name not in made)

    @cached_property
    def output_sizes(self) -> dict[str, int]:
        """Exact size in bytes of every file of the result."""
        sizes = {shard.name: shard.size for shard in self.shards}
        sizes[self.adapter.name] = self.adapter.size
        sizes |= {name: len(text) for name, text in {**self.texts, **self.last_texts}.items()}
        sizes |= sizes_of({name: self.sources[name] for name in self.copies})
        sources, outputs = blank_records(sizes_of(self.sources)), blank_records(sizes)
        stats = {step.tensor: QuantStats() for step in self.weights}
        return sizes | {MANIFEST_NAME: len(self.manifest(sources, outputs, stats))}

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What must be unchanged for a partial result to be continued."""
        return fingerprint(self.head, self.sources)

    def manifest(
        self, source: Mapping[str, FileRecord], output: Mapping[str, FileRecord], stats: Mapping[str, QuantStats]
    ) -> bytes:
        """The text of `pissa_convert.json`; the engine supplies what only the work can tell."""
        modules = {decision.tensor: decision.module for decision in self.decisions}
        tensors = {}
        for shard in self.shards:
            for step in shard.steps:
                if isinstance(step, Quantise):
                    adapted = step.treatment.split is not None
                    tensors[step.tensor] = {
                        "file": shard.name,
                        "module": modules[step.tensor],
                        "shape": [step.treatment.format.rows, step.treatment.format.cols],
                        "dtype": step.treatment.format.dtype,
                        "transposed": step.treatment.transposed,
                        "adapted": adapted,
                        **stats[step.tensor].as_manifest(adapted, self.options.compare_loftq),
                    }
        return render_manifest(self.head, source, output, tensors)
