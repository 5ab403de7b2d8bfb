"""Killed, interrupted, damaged, full: the same command continues, and the result is the same bytes."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import digests, llm_like, raw_header, small_model, write_model

from pissa_convert import convert
from pissa_convert.engine.workers import InProcess
from pissa_convert.errors import ConversionError, PissaError, RequestError
from pissa_convert.linalg.native import NativeBackend

COMMAND = str(Path(sys.executable).with_name("pissa-convert"))
DYING = str(Path(__file__).with_name("dying.py"))
JOURNAL = ".pissa-convert.journal"
OPTIONS = ["--to", "pissa", "--rank", "4"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards, and files beside them."""
    folder = write_model(tmp_path_factory.mktemp("source") / "in", small_model(layers=4), 3)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def expected(source: Path) -> dict[str, str]:
    """What an uninterrupted run gives."""
    dest = source.parent / "uninterrupted"
    convert(source, dest, rank=4)
    return digests(dest)


def finish(source: Path, dest: Path, *options: str) -> None:
    subprocess.run([COMMAND, str(source), str(dest), *OPTIONS, "--quiet", *options], check=True, capture_output=True)


def assert_does_not_load(dest: Path) -> None:
    assert not ((dest / "config.json").exists() and not (dest / "model.safetensors.index.json").exists())
    assert (
        not (dest / "pissa_convert.json").exists() or not (dest / JOURNAL).exists() or (dest / "config.json").exists()
    )


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
    dice = random.Random(0)
    landed, attempt = 0, 0
    while landed < kills:
        attempt += 1
        dest = tmp_path / str(attempt)
        while True:
            process = subprocess.Popen(
                [COMMAND, str(smol), str(dest), "--to", "pissa", "--quiet"], stderr=subprocess.PIPE
            )
            time.sleep(dice.uniform(0.05, 3.0))
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


def test_committed_work_is_not_read_again(source: Path, expected: dict[str, str], tmp_path: Path) -> None:
    total = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    read = []
    for after in range(1, 25, 4):
        dest = tmp_path / str(after)
        interrupt(source, dest, after)
        committed = sum(file.stat().st_size for file in dest.glob("*.safetensors"))
        report = convert(source, dest, rank=4)
        assert report.resumed
        assert report.timings.source_bytes == total - committed
        read.append(report.timings.source_bytes)
        assert digests(dest) == expected
    assert read == sorted(read, reverse=True)
    assert read[-1] < read[0] == total


@pytest.mark.parametrize("where", ["partial", "finished", "adapter", "journal", "header"])
def test_a_flipped_byte_in_what_is_left_is_found_and_redone(
    source: Path, expected: dict[str, str], tmp_path: Path, where: str
) -> None:
    for after in (4, 12, 20):
        dest = tmp_path / str(after)
        interrupt(source, dest, after)
        finished = sorted(dest.glob("*.safetensors"))
        partial = sorted(dest.glob("*.safetensors.partial"))
        file = {
            "partial": (partial or finished)[0],
            "header": (partial or finished)[0],
            "finished": (finished or partial)[0],
            "adapter": dest / "pissa_init" / "adapter_model.safetensors.partial",
            "journal": dest / JOURNAL,
        }[where]
        data = bytearray(file.read_bytes())
        position = {"header": 20, "journal": len(data) * 2 // 3}.get(where, 1500)
        data[position] ^= 0x10
        file.write_bytes(data)
        convert(source, dest, rank=4)
        assert digests(dest) == expected


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"rank": 5}, "--rank"),
        ({"seed": 1}, "--seed"),
        ({"alpha": 3}, "--alpha"),
        ({"rslora": True}, "--rslora"),
        ({"adapter_dtype": "float16"}, "--adapter-dtype"),
        ({"exclude_modules": ["k_proj"]}, "--exclude-modules"),
    ],
)
def test_other_options_do_not_continue_a_run(source: Path, tmp_path: Path, options: dict[str, Any], named: str) -> None:
    interrupt(source, tmp_path / "out", 8)
    before = digests(tmp_path / "out")
    with pytest.raises(RequestError, match=named):
        convert(source, tmp_path / "out", **({"rank": 4} | options))
    assert digests(tmp_path / "out") == before


