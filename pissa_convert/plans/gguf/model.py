"""What the header of a base model's GGUF says of the model: its architecture, its heads, its experts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pissa_convert.errors import FormatError, RequestError
from pissa_convert.formats.gguf import GgufFile, read_gguf
from pissa_convert.formats.safetensors import TensorInfo

RESIDUAL_MARK = "RESIDUAL"
"""In the name of a model that is nothing without its adapter."""


@dataclass(frozen=True)
class BaseGguf:
    """A model's GGUF.

    Attributes:
        file: its header, or that of its first part, which has the keys.
        architecture: llama.cpp's name for it.
        more: headers of the other parts.
    """

    file: GgufFile
    architecture: str
    more: tuple[GgufFile, ...] = ()

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """By name, in the order of the parts and their bytes."""
        return {tensor.name: tensor for part in (self.file, *self.more) for tensor in part.tensors}

    @cached_property
    def homes(self) -> dict[str, Path]:
        """The part that each tensor is in."""
        return {tensor.name: part.path for part in (self.file, *self.more) for tensor in part.tensors}

    def setting(self, key: str, default: Any = None) -> Any:
        """A value of the architecture's own, such as "block_count"."""
        return self.file.values.get(f"{self.architecture}.{key}", default)

    @property
    def blocks(self) -> int:
        """Layers."""
        return self._count("block_count", 0)

    @property
    def experts(self) -> int:
        """Experts of a mixture; 0 where there is none."""
        return self._count("expert_count", 0)

    def heads(self, block: int) -> int:
        """Attention heads of a layer."""
        return self._count("attention.head_count", 0, block)

    def key_heads(self, block: int) -> int:
        """Heads that the keys and values have."""
        return self._count("attention.head_count_kv", self.heads(block), block)

    @property
    def is_residual(self) -> bool:
        """Whether it says that it is the residual of a split."""
        return RESIDUAL_MARK in str(self.file.values.get("general.name", ""))

    def _count(self, key: str, default: int, block: int = 0) -> int:
        value = self.setting(key, default)
        if isinstance(value, tuple):
            value = value[block] if block < len(value) else None
        if type(value) is not int or not 0 <= value < 2**20:
            raise FormatError(
                f"{self.architecture}.{key} is malformed",
                file=self.file.path,
                expected="a count",
                found=str(value)[:40],
                fix="give another GGUF of the model",
            )
        return value


def open_base(path: Path, role: str, whole: bool = True) -> BaseGguf:
    """Read a model's header.

    Args:
        role: what the user calls the file, for messages ("--base-gguf", "SOURCE").
        whole: it must be one file; otherwise it may be any of a model's parts, and all are read.

    Raises:
        RequestError: it is an adapter, a part of a model where that will not do, or not there.
        FormatError: it is malformed.
    """
    if not path.is_file():
        raise RequestError(f"{role} is not a file", file=path, fix="give a GGUF of the base model")
    file = read_gguf(path)
    count = file.values.get("split.count", 1)
    if count in (0, 1):
        return _base(file, (), role)
    if whole:
        fix = "join them first: llama-gguf-split --merge"
        raise RequestError(f"{role} is one of several parts of a model", file=path, found=str(count)[:20], fix=fix)
    first, *more = (read_gguf(part) for part in _parts(path, count))
    return _base(first, tuple(more), role)


def _base(file: GgufFile, more: tuple[GgufFile, ...], role: str) -> BaseGguf:
    architecture, kind = (file.values.get(f"general.{key}", "model") for key in ("architecture", "type"))
    if kind != "model":
        raise RequestError(f"{role} is no model", file=file.path, expected="general.type model", found=str(kind)[:40])
    if not isinstance(architecture, str) or "general.architecture" not in file.values:
        raise FormatError("general.architecture is missing", file=file.path, fix="give a GGUF of the base model")
    base = BaseGguf(file, architecture, more)
    count = sum(len(part.tensors) for part in (file, *more))
    if len(base.tensors) != count:
        raise FormatError("two parts have a tensor of the same name", file=file.path, fix="download all parts again")
    if base.blocks > count:
        raise FormatError("has fewer tensors than layers", file=file.path, expected=base.blocks, found=count)
    return base


def _parts(path: Path, count: object) -> list[Path]:
    """Every part's file, as llama-gguf-split names them: NAME-00001-of-00003.gguf."""
    match = re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})\.gguf", path.name)
    if match is None or type(count) is not int or int(match[3]) != count:
        fix = "give the parts the names that llama-gguf-split gave them"
        raise RequestError("is a part of a model, and not called like one", file=path, fix=fix)
    paths = [path.with_name(f"{match[1]}-{number:05d}-of-{match[3]}.gguf") for number in range(1, count + 1)]
    for part in paths:
        if not part.is_file():
            raise RequestError("the part is missing", file=part, fix="download it")
    return paths


def config_value(config: Mapping[str, Any], *names: str) -> int | None:
    """The first of these counts that a model's config.json has."""
    for name in names:
        value = config.get(name)
        if type(value) is int and 0 <= value < 2**20:
            return value
    return None
