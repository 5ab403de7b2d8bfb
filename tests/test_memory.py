"""What memory the plan takes: within the cgroup's limit, not the machine's."""

from __future__ import annotations

from pathlib import Path

import pytest

from pissa_convert import memory
from pissa_convert.errors import RequestError

MIB = 1 << 20


def cgroup(tmp_path: Path, version: int, limit: str, used: int, cache: int) -> tuple[Path, Path]:
    """/proc/self/cgroup and /sys/fs/cgroup as a container with a limit has them."""
    proc, root = tmp_path / "cgroup", tmp_path / "root"
    prefix, names = ("0:", ("memory.max", "memory.current"))
    folder = root / "pod" / "run"
    if version == 1:
        prefix, names = ("4:memory", ("memory.limit_in_bytes", "memory.usage_in_bytes"))
        folder = root / "memory" / "pod" / "run"
    folder.mkdir(parents=True)
    proc.write_text(f"12:cpu,cpuacct:/other\n{prefix}:/pod/run\n")
    for name, value in zip(names, (limit, used), strict=True):
        (folder.parent / name).write_text(f"{value}\n")  # the limit is the enclosing group's
    (folder.parent / "memory.stat").write_text(f"anon 5\ninactive_file {cache}\n")
    return proc, root


@pytest.mark.parametrize("version", [1, 2])
def test_what_a_cgroup_leaves_is_its_limit_without_what_is_used_but_page_cache_can_go(
    tmp_path: Path, version: int
) -> None:
    proc, root = cgroup(tmp_path, version, str(1000 * MIB), used=400 * MIB, cache=150 * MIB)
    assert memory._cgroup_bounds(proc, root) == [750 * MIB]


@pytest.mark.parametrize(("version", "limit"), [(2, "max"), (1, str(2**63 - 4096))])
def test_a_cgroup_without_a_limit_does_not_bound(tmp_path: Path, version: int, limit: str) -> None:
    proc, root = cgroup(tmp_path, version, limit, used=0, cache=0)
    assert memory._cgroup_bounds(proc, root) == []


def test_the_default_budget_stays_within_what_the_cgroup_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    flights = [150 * MIB] * 4
    free = memory.plan_memory(flights, lambda widths: 0, 1, None)
    monkeypatch.setattr(memory, "_cgroup_bounds", lambda: [350 * MIB])
    bounded = memory.plan_memory(flights, lambda widths: 0, 1, None)
    assert free.budget == 2 * memory.footprint(150 * MIB) + memory._SLACK
    assert 150 * MIB <= bounded.budget < 350 * MIB < free.budget
    assert bounded.peak < free.peak
    monkeypatch.setattr(memory, "_cgroup_bounds", lambda: [100 * MIB])
    with pytest.raises(RequestError, match="available memory is too small"):
        memory.plan_memory(flights, lambda widths: 0, 1, None)


def test_pieces_cover_a_range_and_all_but_the_first_are_aligned() -> None:
    for begin, end in ((0, 0), (0, 1), (5, 7), (memory.CHUNK - 1, 3 * memory.CHUNK + 5), (8, memory.CHUNK)):
        pieces = list(memory.chunks(begin, end))
        assert [begin, *(stop for _, stop in pieces)] == [*(start for start, _ in pieces), end]
        assert all(start % 4096 == 0 for start, _ in pieces[1:])
        assert all(stop - start <= memory.CHUNK for start, stop in pieces)
