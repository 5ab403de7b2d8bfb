"""A model that `--to qpissa` has made, as a source: its 4-bit weights stand for matrices of their original dtype."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pissa_convert.errors import FormatError
from pissa_convert.formats.bitsandbytes import Tensor, stored_tensors
from pissa_convert.formats.checkpoint import Checkpoint
from pissa_convert.formats.manifest import MANIFEST_NAME, Manifest, read_manifest
from pissa_convert.formats.safetensors import DTYPE_BITS, SafetensorsFile, TensorInfo
from pissa_convert.linalg import FourBitSpec


@dataclass(frozen=True)
class StoredWeight:
    """A weight as it is stored: its 4-bit tensors, one after the other.

    Attributes:
        form: of the out × in matrix.
        transposed: the model wants it in × out.
        tensors: its 4-bit tensors.
    """

    form: FourBitSpec
    transposed: bool
    tensors: tuple[Tensor, ...]


def is_stored_plainly(tensor: TensorInfo) -> bool:
    """Whether a tensor's bytes are its values; those of a quantised one are fewer."""
    return tensor.nbytes * 8 == math.prod(tensor.shape) * DTYPE_BITS[tensor.dtype]


def quantised_manifest(checkpoint: Checkpoint) -> Manifest | None:
    """The manifest of a result of `--to qpissa`; None where it is anything else."""
    if MANIFEST_NAME not in checkpoint.auxiliary:
        return None
    manifest = read_manifest(checkpoint.root / MANIFEST_NAME)
    return manifest if manifest.head["to"] == "qpissa" else None


def as_matrices(checkpoint: Checkpoint, manifest: Manifest) -> tuple[Checkpoint, dict[str, StoredWeight]]:
    """The checkpoint with every quantised weight as one tensor of its original name, dtype and shape.

    Such a tensor's byte range is that of all its 4-bit tensors.

    Returns:
        It, and how the weights are stored by name.

    Raises:
        FormatError: the files are not as the manifest says.
    """
    stored: dict[str, StoredWeight] = {}
    shards = tuple(_as_matrices(shard, manifest, stored) for shard in checkpoint.shards)
    missing = sorted(manifest.tensors.keys() - stored.keys())
    if missing:
        raise FormatError("the model lacks a weight of its manifest", file=checkpoint.root, tensor=missing[0])
    config = {name: value for name, value in checkpoint.config.items() if name != "quantization_config"}
    return replace(checkpoint, shards=shards, config=config), stored


def _as_matrices(shard: SafetensorsFile, manifest: Manifest, stored: dict[str, StoredWeight]) -> SafetensorsFile:
    return replace(shard, tensors=tuple(_joined(shard, manifest, stored)))


def _joined(shard: SafetensorsFile, manifest: Manifest, stored: dict[str, StoredWeight]) -> Iterator[TensorInfo]:
    options = manifest.head["options"]
    tensors = iter(shard.tensors)
    for tensor in tensors:
        entry = manifest.tensors.get(tensor.name)
        if entry is None:
            yield tensor
            continue
        form = _form(entry, options)
        wanted = tuple(stored_tensors(tensor.name, form, tensor.begin - len(shard.header)))
        group = [tensor, *(part for _, part in zip(wanted[1:], tensors, strict=False))]
        if [(part.name, part.dtype, part.shape) for part in group] != list(wanted):
            raise FormatError(
                "is not stored as its manifest says",
                file=shard.path,
                tensor=tensor.name,
                fix="make the conversion again with --overwrite",
            )
        stored[tensor.name] = StoredWeight(form, entry["transposed"], wanted)
        shape = (form.cols, form.rows) if entry["transposed"] else (form.rows, form.cols)
        yield TensorInfo(tensor.name, form.dtype, shape, tensor.begin, group[-1].end)


def _form(entry: Mapping[str, Any], options: Mapping[str, Any]) -> FourBitSpec:
    rows, cols = entry["shape"]
    return FourBitSpec(rows, cols, entry["dtype"], options["quant"], options["double_quant"])
