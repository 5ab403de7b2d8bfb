"""Reading a PEFT LoRA folder: every tensor of it is a factor of an adapted module, is carried whole, or is refused.

The names, and what the configuration means for a module's scaling, are PEFT's (0.21). No pickle is opened.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pissa_convert.errors import FormatError, RequestError
from pissa_convert.formats.adapter import CONFIG_NAME, PREFIX, WEIGHTS_NAME
from pissa_convert.formats.checkpoint import check_inside
from pissa_convert.formats.lora_settings import REFUSED, LoraSettings, read_settings
from pissa_convert.formats.safetensors import SafetensorsFile, TensorInfo, read_header
from pissa_convert.formats.strict_json import read_object

_MAX_CONFIG = 16_000_000
_FLOATING = ("F32", "F16", "BF16")

_WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Parts of a name that torch's wrappers (compile, FSDP, activation checkpointing) put in, anywhere."""

_FACTOR = re.compile(
    r"(?P<module>.+)\.(?P<side>lora_(?:embedding_)?[AB])(?:\.(?P<name>[^.]+))??(?:\.(?P<leaf>weight|bias))?"
)
"""A factor; a raw state dict has the adapter's name in it."""

_FOREIGN = re.compile(r"(^|\.)(lora_\w+|hada_\w+|lokr_\w+|oft_\w+|ia3_l|vera_lambda_\w+|prompt_embeddings)(\.|$)")


@dataclass(frozen=True)
class Pair:
    """One adapted module: ΔW = scaling · B·A (for an embedding its transpose).

    Attributes:
        module: run-time name in the base model.
        a: (rank × in), for an embedding (rank × vocabulary).
        b: (out × rank), for an embedding (dimension × rank).
        bias: of B, (out,), scaled with it; None without `lora_bias`.
        scaling: as PEFT computes it from the configuration.
    """

    module: str
    a: TensorInfo
    b: TensorInfo
    bias: TensorInfo | None
    scaling: float
    is_embedding: bool

    @property
    def keys(self) -> tuple[str, str, str]:
        """PEFT's names of A, B and the bias."""
        stem, ending = f"{PREFIX}{self.module}.lora_", ".weight"
        if self.is_embedding:
            stem, ending = f"{stem}embedding_", ""
        return f"{stem}A{ending}", f"{stem}B{ending}", f"{stem}B.bias"

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def size_in(self) -> int:
        return self.a.shape[1]

    @property
    def size_out(self) -> int:
        return self.b.shape[0]


@dataclass(frozen=True)
class AdapterFolder:
    """A LoRA folder as its configuration and header describe it; no tensor is read.

    Attributes:
        root: the folder.
        config: `adapter_config.json`.
        file: the header of `adapter_model.safetensors`.
        pairs: the adapted modules by name, in the order of A's bytes.
        carried: what was trained beside them (modules_to_save, embeddings, biases, token deltas), by PEFT's key.
    """

    root: Path
    config: Mapping[str, Any]
    file: SafetensorsFile
    pairs: Mapping[str, Pair]
    carried: Mapping[str, TensorInfo]


def open_adapter(root: Path, role: str) -> AdapterFolder:
    """Read and check a LoRA folder's configuration and header.

    Args:
        root: the folder with `adapter_config.json`.
        role: what the user calls it, for messages ("TRAINED", "--init", …).

    Raises:
        RequestError: there is no LoRA in safetensors there, or one of a kind that is more than s·B·A.
        FormatError: a file is malformed, or configuration and tensors disagree.
    """
    _check_files(root, role)
    config = read_object(root / CONFIG_NAME, _MAX_CONFIG, "the adapter's configuration")
    settings = read_settings(config, root / CONFIG_NAME)
    file = read_header(root / WEIGHTS_NAME)
    modules, carried = _sort_tensors(file)
    if not modules:
        raise FormatError("there is no lora_A and lora_B in it", file=file.path)
    pairs = {module: _pair(module, parts, settings, file.path) for module, parts in modules.items()}
    ordered = sorted(pairs.values(), key=lambda pair: pair.a.begin)
    return AdapterFolder(root, config, file, {pair.module: pair for pair in ordered}, carried)


