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

PAGE = 4096
"""Unit of the buffers in flight, and what direct writes align to."""

_RUNTIME = 16 << 20
"""Thread stacks, staging, journal and manifest."""

_SLACK = 64 << 20
"""Room beside the largest tensors, so that small ones flow past a large one that is being written."""


_ENOUGH = 1 << 30
"""Bytes up to which every thread gets a tensor of its own unasked."""


def footprint(nbytes: int) -> int:
    """Bytes that a buffer of `nbytes` takes up: whole pages, and one more to begin anywhere in the first."""
    return -(-nbytes // PAGE) * PAGE + PAGE


@dataclass(frozen=True)
class Widths:
    """How many threads a tensor gets.

    One thread per tensor does more work than several on one: they need not wait for one another. So a tensor gets as
    few as the room allows, which is to hold as many of its size as can then be worked on, and once more for what is
    read or written meanwhile.

    Attributes:
        threads: that compute.
        narrowest: that a tensor gets at least: `threads` halved some times.
        room: bytes for tensors in flight, about.
    """

    threads: int
    narrowest: int
    room: int

    def __call__(self, nbytes: int) -> int:
        """Threads for a tensor of so many bytes in flight."""
        width = self.narrowest
        while width < self.threads and (self.threads // width + 1) * nbytes > self.room:
            width = min(2 * width, self.threads)
        return width

    def total(self, works: Iterable[tuple[int, Callable[[int], int]]]) -> int:
        """Bytes of the workspaces, which stay with the lanes when others are at work.

        Args:
            works: of each tensor, its bytes in flight, and its workspace for a number of threads.
        """
        most: dict[int, int] = {}
        for nbytes, workspace in works:
            width = self(nbytes)
            most[width] = max(most.get(width, 0), workspace(width))
        return sum(self.threads // width * workspace for width, workspace in most.items())

    def passing(self, works: Iterable[tuple[int, int]]) -> int:
        """Bytes of what is held only while a tensor is worked on, at most at a time.

        Args:
            works: of each tensor, its bytes in flight, and those that it holds beside them.
        """
        return max((-(-self.threads * held // self(nbytes)) for nbytes, held in works), default=0)


@dataclass(frozen=True)
class MemoryPlan:
    """How much work is in flight.

    Attributes:
        budget: bytes between the reader and the writer, at most.
        peak: predicted resident peak of the whole process, in bytes.
        widths: threads of each tensor.
    """

    budget: int
    peak: int
    widths: Widths


def chunks(begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Cut a byte range at the multiples of `CHUNK`: all pieces but the first begin aligned, as direct writing asks."""
    while begin < end:
        stop = min(begin - begin % CHUNK + CHUNK, end)
        yield begin, stop
        begin = stop


def plan_memory(
    flights: Iterable[int], workspace: Callable[[Widths], int], threads: int, max_memory: int | None
) -> MemoryPlan:
    """Choose the threads of each tensor and the budget for bytes in flight, and predict the peak.

    Args:
        flights: bytes of each buffer that the work takes.
        workspace: bytes that transforms with so many threads need beside their buffers, at most.
        threads: that compute.
        max_memory: the peak asked for, or None for the default: two of the largest and some room, or where that is
            less than 1 GiB one for each thread; all within what the machine or its cgroup has left.

    Raises:
        RequestError: not even one buffer at a time fits; the message says how much would.
    """
    flights = [footprint(nbytes) for nbytes in flights]
    largest = max(flights, default=0)
    resident, available = resident_bytes() + _RUNTIME, available_bytes()
    useful = (threads + 1) * largest + _SLACK
    if max_memory is not None:
        limit, wanted = max_memory - resident, useful
    else:
        wanted = max(2 * largest + _SLACK, min(useful, _ENOUGH))
        limit = wanted if available is None else int(0.9 * available) - _RUNTIME
    narrowest = 1
    while True:
        widths = Widths(threads, narrowest, min(wanted, limit))
        needed = workspace(widths)
        budget = min(wanted, limit - needed)
        if budget >= largest or narrowest == threads:
            break
        narrowest = min(2 * narrowest, threads)
    fixed = resident + needed
    if budget < largest:
        source = "available" if max_memory is None else "--max-memory"
        raise RequestError(
            f"{source} memory is too small for the largest tensor",
            expected=f"at least {fixed + largest} bytes",
            found=f"{budget + fixed}",
            # The resident set before work differs a little from run to run.
            fix=f"give --max-memory {(fixed + largest) // (1 << 20) + 8}MiB or more",
        )
    return MemoryPlan(budget, fixed + min(budget, sum(flights)), widths)


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
