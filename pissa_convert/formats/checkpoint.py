"""A Hugging Face model folder: which files hold the weights, which are copied, and which are left behind."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pissa_convert.errors import FormatError, RequestError
from pissa_convert.formats.safetensors import SafetensorsFile, TensorInfo, read_header
from pissa_convert.formats.strict_json import read_object

INDEX_NAME = "model.safetensors.index.json"
_MAX_INDEX = 100_000_000
_MAX_CONFIG = 16_000_000

_WEIGHT_SUFFIXES = [
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".onnx",
    ".gguf",
    ".ot",
    ".tflite",
    ".mlmodel",
    ".nemo",
    ".npz",
]
_OTHER_FORMATS = {"original", "onnx", "openvino", "coreml", "gguf", "metal"}
_TRANSIENT_FOLDERS = {".git", ".cache", "__pycache__"}
_TRANSIENT_SUFFIXES = {".lock", ".partial", ".incomplete", ".tmp"}


@dataclass(frozen=True)
class Skipped:
    """A file of the source that is not carried over."""

    path: str
    reason: str


@dataclass(frozen=True)
class Checkpoint:
    """A model folder.

    Attributes:
        root: the folder.
        shards: its safetensors files in the order of their names.
        config: config.json, {} where there is none.
        index: name of the index file, None for a single file.
        auxiliary: every other file that belongs to the model, relative POSIX paths, sorted.
        skipped: the files that do not, with the reason.
    """

    root: Path
    shards: tuple[SafetensorsFile, ...]
    config: Mapping[str, Any]
    index: str | None
    auxiliary: tuple[str, ...]
    skipped: tuple[Skipped, ...]

    @property
    def tensors(self) -> Iterator[TensorInfo]:
        """All tensors in the order of shards and offsets."""
        return (tensor for shard in self.shards for tensor in shard.tensors)

    def loading_last(self, names: Iterable[str]) -> list[str]:
        """Auxiliary files in the order of their commits: what makes a folder load comes last."""
        last = [self.index, "config.json"]
        return sorted(names, key=lambda name: (last.index(name) if name in last else -1, name))


def open_checkpoint(root: Path) -> Checkpoint:
    """Read what a model folder's headers say; no weight is read.

    Raises:
        RequestError: there is no such folder, or no safetensors model in it.
        FormatError: a file is malformed, missing, or points outside the folder.
    """
    if not root.is_dir():
        raise RequestError("SOURCE is not a folder", file=root, fix="give the folder of a Hugging Face model")
    top = sorted(entry.name for entry in root.iterdir() if not entry.is_dir())
    index, names = _shard_names(root, top)
    for name in names:
        check_inside(root, root / name)
    shards = tuple(read_header(root / name) for name in names)
    _check_tensors(root, shards, index)
    config = {}
    if "config.json" in top:
        check_inside(root, root / "config.json")
        config = read_object(root / "config.json", _MAX_CONFIG, "the config")
    auxiliary, skipped = _other_files(root, set(names))
    return Checkpoint(root, shards, config, INDEX_NAME if index is not None else None, auxiliary, skipped)


def check_inside(root: Path, path: Path) -> None:
    """Refuse a link that leaves the folder, except into the blob store of a Hub cache snapshot.

    A Hub cache keeps `models--X/snapshots/REVISION/FILE` as links into `models--X/blobs/`.
    """
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise FormatError("the file is missing", file=path, fix="download it again") from error
    home = root.resolve()
    allowed = [home]
    if home.parent.name == "snapshots" and home.parent.parent.name.startswith("models--"):
        allowed.append(home.parent.parent / "blobs")
    if not any(folder in real.parents for folder in allowed):
        raise FormatError("is a link that leaves the folder", file=path, found=real, fix="copy the file here")


def _shard_names(root: Path, top: list[str]) -> tuple[dict[str, str] | None, list[str]]:
    """The index's weight map, if there is an index, and the shards' names in order."""
    if INDEX_NAME in top:
        check_inside(root, root / INDEX_NAME)
        weight_map = _weight_map(root / INDEX_NAME)
        return weight_map, sorted(set(weight_map.values()))
    if "model.safetensors" in top:
        return None, ["model.safetensors"]
    candidates = [name for name in top if name.endswith(".safetensors")]
    numbered = {name: re.fullmatch(r"(.+)-(\d{5,6})-of-(\d{5,6})\.safetensors", name) for name in candidates}
    matches = [match for match in numbered.values() if match]
    if matches and len({(match[1], match[3]) for match in matches}) == 1:
        count = int(matches[0][3])
        missing = set(range(1, count + 1)) - {int(match[2]) for match in matches}
        if missing:
            name = f"{matches[0][1]}-{min(missing):0{len(matches[0][2])}d}-of-{matches[0][3]}.safetensors"
            raise FormatError("the shard is missing", file=root / name, fix="download it again")
        return None, sorted(match[0] for match in matches)
    models = [name for name in candidates if not name.startswith("adapter_")]
    if len(models) == 1:
        return None, models
    found = ", ".join(name for name in top if Path(name).suffix in _WEIGHT_SUFFIXES) or "no weights"
    fix = "give a model folder with model.safetensors or its index"
    if candidates and not models:
        fix = "this is an adapter; give the folder of its base model"
    elif not candidates and found != "no weights":
        fix = "convert the model to safetensors first (save_pretrained does)"
    raise RequestError("there is no safetensors model in SOURCE", file=root, found=found, fix=fix)


def _weight_map(path: Path) -> dict[str, str]:
    weight_map = read_object(path, _MAX_INDEX, "the index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError("the index has no weight_map", file=path, fix="download it again")
    for tensor, name in weight_map.items():
        plain = isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0")
        if not plain:
            raise FormatError(
                "the index points outside the folder",
                file=path,
                tensor=tensor,
                expected="a plain file name",
                found=str(name)[:200],
                fix="do not use this checkpoint",
            )
    return weight_map


def _check_tensors(root: Path, shards: tuple[SafetensorsFile, ...], weight_map: Mapping[str, str] | None) -> None:
    home: dict[str, str] = {}
    for shard in shards:
        for tensor in shard.tensors:
            if tensor.name in home:
                raise FormatError(
                    "the tensor is in two shards", file=shard.path, tensor=tensor.name, found=home[tensor.name]
                )
            home[tensor.name] = shard.path.name
    if not home:
        raise FormatError("the model has no tensors", file=root)
    if weight_map is None or weight_map == home:
        return
    for tensor_name, shard_name in sorted({**home, **weight_map}.items()):
        if home.get(tensor_name) != weight_map.get(tensor_name):
            raise FormatError(
                "index and shards disagree about where it is",
                file=root / INDEX_NAME,
                tensor=tensor_name,
                expected=weight_map.get(tensor_name, "no entry in the index"),
                found=home.get(tensor_name, f"not in {shard_name}"),
                fix="download index and shards again",
            )


def _other_files(root: Path, shards: set[str]) -> tuple[tuple[str, ...], tuple[Skipped, ...]]:
    auxiliary, skipped = [], []
    for folder, folders, files in os.walk(root):
        here = Path(folder)
        for name in sorted(folders):
            relative = (here / name).relative_to(root).as_posix()
            reason = None
            if (here / name).is_symlink():
                reason = "a link to a folder"
            elif name in _TRANSIENT_FOLDERS:
                reason = "not part of the model"
            elif here == root and name in _OTHER_FORMATS:
                reason = "the original weights in another format"
            if reason is not None:
                folders.remove(name)
                skipped.append(Skipped(f"{relative}/", reason))
        for name in sorted(files):
            path = here / name
            relative = path.relative_to(root).as_posix()
            if here == root and name in shards:
                continue
            if path.suffix in _TRANSIENT_SUFFIXES:
                skipped.append(Skipped(relative, "not part of the model"))
            elif here == root and path.suffix in _WEIGHT_SUFFIXES:
                skipped.append(Skipped(relative, "the original weights in another format"))
            else:
                check_inside(root, path)
                if not stat.S_ISREG(path.stat().st_mode):
                    skipped.append(Skipped(relative, "not a regular file"))
                else:
                    auxiliary.append(relative)
    return tuple(sorted(auxiliary)), tuple(sorted(skipped, key=lambda item: item.path))
