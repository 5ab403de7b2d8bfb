"""Killed at any moment, or stopped by a signal: the same command continues, and the result is the same bytes."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkpoints import digests
from interrupting import COMMAND, DYING, JOURNAL, OPTIONS, assert_does_not_load, finish

from pissa_convert import convert


def commit_calls(source: Path, tmp_path: Path, name: str) -> int:
    run = subprocess.run(
        [sys.executable, DYING, "count", name, "before", str(source), str(tmp_path / "count"), *OPTIONS, "--quiet"],
        check=True,
        capture_output=True,
        text=True,
    )
    return int(run.stdout)


def die_and_continue(source: Path, dest: Path, name: str, call: int, when: str) -> None:
    arguments = [sys.executable, DYING, name, str(call), when, str(source), str(dest), *OPTIONS, "--quiet"]
    run = subprocess.run(arguments, check=False, capture_output=True)
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert_does_not_load(dest)
    finish(source, dest)


@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_at_every_rename(source: Path, expected: dict[str, str], tmp_path: Path, when: str) -> None:
    calls = commit_calls(source, tmp_path, "replace")
    assert calls >= 3 + 1 + 6  # shards, adapter, and what lies beside
    for call in range(1, calls + 1):
        dest = tmp_path / str(call)
        die_and_continue(source, dest, "replace", call, when)
        assert digests(dest) == expected


@pytest.mark.long
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["fsync", "unlink", "pwrite", "write", "posix_fallocate", "ftruncate", "mkdir"])
def test_killed_at_every_step(source: Path, expected: dict[str, str], tmp_path: Path, name: str, when: str) -> None:
    calls = commit_calls(source, tmp_path, name)
    assert calls > 0
    for call in range(1, calls + 1):
        dest = tmp_path / str(call)
        die_and_continue(source, dest, name, call, when)
        assert digests(dest) == expected


def kill_at_random_moments(smol: Path, reference: dict[str, str], tmp_path: Path, kills: int) -> None:
    """Kill again and again, also the runs that continue, until as many kills have landed."""
    dest = tmp_path / "out"
    arguments = [COMMAND, str(smol), str(dest), "--to", "pissa", "--quiet"]
    start = time.perf_counter()
    subprocess.run(arguments, check=True)
    takes = time.perf_counter() - start
    dice = random.Random(0)
    landed = 0
    while landed < kills:
        shutil.rmtree(dest)
        while True:
            process = subprocess.Popen(arguments, stderr=subprocess.PIPE)
            time.sleep(dice.uniform(0.05, takes))
            process.send_signal(signal.SIGKILL)
            process.communicate()
            if process.returncode != -signal.SIGKILL:
                assert process.returncode == 0
                break
            landed += 1
        assert digests(dest) == reference


def test_killed_at_random_moments(smol: Path, smol_pissa: Path, tmp_path: Path) -> None:
    kill_at_random_moments(smol, digests(smol_pissa), tmp_path, 6)


@pytest.mark.long
def test_killed_at_two_hundred_random_moments(smol: Path, smol_pissa: Path, tmp_path: Path) -> None:
    kill_at_random_moments(smol, digests(smol_pissa), tmp_path, 200)


def heed_signals() -> None:
    """What shells start in the background ignores SIGINT, and so would what we start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize(("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "SIGINT")])
def test_signals_stop_cleanly_and_say_how_to_continue(
    smol: Path, smol_pissa: Path, tmp_path: Path, number: int, name: str
) -> None:
    arguments = [COMMAND, str(smol), str(tmp_path / "out"), "--to", "pissa"]
    journal = tmp_path / "out" / JOURNAL
    for _ in range(10):  # a busy machine may deliver the signal when all is done
        process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, preexec_fn=heed_signals)
        while process.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") > 5):
            time.sleep(0.01)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        if process.returncode:
            break
        shutil.rmtree(tmp_path / "out")
    assert process.returncode == 1
    assert said == "error: interrupted; run the same command again to continue\n"
    convert(smol, tmp_path / "out")
    assert digests(tmp_path / "out") == digests(smol_pissa)


def test_a_second_process_on_one_destination_is_refused(smol: Path, tmp_path: Path) -> None:
    arguments = [COMMAND, str(smol), str(tmp_path / "out"), "--to", "pissa", "--quiet"]
    first = subprocess.Popen(arguments)
    while first.poll() is None and not (tmp_path / "out" / JOURNAL).exists():
        time.sleep(0.01)
    second = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert first.wait() == 0
    assert second.returncode == 2
    assert "another pissa-convert" in second.stderr
