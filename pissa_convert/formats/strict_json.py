"""JSON from files that nobody vouches for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pissa_convert.errors import FormatError

# Deeper nesting than any real header or config has; Python's parser recurses and would hit its own limit first.
_MAX_DEPTH = 64


class _Duplicate(ValueError):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # With duplicate keys, two readers can see two different files.
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        raise _Duplicate(next(key for key in keys if keys.count(key) > 1))
    return result


def parse_object(data: bytes, file: Path, what: str) -> dict[str, Any]:
    """Parse a JSON object: UTF-8, no duplicate keys, no deep nesting.

    Raises:
        FormatError: it is not that; `what` names it in the message.
    """
    fix = "download the file again"
    try:
        text = data.decode("utf-8")
        try:
            value = json.loads(text, object_pairs_hook=_object)
        except RecursionError:
            raise FormatError(f"{what} is nested too deeply", file=file, fix=fix) from None
    except _Duplicate as error:
        raise FormatError(f"{what} has a key twice", file=file, found=f"{error}"[:200], fix=fix) from None
    except ValueError as error:
        raise FormatError(f"{what} is not valid JSON ({error})", file=file, fix=fix) from None
    if not isinstance(value, dict):
        raise FormatError(
            f"{what} is not what it should be", file=file, expected="an object", found=type(value).__name__, fix=fix
        )
    if _depth_exceeds(value):
        raise FormatError(f"{what} is nested too deeply", file=file, fix=fix)
    return value


def _depth_exceeds(value: Any) -> bool:
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [
            child
            for item in level
            if isinstance(item, dict | list)
            for child in (item.values() if isinstance(item, dict) else item)
            if isinstance(child, dict | list)
        ]
        if not level:
            return False
    return True


def read_object(path: Path, limit: int, what: str) -> dict[str, Any]:
    """Read and parse a JSON file of at most `limit` bytes."""
    size = path.stat().st_size
    if size > limit:
        raise FormatError(f"{what} is too large", file=path, expected=f"at most {limit} bytes", found=size)
    return parse_object(path.read_bytes(), path, what)
