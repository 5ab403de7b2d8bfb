"""The command: help, plan, quiet, progress, report."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch
from adapters import SHAPES, factors, moved, tensors_of, write
from checkpoints import digests, small_model, write_model

from pissa_convert.cli import main

COMMAND = str(Path(sys.executable).with_name("pissa-convert"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_model(tmp_path / "in", small_model(), 2)


def test_help_answers_at_once() -> None:
    times = []
    for _ in range(3):
        started = time.perf_counter()
        run = subprocess.run([COMMAND, "--help"], capture_output=True, text=True, check=True)
        times.append(time.perf_counter() - started)
    assert min(times) < 0.3
    options = "rank alpha rslora target-modules exclude-modules adapter-dtype seed threads plan overwrite quiet"
    options += " init base tolerance uniform-rank dtype adapter verify source device max-vram"
    for option in (f"--{name}" for name in options.split()):
        assert option in run.stdout
    for target in ("pissa", "lora", "merged"):
        assert f"for --to {target}" in run.stdout


def test_plan_shows_every_decision_and_writes_nothing(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(source), str(tmp_path / "out"), "--to", "pissa", "--rank", "4", "--plan"]) == 0
    out = capsys.readouterr().out
    for name in small_model():
        assert name in out
    assert "split      8 of 12 tensors" in out
    assert "bytes at peak" in out
    assert not (tmp_path / "out").exists()


def test_without_a_terminal_there_is_no_progress_and_quiet_says_nothing(source: Path, tmp_path: Path) -> None:
    base = [COMMAND, str(source)]
    plain = subprocess.run(
        [*base, str(tmp_path / "a"), "--to", "pissa", "--rank", "4"], capture_output=True, check=True
    )
    assert b"%|" not in plain.stderr
    assert b"\r" not in plain.stderr
    assert plain.stdout == b""
    assert b"finished" in plain.stderr
    options = ["--to", "pissa", "--rank", "4", "--quiet"]
    quiet = subprocess.run([*base, str(tmp_path / "b"), *options], capture_output=True, check=True)
    assert quiet.stderr == quiet.stdout == b""


def test_on_a_terminal_progress_is_in_bytes(source: Path, tmp_path: Path) -> None:
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    subprocess.run(
        [COMMAND, str(source), str(tmp_path / "out"), "--to", "pissa", "--rank", "4"], stderr=child, check=True
    )
    os.close(child)
    shown = os.read(parent, 65536)
    os.close(parent)
    assert b"100%|" in shown
    assert b"B/s" in shown
    assert b"bound by" in shown


def test_log_json_holds_the_report(source: Path, tmp_path: Path) -> None:
    log = tmp_path / "log.json"
    assert (
        main([str(source), str(tmp_path / "out"), "--to", "pissa", "--rank", "4", "--quiet", "--log-json", str(log)])
        == 0
    )
    report = json.loads(log.read_text())
    assert report["tensors"] == 8
    assert report["timings"]["source_bytes"] == sum(file.stat().st_size for file in source.glob("*.safetensors"))
    assert report["bottleneck"] in ("read", "compute", "write", "hash")
    stages = ("read_seconds", "compute_seconds", "write_seconds", "hash_seconds")
    assert all(0 < report["timings"][stage] < report["wall_seconds"] for stage in stages)
    assert report["timings"]["written_bytes"] > report["timings"]["source_bytes"] / 2
    assert report["resumed"] is False


@pytest.mark.parametrize("to", ["lora", "merged"])
def test_log_json_of_the_other_targets_is_json(tmp_path: Path, to: str) -> None:
    start = factors(4)
    trained = write(tmp_path / "trained", tensors_of(moved(start)))
    source, options = trained, ["--init", str(write(tmp_path / "init", tensors_of(start)))]
    if to == "merged":
        weights = {f"{module}.weight": torch.zeros(shape) for module, shape in SHAPES.items()}
        source, options = write_model(tmp_path / "model", weights), ["--adapter", str(trained)]
    log = tmp_path / "log.json"
    arguments = [str(source), str(tmp_path / "out"), "--to", to, *options, "--quiet", "--log-json", str(log)]
    assert main(arguments) == 0
    report = json.loads(log.read_text(), parse_constant=pytest.fail)
    assert report["timings"]["written_bytes"] > 0
    assert report["bottleneck"] in ("read", "compute", "write", "hash")


def test_a_finished_folder_is_checked_and_left_alone(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(source), str(tmp_path / "out"), "--to", "pissa", "--rank", "4"]
    assert main(arguments) == 0
    before = digests(tmp_path / "out")
    assert main(arguments) == 0
    assert "complete already" in capsys.readouterr().err
    assert main([*arguments[:-1], "5"]) == 2
    assert "options" in capsys.readouterr().err
    assert digests(tmp_path / "out") == before


def test_a_finished_folder_with_a_flipped_bit_is_not_called_complete(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(source), str(tmp_path / "out"), "--to", "pissa", "--rank", "4"]
    assert main(arguments) == 0
    file = next((tmp_path / "out").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert main(arguments) == 2
    assert file.name in capsys.readouterr().err


def test_overwrite_replaces_a_conversion_and_nothing_else(source: Path, tmp_path: Path) -> None:
    dest = tmp_path / "out"
    assert main([str(source), str(dest), "--to", "pissa", "--rank", "4", "--quiet"]) == 0
    (dest / "notes.txt").write_text("mine")
    assert main([str(source), str(dest), "--to", "pissa", "--rank", "6", "--quiet", "--overwrite"]) == 0
    assert (dest / "notes.txt").read_text() == "mine"
    assert main([str(source), str(tmp_path / "fresh"), "--to", "pissa", "--rank", "6", "--quiet"]) == 0
    result = digests(dest)
    del result["notes.txt"]
    assert result == digests(tmp_path / "fresh")
