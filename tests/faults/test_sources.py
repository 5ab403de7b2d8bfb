"""A source that changes while it is read is noticed."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import raw_header, small_model, write_model

from pissa_convert import api, convert
from pissa_convert.engine import reader
from pissa_convert.engine.run import run
from pissa_convert.engine.workers import InProcess
from pissa_convert.errors import ConversionError
from pissa_convert.linalg.native import NativeBackend


@pytest.mark.parametrize("event", ["changes", "shrinks", "vanishes"])
def test_a_source_shard_that_changes_during_the_run_is_noticed(tmp_path: Path, event: str) -> None:
    source = write_model(tmp_path / "in", small_model(), 3)
    victim = sorted(source.glob("*.safetensors"))[2]

    def progress(done: int, total: int, timings: object) -> None:
        if not victim.exists() or done == 0:
            return
        if event == "changes":
            victim.write_bytes(victim.read_bytes())
        elif event == "shrinks":
            os.truncate(victim, 1000)
        else:
            victim.unlink()

    # The budget of one buffer keeps the reader from being past the last shard when the first bytes are done.
    plan = api.plan(source, tmp_path / "out", rank=4)
    tight = replace(plan, memory=replace(plan.memory, budget=40_000))
    with pytest.raises(ConversionError, match=victim.name):
        run(tight, InProcess(NativeBackend(1)), progress=progress)
    assert not (tmp_path / "out" / "config.json").exists()


def while_read(monkeypatch: pytest.MonkeyPatch, file: Path, happens: Callable[[], None]) -> None:
    """Let something happen to a file when some of its tensors have been read."""
    real, reads = reader.read_exactly, [0]

    def reading(descriptor: int, begin: int, view: memoryview, path: Path) -> None:
        real(descriptor, begin, view, path)
        reads[0] += path == file
        if path == file and reads[0] == 4:
            happens()

    monkeypatch.setattr(reader, "read_exactly", reading)


def test_a_source_that_is_written_to_and_gets_its_old_time_back_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_model(tmp_path / "in", small_model(), 3)
    file = sorted(source.glob("*.safetensors"))[1]

    def write() -> None:
        status = file.stat()
        with file.open("r+b") as opened:
            opened.seek(-1, os.SEEK_END)
            opened.write(b"\x01")
            opened.seek(len(raw_header(file)))
            opened.write(b"\x01")
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert file.stat().st_mtime_ns == status.st_mtime_ns

    while_read(monkeypatch, file, write)
    with pytest.raises(ConversionError, match=rf"{file.name}.*changed while it was read"):
        convert(source, tmp_path / "out", rank=4)
    assert not (tmp_path / "out" / "config.json").exists()
    assert not (tmp_path / "out" / file.name).exists()


def test_a_source_that_gets_other_permissions_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_model(tmp_path / "in", small_model(), 3)
    file = sorted(source.glob("*.safetensors"))[1]
    while_read(monkeypatch, file, lambda: file.chmod(0o600))
    convert(source, tmp_path / "out", rank=4)
    assert file.stat().st_mode & 0o777 == 0o600
