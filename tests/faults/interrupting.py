"""Stopping a conversion in the middle, and what is left then."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pissa_convert import convert

COMMAND = str(Path(sys.executable).with_name("pissa-convert"))
DYING = str(Path(__file__).with_name("dying.py"))
JOURNAL = ".pissa-convert.journal"
OPTIONS = ["--to", "pissa", "--rank", "4"]


def finish(source: Path, dest: Path, *options: str) -> None:
    subprocess.run([COMMAND, str(source), str(dest), *OPTIONS, "--quiet", *options], check=True, capture_output=True)


def assert_does_not_load(dest: Path) -> None:
    assert not ((dest / "config.json").exists() and not (dest / "model.safetensors.index.json").exists())
    assert (
        not (dest / "pissa_convert.json").exists() or not (dest / JOURNAL).exists() or (dest / "config.json").exists()
    )


class Stop(Exception):
    """Raised by a progress callback to stop a run in the middle."""


def stop_after(count: int) -> Any:
    seen = [0]

    def progress(done: int, total: int, timings: object) -> None:
        seen[0] += 1
        if seen[0] > count:
            raise Stop

    return progress


def interrupt(source: Path, dest: Path, after: int) -> None:
    with pytest.raises(Stop):
        convert(source, dest, rank=4, progress=stop_after(after))
    assert (dest / JOURNAL).exists()
