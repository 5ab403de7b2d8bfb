"""Does an adapter belong to this model? Names and shapes fit the original and its residual alike, so values must tell.

A LoRA added to a residual, or a trained principal adapter added to the original model, gives a model that answers with
noise and no error anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from pissa_convert.engine.factors import FactorFile
from pissa_convert.engine.reading import hash_file
from pissa_convert.errors import RequestError
from pissa_convert.formats.adapter import CONFIG_NAME
from pissa_convert.formats.adapter_folder import AdapterFolder, open_adapter
from pissa_convert.formats.manifest import MANIFEST_NAME, FileRecord, Manifest, read_manifest
from pissa_convert.formats.safetensors import TensorInfo
from pissa_convert.plans.init_planning import split_manifest
from pissa_convert.plans.merge_changes import pairs_of
from pissa_convert.plans.merge_plan import MergePlan
from pissa_convert.plans.split_plan import ADAPTER_FOLDER
from pissa_convert.transforms.delta import UNRELATED, Array, Product, difference
from pissa_convert.transforms.repetition import REPEATED, distance_from_part

_SAMPLE = 8
"""Modules whose factors are compared."""

_QUICK = 2 << 30
"""Bytes of a shard that may be read twice."""

_PROBES = 3
"""Weights that are read, the smallest ones."""

_VALUES = 1 << 22
"""Values that are read of each, at most."""

_TRAINED_ON_RESIDUAL = "give the residual model that the adapter was trained on, or make a LoRA of it with --to lora"


@dataclass(frozen=True)
class _Origin:
    """What an adapter's manifest says: the model that it belongs to, by its files."""

    files: Mapping[str, FileRecord]
    what: str


def check_base(plan: MergePlan) -> MergePlan:
    """The plan with what the source must be, file by file, as far as that can be told.

    Raises:
        RequestError: the model is not the one that the adapter belongs to.
    """
    adapter = plan.adapter
    if adapter is None:
        return plan
    split = split_manifest(plan.source)
    origin = _origin(adapter)
    if split is not None:
        _check_residual(plan, adapter, split, origin)
        return plan
    if origin is None:
        _check_not_repeated(plan, adapter)
        return plan
    sizes = {shard.path.name: shard.size for shard in plan.checkpoint.shards}
    if sizes != {name: record.size for name, record in origin.files.items()}:
        _check_not_repeated(plan, adapter)
        warning = (
            f"the files of {plan.source} are not those of {origin.what}, for which the adapter was made: "
            f"only names and shapes were compared"
        )
        return replace(plan, warnings=(*plan.warnings, warning))
    _check_smallest(plan, origin, sizes)
    return replace(plan, recorded=origin.files)


def _check_smallest(plan: MergePlan, origin: _Origin, sizes: Mapping[str, int]) -> None:
    """Every shard is compared when it has been read; the smallest, where that is quick, before anything is written."""
    smallest = min(sizes, key=lambda name: (sizes[name], name))
    if sizes[smallest] > _QUICK:
        return
    found = hash_file(plan.source / smallest)
    if found != origin.files[smallest]:
        raise RequestError(
            f"SOURCE is not {origin.what}, for which the adapter was made",
            file=plan.source / smallest,
            expected=f"blake3 {origin.files[smallest].digest}",
            found=found.digest,
            fix="give that model",
        )


def _origin(adapter: AdapterFolder) -> _Origin | None:
    own = _manifest(adapter.root)
    if own is not None and own.head["to"] == "lora" and own.base:
        return _Origin(own.base, "the original model")
    split = split_manifest(adapter.root.parent) if adapter.root.name == ADAPTER_FOLDER else None
    return _Origin(split.shards, "the residual model beside it") if split is not None else None


def _manifest(folder: Path) -> Manifest | None:
    return read_manifest(folder / MANIFEST_NAME) if (folder / MANIFEST_NAME).is_file() else None


def _check_residual(plan: MergePlan, adapter: AdapterFolder, split: Manifest, origin: _Origin | None) -> None:
    """SOURCE says itself that it is a residual: only what began as its adapter goes on it."""
    if origin is not None:
        if origin.files != split.shards:
            raise RequestError(
                f"SOURCE is a residual model, and the adapter was made for {origin.what}",
                file=plan.source,
                fix="give that model",
            )
        return
    root = plan.source / ADAPTER_FOLDER
    if not (root / CONFIG_NAME).is_file():
        return
    init = open_adapter(root, "SOURCE's adapter")
    if init.pairs.keys() != adapter.pairs.keys():
        raise RequestError(
            "SOURCE is a residual model, and the adapter has other modules than were split",
            file=plan.source,
            found=", ".join(sorted(init.pairs.keys() ^ adapter.pairs.keys())[:2]),
            fix="give the model that the adapter was trained on",
        )
    change = _relative_change(adapter, init)
    if change > UNRELATED:
        raise RequestError(
            "SOURCE is a residual model, and the adapter did not begin as its principal adapter",
            file=plan.source,
            expected=f"‖ΔW‖ far below that of the adapters (less than {UNRELATED} of it)",
            found=f"{change:.2f}",
            fix="give the model that the adapter was trained on",
        )


def _relative_change(adapter: AdapterFolder, init: AdapterFolder) -> float:
    """‖s′B′A′ − sBA‖ / √(‖s′B′A′‖² + ‖sBA‖²) over a few modules."""
    names = [*init.pairs]
    energy = change = 0.0
    with FactorFile(adapter.file.path) as after, FactorFile(init.file.path) as before:
        for name in names[:: max(1, len(names) // _SAMPLE)]:
            if (adapter.pairs[name].size_in, adapter.pairs[name].size_out) != (
                init.pairs[name].size_in,
                init.pairs[name].size_out,
            ):
                return math.inf
            first, second = after.product(adapter.pairs[name]), before.product(init.pairs[name])
            energy += first.norm**2 + second.norm**2
            change += difference(first, second).norm ** 2
    return math.sqrt(change / energy) if energy else 0.0


def _check_not_repeated(plan: MergePlan, adapter: AdapterFolder) -> None:
    """A principal adapter repeats what the original model holds; a LoRA does not, nor a residual."""
    homes = {tensor.name: (shard.path, tensor) for shard in plan.checkpoint.shards for tensor in shard.tensors}
    pairs = {name: pair for name, pair in pairs_of(plan.changes).items() if not pair.is_embedding}
    names = sorted(pairs, key=lambda name: (homes[name][1].nbytes, name))[:_PROBES]
    found = []
    with FactorFile(adapter.file.path) as factors:
        for name in names:
            product = factors.product(pairs[name])
            if plan.changes.tensors[name].transposed:
                product = Product(product.right.T, product.left.T)
            found.append(distance_from_part(_first_rows(*homes[name]), product))
    known = [distance for distance in found if distance is not None]
    if known and median(known) < REPEATED:
        raise RequestError(
            "SOURCE still holds what the adapter took out of it: this is a principal adapter, and SOURCE its original",
            file=plan.source,
            tensor=names[0],
            expected=f"‖W·Aᵀ − s·B·A·Aᵀ‖ / ‖s·B·A·Aᵀ‖ of about 1, as in a residual, or more (at least {REPEATED})",
            found=f"{median(known):.3f}",
            fix=_TRAINED_ON_RESIDUAL,
        )


def _first_rows(path: Path, tensor: TensorInfo) -> Array:
    """As many rows as make a good sample."""
    rows = min(tensor.shape[0], max(1, _VALUES // tensor.shape[1]))
    with FactorFile(path) as shard:
        return shard.rows(tensor, 0, rows)
