"""What must be unchanged for an interrupted conversion to be continued."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def fingerprint(head: Mapping[str, Any], files: Mapping[str, Path]) -> dict[str, Any]:
    """A plan's fingerprint, by what a message calls each part of it.

    Args:
        head: what the manifest says of the conversion as a whole.
        files: what is read, by name; each is known by its size and modification time.
    """
    return {
        **{name: value for name, value in head.items() if name != "options"},
        **{f"--{name.replace('_', '-')}": value for name, value in head["options"].items()},
        **{f"source file {name}": identity(path) for name, path in files.items()},
    }


def identity(path: Path) -> list[int]:
    """What a file is known by: its size in bytes and its modification time in nanoseconds."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]
