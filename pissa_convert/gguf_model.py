"""What the header of a base model's GGUF says of the model: its architecture, its heads, its experts."""

from __future__ import annotations

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
        file: its header.
        architecture: llama.cpp's name for it.
    """

    file: GgufFile
    architecture: str

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """By name."""
        return {tensor.name: tensor for tensor in self.file.tensors}

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


def open_base(path: Path, role: str) -> BaseGguf:
    """Read a model's header.

    Args:
        role: what the user calls the file, for messages ("--base-gguf", "SOURCE").

    Raises:
        RequestError: it is an adapter, a part of a model, or not there.
        FormatError: it is malformed.
    """
    if not path.is_file():
        raise RequestError(f"{role} is not a file", file=path, fix="give a GGUF of the base model")
    file = read_gguf(path)
    architecture = file.values.get("general.architecture")
    if not isinstance(architecture, str):
        raise FormatError("general.architecture is missing", file=path, fix="give a GGUF of the base model")
    kind = file.values.get("general.type", "model")
    if kind != "model":
        raise RequestError(f"{role} is no model", file=path, expected="general.type model", found=str(kind)[:40])
    parts = file.values.get("split.count", 0)
    if parts not in (0, 1):
        raise RequestError(
            f"{role} is one of {parts} parts of a model",
            file=path,
            fix="join them first: llama-gguf-split --merge",
        )
    base = BaseGguf(file, architecture)
    if base.blocks > len(file.tensors):
        raise FormatError("has fewer tensors than layers", file=path, expected=base.blocks, found=len(file.tensors))
    return base


def config_value(config: Mapping[str, Any], *names: str) -> int | None:
    """The first of these counts that a model's config.json has."""
    for name in names:
        value = config.get(name)
        if type(value) is int and 0 <= value < 2**20:
            return value
    return None
