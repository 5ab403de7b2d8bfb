"""Reader → lanes → writer, each in threads of its own, over the shards in order.

The reader fills buffers; each lane transforms one tensor at a time; the writer, in the calling thread, appends results
in the order of their offsets. So every file is read and written front to back, its digest needs no second reading,
and what is done of it is a prefix. Source and output are hashed beside that, each in a thread of its own: SHA-256 is
slower than a good disk.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from pathlib import Path

from pissa_convert.engine.buffers import Buffers
from pissa_convert.engine.hashing import HashThread
from pissa_convert.engine.lanes import Lanes
from pissa_convert.engine.reader import Reader
from pissa_convert.engine.work import Item, Shard, Transform
from pissa_convert.engine.writer import Sink, Writer
from pissa_convert.report import Timings


def run_pipeline(
    shards: Sequence[Shard], dest: Path, transforms: Sequence[Transform], budget: int, sink: Sink, timings: Timings
) -> None:
    """Convert `shards` one after the other into `dest`.

    Args:
        shards: what is left to do.
        dest: folder of the output shards.
        transforms: one for each tensor that is worked on at the same time; they share no state.
        budget: bytes in flight at most.
        sink: is told what is done.
        timings: grow as the work goes on.

    Raises:
        PissaError: from whichever stage failed first.
        KeyboardInterrupt: passed on once the other stages have stopped.
    """
    buffers = Buffers(budget)
    items: queue.Queue[Item] = queue.Queue()  # its length is bounded by the budget for what it holds
    with (
        HashThread("hash-source") as source_hash,
        HashThread("hash-output") as output_hash,
        Lanes(transforms, timings) as lanes,
    ):
        reader = Reader(buffers, source_hash, lanes, items, timings)
        thread = threading.Thread(target=reader.read_all, args=(shards,), name="reader")
        thread.start()
        try:
            Writer(dest, buffers, output_hash, sink, timings).write_all(items)
        finally:
            buffers.cancel()
            lanes.cancel()
            thread.join()
