"""`--to lora`: what becomes of every module of two adapters, decided from their headers alone."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pissa_convert import __version__
from pissa_convert.errors import FormatError, RequestError
from pissa_convert.formats.adapter import CONFIG_NAME, WEIGHTS_NAME
from pissa_convert.formats.adapter_folder import AdapterFolder, Pair
from pissa_convert.formats.checkpoint import check_inside
from pissa_convert.formats.lora_card import lora_card, lora_config
from pissa_convert.formats.manifest import MANIFEST_NAME, FileRecord, Fixed, FixedCount, render_manifest
from pissa_convert.formats.model_card import CARD_NAME
from pissa_convert.formats.safetensors import TensorInfo, lay_out
from pissa_convert.init_planning import Init
from pissa_convert.memory import MemoryPlan, plan_memory
from pissa_convert.options import ADAPTER_DTYPES, LoraOptions, RunOptions
from pissa_convert.planning import check_destination
from pissa_convert.transforms.delta import exact_rank

INIT_WEIGHTS = f"init/{WEIGHTS_NAME}"
"""What the manifest calls the initial adapter's tensors, whether they were read or derived again."""

_COMPANIONS = (
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
    def head(self) -> dict[str, Any]:
        """What the manifest says of the conversion as a whole."""
        return {
            "tool": "pissa-convert",
            "version": __version__,
            "to": self.to,
            "backend": "numpy",
            "options": {**self.options.as_json(), **self.init.options},
        }

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
        return {CARD_NAME: lora_card(self.ranks, self.options.dtype, __version__), CONFIG_NAME: config}

    @cached_property
    def output_sizes(self) -> dict[str, int]:
        """Size in bytes of every file of the result; with `--rank auto` at most."""
        sizes = {WEIGHTS_NAME: self.size}
        sizes |= {name: (self.trained.root / name).stat().st_size for name in self.companions}
        sizes |= {name: len(text) for name, text in self.texts.items()}
        blank = {name: FileRecord(size, "0" * 64) for name, size in sizes.items()}
        sources = {name: FileRecord(path.stat().st_size, "0" * 64) for name, path in self.sources.items()}
        sources |= {INIT_WEIGHTS: FileRecord(self.init.size, "0" * 64)}
        results = {module.name: ModuleResult(0) for module in self.modules}
        return sizes | {MANIFEST_NAME: len(lora_manifest(self, sources, blank, results))}

    @property
    def sources(self) -> dict[str, Path]:
        """The files that decide the result, by their names in the manifest."""
        names = (CONFIG_NAME, WEIGHTS_NAME, *self.companions)
        return {f"trained/{name}": self.trained.root / name for name in names} | dict(self.init.sources)

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What must be unchanged for an interrupted run to be taken up again."""
        head = self.head
        options = head.pop("options")
        shards = {derivation.shard for derivation in self.init.derivations.values()}
        files = self.sources | {f"of --base {path.name}": path for path in sorted(shards)}
        return {
            **head,
            **{f"--{name.replace('_', '-')}": value for name, value in options.items()},
            **{f"source file {name}": _identity(path) for name, path in files.items()},
        }


def _identity(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def lora_manifest(
    plan: LoraPlan,
    source: Mapping[str, FileRecord],
    output: Mapping[str, FileRecord],
    results: Mapping[str, ModuleResult],
) -> bytes:
    """The text of `pissa_convert.json`; `base` in it names the model that the LoRA is for, by its files' digests."""
    tensors = {name: result.as_manifest() for name, result in results.items()}
    return render_manifest(plan.head, source, output, tensors, plan.init.base_files)


def plan_lora(
    trained: AdapterFolder,
    init: Init,
    dest: str | os.PathLike[str],
    options: LoraOptions,
    run: RunOptions,
    threads: int,
    workspace: int = 0,
) -> LoraPlan:
    """Decide everything that headers can tell.

    Args:
        threads: modules that may be worked on at once.
        workspace: bytes that splitting one weight again takes, where that is asked for.

    Raises:
        RequestError: the two adapters do not belong together, or DEST cannot be used.
    """
    target = Path(os.path.abspath(dest))
    for folder in (trained.root.resolve(), init.folder.resolve()):
        check_destination(folder, target)
    modules = _matched(trained, init)
    companions = tuple(name for name in _COMPANIONS if (trained.root / name).is_file())
    for name in companions:
        check_inside(trained.root, trained.root / name)
    largest = max(module.workspace for module in modules)
    memory = plan_memory([largest] * min(threads, len(modules)), lambda lanes: workspace, 1, run.max_memory)
    return LoraPlan(
        dest=target,
        options=options,
        trained=trained,
        init=init,
        modules=modules,
        ranks=choose_ranks(modules, {module.name: module.exact_rank for module in modules}, options),
        companions=companions,
        in_flight=max(1, min(threads, memory.budget // largest)),
        memory=memory,
    )


def choose_ranks(modules: tuple[Module, ...], wanted: Mapping[str, int], options: LoraOptions) -> dict[str, int]:
    """Each module's rank: as wanted, within what was asked for, and the same for all with `--uniform-rank`."""
    limit = options.rank if isinstance(options.rank, int) else max(wanted.values())
    ranks = {module.name: min(wanted[module.name], limit) for module in modules}
    return dict.fromkeys(ranks, max(ranks.values())) if options.uniform_rank else ranks


def _matched(trained: AdapterFolder, init: Init) -> tuple[Module, ...]:
    for one, other, where in (
        (init.pairs, trained.pairs, trained.file.path),
        (trained.pairs, init.pairs, init.file),
    ):
        missing = sorted(one.keys() - other.keys())
        if missing:
            raise RequestError(
                f"lacks {len(missing)} modules that the other adapter has" if len(missing) > 1 else "lacks a module",
                file=where,
                found=", ".join(missing[:2]) + ("…" if len(missing) > 2 else ""),
                fix="give the adapter that the training began with",
            )
    return tuple(_module(pair, trained.pairs[name], trained.file.path) for name, pair in init.pairs.items())


def _module(init: Pair, trained: Pair, path: Path) -> Module:
    before, after = (
        (pair.is_embedding, pair.size_out, pair.size_in, pair.bias is not None) for pair in (init, trained)
    )
    if before != after:
        raise FormatError(
            "its shape is not that of the initial adapter's",
            file=path,
            tensor=trained.a.name,
            expected=f"in {init.size_in}, out {init.size_out}" + (", with a bias" if init.bias else ""),
            found=f"in {trained.size_in}, out {trained.size_out}" + (", with a bias" if trained.bias else ""),
            fix="give the adapter that the training began with",
        )
    return Module(trained, init)
