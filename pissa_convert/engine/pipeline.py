"""Reader → lanes → writer, each in threads of its own, over the shards in order.

The reader fills buffers; each lane transforms one tensor at a time; the writer, in the calling thread, appends results
in the order of their offsets. So every file is read and written front to back, its digest needs no second reading,
and what is done of it is a prefix. Source and output are hashed beside that: a digest is no faster than a good disk.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from pissa_convert.engine.buffers import Buffers
from pissa_convert.engine.hashing import Hashing
from pissa_convert.engine.lanes import Lanes, MakeTransform
from pissa_convert.engine.reader import Reader
from pissa_convert.engine.work import Item, Shard
from pissa_convert.engine.writer import Sink, Writer
from pissa_convert.memory import MemoryPlan
from pissa_convert.report import Timings

Pin = Callable[[memoryview], AbstractContextManager[None]]


def run_pipeline(
    shards: Sequence[Shard],
    dest: Path,
    make: MakeTransform,
    memory: MemoryPlan,
    sink: Sink,
    timings: Timings,
    pin: Pin,
) -> None:
    """Convert `shards` one after the other into `dest`.

    Args:
        shards: what is left to do.
        dest: folder of the output shards.
        make: the transform of a lane.
        memory: bytes in flight at most, and the threads of each tensor.
        sink: is told what is done.
        timings: grow as the work goes on.
        pin: holds the memory of the buffers meanwhile: see `Backend.pinned`.

    Raises:
        PissaError: from whichever stage failed first.
        KeyboardInterrupt: passed on once the other stages have stopped.
    """
    buffers = Buffers(memory.budget)
    items: queue.Queue[Item] = queue.Queue()  # its length is bounded by the budget for what it holds
    with pin(buffers.memory), Hashing() as hashing, Lanes(make, memory.widths, timings) as lanes:
        reader = Reader(buffers, hashing, lanes, items, timings)
        thread = threading.Thread(target=reader.read_all, args=(shards,), name="reader")
        thread.start()
        try:
            Writer(dest, buffers, hashing, sink, timings).write_all(items)
        finally:
            buffers.cancel()
            lanes.cancel()
            hashing.cancel()
            thread.join()
