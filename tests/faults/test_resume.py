"""What an interrupted run leaves is continued where that is proved, else redone, and refused if it is another's."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoints import digests, raw_header, small_model, write_model
from interrupting import JOURNAL, interrupt

from pissa_convert import api, convert
from pissa_convert.engine.run import run
from pissa_convert.engine.workers import InProcess
from pissa_convert.errors import ConversionError, PissaError, RequestError
from pissa_convert.linalg.native import NativeBackend
from pissa_convert.memory import footprint
from pissa_convert.plans.steps import flights


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


def test_the_journal_is_not_trusted_when_it_is_forged(source: Path, expected: dict[str, str], tmp_path: Path) -> None:
    """Lines that prove themselves but claim what the files do not hold."""
    from pissa_convert.engine.journal import Journal

    interrupt(source, tmp_path / "out", 6)
    with Journal(tmp_path / "out") as journal:
        for file in sorted(source.glob("*.safetensors")):
            journal.append({"committed": file.name, "digest": "0" * 64, "source_digest": "0" * 64})
    try:
        convert(source, tmp_path / "out", rank=4)
    except PissaError:
        pytest.fail("a forged claim must be redone")
    assert digests(tmp_path / "out") == expected


def test_a_source_that_was_changed_behind_what_is_kept_is_noticed(tmp_path: Path) -> None:
    source = write_model(tmp_path / "in", small_model())
    interrupt(source, tmp_path / "out", 8)
    file = source / "model.safetensors"
    status = file.stat()
    data = bytearray(file.read_bytes())
    data[len(raw_header(file)) + 100] ^= 1  # in the first tensor, whose result is kept
    file.write_bytes(data)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(ConversionError, match="changed since the interrupted run"):
        convert(source, tmp_path / "out", rank=4)
    convert(source, tmp_path / "out", rank=4, overwrite=True)
    convert(source, tmp_path / "fresh", rank=4)
    assert digests(tmp_path / "out") == digests(tmp_path / "fresh")


def test_what_is_kept_may_be_larger_than_the_memory_in_flight(tmp_path: Path) -> None:
    source = write_model(tmp_path / "in", small_model(layers=6))
    interrupt(source, tmp_path / "out", 20)
    plan = api.plan(source, tmp_path / "out", rank=4)
    tight = replace(plan.memory, budget=max(map(footprint, flights(plan.shards))))
    kept = (tmp_path / "out" / JOURNAL).read_bytes().count(b'"step"')
    assert sum(step.end - step.begin for step in list(plan.splits)[:kept]) > tight.budget
    report = run(replace(plan, memory=tight), InProcess(NativeBackend(1)))
    assert report.resumed
    convert(source, tmp_path / "fresh", rank=4)
    assert digests(tmp_path / "out") == digests(tmp_path / "fresh")
