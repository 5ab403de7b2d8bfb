"""`--to qpissa` stopped and killed in the middle: the same command continues, and the result is the same bytes."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import digests
from interrupting import COMMAND, DYING, JOURNAL, Stop, assert_does_not_load, stop_after

from pissa_convert import convert

OPTIONS = ["--to", "qpissa", "--rank", "4", "--iterations", "2", "--quiet"]


@pytest.fixture(scope="module")
def quantised(source: Path) -> dict[str, str]:
    """What an uninterrupted run gives."""
    dest = source.parent / "quantised"
    convert(source, dest, "qpissa", rank=4, iterations=2)
    return digests(dest)


@pytest.mark.parametrize("after", [1, 3, 7, 12])
def test_stopped(source: Path, quantised: dict[str, str], tmp_path: Path, after: int) -> None:
    dest = tmp_path / "out"
    with pytest.raises(Stop):
        convert(source, dest, "qpissa", rank=4, iterations=2, progress=stop_after(after))
    assert (dest / JOURNAL).exists()
    assert_does_not_load(dest)
    report = convert(source, dest, "qpissa", rank=4, iterations=2)
    assert report.resumed
    assert digests(dest) == quantised
    assert convert(source, dest, "qpissa", rank=4, iterations=2).complete_before


@pytest.mark.parametrize(("name", "call"), [("pwrite", 9), ("replace", 2), ("replace", 8)])
def test_killed(source: Path, quantised: dict[str, str], tmp_path: Path, name: str, call: int) -> None:
    arguments = [str(source), str(tmp_path / "out"), *OPTIONS]
    run = subprocess.run(
        [sys.executable, DYING, name, str(call), "after", *arguments], check=False, capture_output=True
    )
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert_does_not_load(tmp_path / "out")
    subprocess.run([COMMAND, *arguments], check=True, capture_output=True)
    assert digests(tmp_path / "out") == quantised
