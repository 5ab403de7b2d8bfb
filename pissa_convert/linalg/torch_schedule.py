"""How a split on a device is laid out for a shape and rank, and the memory that this takes."""

from __future__ import annotations

from dataclasses import dataclass

from pissa_convert.linalg import SplitSpec

PIECE = 4096
"""Of the longer side, that are widened to float64 at a time."""


@dataclass(frozen=True)
class Schedule:
    """How the work is laid out for a shape and rank.

    Attributes:
        block: vectors that a pass adds.
        first_check, min_passes, max_passes: passes before the estimate is looked at, at least, and at most.
        exact: the basis would have to span most of the space: its whole Gram matrix is cheaper.
    """

    block: int
    first_check: int
    min_passes: int
    max_passes: int
    exact: bool

    @classmethod
    def of(cls, rows: int, cols: int, rank: int, passes: int | None) -> Schedule:
        limit = min(rows, cols)
        block = 32 * -(-rank // 64)
        expected = 2 * rank + rank // 4 + 64
        exact = rank + 2 * block > limit if passes else 4 * expected >= 3 * limit
        max_passes = min(passes or (6 * rank + 64) // block + 1, limit // block)
        min_passes = -(-rank // block)
        first_check = max(min_passes, min((2 * rank + 64) // block, max_passes))
        return cls(block, first_check, min_passes, max_passes, exact or max_passes < min_passes)


def device_bytes(spec: SplitSpec, chunk: int) -> int:
    """Upper bound of what a split takes on its device, W included."""
    schedule = Schedule.of(spec.rows, spec.cols, spec.rank, spec.passes)
    values, sides, longer = spec.rows * spec.cols, spec.rows + spec.cols, max(spec.rows, spec.cols)
    width = 4 if spec.dtype == "F32" else 2
    weight = width * values + 6 * width * min(chunk, values)
    factors = 4 * 4 * spec.rank * sides
    if schedule.exact:
        small = min(spec.rows, spec.cols)
        return weight + factors + 8 * (4 * small * small + 2 * PIECE * small + 2 * spec.rank * longer)
    room = schedule.block * schedule.max_passes
    # X and Y in float32, one of them widened, Y once in float64, the block at work, and the Gram matrix.
    basis = 4 * room * (sides + longer) + 8 * room * spec.rows + 6 * 4 * schedule.block * longer + 4 * 8 * room * room
    return weight + factors + basis
