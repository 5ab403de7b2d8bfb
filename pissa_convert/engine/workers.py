"""Who works on the shards of a plan: the lanes of this process here, the tasks of a cluster in `cluster.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from pissa_convert.engine.files import PartialFile
from pissa_convert.engine.lanes import MakeTransform
from pissa_convert.engine.ledger import Ledger
from pissa_convert.engine.pipeline import run_pipeline
from pissa_convert.engine.recovery import reopen
from pissa_convert.engine.work import ModelPlan, Shard
from pissa_convert.engine.writer import Sink
from pissa_convert.linalg import Backend

MakeLanes = Callable[[Any, Backend], AbstractContextManager[MakeTransform]]
"""From a target's plan and a backend to what makes lanes; a function of a module, so that other processes know it by
name."""


class Workers(Protocol):
    """Those who make what is left of a plan's shards."""

    def work(self, plan: ModelPlan, make_lanes: MakeLanes, remaining: Sequence[Shard], ledger: Ledger) -> None:
        """Make the shards and tell the ledger; they are committed when this returns.

        Raises:
            PissaError: from whichever fails first.
        """

    @property
    def warnings(self) -> Sequence[str]:
        """What the user should know of the work so far."""


@dataclass(frozen=True)
class InProcess:
    """This process, one shard after the other, with a backend's threads."""

    backend: Backend

    @property
    def warnings(self) -> Sequence[str]:
        """See `Workers.warnings`."""
        return self.backend.warnings

    def work(self, plan: ModelPlan, make_lanes: MakeLanes, remaining: Sequence[Shard], ledger: Ledger) -> None:
        """See `Workers.work`."""
        with open_beside(plan) as beside, make_lanes(plan, self.backend) as make:

            def shard_written(shard: Shard, source_digest: str, file: PartialFile) -> None:
                if beside is not None:
                    beside.sync()  # A and B of this shard must not be behind its residual
                ledger.commit(shard.plan, shard.digest.hexdigest(), source_digest, file.commit)
                ledger.advance(len(shard.plan.source.header))

            sink = Sink(beside, ledger.step_done, shard_written, ledger.advance)
            run_pipeline(remaining, plan.dest, make, plan.memory, sink, ledger.timings, self.backend.pinned)


@contextmanager
def open_beside(plan: ModelPlan) -> Iterator[PartialFile | None]:
    """The file beside the shards, under its partial name; None where a plan has none."""
    if plan.beside is None:
        yield None
        return
    path = plan.dest / plan.beside.name
    reopen(path)
    with PartialFile(path, plan.beside.size) as file:
        yield file
