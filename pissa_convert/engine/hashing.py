"""A digest in a thread of its own: what is read or written is hashed while the next piece is on its way."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType

from pissa_convert.memory import chunks


def _step_aside() -> None:
    """Give way to the compute threads, which wait for one another: one of them off its CPU stalls them all."""
    with suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)  # of this thread alone, on Linux


class HashThread:
    """Feeds digests in the order of the calls. A context manager; leaving it drops what is not hashed yet.

    Attributes:
        seconds: that it was busy.
    """

    def __init__(self, name: str) -> None:
        self._thread = ThreadPoolExecutor(1, name, initializer=_step_aside)
        self.seconds = 0.0

    def __enter__(self) -> HashThread:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def feed(self, digest: hashlib._Hash, view: memoryview) -> Future[None]:
        """Hash `view`; once the future is done, its bytes may change and no export of them is left."""
        return self._thread.submit(self._update, digest, view)

    def finish(self, digest: hashlib._Hash) -> Future[str]:
        """The digest in hexadecimal of all that was fed to it before."""
        return self._thread.submit(digest.hexdigest)

    def _update(self, digest: hashlib._Hash, view: memoryview) -> None:
        started = time.perf_counter()
        for begin, end in chunks(0, len(view)):
            with view[begin:end] as piece:
                digest.update(piece)
        view.release()
        self.seconds += time.perf_counter() - started
