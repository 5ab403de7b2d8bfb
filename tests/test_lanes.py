"""Tensors in flight: how many threads each gets, in which order they begin, and that none of it changes a byte."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from blake3 import blake3
from checkpoints import digests, llm_like, write_model

from pissa_convert import api, memory
from pissa_convert.engine.buffers import Buffers, Cancelled
from pissa_convert.engine.hashing import Hashing
from pissa_convert.engine.lanes import Lanes
from pissa_convert.engine.run import run
from pissa_convert.engine.workers import InProcess
from pissa_convert.errors import RequestError
from pissa_convert.linalg.native import NativeBackend
from pissa_convert.memory import Widths, footprint, plan_memory
from pissa_convert.plans.steps import Change, Stats
from pissa_convert.report import Timings

GIB, MIB = 1 << 30, 1 << 20


def test_small_tensors_get_a_thread_each_and_large_ones_all() -> None:
    widths = Widths(threads=8, narrowest=1, room=900)
    assert [widths(nbytes) for nbytes in (1, 100, 101, 180, 181, 300, 301, 1000)] == [1, 1, 2, 2, 4, 4, 8, 8]
    assert Widths(6, 1, 100)(100) == 6
    assert Widths(8, 4, 900)(1) == 4


def test_workspaces_of_every_width_are_counted_as_many_times_as_there_are_lanes() -> None:
    widths = Widths(threads=4, narrowest=1, room=500)
    works: list[tuple[int, Callable[[int], int]]] = [(100, lambda width: 10 * width), (400, lambda width: 7 * width)]
    assert widths(100) == 1
    assert widths(400) == 4
    assert widths.total(works) == 4 * 10 + 1 * 28
    assert widths.total([*works, (50, lambda width: 11)]) == 4 * 11 + 28


def test_what_is_held_in_passing_is_counted_as_often_as_there_is_room_for_at_once() -> None:
    widths = Widths(threads=4, narrowest=1, room=500)
    assert widths.passing([(100, 10), (400, 28)]) == 4 * 10
    assert widths.passing([(100, 10), (400, 41)]) == 41
    assert widths.passing([]) == 0


def test_with_little_memory_fewer_lanes_are_planned_before_a_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "resident_bytes", lambda: 100 * MIB)

    def workspace(widths: Widths) -> int:
        return widths.total([(50 * MIB, lambda width: 100 * MIB)])

    flights = [50 * MIB] * 8
    ample = plan_memory(flights, workspace, 8, 2 * GIB)
    assert ample.widths(50 * MIB) == 1
    assert ample.peak <= 2 * GIB
    resident = ample.peak - sum(map(footprint, flights)) - 8 * 100 * MIB
    tight = plan_memory(flights, workspace, 8, resident + 160 * MIB)  # of which one lane takes 100
    assert tight.widths(50 * MIB) == 8
    assert tight.budget >= footprint(50 * MIB)
    assert tight.peak <= resident + 160 * MIB
    with pytest.raises(RequestError, match="too small"):
        plan_memory(flights, workspace, 8, resident + 140 * MIB)


class Work:
    """Steps whose transforms record when they run and with how many threads."""

    def __init__(self, threads: int, room: int, seconds: Callable[[int], float]) -> None:
        self.lock = threading.Lock()
        self.begun: list[int] = []
        self.busy = self.most = 0
        self.made: list[int] = []
        self.seconds = seconds
        self.buffers = Buffers(GIB)
        self.widths = Widths(threads, 1, room)

    def make(self, width: int) -> Callable[[Any, Path, memoryview], Stats]:
        self.made.append(width)
        running = threading.Lock()

        def transform(step: Any, path: Path, view: memoryview) -> Stats:
            assert running.acquire(blocking=False), "a transform is used twice at once"
            with self.lock:
                self.begun.append(step.number)
                self.busy += width
                self.most = max(self.most, self.busy)
            time.sleep(self.seconds(step.number))
            with self.lock:
                self.busy -= width
            running.release()
            return cast(Stats, SimpleNamespace(width=width))

        return transform

    def submit_all(self, lanes: Lanes, hashing: Hashing, sizes: list[int]) -> list[Future[Stats]]:
        futures = []
        for number, nbytes in enumerate(sizes):
            ticket = hashing.source.feed(blake3(), memoryview(b"bytes"))
            step = cast(Change, SimpleNamespace(nbytes=nbytes, number=number))
            futures.append(lanes.submit(step, Path(), self.buffers.take(nbytes), ticket))
        return futures


def test_steps_begin_in_order_and_never_with_more_threads_than_there_are() -> None:
    sizes = [10, 10, 300, 10, 10, 10, 150, 10, 300, 300, 10, 10]
    work, timings = Work(4, 500, lambda number: 0.003 * (1 + number % 3)), Timings()
    with Hashing() as hashing, Lanes(work.make, work.widths, timings) as lanes:
        widths = [future.result(10).width for future in work.submit_all(lanes, hashing, sizes)]  # type: ignore[attr-defined]
    assert widths == [work.widths(nbytes) for nbytes in sizes]
    assert set(widths) == {1, 2, 4}
    assert work.begun == list(range(len(sizes)))
    assert work.most == 4
    assert len(work.made) <= 4 + 2 + 1
    assert timings.compute_seconds > 0


def test_given_up_work_wakes_what_waits_for_its_turn() -> None:
    hold = threading.Event()
    work = Work(2, 500, lambda number: float(not hold.wait(10)))
    with Hashing() as hashing, Lanes(work.make, work.widths, Timings()) as lanes:
        futures = work.submit_all(lanes, hashing, [10, 400, 10])
        while not work.begun:
            time.sleep(0.001)
        lanes.cancel()
        with pytest.raises(Cancelled):
            futures[1].result(10)
        hold.set()
    assert work.begun == [0]


def test_lanes_and_threads_change_no_byte_of_a_split(tmp_path: Path) -> None:
    tensors = {f"x.{n}.mlp.up_proj.weight": llm_like(90 + n, 70, n) for n in range(5)}
    tensors["x.5.mlp.down_proj.weight"] = llm_like(300, 290, 5)
    source = write_model(tmp_path / "in", tensors)
    found = []
    for threads, room in ((1, GIB), (2, GIB), (3, 1_500_000), (4, 100_000), (4, 0)):
        dest = tmp_path / f"{threads}-{room}"
        plan = api.plan(source, dest, rank=4, threads=threads)
        widths = replace(plan.memory.widths, room=room)
        run(replace(plan, memory=replace(plan.memory, widths=widths)), InProcess(NativeBackend(threads)))
        used = {widths(step.nbytes) for step in plan.splits}
        found.append((len(used), max(used), digests(dest)))
    assert {counts[:2] for counts in found} >= {(1, 1), (1, 4), (2, 4)}
    assert all(result == found[0][2] for _, _, result in found)
