"""Every decision, made from headers alone: what becomes of each tensor and where its bytes will lie.

A plan holds no tensor bytes and writes nothing. Because W_res has W's name, shape and dtype, a residual shard has its
source's header and length, and because A's and B's shapes follow from the rank, the adapter file is laid out here
too: the engine only fills known places.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from pissa_convert import __version__
from pissa_convert.errors import RequestError
from pissa_convert.formats.adapter import CONFIG_NAME, WEIGHTS_NAME, adapter_config, adapter_keys
from pissa_convert.formats.checkpoint import Checkpoint, open_checkpoint
from pissa_convert.formats.manifest import (
    MANIFEST_NAME,
    FileRecord,
    blank_records,
    manifest_head,
    render_manifest,
    sizes_of,
)
from pissa_convert.formats.model_card import CARD_NAME, residual_card
from pissa_convert.formats.safetensors import TensorInfo, lay_out
from pissa_convert.linalg import Backend, SplitSpec, SplitStats, tensor_key
from pissa_convert.memory import MemoryPlan, Widths, plan_memory
from pissa_convert.options import ADAPTER_DTYPES, RunOptions, SplitOptions
from pissa_convert.plans.fingerprint import fingerprint
from pissa_convert.plans.steps import ShardPlan, Split, flights, split_steps
from pissa_convert.plans.targets import Action, Decision, compact_target_modules, decide

ADAPTER_FOLDER = "pissa_init"
ADAPTER_CONFIG = f"{ADAPTER_FOLDER}/{CONFIG_NAME}"


@dataclass(frozen=True)
class AdapterPlan:
    """`pissa_init/`: A and B of every split weight, in the order in which the splits happen."""

    name: str
    header: bytes
    size: int
    config: str


@dataclass(frozen=True)
class Plan:
    """What `convert` would do.

    Attributes:
        to: the target ("pissa").
        source, dest: absolute paths.
        options: what decides the bytes.
        checkpoint: the source as its headers describe it.
        decisions: one per tensor, with the reason.
        shards: the output shards in order.
        adapter: the adapter file.
        memory: the budget in bytes and the predicted peak.
        backend: name of the linear-algebra backend and its kernel.
    """

    to: str
    source: Path
    dest: Path
    options: SplitOptions
    checkpoint: Checkpoint
    decisions: tuple[Decision, ...]
    shards: tuple[ShardPlan, ...]
    adapter: AdapterPlan
    memory: MemoryPlan
    backend: str

    @property
    def splits(self) -> Iterator[Split]:
        return (step for shard in self.shards for step in shard.steps if isinstance(step, Split))

    @property
    def beside(self) -> AdapterPlan:
        """The file that steps fill beside the shards."""
        return self.adapter

    @property
    def recorded(self) -> Mapping[str, FileRecord]:
        """Nothing is known of the source before it is read."""
        return {}

    @property
    def last_texts(self) -> Mapping[str, bytes]:
        """What makes the folder load is copied."""
        return {}

    @property
    def source_bytes(self) -> int:
        """Bytes of all source shards."""
        return sum(shard.source.size for shard in self.shards)

    @property
    def alone(self) -> None:
        """The folder is the result."""
        return

    @property
    def head(self) -> dict[str, Any]:
        """What the manifest says of the conversion as a whole; with the sources' bytes it decides every output byte."""
        return manifest_head(self.to, self.backend, self.options.as_json())

    @cached_property
    def texts(self) -> dict[str, bytes]:
        """Small files that are written by us, in the order of their commits."""
        architectures = self.checkpoint.config.get("architectures") or []
        original = (self.source / CARD_NAME).read_bytes() if CARD_NAME in self.checkpoint.auxiliary else None
        layers = sum(decision.action is Action.SPLIT for decision in self.decisions)
        card = residual_card(original, self.options, layers, architectures, __version__)
        return {CARD_NAME: card, ADAPTER_CONFIG: self.adapter.config.encode()}

    @property
    def copies(self) -> list[str]:
        """Auxiliary files that are copied, in the order of their commits: what makes the folder load comes last."""
        return self.checkpoint.loading_last(name for name in self.checkpoint.auxiliary if name not in self.texts)

    @property
    def sources(self) -> dict[str, Path]:
        """Every file that is read, by its name in the manifest."""
        names = [*(shard.name for shard in self.shards), *self.checkpoint.auxiliary]
        return {name: self.source / name for name in sorted(names)}

    @cached_property
    def output_sizes(self) -> dict[str, int]:
        """Exact size in bytes of every file of the result."""
        sizes = {shard.name: shard.size for shard in self.shards}
        sizes[self.adapter.name] = self.adapter.size
        sizes |= {name: len(text) for name, text in self.texts.items()}
        sizes |= sizes_of({name: self.sources[name] for name in self.copies})
        sources, outputs = blank_records(sizes_of(self.sources)), blank_records(sizes)
        stats = {step.tensor: SplitStats.blank(self.options.rank) for step in self.splits}
        return sizes | {MANIFEST_NAME: len(self.manifest(sources, outputs, stats))}

    def manifest(
        self, source: Mapping[str, FileRecord], output: Mapping[str, FileRecord], stats: Mapping[str, SplitStats]
    ) -> bytes:
        """The text of `pissa_convert.json`; the engine supplies what only the work can tell."""
        modules = {decision.tensor: decision.module for decision in self.decisions}
        places = {step.tensor: shard.name for shard in self.shards for step in shard.steps if isinstance(step, Split)}
        tensors = {
            step.tensor: {
                "file": places[step.tensor],
                "module": modules[step.tensor],
                "shape": [step.spec.rows, step.spec.cols],
                "dtype": step.spec.dtype,
                "fan_in_fan_out": step.spec.fan_in_fan_out,
                **stats[step.tensor].as_manifest(),
            }
            for step in self.splits
        }
        return render_manifest(self.head, source, output, tensors)

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What must be unchanged for a partial result to be continued."""
        return fingerprint(self.head, self.sources)


def make_plan(
    source: str | os.PathLike[str],
    dest: str | os.PathLike[str],
    to: str,
    options: SplitOptions,
    run: RunOptions,
    backend: Backend,
) -> Plan:
    """Read the headers of `source` and decide everything.

    Raises:
        RequestError: the request and the model do not fit (also its subclass FormatError: a file is malformed).
    """
    if to != "pissa":
        raise RequestError("--to is unknown", expected="pissa", found=to)
    source, dest = Path(source).resolve(), Path(os.path.abspath(dest))
    check_destination(source, dest)
    checkpoint = open_checkpoint(source)
    check_not_residual(checkpoint)
    decisions = decide(
        [(tensor.name, tensor.dtype, tensor.shape) for tensor in checkpoint.tensors],
        checkpoint.config,
        options.target_modules,
        options.exclude_modules,
    )
    chosen = {decision.tensor: decision for decision in decisions if decision.action is Action.SPLIT}
    specs = {}
    for shard in checkpoint.shards:
        for tensor in shard.tensors:
            if tensor.name in chosen:
                check_rank(shard.path, tensor, options.rank)
                specs[tensor.name] = split_spec(tensor, chosen[tensor.name], options)
    adapter, slots = plan_adapter(checkpoint, decisions, specs, options)
    shards = tuple(
        ShardPlan(shard, shard.header, shard.size, tuple(split_steps(shard, specs, slots)))
        for shard in checkpoint.shards
    )
    return Plan(
        to=to,
        source=source,
        dest=dest,
        options=options,
        checkpoint=checkpoint,
        decisions=decisions,
        shards=shards,
        adapter=adapter,
        memory=plan_memory(
            flights(shards),
            partial(_workspace, shards, backend),
            backend.at_once(specs.values()),
            run.max_memory,
        ),
        backend=backend.name,
    )


def check_destination(source: Path, dest: Path) -> None:
    """Refuse a DEST that is SOURCE, lies inside it, or is no folder.

    Raises:
        RequestError: it is.
    """
    real = Path(os.path.realpath(dest))
    if real == source or source in real.parents:
        raise RequestError("DEST is SOURCE or lies inside it", file=dest, fix="choose a folder outside SOURCE")
    if os.path.lexists(dest) and not stat.S_ISDIR(os.stat(dest).st_mode):
        raise RequestError("DEST is not a folder", file=dest, fix="choose another name")


def check_not_residual(checkpoint: Checkpoint) -> None:
    """Refuse to split what is left of a split.

    Raises:
        RequestError: it is.
    """
    for name in checkpoint.auxiliary:
        if name == MANIFEST_NAME or name.startswith(f"{ADAPTER_FOLDER}/"):
            raise RequestError(
                f"SOURCE is itself the residual of a split: it holds {name}",
                file=checkpoint.root,
                fix="split the original model",
            )


def check_rank(file: Path, tensor: TensorInfo, rank: int) -> None:
    """Refuse a rank that is larger than the weight.

    Raises:
        RequestError: it is.
    """
    if rank > min(tensor.shape):
        raise RequestError(
            "--rank is larger than the weight allows",
            file=file,
            tensor=tensor.name,
            expected=f"at most {min(tensor.shape)} for shape {list(tensor.shape)}",
            found=rank,
            fix="lower --rank or leave the module out with --exclude-modules",
        )


def split_spec(tensor: TensorInfo, decision: Decision, options: SplitOptions) -> SplitSpec:
    """What the split of a chosen weight is."""
    rows, cols = tensor.shape
    return SplitSpec(
        rows=rows,
        cols=cols,
        dtype=tensor.dtype,
        rank=options.rank,
        scaling=options.scaling,
        adapter_dtype=ADAPTER_DTYPES[options.adapter_dtype],
        fan_in_fan_out=decision.fan_in_fan_out,
        passes=options.passes,
        key=tensor_key(options.seed, tensor.name),
        name=tensor.name,
    )


def plan_adapter(
    checkpoint: Checkpoint,
    decisions: Iterable[Decision],
    specs: Mapping[str, SplitSpec],
    options: SplitOptions,
) -> tuple[AdapterPlan, dict[str, tuple[TensorInfo, TensorInfo]]]:
    """The adapter file of the splits in `specs`, and the places of A and B by tensor name."""
    modules = {decision.tensor: decision.module for decision in decisions}
    tensors: list[tuple[str, str, tuple[int, ...]]] = []
    for name, spec in specs.items():
        a_key, b_key = adapter_keys(modules[name])
        tensors += [(a_key, spec.adapter_dtype, spec.a_shape), (b_key, spec.adapter_dtype, spec.b_shape)]
    header, infos = lay_out(tensors, {"format": "pt"})
    slots = {name: (infos[2 * i], infos[2 * i + 1]) for i, name in enumerate(specs)}
    config = adapter_config(
        rank=options.rank,
        alpha=options.alpha,
        rslora=options.rslora,
        target_modules=compact_target_modules(modules.values(), [modules[name] for name in specs]),
        fan_in_fan_out=any(spec.fan_in_fan_out for spec in specs.values()),
        model_config=dict(checkpoint.config),
    )
    return AdapterPlan(f"{ADAPTER_FOLDER}/{WEIGHTS_NAME}", header, infos[-1].end, config), slots


def _workspace(shards: Iterable[ShardPlan], backend: Backend, widths: Widths) -> int:
    splits = (step for shard in shards for step in shard.steps if isinstance(step, Split))
    return widths.total((step.nbytes, partial(backend.workspace_bytes, step.spec)) for step in splits)
