"""Running SHA-256: by the core where the CPU has instructions for it, so that two go on at once; else by hashlib.

One stream leaves half of the CPU's SHA unit idle, because every round waits for the one before it. A conversion has two
of every byte's length, the source's and the result's.
"""

from __future__ import annotations

import hashlib
from typing import Protocol

from pissa_convert import _core

IS_NATIVE = _core.Sha256.available()


class Digest(Protocol):
    """The part of hashlib's objects that is used. Not to be used by two threads at once."""

    def update(self, data: memoryview | bytes, /) -> None:
        """Hash more bytes."""

    def hexdigest(self) -> str:
        """Of all bytes so far."""

    def copy(self) -> Digest:
        """One that goes its own way from here."""


def sha256(data: bytes = b"") -> Digest:
    """A new digest of `data` and what is to follow."""
    digest: Digest = _core.Sha256() if IS_NATIVE else hashlib.sha256()
    digest.update(data)
    return digest


def update_both(first: Digest, a: memoryview, second: Digest, b: memoryview) -> None:
    """`first.update(a)` and `second.update(b)`, interleaved where the CPU can; the two must be different."""
    if isinstance(first, _core.Sha256) and isinstance(second, _core.Sha256):
        _core.update_both(first, a, second, b)
    else:
        first.update(a)
        second.update(b)
