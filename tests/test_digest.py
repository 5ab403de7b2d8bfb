"""Running digests against hashlib, for all lengths and splits."""

from __future__ import annotations

import hashlib
import random

import pytest

from pissa_convert.engine import digest
from pissa_convert.engine.digest import sha256, update_both

DATA = random.Random(0).randbytes(1 << 16)


@pytest.fixture(params=["core", "hashlib"], autouse=True)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "hashlib":
        monkeypatch.setattr(digest, "IS_NATIVE", False)
    elif not digest.IS_NATIVE:
        pytest.skip("this CPU has no instructions for SHA-256")


def expected(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_every_length_around_a_block() -> None:
    for length in range(260):
        assert sha256(DATA[:length]).hexdigest() == expected(DATA[:length])


def test_pairs_of_any_lengths_each_begun_anywhere() -> None:
    dice = random.Random(1)
    for _ in range(2000):
        parts = [[dice.randbytes(dice.choice([0, 1, 55, 64, 119, dice.randrange(700)])) for _ in "abc"] for _ in "xy"]
        first, second = sha256(parts[0][0]), sha256(parts[1][0])
        update_both(first, memoryview(parts[0][1]), second, memoryview(parts[1][1]))
        update_both(second, memoryview(parts[1][2]), first, memoryview(parts[0][2]))
        assert first.hexdigest() == expected(b"".join(parts[0]))
        assert second.hexdigest() == expected(b"".join(parts[1]))


def test_a_digest_goes_on_after_it_was_read_or_copied() -> None:
    one = sha256(DATA[:100])
    assert one.hexdigest() == expected(DATA[:100])
    other = one.copy()
    one.update(DATA[100:])
    other.update(memoryview(DATA)[5:9])
    assert one.hexdigest() == expected(DATA)
    assert other.hexdigest() == expected(DATA[:100] + DATA[5:9])


def test_what_is_no_run_of_bytes_is_refused(implementation: None) -> None:
    with pytest.raises((ValueError, BufferError)):
        sha256().update(memoryview(DATA)[::2])
    if digest.IS_NATIVE:
        one = sha256()
        with pytest.raises(ValueError, match="same"):
            update_both(one, memoryview(DATA), one, memoryview(DATA))
