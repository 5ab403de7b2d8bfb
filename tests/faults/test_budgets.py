"""Memory: refused with what is needed, and kept to."""

from __future__ import annotations

import json
import random
import re
import subprocess
import threading
import time
from pathlib import Path

import pytest
from checkpoints import digests, llm_like, write_model
from interrupting import COMMAND, OPTIONS

from pissa_convert import convert
from pissa_convert.engine.buffers import Buffers


def test_a_refused_run_says_how_much_memory_it_needs_and_that_is_enough(tmp_path: Path) -> None:
    weights = {f"x.{n}.q_proj.weight": llm_like(64, 64, n).repeat(40, 40) for n in range(4)}
    source = write_model(tmp_path / "in", weights)
    command = [COMMAND, str(source), str(tmp_path / "out"), *OPTIONS, "--log-json", str(tmp_path / "log")]
    refused = subprocess.run([*command, "--max-memory", "1MiB"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert not (tmp_path / "out").exists()
    needed = re.search(r"--max-memory (\d+)MiB", refused.stderr)
    assert needed is not None, refused.stderr
    subprocess.run([*command, "--max-memory", f"{needed[1]}MiB"], capture_output=True, check=True)
    assert json.loads((tmp_path / "log").read_text())["peak_memory"] <= int(needed[1]) << 20
    convert(source, tmp_path / "fresh", rank=4)
    assert digests(tmp_path / "out") == digests(tmp_path / "fresh")


@pytest.mark.parametrize("threads", [1, 2])
def test_the_peak_is_as_planned(tmp_path: Path, threads: int) -> None:
    weights = {f"x.{n}.q_proj.weight": llm_like(64, 64, n).repeat(20, 20) for n in range(30)}
    source = write_model(tmp_path / "in", weights)
    command = [COMMAND, str(source), str(tmp_path / "out"), *OPTIONS, "--threads", str(threads)]
    planned = subprocess.run([*command, "--plan"], capture_output=True, text=True, check=True).stdout
    subprocess.run([*command, "--quiet", "--log-json", str(tmp_path / "log")], check=True)
    found = json.loads((tmp_path / "log").read_text())["peak_memory"]
    expected = re.search(r"^memory +(\d+) bytes", planned, re.MULTILINE)
    assert expected is not None
    assert abs(int(expected[1]) / found - 1) <= 0.2


def test_memory_in_flight_never_exceeds_the_budget_and_no_buffer_overlaps_another() -> None:

    buffers, budget, page = Buffers(100 * 4096), 100, 4096
    held, peak, lock, broken = [0], [0], threading.Lock(), []

    def work(number: int, pages: int) -> None:
        dice = random.Random(number)
        for _ in range(50):
            size = dice.randint(2, pages)
            buffer = buffers.take((size - 1) * page - dice.randrange(page), at=dice.randrange(2 * page))
            with lock:
                held[0] += size
                peak[0] = max(peak[0], held[0])
            buffer.view[:] = bytes([number]) * len(buffer.view)
            time.sleep(0.0001)
            if bytes(buffer.view) != bytes([number]) * len(buffer.view):
                broken.append(number)
            with lock:
                held[0] -= size
            buffers.give_back(buffer)

    threads = [threading.Thread(target=work, args=item) for item in enumerate((100, 60, 30, 10))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not broken
    assert 60 < peak[0] <= budget
