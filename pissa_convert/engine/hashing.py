"""BLAKE3 of the source and of the output beside the work, in a thread for each: one file's digest is a chain."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from blake3 import blake3

Ticket = Future[str]
"""Bytes that are to be hashed; with its result, the digest up to and with them, nothing looks at them any more."""


class Side:
    """Hashes bytes in the order in which they come.

    Attributes:
        seconds: that the thread was busy.
    """

    def __init__(self, name: str) -> None:
        self.seconds = 0.0
        self._thread = ThreadPoolExecutor(1, f"hash-{name}")

    def feed(self, digest: blake3, view: memoryview, then: Callable[[], None] | None = None) -> Ticket:
        """Hash `view` after what came before it, release it, and call `then` in the hashing thread."""
        return self._thread.submit(self._hash, digest, view, then)

    def cancel(self) -> None:
        """Hash nothing more: tickets that are waited for raise CancelledError."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def join(self) -> None:
        """Return once nothing is being hashed."""
        self._thread.shutdown(wait=True)

    def _hash(self, digest: blake3, view: memoryview, then: Callable[[], None] | None) -> str:
        started = time.perf_counter()
        digest.update(view)
        view.release()
        self.seconds += time.perf_counter() - started
        if then is not None:
            then()
        return digest.hexdigest()


class Hashing:
    """The two sides of a conversion. A context manager; leaving it drops what is not hashed yet."""

    def __init__(self) -> None:
        self.source, self.output = Side("source"), Side("output")

    @property
    def seconds(self) -> float:
        """That the busier thread was busy."""
        return max(self.source.seconds, self.output.seconds)

    def __enter__(self) -> Hashing:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()
        self.source.join()
        self.output.join()

    def cancel(self) -> None:
        """See `Side.cancel`."""
        self.source.cancel()
        self.output.cancel()
