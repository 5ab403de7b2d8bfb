"""Digests beside the work: in order on each side, every one on the way known, and never a waiter left behind."""

from __future__ import annotations

import random
import threading
from concurrent.futures import CancelledError

import pytest
from blake3 import blake3

from pissa_convert.engine.hashing import Hashing


def test_both_sides_are_hashed_in_order_and_every_digest_on_the_way_is_known() -> None:
    dice = random.Random(0)
    with Hashing() as hashing:
        waiting = []
        for side, count in ((hashing.source, 30), (hashing.output, 20)):
            digest, so_far = blake3(), b""
            for _ in range(count):
                data = dice.randbytes(dice.choice([0, 1, 1000, 300_000]))
                so_far += data
                waiting.append((side.feed(digest, memoryview(data)), blake3(so_far).hexdigest()))
        for ticket, expected in waiting:
            assert ticket.result(10) == expected
        assert hashing.seconds > 0


def test_bytes_are_released_before_their_holder_is_told() -> None:
    data = bytearray(100)

    def then() -> None:
        data.append(0)  # BufferError while a view of it is held

    with Hashing() as hashing:
        hashing.source.feed(blake3(), memoryview(data), then).result(10)
    assert len(data) == 101


def test_whoever_waits_is_woken_when_the_work_is_given_up() -> None:
    hold = threading.Event()
    with Hashing() as hashing:
        hashing.source.feed(blake3(), memoryview(b"first"), lambda: float(not hold.wait(10)))
        ticket = hashing.source.feed(blake3(), memoryview(b"second"))
        hashing.cancel()
        with pytest.raises(CancelledError):
            ticket.result(10)
        hold.set()


def test_what_goes_wrong_in_the_thread_reaches_who_waits() -> None:
    def fail() -> None:
        raise OSError("broken")

    with Hashing() as hashing:
        ticket = hashing.source.feed(blake3(), memoryview(bytes(10)), fail)
        with pytest.raises(OSError, match="broken"):
            ticket.result(10)