def _check_files(root: Path, role: str) -> None:
    if not root.is_dir():
        raise RequestError(f"{role} is not a folder", file=root, fix="give the folder of a PEFT adapter")
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if (root / name).is_file() or (root / name).is_symlink():
            check_inside(root, root / name)
            continue
        pickled = name == WEIGHTS_NAME and (root / "adapter_model.bin").exists()
        raise RequestError(
            f"{role} holds a pickled adapter, which is never opened" if pickled else f"{role} is not a PEFT adapter",
            file=root,
            expected=name,
            found="adapter_model.bin" if pickled else None,
            fix="save it again with safe_serialization=True" if pickled else "give the folder that PEFT saved",
        )


def plain_key(key: str) -> str:
    """PEFT's own key for a tensor, whatever the model was wrapped in when it was saved."""
    key = _WRAPPERS.sub("", key).removeprefix("module.")  # the latter is DistributedDataParallel's
    key = re.sub(r"\.modules_to_save\.[^.]+\.", ".", key)
    return key if key.startswith(PREFIX) else PREFIX + key


def _sort_tensors(file: SafetensorsFile) -> tuple[dict[str, dict[str, TensorInfo]], dict[str, TensorInfo]]:
    """The parts of each adapted module, and what is carried."""
    modules: dict[str, dict[str, TensorInfo]] = {}
    carried: dict[str, TensorInfo] = {}
    for tensor in file.tensors:
        key = plain_key(tensor.name)
        match = _FACTOR.fullmatch(key.removeprefix(PREFIX))
        if match:
            parts = modules.setdefault(match["module"], {})
            part = f"{match['side']}.bias" if match["leaf"] == "bias" else match["side"]
        elif "lora_magnitude_vector" in key:
            raise RequestError(f"is DoRA's: {REFUSED['use_dora']}", file=file.path, tensor=tensor.name)
        elif _FOREIGN.search(key):
            raise RequestError("is no part of a LoRA that is known here", file=file.path, tensor=tensor.name)
        else:
            parts, part = carried, key
        if part in parts:
            raise FormatError("is there twice, for two adapters", file=file.path, tensor=tensor.name, found=key)
        parts[part] = tensor
    return modules, carried


def _pair(module: str, parts: Mapping[str, TensorInfo], settings: LoraSettings, path: Path) -> Pair:
    is_embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
    kind = "lora_embedding" if is_embedding else "lora"
    first = next(iter(parts.values()))
    for side in ("A", "B"):
        if f"{kind}_{side}" not in parts:
            raise FormatError(f"the module's {kind}_{side} is missing", file=path, tensor=first.name)
    rest = parts.keys() - {f"{kind}_A", f"{kind}_B", "lora_B.bias"}
    if rest:
        raise FormatError("is no part of a LoRA that is known here", file=path, tensor=parts[min(rest)].name)
    a, b, bias = parts[f"{kind}_A"], parts[f"{kind}_B"], parts.get("lora_B.bias")
    for tensor, dimensions in ((a, 2), (b, 2), (bias, 1)):
        if tensor is not None:
            _check_tensor(tensor, dimensions, path)
    rank, stated = a.shape[0], settings.rank_of(module)
    if b.shape[1] != rank or (bias is not None and bias.shape[0] != b.shape[0]):
        raise FormatError("A and B do not fit", file=path, tensor=b.name, expected=f"rank {rank}", found=list(b.shape))
    # PEFT's PiSSA makes smaller factors than it was asked for where the weight is smaller; it scales by what was asked.
    if rank != stated and not (rank < stated and rank == min(a.shape[1], b.shape[0])):
        raise FormatError(
            "its rank is not the configuration's", file=path, tensor=a.name, expected=f"rank {stated}", found=rank
        )
    return Pair(module, a, b, bias, settings.scaling_of(module), is_embedding)


def _check_tensor(tensor: TensorInfo, dimensions: int, path: Path) -> None:
    if tensor.dtype not in _FLOATING:
        raise RequestError(
            "is quantised or packed",
            file=path,
            tensor=tensor.name,
            expected=" or ".join(_FLOATING),
            found=tensor.dtype,
            fix="save the adapter in floating point",
        )
    if len(tensor.shape) != dimensions or 0 in tensor.shape:
        raise RequestError(
            "has a shape that no linear layer's or embedding's factor has",
            file=path,
            tensor=tensor.name,
            expected=f"{dimensions} dimensions",
            found=list(tensor.shape),
        )
