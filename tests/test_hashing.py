"""Digests beside the work: in order on each side, together where two wait, at once where somebody needs them."""

from __future__ import annotations

import hashlib
import random
import threading
import time

import pytest

from pissa_convert.engine.buffers import Cancelled
from pissa_convert.engine.digest import sha256
from pissa_convert.engine.hashing import Hashing


@pytest.mark.parametrize("together", [True, False])
def test_both_sides_are_hashed_in_order_and_every_digest_on_the_way_is_known(together: bool) -> None:
    dice = random.Random(0)
    with Hashing(together=together) as hashing:
        waiting = []
        for line, count in ((hashing.source, 30), (hashing.output, 20)):
            digest, reference = sha256(), hashlib.sha256()
            for _ in range(count):
                data = dice.randbytes(dice.choice([0, 1, 1000, 3 << 20]))
                reference.update(data)
                waiting.append((hashing.feed(line, digest, memoryview(data)), reference.hexdigest()))
        dice.shuffle(waiting)
        for ticket, expected in waiting:
            assert ticket.sha256() == expected
            assert ticket.is_done
        assert hashing.seconds > 0


def test_bytes_wait_for_a_partner_until_they_are_needed() -> None:
    data, called = memoryview(bytes(100)), threading.Event()
    with Hashing(together=True) as hashing:
        alone = hashing.feed(hashing.source, sha256(), data[:], called.set)
        time.sleep(0.05)
        assert not alone.is_done
        other = hashing.feed(hashing.output, sha256(), data[:])
        assert called.wait(10)
        other.wait()
        wanted, later = hashing.feed(hashing.output, sha256(), data[:]), hashing.feed(hashing.output, sha256(), data[:])
        wanted.wait()
        time.sleep(0.05)
        assert not later.is_done
        with hashing.pressed():
            while not later.is_done:
                time.sleep(0.001)


def test_whoever_waits_is_woken_when_the_work_is_given_up() -> None:
    raised = []

    def wait() -> None:
        try:
            with Hashing(together=True) as hashing:
                ticket = hashing.feed(hashing.source, sha256(), memoryview(bytes(10)))
                hashing.cancel()
                ticket.wait()
        except Cancelled as error:
            raised.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    thread.join(10)
    assert raised


def test_what_goes_wrong_in_the_thread_reaches_who_waits() -> None:
    def fail() -> None:
        raise OSError("broken")

    with Hashing(together=True) as hashing:
        ticket = hashing.feed(hashing.source, sha256(), memoryview(bytes(10)), fail)
        with pytest.raises(OSError, match="broken"):
            ticket.wait()
