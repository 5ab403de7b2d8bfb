"""What there is to check of a finished folder, by target: one job per file, or per pair of files to compare."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pissa_convert.engine.comparison import Adapter, compare_shard
from pissa_convert.engine.gguf_check import compare_gguf, compare_gguf_adapter, plan_again
from pissa_convert.engine.lora_check import compare_lora
from pissa_convert.engine.merge_check import compare_merged
from pissa_convert.engine.quant_check import compare_quantised
from pissa_convert.engine.reading import check_file
from pissa_convert.engine.side_by_side import Finding
from pissa_convert.errors import FormatError, PissaError, RequestError
from pissa_convert.formats.adapter import WEIGHTS_NAME
from pissa_convert.formats.checkpoint import check_inside
from pissa_convert.formats.manifest import FileRecord, Manifest
from pissa_convert.formats.model_card import CARD_NAME
from pissa_convert.linalg.native import NativeBackend
from pissa_convert.options import RunOptions, merge_options, quant_options
from pissa_convert.plans.gguf.adapter_plan import GgufAdapterPlan
from pissa_convert.plans.gguf.plan import GgufPlan
from pissa_convert.plans.init_planning import stored_init
from pissa_convert.plans.merge_plan import ADAPTER_PREFIX
from pissa_convert.plans.merge_planning import plan_merge
from pissa_convert.plans.quant_planning import plan_quantised
from pissa_convert.plans.split_plan import ADAPTER_FOLDER

Seen = Callable[[int], None]


@dataclass(frozen=True)
class Origins:
    """What a result is compared with: the folders that it was made from, as they were given to `convert`."""

    source: Path | None
    init: Path | None
    adapter: Path | None
    base_gguf: Path | None = None
    base: Path | None = None

    @property
    def companions(self) -> dict[str, Path]:
        """What was given beside the source, by option."""
        given = {name: getattr(self, name) for name in ("init", "adapter", "base_gguf", "base")}
        return {name: path for name, path in given.items() if path is not None}

    def check(self, manifest: Manifest, dest: Path) -> None:
        """Refuse folders that such a result is not made from, and half of what it takes.

        Raises:
            RequestError: the message says which.
        """
        if manifest.head["to"] == "gguf":
            return  # that is refused when it is planned again
        partner = {"lora": "init", "merged": "adapter"}.get(manifest.head["to"])
        if partner == "adapter" and not _has_adapter(manifest):
            partner = None
        for name in ("init", "adapter", "base_gguf", "base"):
            given = getattr(self, name) is not None
            if given and name != partner:
                option = name.replace("_", "-")
                raise RequestError(f"--{option} is no part of a result of --to {manifest.head['to']}", file=dest)
            if name == partner and given != (self.source is not None):
                fix = f"give SOURCE as --source and what it was converted with as --{name}, or neither"
                raise RequestError("the result was made from two folders", file=dest, fix=fix)


def _has_adapter(manifest: Manifest) -> bool:
    return any(name.startswith(ADAPTER_PREFIX) for name in manifest.source)


def jobs(dest: Path, origins: Origins, manifest: Manifest, seen: Seen) -> Iterator[Callable[[], Finding]]:
    """The jobs; each can run in any thread."""
    by_target = {"lora": _lora_jobs, "merged": _merged_jobs, "qpissa": _quantised_jobs}
    if "outtype" in manifest.head["options"]:
        yield from _gguf_jobs(dest, origins, manifest, seen)
        return
    yield from by_target.get(manifest.head["to"], _split_jobs)(dest, origins, manifest, seen)


def _split_jobs(dest: Path, origins: Origins, manifest: Manifest, seen: Seen) -> Iterator[Callable[[], Finding]]:
    shards = set(manifest.shards) if origins.source is not None else set()
    if origins.source is not None:
        for name, record in manifest.source.items():
            if name not in shards:
                yield partial(_check_source, origins.source, name, record, manifest, seen)
        try:
            adapter = Adapter(dest / ADAPTER_FOLDER / WEIGHTS_NAME)
        except PissaError:
            shards = set()  # the adapter's own check names it; without it there is nothing to compare
        for name in sorted(shards):
            yield partial(compare_shard, origins.source, dest, name, manifest, adapter, seen)
    for name, record in manifest.output.items():
        if name not in shards:
            yield partial(_check_file, dest / name, record, seen)


def _quantised_jobs(dest: Path, origins: Origins, manifest: Manifest, seen: Seen) -> Iterator[Callable[[], Finding]]:
    shards: set[str] = set()
    if origins.source is not None:
        options = dict(manifest.head["options"])
        options["passes"] = options["passes"] or "auto"
        plan = plan_quantised(origins.source, dest, quant_options(**options), RunOptions(), NativeBackend(1))
        for name, record in manifest.source.items():
            if name not in manifest.shards:
                yield partial(_check_source, origins.source, name, record, manifest, seen, plan.last_texts)
        with suppress(PissaError):  # the adapter's own check names it; without it there is nothing to compare
            adapter = Adapter(dest / ADAPTER_FOLDER / WEIGHTS_NAME)
            for shard in plan.shards:
                shards.add(shard.name)
                yield partial(compare_quantised, plan, shard, manifest, adapter, seen)
    for name, record in manifest.output.items():
        if name not in shards:
            yield partial(_check_file, dest / name, record, seen)


def _lora_jobs(dest: Path, origins: Origins, manifest: Manifest, seen: Seen) -> Iterator[Callable[[], Finding]]:
    for name, record in manifest.output.items():
        yield partial(_check_file, dest / name, record, seen)
    if origins.source is None or origins.init is None:
        return
    for root, prefix in ((origins.source, "trained/"), (stored_init(origins.init).folder, "init/")):
        for name, record in manifest.source.items():
            if name.startswith(prefix):
                yield partial(_check_file, root / name.removeprefix(prefix), record, seen)
    yield partial(compare_lora, dest, origins.source, origins.init, manifest)


def _merged_jobs(dest: Path, origins: Origins, manifest: Manifest, seen: Seen) -> Iterator[Callable[[], Finding]]:
    shards: set[str] = set()
    if origins.source is not None and (origins.adapter is not None or not _has_adapter(manifest)):
        options = merge_options(**manifest.head["options"])
        plan = plan_merge(origins.source, origins.adapter, dest, options, RunOptions(), 1)
        shards = {shard.name for shard in plan.shards}
        for name, record in manifest.source.items():
            if origins.adapter is not None and name.startswith(ADAPTER_PREFIX):
                yield partial(_check_file, origins.adapter / name.removeprefix(ADAPTER_PREFIX), record, seen)
            elif name not in {shard.source_name for shard in plan.shards}:
                yield partial(_check_file, origins.source / name, record, seen)
        for shard in plan.shards:
            yield partial(compare_merged, plan, shard, manifest, seen)
    for name, record in manifest.output.items():
        if name not in shards:
            yield partial(_check_file, dest / name, record, seen)


def _gguf_jobs(dest: Path, origins: Origins, manifest: Manifest, seen: Seen) -> Iterator[Callable[[], Finding]]:
    compared: set[str] = set()
    if origins.source is not None:
        given = {name: getattr(origins, name) for name in ("init", "adapter", "base_gguf", "base")}
        plan = plan_again(
            origins.source, dest, manifest, {name: path for name, path in given.items() if path is not None}
        )
        if isinstance(plan, GgufPlan):
            compared = {plan.shard.name}
            yield partial(compare_gguf, plan, manifest, seen)
        else:
            yield partial(compare_gguf_adapter, plan, manifest)
        for name, path in plan.sources.items():
            if isinstance(plan, GgufAdapterPlan) or name != plan.shard.source_name:
                record = manifest.source.get(name)
                if record is not None:
                    yield partial(_check_file, path, record, seen)
    for name, record in manifest.output.items():
        if name not in compared:
            yield partial(_check_file, dest / name, record, seen)


def _check_file(path: Path, record: FileRecord, seen: Seen) -> Finding:
    return check_file(path, record, seen), []


def _check_source(
    source: Path, name: str, record: FileRecord, manifest: Manifest, seen: Seen, made: Iterable[str] = ()
) -> Finding:
    """A file beside the weights: it must be what was converted, and the result's copy of it must be the same."""
    check_inside(source, source / name)
    findings = check_file(source / name, record, seen)
    if name in manifest.output and name not in (CARD_NAME, *made) and manifest.output[name] != record:
        findings.append(FormatError("the manifest says that it was copied, with another digest", file=source / name))
    return findings, []
