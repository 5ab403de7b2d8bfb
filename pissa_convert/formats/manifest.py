"""`pissa_convert.json`: what was done, from what, and what came out, with digests.

It holds no times and no host names, so it is byte-identical from run to run; and every number in it has a fixed
width, so its size is known before the work starts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MANIFEST_NAME = "pissa_convert.json"


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and SHA-256 (hexadecimal; the digest that the Hugging Face Hub shows for the same file)."""

    size: int
    sha256: str


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


def render_manifest(
    head: Mapping[str, Any],
    source: Mapping[str, FileRecord],
    output: Mapping[str, FileRecord],
    tensors: Mapping[str, Mapping[str, Any]],
) -> bytes:
    """The manifest's text: one line per option, file and tensor, so that two of them can be compared with `diff`."""
    parts = [f"  {json.dumps(key)}: {_render(value)}" for key, value in head.items()]
    for title, files in (("source", source), ("output", output)):
        records = {name: {"bytes": files[name].size, "sha256": files[name].sha256} for name in sorted(files)}
        parts.append(f'  "{title}": {_block(records)}')
    parts.append(f'  "tensors": {_block(tensors)}')
    return ("{\n" + ",\n".join(parts) + "\n}\n").encode()
