"""Which tensors of a Hugging Face model fill each tensor of a template GGUF; all of both must be accounted for."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pissa_convert.errors import RequestError
from pissa_convert.formats.checkpoint import Checkpoint
from pissa_convert.formats.safetensors import TensorInfo
from pissa_convert.plans.architectures import read_architecture
from pissa_convert.plans.gguf.model import BaseGguf
from pissa_convert.plans.gguf.names import ONE_MORE, Home, Layout
from pissa_convert.plans.targets import SPLITTABLE

_COMPUTED = re.compile(r"rope_freqs\.weight|(blk\.\d+\.)?rope_factors_(long|short)\.weight")
"""Tensors of a GGUF that its converter works out of the config; they stay the template's."""

_DROPPED = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|(attn|attention)\.(masked_)?bias)")
"""Tensors of a checkpoint that are no weights."""

HEAD, EMBEDDING = "output.weight", "token_embd.weight"


@dataclass(frozen=True)
class Origin:
    """Where the rows of a GGUF tensor come from.

    Attributes:
        parts: the model's tensor with its file; for a stack of experts one for each.
        heads: rows are permuted within so many groups; None where they keep their order.
        added: to every value.
    """

    parts: tuple[tuple[Path, TensorInfo], ...]
    heads: int | None = None
    added: float = 0.0

    @property
    def rows(self) -> int:
        """Of one part."""
        return as_rows(self.parts[0][1].shape)[0]

    @property
    def group(self) -> int:
        """Rows that must be taken together."""
        return self.rows // self.heads if self.heads else 1


def as_rows(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows, of all experts one after the other, and columns; a vector is a column."""
    return (shape[0], 1) if len(shape) == 1 else (math.prod(shape[:-1]), shape[-1])


def find_origins(checkpoint: Checkpoint, template: BaseGguf, layout: Layout) -> dict[str, Origin]:
    """The origin of each of the template's tensors but those that are computed.

    Raises:
        RequestError: template and model are not of the same architecture and shapes; names the first tensor.
    """
    homes = _homes(checkpoint, template, layout)
    origins = {}
    for tensor in template.file.tensors:
        parts = homes.pop(tensor.name, None)
        if parts is None and _COMPUTED.fullmatch(tensor.name):
            continue
        if parts is None and tensor.name == HEAD and _is_tied(checkpoint):
            parts = {None: (*_by_name(checkpoint, template, layout, EMBEDDING), Home(HEAD))}
        if parts is None:
            raise _mismatch(template, tensor.name, "a tensor of the model for it", "none")
        origins[tensor.name] = _origin(tensor, parts, template, layout)
    if homes:
        name, parts = next(iter(homes.items()))
        _, missing, _ = next(iter(parts.values()))
        raise _mismatch(template, missing.name, f"a tensor {name} in the template", "none")
    return origins


_Parts = dict[int | None, tuple[Path, TensorInfo, Home]]


def _homes(checkpoint: Checkpoint, template: BaseGguf, layout: Layout) -> dict[str, _Parts]:
    """The model's tensors by the GGUF tensor that they are in, and their expert."""
    known = {tensor.name for tensor in template.file.tensors}
    homes: dict[str, _Parts] = {}
    for shard in checkpoint.shards:
        for tensor in shard.tensors:
            if _DROPPED.fullmatch(tensor.name):
                continue
            home = layout.home(tensor.name)
            if home is None:
                raise _mismatch(template, tensor.name, f"a tensor that {layout.architecture} has", "another")
            if home.name == HEAD and HEAD not in known and _is_tied(checkpoint):
                continue  # transformers does not look at it either
            parts = homes.setdefault(home.name, {})
            if home.expert in parts:
                raise _mismatch(template, tensor.name, f"one tensor for {home.name}", "two")
            parts[home.expert] = (shard.path, tensor, home)
    return homes


def _is_tied(checkpoint: Checkpoint) -> bool:
    return read_architecture(checkpoint.config, [tensor.name for tensor in checkpoint.tensors]).tied


def _by_name(checkpoint: Checkpoint, template: BaseGguf, layout: Layout, name: str) -> tuple[Path, TensorInfo]:
    for shard in checkpoint.shards:
        for tensor in shard.tensors:
            home = layout.home(tensor.name)
            if home is not None and home.name == name:
                return shard.path, tensor
    raise _mismatch(template, name, "a tensor of the model for it", "none")


def _origin(tensor: TensorInfo, parts: _Parts, template: BaseGguf, layout: Layout) -> Origin:
    stacked = None not in parts
    numbers = sorted(number for number in parts if number is not None)
    if stacked and numbers != list(range(tensor.shape[0])):
        raise _mismatch(template, tensor.name, f"{tensor.shape[0]} experts", f"{len(numbers)} in the model")
    ordered = [parts[number] for number in numbers] if stacked else list(parts.values())
    shape = tensor.shape[1:] if stacked else tensor.shape
    for _, part, home in ordered:
        if part.dtype not in SPLITTABLE:
            raise RequestError(
                "cannot be converted from its dtype",
                tensor=part.name,
                expected=" or ".join(SPLITTABLE),
                found=part.dtype,
            )
        if part.shape != shape or (home.heads and shape[0] % (2 * home.heads)):
            raise _mismatch(template, part.name, f"shape {list(shape)}, that of {tensor.name}", list(part.shape))
    one_more = layout.architecture in ONE_MORE and tensor.name.endswith("norm.weight")
    return Origin(tuple((path, part) for path, part, _ in ordered), ordered[0][2].heads, 1.0 if one_more else 0.0)


def _mismatch(template: BaseGguf, tensor: str, expected: object, found: object) -> RequestError:
    return RequestError(
        "the template is not a GGUF of this model",
        file=template.file.path,
        tensor=tensor,
        expected=expected,
        found=found,
        fix="give a GGUF of the model itself, or of the one that it was trained from, as --base-gguf",
    )


def kinds_of(names: Mapping[str, Any]) -> dict[str, list[str]]:
    """Tensor names by what they are in a layer."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(Home(name).kind, []).append(name)
    return kinds
