"""Around every conversion: the destination is checked and locked, its state found, and the time taken."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pissa_convert.engine import destination
from pissa_convert.engine.destination import State, Work
from pissa_convert.engine.files import storage_error
from pissa_convert.engine.journal import Journal
from pissa_convert.memory import peak_resident_bytes
from pissa_convert.report import Timings

Entries = Mapping[str, Mapping[str, Any]]
"""Of the manifest, by tensor or module."""


class Described(Work, Protocol):
    """Work whose manifest says what it was, and of which files."""

    @property
    def head(self) -> Mapping[str, Any]:
        """What the manifest says of the conversion as a whole."""

    @property
    def sources(self) -> Mapping[str, Path]:
        """Every file that decides the result, by its name in the manifest."""


@dataclass(frozen=True)
class Outcome:
    """What a conversion did.

    Attributes:
        tensors: the manifest's entries.
        resumed, complete_before, wall_seconds, timings: as in `Report`.
    """

    tensors: Entries
    resumed: bool
    complete_before: bool
    wall_seconds: float
    timings: Timings

    def report(self, dest: Path, warnings: Collection[str]) -> dict[str, Any]:
        """The fields that every report has."""
        return {
            "dest": dest,
            "resumed": self.resumed,
            "complete_before": self.complete_before,
            "wall_seconds": self.wall_seconds,
            "timings": self.timings,
            "peak_memory": peak_resident_bytes(),
            "warnings": tuple(warnings),
        }


def conduct(
    plan: Described, overwrite: bool, convert: Callable[[Journal, Timings], Entries], unkept: Collection[str] = ()
) -> Outcome:
    """Make what a plan describes, or what is missing of it, by calling `convert`; compare what is complete already.

    Args:
        overwrite: replace an earlier conversion in the destination.
        unkept: source files that may be missing when a complete result is compared.

    Raises:
        PissaError: see the family.
    """
    started, timings = time.perf_counter(), Timings()
    destination.check(plan, overwrite)
    try:
        plan.dest.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(error, plan.dest) from error
    with Journal(plan.dest, plan.alone) as journal:
        state = destination.begin(plan, journal, overwrite)
        if state is State.COMPLETE:
            try:
                entries = destination.verify_complete(plan, plan.head, plan.sources, unkept)
            finally:
                journal.remove()
        else:
            entries = convert(journal, timings)
            journal.remove()
    return Outcome(entries, state is State.RESUMED, state is State.COMPLETE, time.perf_counter() - started, timings)
