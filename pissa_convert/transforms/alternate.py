"""A quantised base and an adapter that fit one another: W ≈ Q + s·B·A with Q on the quantiser's grid.

The paper's algorithm 1 (arXiv 2404.02948, appendix) alternates: A and B from the largest singular directions of W − Q,
then Q from W − s·B·A. Three deviations, each for a smaller error at the same number of quantisations:

- it ends with a refit of A and B to the Q that is stored, and not with a Q that they were not made for; before, where
  Q changes by little, they are corrected by least squares, which leaves as little at a fraction of the time;
- what is quantised is moved past its goal, I ← I + 2·(W − s·B·A − I). The codes change only where the goal has moved
  by half a step, so going all the way and as much again reaches in five turns what the plain alternation reaches in ten
  or more (over-relaxation, as in Gubin, Polyak & Raik 1967 for alternating projections);
- the best of all turns is kept, and a turn that gains next to nothing is the last.

LoftQ (arXiv 2310.08659) is the same alternation, plain, from A = B = 0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pissa_convert.linalg import Backend, FourBit, FourBitSpec, SplitSpec
from pissa_convert.linalg.native import NativeBackend

_RELAXATION = 2.0

_GAIN = 1e-3
"""A turn that lowers the error by a smaller part of it is the last."""


@dataclass
class Adapted:
    """A base with its adapter.

    Attributes:
        base: Q.
        a, b: bytes of A and B.
        difference: W − (Q + s·B·A), float32; empty while it is sought.
        error: its norm.
        iterations: quantisations until it was found.
    """

    base: FourBit
    a: memoryview
    b: memoryview
    difference: memoryview
    error: float
    iterations: int


def alternate(
    weight: memoryview, split: SplitSpec, form: FourBitSpec, iterations: int, backend: Backend, quantiser: NativeBackend
) -> Adapted:
    """Find a base and an adapter of one weight.

    Args:
        weight: its bytes, out × in; they stay as they are.
        split: the adapter's rank, scaling and dtype.
        form: how the base is stored.
        iterations: quantisations at most.
        backend: splits.

    Raises:
        WeightError: it holds NaN or infinity, or a factor overflows its dtype.
    """
    goal, first = _copy(weight), _empty(split, form)
    backend.split(goal, first.a, first.b, replace(split, precise=False))  # leaves W − s·B·A
    return _alternate(weight, goal, first, _RELAXATION, split, iterations, backend, quantiser)


def loftq(
    weight: memoryview, split: SplitSpec, form: FourBitSpec, iterations: int, backend: Backend, quantiser: NativeBackend
) -> Adapted:
    """The same in LoftQ's order, for comparison."""
    return _alternate(weight, _copy(weight), _empty(split, form), 1.0, split, iterations, backend, quantiser)


def _alternate(
    weight: memoryview,
    goal: memoryview,
    first: Adapted,
    relaxation: float,
    split: SplitSpec,
    iterations: int,
    backend: Backend,
    quantiser: NativeBackend,
) -> Adapted:
    """From the base for `goal`, which is W less the s·B·A of `first`: of a split, or zeros."""
    best, spare = first, _empty(split, first.base.spec)
    difference = memoryview(bytearray(4 * split.rows * split.cols))

    def refit(found: Adapted) -> None:
        quantiser.subtract(weight, found.base.spec.dtype, found.base, difference)
        backend.refit(difference, found.a, found.b, split)

    rest, rest_dtype = goal, first.base.spec.dtype  # W − s·B·A
    for turn in range(1, iterations + 1):
        quantiser.quantise(goal, spare.base)
        spare.a[:], spare.b[:] = best.a, best.b
        corrected = False
        if turn < iterations:
            quantiser.subtract(rest, rest_dtype, spare.base, difference)
            corrected = backend.correct(difference, spare.a, spare.b, split)
        if not corrected:
            refit(spare)
        spare.error = quantiser.norm(difference, "F32")
        spare.iterations = turn
        gained = turn == 1 or spare.error < (1 - _GAIN) * best.error
        if turn < iterations and gained:
            quantiser.relax(spare.base, difference, relaxation, goal)
            rest, rest_dtype = difference, "F32"
        if turn == 1 or spare.error < best.error:
            best, spare = spare, best
        if not gained:
            break
    if corrected or best.iterations < turn:  # `difference` is another's, or not exact
        refit(best)
        best.error = quantiser.norm(difference, "F32")
    best.difference = difference
    return best


def _empty(split: SplitSpec, form: FourBitSpec) -> Adapted:
    a, b = (memoryview(bytearray(size)) for size in split.factor_bytes)
    return Adapted(FourBit.empty(form), a, b, memoryview(b""), 0.0, 0)


def _copy(data: memoryview) -> memoryview:
    return memoryview(bytearray(data))


def workspace_bytes(split: SplitSpec, form: FourBitSpec) -> int:
    """Bytes of what `alternate` holds, the backend's own apart."""
    return form.value_bytes + 4 * form.rows * form.cols + 2 * result_bytes(split, form)


def result_bytes(split: SplitSpec, form: FourBitSpec) -> int:
    """Bytes of what it returns, the difference apart."""
    return FourBit.nbytes(form) + sum(split.factor_bytes)
