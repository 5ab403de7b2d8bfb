"""How much memory a conversion may hold: the plan's side (what is predicted) of what `engine.buffers` enforces.

The peak is that of the process: what it holds before work starts (interpreter, numpy, the core), the bytes in flight
between the reader and the writer, and the workspaces of the splits that run at once. The bytes in flight come from a
ring as large as the budget, all of which a model that is larger than it passes through, so the peak can be computed
instead of guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pissa_convert.errors import RequestError

CHUNK = 8 << 20
"""Bytes that a pass-through range is read and written by."""

_RUNTIME = 40 << 20
"""Thread stacks, staging, journal and manifest: measured 15 to 35 MiB above the resident set at planning."""

_SLACK = 192 << 20
"""Room beside two of the largest tensors, so that small ones flow past a large one that is being written."""


@dataclass(frozen=True)
class MemoryPlan:
    """How much work is in flight.

    Attributes:
        budget: bytes between the reader and the writer, at most.
        peak: predicted resident peak of the whole process, in bytes.
        lanes: tensors that are transformed at the same time.
    """

    budget: int
    peak: int
    lanes: int


def chunks(begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Cut a byte range at the multiples of `CHUNK`: all pieces but the first begin aligned, as direct writing asks."""
    while begin < end:
        stop = min(begin - begin % CHUNK + CHUNK, end)
        yield begin, stop
        begin = stop


def plan_memory(
    flights: Iterable[int], workspace: Callable[[int], int], threads: int, max_memory: int | None
) -> MemoryPlan:
    """Choose the number of lanes and the budget for bytes in flight, and predict the peak.

    One thread per tensor does more work than several on one: they need not wait for one another. So there are as many
    lanes as threads where the budget holds the largest tensor for each of them and once more (for what is read or
    written meanwhile), otherwise a half, a quarter, …, of that.

    Args:
        flights: bytes of each buffer that the work takes.
        workspace: bytes that so many transforms at once need beside their buffers, at most.
        threads: that compute.
        max_memory: the peak asked for, or None for the default (two of the largest and some room, within what
            the machine or its cgroup has left).

    Raises:
        RequestError: not even one buffer at a time fits; the message says how much would.
    """
    flights = list(flights)
    largest = max(flights, default=0)
    resident, available = resident_bytes() + _RUNTIME, available_bytes()
    lanes = threads
    while True:
        fixed = resident + workspace(lanes)
        if max_memory is not None:
            budget = max_memory - fixed
        else:
            budget = 2 * largest + _SLACK
            if available is not None:
                budget = min(budget, int(0.9 * available) - _RUNTIME - workspace(lanes))
        if lanes == 1 or budget >= (lanes + 1) * largest:
            break
        lanes //= 2
    if budget < largest:
        limit = "available" if max_memory is None else "--max-memory"
        raise RequestError(
            f"{limit} memory is too small for the largest tensor",
            expected=f"at least {fixed + largest} bytes",
            found=f"{budget + fixed}",
            # The resident set before work differs a little from run to run.
            fix=f"give --max-memory {(fixed + largest) // (1 << 20) + 8}MiB or more",
        )
    return MemoryPlan(budget, fixed + min(budget, sum(flights)), lanes)


def resident_bytes() -> int:
    """Resident set of this process now (Linux; 64 MiB where it cannot be read)."""
    try:
        return _status_bytes("VmRSS")
    except (OSError, StopIteration):
        return 64 << 20


def peak_resident_bytes() -> int | None:
    """Largest resident set this process has had (Linux; None where it cannot be read)."""
    try:
        return _status_bytes("VmHWM")
    except (OSError, StopIteration):
        return None


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def available_bytes() -> int | None:
    """Memory that can still be taken: the machine's or, where it is less, what the cgroup leaves (None if unknown).

    In a container /proc/meminfo shows the host's memory, and it is the cgroup's limit that kills.
    """
    bounds = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        bounds.append(int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024)
    except (OSError, StopIteration):
        pass
    bounds += _cgroup_bounds()
    return min(bounds, default=None)


def _cgroup_bounds(proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """What each enclosing cgroup (version 2, or 1's memory controller) leaves."""
    bounds = []
    try:
        lines = proc.read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top = root / controllers if controllers else root
        limit, used = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        )
        folder = top / path.lstrip("/")
        while folder == top or top in folder.parents:
            try:
                text = (folder / limit).read_text().strip()
                # Page cache counts as usage but is given back on demand.
                cache = _inactive_file(folder)
                if text != "max" and int(text) < 1 << 60:
                    bounds.append(max(0, int(text) - int((folder / used).read_text()) + cache))
            except (OSError, ValueError):
                pass
            folder = folder.parent
    return bounds


def _inactive_file(folder: Path) -> int:
    lines = (folder / "memory.stat").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
