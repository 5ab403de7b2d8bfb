"""What is done of a plan: told by whoever works on its shards, written to the journal, shown as progress."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pissa_convert.engine.journal import Entry, Journal
from pissa_convert.engine.recovery import Progress
from pissa_convert.engine.work import ModelPlan, Shard
from pissa_convert.engine.writer import StepDone
from pissa_convert.errors import ConversionError
from pissa_convert.formats.manifest import FileRecord
from pissa_convert.plans.steps import Copy, ShardPlan
from pissa_convert.report import Timings

ProgressCallback = Callable[[int, int, Timings], None]
"""Called with the bytes of source that are done, the bytes in all, and the stages' timings so far."""


class Ledger:
    """Keeps the order of promises: a step's line after its bytes, a shard's line after its rename."""

    def __init__(
        self,
        plan: ModelPlan,
        journal: Journal,
        done: Progress,
        finished: int,
        timings: Timings,
        progress: ProgressCallback | None,
    ) -> None:
        """Begin with what is `done`, which is `finished` bytes of the source."""
        self.done, self.timings = done, timings
        self._plan, self._journal, self._progress = plan, journal, progress
        self._finished, self._total = finished, sum(shard.source.size for shard in plan.shards)
        self.advance(0)

    def entries_of(self, shard: ShardPlan) -> list[Entry]:
        """What the journal has of a shard's steps."""
        return [entry for entry in self._journal.entries if entry.get("shard") == shard.name]

    def advance(self, nbytes: int) -> None:
        """So many bytes of source more have their output in place."""
        self._finished += nbytes
        if self._progress is not None:
            self._progress(self._finished, self._total, self.timings)

    def step_done(self, shard: Shard, step: StepDone) -> None:
        """A step's bytes are written: see `Sink.step_done`."""
        self.add(shard.plan, step_entry(shard.plan, step))

    def add(self, shard: ShardPlan, entry: Entry) -> None:
        """Note a step's journal entry."""
        step = shard.steps[entry["step"]]
        assert not isinstance(step, Copy)
        self.done.stats[step.key], self.done.side[step.key] = step.read_stats(entry["stats"]), entry["side"]
        self._journal.append(entry)

    def commit(self, shard: ShardPlan, digest: str, source_digest: str, name: Callable[[], None]) -> None:
        """Give a shard that is durable, as is what it has in the file beside, its name by calling `name`.

        Raises:
            ConversionError: its source is not what the plan knows of it, or the disk fails.
        """
        source = FileRecord(shard.source.size, source_digest)
        _check_recorded(self._plan, shard.source.path, source)
        name()
        self._journal.append({"committed": shard.name, "digest": digest, "source_digest": source_digest}, durable=True)
        self.done.sources[shard.source_name] = source
        self.done.outputs[shard.name] = FileRecord(shard.size, digest)


def step_entry(shard: ShardPlan, step: StepDone) -> Entry:
    """The journal's line for a step."""
    return {
        "shard": shard.name,
        "step": step.index,
        "source": step.source,
        "digest": step.output,
        "side": step.side,
        "stats": step.stats.as_json(),
    }


def _check_recorded(plan: ModelPlan, path: Path, found: FileRecord) -> None:
    expected = plan.recorded.get(path.name)
    if expected not in (None, found):
        raise ConversionError(
            "SOURCE is not the model that the adapter belongs to",
            file=path,
            expected=f"blake3 {expected.digest}" if expected else None,
            found=found.digest,
            fix="give that model",
        )
