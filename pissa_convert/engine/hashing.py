"""SHA-256 of the source and of the output beside the work: in a thread for each, or together in one.

With CPUs to spare each side has its own thread, because hashing one file is no faster than one CPU. With few, they
share one: two digests that go on together take less time than one after the other. Bytes of either side then wait for
a partner from the other until somebody needs their digest to go on: a lane that has nothing else to do, the writer at
the end of a file, the reader for whom no memory is left.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType

from pissa_convert.engine.buffers import Cancelled
from pissa_convert.engine.digest import Digest, update_both

_PAIR = 4 << 20
"""Bytes of each side that are hashed at a time."""

_SINGLE = 1 << 20
"""The same without a partner: few, so that one that comes is not kept waiting."""

_Then = Callable[[], None]


@dataclass
class _Piece:
    digest: Digest
    view: memoryview
    then: _Then | None
    done: int = 0
    sha256: str | None = None  # of everything up to its end


class Line:
    """Bytes of one side, hashed in the order in which they come."""

    def __init__(self) -> None:
        self.pieces: deque[_Piece] = deque()
        self.fed = self.hashed = self.wanted = 0  # pieces, from the start of the work

    @property
    def is_wanted(self) -> bool:
        """Somebody waits for the next piece."""
        return self.hashed < self.wanted


@dataclass(frozen=True)
class Ticket:
    """A place in a line."""

    hashing: Hashing
    line: Line
    number: int
    piece: _Piece

    @property
    def is_done(self) -> bool:
        """The bytes have been hashed, and nothing looks at them any more."""
        return self.line.hashed >= self.number

    def wait(self) -> None:
        """Return once they have.

        Raises:
            Cancelled: the work was given up.
        """
        self.hashing.wait(self.line, self.number)

    def sha256(self) -> str:
        """The digest up to and with these bytes, once it is known; as `wait`."""
        self.wait()
        assert self.piece.sha256 is not None
        return self.piece.sha256


class Hashing:
    """Feeds digests in the order of the calls. A context manager; leaving it drops what is not hashed yet.

    Attributes:
        source, output: the two sides.
    """

    def __init__(self, *, together: bool) -> None:
        """`together`: in one thread."""
        self.source, self.output = Line(), Line()
        self._changed = threading.Condition()
        self._is_pressed = self._is_closing = False
        self._error: BaseException | None = None
        sides = [(self.source, self.output)] if together else [(self.source,), (self.output,)]
        self._seconds = [0.0] * len(sides)
        self._threads = [
            threading.Thread(target=self._run, args=(number, lines), name=f"hash-{number}")
            for number, lines in enumerate(sides)
        ]

    @property
    def seconds(self) -> float:
        """That the busiest thread was busy."""
        return max(self._seconds)

    def __enter__(self) -> Hashing:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()
        for thread in self._threads:
            thread.join()

    def cancel(self) -> None:
        """Hash nothing more, and wake whoever waits."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()

    def feed(
        self, line: Line, digest: Digest, view: memoryview, then: _Then | None = None, *, alone: bool = False
    ) -> Ticket:
        """Hash `view` after what came before it on this side, release it, and call `then` in the hashing thread.

        `alone`: no partner will come.
        """
        with self._changed:
            piece = _Piece(digest, view, then)
            line.pieces.append(piece)
            line.fed += 1
            line.wanted = line.fed if alone else line.wanted
            self._changed.notify_all()
            return Ticket(self, line, line.fed, piece)

    def wait(self, line: Line, number: int) -> None:
        """Return once the first `number` pieces of a side are hashed; see `Ticket.wait`."""
        with self._changed:
            line.wanted = max(line.wanted, number)
            self._changed.notify_all()
            self._changed.wait_for(lambda: line.hashed >= number or self._is_closing)
            if self._error is not None:
                raise self._error
            if line.hashed < number:
                raise Cancelled

    @contextmanager
    def pressed(self) -> Iterator[None]:
        """While this lasts nothing waits for a partner: somebody waits for memory that the bytes take up."""
        with self._changed:
            self._is_pressed = True
            self._changed.notify_all()
        try:
            yield
        finally:
            self._is_pressed = False

    def _run(self, number: int, sides: tuple[Line, ...]) -> None:
        try:
            while (turn := self._next_turn(sides)) is not None:
                started = time.perf_counter()
                _hash_some(turn)
                self._seconds[number] += time.perf_counter() - started
                self._finish(turn)
        except BaseException as error:
            self._error = error
            self.cancel()

    def _next_turn(self, sides: tuple[Line, ...]) -> list[Line] | None:
        """Those to hash next bytes of, once there are some that should not wait; None at the end of the work."""
        with self._changed:
            while not self._is_closing:
                lines = [line for line in sides if line.pieces]
                if lines and (len(lines) == len(sides) or lines[0].is_wanted or self._is_pressed):
                    return lines
                self._changed.wait()
        return None

    def _finish(self, lines: list[Line]) -> None:
        for line in lines:
            piece = line.pieces[0]
            if piece.done < len(piece.view):
                continue
            piece.sha256 = piece.digest.hexdigest()
            piece.view.release()
            if piece.then is not None:
                piece.then()
            with self._changed:
                line.pieces.popleft()
                line.hashed += 1
                self._changed.notify_all()


def _hash_some(lines: list[Line]) -> None:
    pieces = [line.pieces[0] for line in lines]
    count = min(_SINGLE if len(pieces) == 1 else _PAIR, *(len(piece.view) - piece.done for piece in pieces))
    views = [piece.view[piece.done : piece.done + count] for piece in pieces]
    if len(pieces) == 2:
        update_both(pieces[0].digest, views[0], pieces[1].digest, views[1])
    else:
        pieces[0].digest.update(views[0])
    for piece, view in zip(pieces, views, strict=True):
        view.release()
        piece.done += count