def test_another_version_does_not_continue_a_run(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(source, tmp_path / "out", 8)
    monkeypatch.setattr("pissa_convert.formats.manifest.__version__", "9.9")
    with pytest.raises(RequestError, match="version"):
        convert(source, tmp_path / "out", rank=4)


def test_another_source_does_not_continue_a_run_but_can_replace_it(tmp_path: Path) -> None:
    source = write_model(tmp_path / "in", small_model(), 2)
    interrupt(source, tmp_path / "out", 8)
    file = sorted(source.glob("*.safetensors"))[1]
    os.utime(file, ns=(0, 0))
    with pytest.raises(RequestError, match=file.name):
        convert(source, tmp_path / "out", rank=4)
    convert(source, tmp_path / "out", rank=4, overwrite=True)
    convert(source, tmp_path / "fresh", rank=4)
    assert digests(tmp_path / "out") == digests(tmp_path / "fresh")


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
    from pissa_convert import api

    plan = api.plan(source, tmp_path / "out", rank=4)
    object.__setattr__(plan.memory, "budget", 40_000)
    with pytest.raises(ConversionError, match=victim.name):
        api.run(plan, InProcess(NativeBackend(1)), progress=progress)
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "SIGINT")])
def test_signals_stop_cleanly_and_say_how_to_continue(
    smol: Path, smol_pissa: Path, tmp_path: Path, number: int, name: str
) -> None:
    arguments = [COMMAND, str(smol), str(tmp_path / "out"), "--to", "pissa"]
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
    journal = tmp_path / "out" / JOURNAL
    while process.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") > 5):
        time.sleep(0.01)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
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


LARGE = {f"model.layers.{n}.mlp.up_proj.weight": llm_like(700, 500, n) for n in range(2)}
"""Weights of 1.4 MB: large enough to go to the disk directly."""


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


def test_the_journal_is_not_trusted_when_it_is_forged(source: Path, expected: dict[str, str], tmp_path: Path) -> None:
    """Lines that prove themselves but claim what the files do not hold."""
    from pissa_convert.engine.journal import Journal

    interrupt(source, tmp_path / "out", 6)
    with Journal(tmp_path / "out") as journal:
        for file in sorted(source.glob("*.safetensors")):
            journal.append({"committed": file.name, "sha256": "0" * 64, "source_sha256": "0" * 64})
    try:
        convert(source, tmp_path / "out", rank=4)
    except PissaError:
        pytest.fail("a forged claim must be redone")
    assert digests(tmp_path / "out") == expected


def test_memory_in_flight_never_exceeds_the_budget_and_no_buffer_overlaps_another() -> None:
    import threading

    from pissa_convert.engine.buffers import Buffers

    buffers, budget, page = Buffers(100 * 4096), 100, 4096
    held, peak, lock, broken = [0], [0], threading.Lock(), []

    def work(number: int, pages: int) -> None:
        dice = random.Random(number)
        for _ in range(50):
            size = dice.randint(1, pages)
            buffer = buffers.take(size * page - dice.randrange(page))
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


def test_the_report_counts_what_was_done(source: Path, tmp_path: Path) -> None:
    report = convert(source, tmp_path / "out", rank=4)
    manifest = json.loads((tmp_path / "out" / "pissa_convert.json").read_text())
    assert report.tensors == len(manifest["tensors"]) == 16
    timings = report.timings
    shards = sorted(source.glob("*.safetensors"))
    adapter = tmp_path / "out" / "pissa_init" / "adapter_model.safetensors"
    assert timings.source_bytes == sum(file.stat().st_size for file in shards)
    assert timings.written_bytes == sum(file.stat().st_size - len(raw_header(file)) for file in [*shards, adapter])
    busy = [timings.read_seconds, timings.compute_seconds, timings.write_seconds]
    assert all(0 < seconds < report.wall_seconds for seconds in busy)
    assert not report.resumed
    assert torch.tensor([report.relative_error]).isfinite()
