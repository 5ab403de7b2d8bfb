"""Where an adapter as it was before training comes from: a folder that was kept, or the split made again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pissa_convert.errors import RequestError
from pissa_convert.formats.adapter import CONFIG_NAME, WEIGHTS_NAME, adapter_keys
from pissa_convert.formats.adapter_folder import AdapterFolder, Pair, open_adapter
from pissa_convert.formats.checkpoint import Checkpoint, open_checkpoint
from pissa_convert.formats.manifest import MANIFEST_NAME, FileRecord, Manifest, read_manifest
from pissa_convert.formats.safetensors import TensorInfo, lay_out
from pissa_convert.linalg import SplitSpec
from pissa_convert.options import SplitOptions, split_options
from pissa_convert.plans.quant_stats import overall
from pissa_convert.plans.split_plan import ADAPTER_FOLDER, split_spec
from pissa_convert.plans.targets import Action, decide

_RECORD = f"{ADAPTER_FOLDER}/{WEIGHTS_NAME}"
_SPLITS = ("pissa", "qpissa")


@dataclass(frozen=True)
class Derivation:
    """One split to make again, for its A and B alone."""

    shard: Path
    tensor: TensorInfo
    spec: SplitSpec


@dataclass(frozen=True)
class Init:
    """The initial adapter as a plan sees it.

    Attributes:
        file: its `adapter_model.safetensors`, or the folder of the model that it is derived from.
        header: of `adapter_model.safetensors`, as it is or would be.
        size: of the same, in bytes.
        pairs: its modules, in the order of that file.
        recorded: what that file must be, if a manifest says so.
        base: where PEFT may look for the original model, if that is known.
        base_files: the original model's weights, if a manifest names them.
        sources: files of it that the result's manifest records.
        derivations: the splits to make again, by module; none where the file is read.
        options: what decides them.
        base_error: ‖W − (Q + s·B·A)‖/‖W‖ over all modules together, where the training ran on a 4-bit base Q.
    """

    file: Path
    header: bytes
    size: int
    pairs: Mapping[str, Pair]
    recorded: FileRecord | None
    base: str | None
    base_files: Mapping[str, FileRecord]
    sources: Mapping[str, Path] = field(default_factory=dict)
    derivations: Mapping[str, Derivation] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    base_error: float | None = None

    @property
    def folder(self) -> Path:
        """The folder that is read."""
        return self.file if self.derivations else self.file.parent


def stored_init(path: Path) -> Init:
    """An adapter folder that was kept, or the folder of a split model with `pissa_init/` in it.

    Raises:
        RequestError: there is none, or it is none that can be subtracted.
    """
    root = path if (path / CONFIG_NAME).is_file() or not (path / ADAPTER_FOLDER).is_dir() else path / ADAPTER_FOLDER
    if not (root / WEIGHTS_NAME).exists() and split_manifest(path) is not None:
        raise RequestError(
            "the initial adapter is missing",
            file=path,
            expected=_RECORD,
            fix="add --base with the original model to derive it again",
        )
    folder = open_adapter(root, "--init")
    manifest = split_manifest(root.parent) if root.name == ADAPTER_FOLDER else None
    base = folder.config.get("base_model_name_or_path")
    base_error = None
    if manifest is not None and manifest.head["to"] == "qpissa":
        base_error = overall(entry for entry in manifest.tensors.values() if entry["adapted"]).relative_error
    return Init(
        file=folder.file.path,
        header=folder.file.header,
        size=folder.file.size,
        pairs=folder.pairs,
        recorded=manifest.output.get(_RECORD) if manifest else None,
        base=base if isinstance(base, str) and manifest is None else None,
        base_files=manifest.source_weights if manifest else {},
        sources={f"init/{name}": root / name for name in (CONFIG_NAME, WEIGHTS_NAME)},
        options={} if base_error is None else {"base_error": base_error},
        base_error=base_error,
    )


def split_manifest(folder: Path) -> Manifest | None:
    """The manifest of a split in `folder`, if there is one."""
    if not (folder / MANIFEST_NAME).is_file():
        return None
    manifest = read_manifest(folder / MANIFEST_NAME)
    return manifest if manifest.head["to"] in _SPLITS else None


def derived_init(model: Path, trained: AdapterFolder, kept: Path | None, given: Mapping[str, Any]) -> Init:
    """The initial adapter that `--to pissa` made from `model`, to be made again.

    Args:
        model: the original model's folder.
        trained: the adapter after training; it names the modules, the rank and the scaling.
        kept: what is left of the split's folder, with its manifest, which then has the options.
        given: seed, passes and adapter_dtype, where there is no manifest.

    Raises:
        RequestError: the adapter cannot have begun as a split of this model.
    """
    manifest = None if kept is None else split_manifest(kept.parent if kept.name == ADAPTER_FOLDER else kept)
    if kept is not None and manifest is None:
        raise RequestError("--init holds no manifest of a split", file=kept, fix="give --base alone, with the options")
    if manifest is not None and given:
        name = next(iter(given)).replace("_", "-")
        raise RequestError(f"--{name} is recorded in --init's manifest already", file=kept, fix="leave it out")
    options = _options_of(manifest) if manifest else _options_from(trained, given)
    checkpoint = open_checkpoint(model.resolve())
    _check_same_model(checkpoint, manifest)
    derivations = _derivations(checkpoint, trained, options)
    header, places = lay_out(
        (
            (key, derivation.spec.adapter_dtype, shape)
            for module, derivation in derivations.items()
            for key, shape in zip(adapter_keys(module), (derivation.spec.a_shape, derivation.spec.b_shape), strict=True)
        ),
        {"format": "pt"},
    )
    pairs = {
        module: Pair(module, places[2 * i], places[2 * i + 1], None, options.scaling, is_embedding=False)
        for i, module in enumerate(derivations)
    }
    return Init(
        file=checkpoint.root,
        header=header,
        size=places[-1].end,
        pairs=pairs,
        recorded=manifest.output.get(_RECORD) if manifest else None,
        base=None,
        base_files=manifest.source_weights if manifest else {},
        derivations=derivations,
        options={name: options.as_json()[name] for name in ("seed", "passes", "adapter_dtype")},
    )


def _options_of(manifest: Manifest) -> SplitOptions:
    if manifest.head["to"] != "pissa":
        raise RequestError(
            "the initial adapter of a 4-bit base cannot be derived from the original model",
            fix="restore pissa_init/, or make the base again with --to qpissa",
        )
    known = dict(manifest.head["options"])
    try:
        known["passes"] = known["passes"] or "auto"
        return split_options(**known)
    except (TypeError, KeyError) as error:
        raise RequestError("--init's manifest has other options than a split's", found=error) from error


def _options_from(trained: AdapterFolder, given: Mapping[str, Any]) -> SplitOptions:
    pairs = list(trained.pairs.values())
    rank, scaling = pairs[0].rank, pairs[0].scaling
    for pair in pairs:
        if (pair.rank, pair.scaling) != (rank, scaling):
            raise RequestError(
                "--base makes a split of one rank and scaling again",
                file=trained.file.path,
                tensor=pair.a.name,
                expected=f"rank {rank}, scaling {scaling:g}",
                found=f"rank {pair.rank}, scaling {pair.scaling:g}",
                fix="give --init",
            )
    alpha, rslora = trained.config.get("lora_alpha", 8), trained.config.get("use_rslora", False)
    options = split_options(rank=rank, alpha=alpha, rslora=rslora, **given)
    # Patterns may say for all modules what the two numbers do not: only the quotient decides what is split.
    return options if options.scaling == scaling else split_options(rank=rank, alpha=scaling * rank, **given)


def _check_same_model(checkpoint: Checkpoint, manifest: Manifest | None) -> None:
    if manifest is None:
        return
    sizes = {shard.path.name: shard.size for shard in checkpoint.shards}
    recorded = {name: record.size for name, record in manifest.source_weights.items()}
    if sizes != recorded:
        raise RequestError(
            "--base is not the model that --init was split from",
            file=checkpoint.root,
            expected=", ".join(f"{name} of {size} bytes" for name, size in list(recorded.items())[:2]),
            found=", ".join(f"{name} of {size} bytes" for name, size in list(sizes.items())[:2]),
        )


def _derivations(checkpoint: Checkpoint, trained: AdapterFolder, options: SplitOptions) -> dict[str, Derivation]:
    decisions = decide(
        [(tensor.name, tensor.dtype, tensor.shape) for tensor in checkpoint.tensors],
        checkpoint.config,
        [*trained.pairs],
    )
    chosen = {d.tensor: d for d in decisions if d.action is Action.SPLIT and d.module in trained.pairs}
    found = {}
    for shard in checkpoint.shards:
        for tensor in shard.tensors:
            if tensor.name in chosen and options.rank <= min(tensor.shape):
                decision = chosen[tensor.name]
                found[decision.module] = Derivation(shard.path, tensor, split_spec(tensor, decision, options))
    for module, pair in trained.pairs.items():
        if module not in found:
            raise RequestError(
                "--base has no weight that this could have been split from",
                file=trained.file.path,
                tensor=pair.a.name,
                fix="give the original model, or the adapter that the training began with as --init",
            )
    return found
