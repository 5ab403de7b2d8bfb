"""`pissa_convert.json`: what was done, from what, and what came out, with digests.

It holds no times and no host names, so it is byte-identical from run to run; and every number in it has a fixed
width, so its size is known before the work starts. Its last line is the digest of everything before it, so that
damage to the manifest itself is found.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from blake3 import blake3

from pissa_convert import __version__
from pissa_convert.errors import FormatError
from pissa_convert.formats.strict_json import parse_object

MANIFEST_NAME = "pissa_convert.json"


def manifest_name(alone: str | None) -> str:
    """What the manifest is called in the folder of a result, or beside a result that is one file of that name."""
    return MANIFEST_NAME if alone is None else f"{alone}.{MANIFEST_NAME}"


_AGAIN = "make the conversion again with --overwrite"

_ENTRY_KEYS: dict[str, dict[str, type]] = {
    "pissa": {"file": str, "module": str, "fan_in_fan_out": bool, "relative_error": float},
    "qpissa": {"file": str, "module": str, "transposed": bool, "adapted": bool, "relative_error": float, "norm": float},
    "lora": {"rank": int, "relative_error": float, "norm": float},
    "merged": {"file": str, "relative_error": float},
    "gguf": {"relative_error": float},
}
"""What is read of a weight's or module's entry, by target."""

_MAX_MANIFEST = 1 << 30
"""Bytes; a model of 10,000 weights at rank 1024 has a sixth of that."""


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and BLAKE3 (hexadecimal, as `b3sum` shows it)."""

    size: int
    digest: str


def _is_weights(name: str) -> bool:
    return name.endswith(".safetensors")


@dataclass(frozen=True)
class Manifest:
    """A manifest as it was read.

    Attributes:
        head: tool, version, target, backend, options.
        source, output: the files' records by relative POSIX path.
        tensors: the entry of each split weight by its name; with "lora" of each module, with "merged" of each
            merged weight.
        base: the files of the model that an adapter belongs to, where that is known.
    """

    head: Mapping[str, Any]
    source: Mapping[str, FileRecord]
    output: Mapping[str, FileRecord]
    tensors: Mapping[str, Mapping[str, Any]]
    base: Mapping[str, FileRecord]

    @property
    def shards(self) -> dict[str, FileRecord]:
        """The result's weights that are named as the source's are."""
        return {name: self.output[name] for name in self.output if name in self.source and _is_weights(name)}

    @property
    def source_weights(self) -> dict[str, FileRecord]:
        """The source's weights."""
        return {name: record for name, record in self.source.items() if _is_weights(name)}


@dataclass(frozen=True)
class Fixed:
    """A number rendered with a fixed width, so that the manifest's size does not depend on results."""

    value: float

    def __str__(self) -> str:
        # Below 1e-99 the exponent needs a third digit; nothing that small means anything here.
        return f"{self.value if abs(self.value) >= 1e-99 else 0.0:.8e}"


@dataclass(frozen=True)
class FixedCount:
    """A small whole number, padded to a fixed width (JSON allows the blanks)."""

    value: int

    def __str__(self) -> str:
        return f"{self.value:>4d}"


def _render(value: Any) -> str:
    if isinstance(value, Fixed | FixedCount):
        return str(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(key)}: {_render(item)}" for key, item in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ", ".join(map(_render, value)) + "]"
    return json.dumps(value)


def _block(entries: Mapping[str, Any]) -> str:
    lines = [f"    {json.dumps(name)}: {_render(value)}" for name, value in entries.items()]
    return "{\n" + ",\n".join(lines) + "\n  }"


def manifest_head(to: str, backend: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest says of the conversion as a whole; with the sources' bytes it decides every output byte."""
    return {"tool": "pissa-convert", "version": __version__, "to": to, "backend": backend, "options": options}


def blank_records(sizes: Mapping[str, int]) -> dict[str, FileRecord]:
    """Records as long as those of the finished files, for what a manifest's size will be."""
    return {name: FileRecord(size, "0" * 64) for name, size in sizes.items()}


def sizes_of(files: Mapping[str, Path]) -> dict[str, int]:
    """Bytes of files as they are."""
    return {name: path.stat().st_size for name, path in files.items()}


def render_manifest(
    head: Mapping[str, Any],
    source: Mapping[str, FileRecord],
    output: Mapping[str, FileRecord],
    tensors: Mapping[str, Mapping[str, Any]],
    base: Mapping[str, FileRecord] | None = None,
) -> bytes:
    """The manifest's text: one line per option, file and tensor, so that two of them can be compared with `diff`."""
    parts = [f"  {json.dumps(key)}: {_render(value)}" for key, value in head.items()]
    for title, files in (("source", source), ("output", output), *([("base", base)] if base else [])):
        records = {name: {"bytes": files[name].size, "blake3": files[name].digest} for name in sorted(files)}
        parts.append(f'  "{title}": {_block(records)}')
    parts.append(f'  "tensors": {_block(tensors)}')
    return _sealed(("{\n" + ",\n".join(parts)).encode())


def _sealed(text: bytes) -> bytes:
    return text + b',\n  "manifest_blake3": "' + blake3(text).hexdigest().encode() + b'"\n}\n'


_SEAL = len(_sealed(b""))


def read_manifest(path: Path) -> Manifest:
    """Read and check a manifest.

    Raises:
        FormatError: it cannot be read, is no manifest, or is not as it was written.
    """
    try:
        size = path.stat().st_size
        data = path.read_bytes() if size <= _MAX_MANIFEST else b""
    except OSError as error:
        raise FormatError(f"cannot read: {error.strerror}", file=path) from error
    if _sealed(data[:-_SEAL]) != data:
        raise FormatError("the manifest's own digest does not fit: it was changed or damaged", file=path, fix=_AGAIN)
    entries = parse_object(data, path, "the manifest")
    try:
        return Manifest(
            head={name: entries[name] for name in ("tool", "version", "to", "backend", "options")},
            source=_records(entries["source"]),
            output=_records(entries["output"]),
            tensors=_tensors(entries["tensors"], _ENTRY_KEYS.get(entries["to"], {})),
            base=_records(entries.get("base", {})),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError("this is not a manifest of pissa-convert", file=path, fix=_AGAIN) from error


def _tensors(entries: Mapping[str, Any], keys: Mapping[str, type]) -> Mapping[str, Mapping[str, Any]]:
    for name, entry in entries.items():
        if {key: type(entry[key]) for key in keys} != keys:
            raise ValueError(name)
    return entries


def _records(entries: Mapping[str, Any]) -> dict[str, FileRecord]:
    for name in entries:
        parts = PurePosixPath(name).parts
        if not parts or parts[0] == "/" or ".." in parts:
            raise ValueError(name)  # a manifest is only a file: it cannot point us outside
    return {name: FileRecord(record["bytes"], record["blake3"]) for name, record in entries.items()}
