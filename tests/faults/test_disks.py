"""Disks that are full, fail, or take no direct writes."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import digests, llm_like, write_model

from pissa_convert import convert
from pissa_convert.engine import files
from pissa_convert.engine.files import PartialFile, write_file
from pissa_convert.errors import ConversionError, RequestError

LARGE = {f"model.layers.{n}.mlp.up_proj.weight": llm_like(700, 500, n) for n in range(2)}
"""Weights of 1.4 MB: large enough to go to the disk directly."""


def test_a_disk_that_is_too_small_is_refused_before_work(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.statvfs

    def small(path: Any) -> Any:
        return type("Disk", (), {"f_bavail": 3, "f_frsize": real(path).f_frsize})

    monkeypatch.setattr(os, "statvfs", small)
    with pytest.raises(RequestError, match=r"disk is too small.*bytes free"):
        convert(source, tmp_path / "out", rank=4)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("call", ["pwrite", "fsync", "posix_fallocate"])
def test_a_disk_that_fails_in_the_middle_loses_nothing(
    source: Path, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    real = getattr(os, call)
    for good in (2, 5, 9):
        dest, calls = tmp_path / str(good), [0]

        def failing(*arguments: Any, calls: list[int] = calls, good: int = good) -> Any:
            calls[0] += 1
            if calls[0] > good:
                raise OSError(code, os.strerror(code))
            return real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing)
            with pytest.raises(ConversionError, match="same command again"):
                convert(source, dest, rank=4)
        assert not (dest / "config.json").exists()
        for shard in dest.glob("*.safetensors"):
            assert digests(dest)[shard.name] == expected[shard.name]
        convert(source, dest, rank=4)
        assert digests(dest) == expected


def is_direct(descriptor: int) -> bool:
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("good", [0, 1])
def test_a_direct_write_that_fails_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, good: int
) -> None:
    source = write_model(tmp_path / "in", LARGE, 2)
    real, calls = os.pwrite, [0]

    def failing(descriptor: int, *arguments: Any) -> int:
        calls[0] += is_direct(descriptor)
        if is_direct(descriptor) and calls[0] > good:
            raise OSError(code, os.strerror(code))
        return real(descriptor, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", failing)
        with pytest.raises(ConversionError, match="same command again"):
            convert(source, tmp_path / "out", rank=4)
    assert calls[0] == good + 1
    assert not (tmp_path / "out" / "config.json").exists()
    convert(source, tmp_path / "out", rank=4)
    convert(source, tmp_path / "fresh", rank=4)
    assert digests(tmp_path / "out") == digests(tmp_path / "fresh")


@pytest.mark.parametrize("refusal", ["open", "write", "short write"])
def test_a_file_system_without_direct_writes_gets_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: str
) -> None:
    source = write_model(tmp_path / "in", LARGE, 2)
    convert(source, tmp_path / "direct", rank=4)
    real_open, real_pwrite, refused = os.open, os.pwrite, [0]

    def opening(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        if refusal == "open" and flags & os.O_DIRECT and not flags & os.O_DIRECTORY:
            refused[0] += 1
            raise OSError(errno.EINVAL, "no O_DIRECT here")
        return real_open(path, flags, *arguments, **options)

    def writing(descriptor: int, data: Any, offset: int) -> int:
        if refusal != "open" and is_direct(descriptor):
            refused[0] += 1
            if refusal == "write":
                raise OSError(errno.EINVAL, "unaligned")
            return real_pwrite(descriptor, bytes(data[:4096]), offset) if refused[0] % 2 else 0
        return real_pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "open", opening)
    monkeypatch.setattr(os, "pwrite", writing)
    convert(source, tmp_path / "cached", rank=4)
    assert refused[0] > 0
    assert digests(tmp_path / "cached") == digests(tmp_path / "direct")


def cached_bytes(path: Path) -> int:
    """How much of a file lies in the page cache, in whole pages, without touching any."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        view = np.frombuffer(mapped, np.uint8)
        pages = np.zeros(-(-len(view) // mmap.PAGESIZE), np.uint8)
        address, length = ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(len(view))
        assert ctypes.CDLL(None).mincore(address, length, ctypes.c_void_p(pages.ctypes.data)) == 0
        del view
    return mmap.PAGESIZE * int((pages & 1).sum())


@pytest.mark.parametrize("is_direct", [True, False])
def test_what_is_written_does_not_fill_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_direct: bool
) -> None:
    probe = tmp_path / "probe"
    write_file(probe, bytes(16 << 20))
    if cached_bytes(probe) > 4 << 20:
        pytest.skip("this file system keeps its files in memory")
    source = write_model(tmp_path / "in", {"x.0.mlp.up_proj.weight": llm_like(64, 64).repeat(32, 32)})
    monkeypatch.setattr(files, "_WINDOW", 1 << 20)
    if not is_direct:
        monkeypatch.setattr(PartialFile, "_open_direct", lambda file: None)
    before: dict[str, int] = {}
    real = PartialFile.commit

    def committing(file: PartialFile) -> None:
        before[file.path.name] = cached_bytes(file.partial)
        real(file)

    monkeypatch.setattr(PartialFile, "commit", committing)
    convert(source, tmp_path / "out", rank=4)
    shard = tmp_path / "out" / "model.safetensors"
    assert shard.stat().st_size > 16 << 20
    # The kernel may keep a few pages that it was about to put on its lists.
    assert before[shard.name] < 6 << 20
    assert cached_bytes(shard) < 4 << 20


@pytest.mark.parametrize("at", [0, 300, -1])
def test_an_adapter_that_the_disk_has_not_kept_is_noticed(
    source: Path, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    real = PartialFile.write
    wrong = [True]

    def writing(file: PartialFile, data: Any, offset: int) -> None:
        data = bytearray(data)
        if wrong[0] and "adapter_model" in file.path.name and offset:
            wrong[0] = False
            data[at] ^= 1
        real(file, data, offset)

    monkeypatch.setattr(PartialFile, "write", writing)
    with pytest.raises(ConversionError, match=r"adapter_model.*reads back differently.*same command again"):
        convert(source, tmp_path / "out", rank=4)
    assert not (tmp_path / "out" / "config.json").exists()
    convert(source, tmp_path / "out", rank=4)
    assert digests(tmp_path / "out") == expected


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("mounting is not permitted here; full disks are injected in the tests above")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_real_disk_that_is_too_small_is_refused_and_one_that_fills_up_is_survived(
    small_disk: Path, tmp_path: Path
) -> None:
    source = write_model(tmp_path / "in", LARGE, 2)
    convert(source, tmp_path / "fresh", rank=4)
    filler, dest = small_disk / "filler", small_disk / "out"
    filler.write_bytes(bytes(15 << 20))
    with pytest.raises(RequestError, match="disk is too small"):
        convert(source, dest, rank=4)
    assert not dest.exists()
    filler.unlink()

    def fill(done: int, total: int, timings: object) -> None:
        if not filler.exists():
            with filler.open("wb", buffering=0) as file, suppress(OSError):
                while True:
                    file.write(bytes(1 << 16))

    with pytest.raises(ConversionError, match="make room"):
        convert(source, dest, rank=4, progress=fill)
    assert not (dest / "config.json").exists()
    filler.unlink()
    assert convert(source, dest, rank=4).resumed
    assert digests(dest) == digests(tmp_path / "fresh")
