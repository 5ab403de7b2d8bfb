"""The plan of `--to lora`: every module's rank and place, and the files of the result."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pissa_convert import __version__
from pissa_convert.formats.adapter import CONFIG_NAME, WEIGHTS_NAME
from pissa_convert.formats.adapter_folder import AdapterFolder, Pair
from pissa_convert.formats.lora_card import lora_card, lora_config
from pissa_convert.formats.manifest import (
    MANIFEST_NAME,
    FileRecord,
    Fixed,
    FixedCount,
    blank_records,
    manifest_head,
    render_manifest,
    sizes_of,
)
from pissa_convert.formats.model_card import CARD_NAME
from pissa_convert.formats.safetensors import TensorInfo, lay_out
from pissa_convert.memory import MemoryPlan
from pissa_convert.options import ADAPTER_DTYPES, LoraOptions
from pissa_convert.plans.fingerprint import fingerprint
from pissa_convert.plans.init_planning import Init
from pissa_convert.transforms.delta import exact_rank

INIT_WEIGHTS = f"init/{WEIGHTS_NAME}"
"""What the manifest calls the initial adapter's tensors, whether they were read or derived again."""

COMPANIONS = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
"""The tokenizer that a trainer saves beside the adapter: with added tokens, the adapter is useless without it."""


@dataclass(frozen=True)
class ModuleResult:
    """What is known of a finished module.

    Attributes:
        rank: of its factors.
        relative_error: ‖ΔW − B·A‖ / ‖ΔW‖ as stored.
        norm: ‖ΔW‖.
        trained_norm, init_norm: ‖s′·B′·A′‖ and ‖s·B·A‖.
    """

    rank: int
    relative_error: float = 0.0
    norm: float = 0.0
    trained_norm: float = 0.0
    init_norm: float = 0.0

    def as_manifest(self) -> dict[str, Any]:
        """The manifest's entry, in numbers of fixed width."""
        return {
            "rank": FixedCount(self.rank),
            "relative_error": Fixed(self.relative_error),
            "norm": Fixed(self.norm),
            "trained_norm": Fixed(self.trained_norm),
            "init_norm": Fixed(self.init_norm),
        }


@dataclass(frozen=True)
class Module:
    """One module before and after training, which are to be subtracted."""

    trained: Pair
    init: Pair

    @property
    def name(self) -> str:
        return self.trained.module

    @property
    def exact_rank(self) -> int:
        """At this rank nothing is lost."""
        return exact_rank(self.trained.size_out, self.trained.size_in, self.trained.rank + self.init.rank)

    @property
    def workspace(self) -> int:
        """Bytes held while it is worked on, float64: both products, their difference, its bases, the new factors."""
        ranks = self.trained.rank + self.init.rank
        return 8 * (8 * ranks * (self.trained.size_out + self.trained.size_in) + 8 * ranks**2)


@dataclass(frozen=True)
class LoraPlan:
    """What `convert(to="lora")` would do.

    Attributes:
        dest: absolute path.
        trained: the adapter after training.
        init: where the adapter before training comes from.
        modules: in the order of the initial adapter.
        ranks: of each module; with `--rank auto` the most that it can be, until the work has told.
        companions: tokenizer files that are copied.
        in_flight: modules that are worked on at once.
    """

    dest: Path
    options: LoraOptions
    trained: AdapterFolder
    init: Init
    modules: tuple[Module, ...]
    ranks: Mapping[str, int]
    companions: tuple[str, ...]
    in_flight: int
    memory: MemoryPlan
    to: str = "lora"

    @property
    def alone(self) -> None:
        """The folder is the result."""
        return

    @property
    def head(self) -> dict[str, Any]:
        """What the manifest says of the conversion as a whole."""
        return manifest_head(self.to, "numpy", {**self.options.as_json(), **self.init.options})

    @cached_property
    def _layout(self) -> tuple[bytes, tuple[TensorInfo, ...]]:
        return lay_out(self._tensors(), {"format": "pt"})

    def _tensors(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        dtype = ADAPTER_DTYPES[self.options.dtype]
        for module in self.modules:
            rank, pair = self.ranks[module.name], module.trained
            a, b, bias = pair.keys
            yield from ((a, dtype, (rank, pair.size_in)), (b, dtype, (pair.size_out, rank)))
            if pair.bias is not None:
                yield bias, dtype, (pair.size_out,)
        for key, tensor in self.trained.carried.items():
            yield key, tensor.dtype, tensor.shape

    @property
    def header(self) -> bytes:
        """The new `adapter_model.safetensors` up to its first tensor."""
        return self._layout[0]

    @property
    def size(self) -> int:
        """Bytes of `adapter_model.safetensors`."""
        return self._layout[1][-1].end

    @cached_property
    def slots(self) -> dict[str, tuple[TensorInfo, ...]]:
        """A, B and, where there is one, the bias of each module."""
        places = iter(self._layout[1])
        return {
            module.name: tuple(next(places) for _ in range(2 if module.trained.bias is None else 3))
            for module in self.modules
        }

    @property
    def carried_slots(self) -> tuple[TensorInfo, ...]:
        """Places of what is carried, in the order of `trained.carried`."""
        count = len(self.trained.carried)
        return self._layout[1][len(self._layout[1]) - count :]

    @cached_property
    def texts(self) -> dict[str, bytes]:
        """Small files that are written by us, in the order of their commits: what makes the folder load comes last."""
        config = lora_config(self.trained.config, self.init.base, self.ranks)
        card = lora_card(self.ranks, self.options.dtype, __version__, self.init.base_error)
        return {CARD_NAME: card, CONFIG_NAME: config}

    @cached_property
    def output_sizes(self) -> dict[str, int]:
        """Size in bytes of every file of the result; with `--rank auto` at most."""
        sizes = {WEIGHTS_NAME: self.size}
        sizes |= sizes_of({name: self.trained.root / name for name in self.companions})
        sizes |= {name: len(text) for name, text in self.texts.items()}
        sources, outputs = blank_records({**sizes_of(self.sources), INIT_WEIGHTS: self.init.size}), blank_records(sizes)
        results = {module.name: ModuleResult(0) for module in self.modules}
        return sizes | {MANIFEST_NAME: len(lora_manifest(self, sources, outputs, results))}

    @property
    def sources(self) -> dict[str, Path]:
        """The files that decide the result, by their names in the manifest."""
        names = (CONFIG_NAME, WEIGHTS_NAME, *self.companions)
        return {f"trained/{name}": self.trained.root / name for name in names} | dict(self.init.sources)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What must be unchanged for an interrupted run to be taken up again; the files as they are at this moment."""
        shards = {derivation.shard for derivation in self.init.derivations.values()}
        return fingerprint(self.head, self.sources | {f"of --base {path.name}": path for path in sorted(shards)})


def lora_manifest(
    plan: LoraPlan,
    source: Mapping[str, FileRecord],
    output: Mapping[str, FileRecord],
    results: Mapping[str, ModuleResult],
) -> bytes:
    """The text of `pissa_convert.json`; `base` in it names the model that the LoRA is for, by its files' digests."""
    tensors = {name: result.as_manifest() for name, result in results.items()}
    return render_manifest(plan.head, source, output, tensors, plan.init.base_files)
