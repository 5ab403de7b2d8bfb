"""The leading singular triplets of a weight on a device: cpp/factorize.cpp's method with blocks for a GPU.

A product with a few vectors takes a GPU as long as one with many, since it waits for W to be read, and every block is
a round trip to the CPU: so blocks are about half the rank wide here, and passes fewer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pissa_convert import _core
from pissa_convert.errors import WeightError
from pissa_convert.linalg import SplitSpec
from pissa_convert.linalg.torch_basis import Array, Basis, Note
from pissa_convert.linalg.torch_matrix import Matrix, multiply
from pissa_convert.linalg.torch_ritz import ritz
from pissa_convert.linalg.torch_schedule import PIECE, Schedule

TARGET_DEFICIT = 2.5e-3
"""Stop when the estimate says that a full SVD would capture at most this much more of the leading energy."""

_PRECISE = 2e-2
"""Where σ_r is less of σ₁ than this, products of rounded vectors would cost the last directions accuracy."""
_DROWNED = 2**-4
"""Of σ₁: what products of vectors rounded to bfloat16 do not tell from their rounding."""

_ACCELERATION = 0.9
"""Each pass reduces the estimate by so much more than the one before; see cpp/factorize.cpp."""

_SMALL_NORM, _LARGE_NORM = 1e-15, 1e15
"""Of the sketch: between them, float32's products and squares stay in range."""

_SMALL_FOR_BF16 = 96
"""In a small matrix the rounding of the basis does not average out, and there is little to gain."""


@dataclass(frozen=True)
class Factors:
    """W ≈ Σ σᵢ·uᵢ·vᵢᵀ.

    Attributes:
        left: rank × rows, the uᵢ, float32.
        right: rank × cols, each vᵢ times its length, float32.
        length: of right's rows.
        sigma: descending.
        passes: over W; 0 for the exact method of small matrices.
        estimated_deficit: see `SplitStats`.
    """

    left: torch.Tensor
    right: torch.Tensor
    length: Array
    sigma: Array
    passes: int
    estimated_deficit: float


def signs(key: int, count: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The random ±1 of cpp/philox.hpp, as float32: the same start on every backend."""
    values = np.empty(count, np.float32)
    _core.random_signs(key, values.data)
    return values


def factorize(weight: Matrix, spec: SplitSpec, note: Note) -> Factors:
    """The weight to the spec's rank.

    Raises:
        WeightError: it holds a value that is not finite.
    """
    schedule = Schedule.of(spec.rows, spec.cols, spec.rank, spec.passes)
    if schedule.exact:
        return _factor_exactly(weight, spec.rank, note)
    dtype = weight.values.dtype
    rounded = dtype == torch.bfloat16 and min(spec.rows, spec.cols) >= _SMALL_FOR_BF16
    element = torch.bfloat16 if rounded else torch.float32
    factors = _Krylov(weight, spec, schedule, element, exact=dtype == torch.float32, note=note).run()
    if factors is None:
        factors = _Krylov(weight, spec, schedule, torch.float32, exact=True, note=note).run()
    assert factors is not None
    return factors


class _Krylov:
    """Block Krylov: X orthonormal, Y = W·X·2^-exponent, both as rows and rounded to `element`."""

    def __init__(
        self, weight: Matrix, spec: SplitSpec, schedule: Schedule, element: torch.dtype, *, exact: bool, note: Note
    ) -> None:
        self._weight, self._spec, self._schedule = weight, spec, schedule
        self._element, self._exact, self._note = element, exact, note
        device, room = weight.values.device, schedule.max_passes * schedule.block
        self._x = Basis(torch.empty(room, spec.cols, dtype=element, device=device), note)
        self._y = torch.empty(room, spec.rows, dtype=element, device=device)
        self._gram = torch.zeros(room, room, dtype=torch.float64, device=device)
        self._passes = 0
        self._exhausted = False

    def run(self) -> Factors | None:
        """The factors; None where float32 vectors are needed for them and `element` is less."""
        start = self._start()
        if start is None:
            return None if not self._exact and self._weight.largest() > 0 else _nothing(self._weight, self._spec)
        schedule, rank = self._schedule, self._spec.rank
        following = schedule.max_passes if self._spec.passes else schedule.first_check
        self._x.extend(start, 0)
        while True:
            self._advance_to(following)
            found, vectors = self._triplets()
            deficit = 0.0 if self._exhausted else found.estimated_deficit
            # See cpp/factorize.cpp.
            first, least = found.sigma[0], found.sigma[rank - 1]
            if not self._exact and (least < _PRECISE * first or self._drowned(first, least)):
                return None
            if deficit <= TARGET_DEFICIT or self._exhausted or self._passes >= schedule.max_passes:
                return self._combine(np.array(found.sigma), vectors, deficit)
            following = min(schedule.max_passes, self._passes + self._ahead(deficit, found.convergence))

    def _ahead(self, deficit: float, convergence: float) -> int:
        """Passes to the next check: where the estimate will have come down, but not far ahead."""
        limit, ahead = max(3, -(-self._passes // 2)), 0
        while ahead < limit and deficit > TARGET_DEFICIT:
            convergence *= _ACCELERATION
            deficit *= convergence
            ahead += 1
        return ahead

    def _start(self) -> torch.Tensor | None:
        """The first block, with W's exponent set; None where W is zero, or out of range for `element`."""
        z = self._sketch(self._spec.key)
        norm = float(torch.linalg.vector_norm(z, dtype=torch.float64))
        if not _SMALL_NORM < norm < _LARGE_NORM:
            largest = check_finite(self._weight)
            if largest == 0 or not self._exact:
                return None
            self._weight = self._weight.at(math.frexp(largest)[1])
            z = self._sketch(self._spec.key)
            norm = float(torch.linalg.vector_norm(z, dtype=torch.float64))
        magnitude = norm / math.sqrt(self._schedule.block)
        self._weight = self._weight.at(self._weight.exponent + math.frexp(magnitude)[1] - 1)
        return z

    def _sketch(self, key: int) -> torch.Tensor:
        """Sᵀ·W: row i of W, with a random sign, is added to vector i mod block."""
        rows, block = self._spec.rows, self._schedule.block
        dense = torch.zeros(block, rows, dtype=self._element, device=self._y.device)
        index = torch.arange(rows, device=dense.device)
        dense[index % block, index] = torch.from_numpy(signs(key, rows)).to(dense)
        return self._weight.transposed_product(dense)

    def _advance_to(self, passes: int) -> None:
        block = self._schedule.block
        while self._passes < passes:
            done = self._passes * block
            if done:
                z = self._weight.transposed_product(self._y[done - block : done])
                # In exact arithmetic z is orthogonal to all of X but its last two blocks. Where X spans a space that W
                # maps into itself and back, what W has beyond it is found from a new start.
                if not self._x.extend(z, min(done, 2 * block)) and not self._x.extend(
                    self._sketch(self._spec.key + self._passes), done
                ):
                    self._exhausted = True
                    return
            new = slice(done, done + block)
            self._y[new] = self._weight.product(self._x.rows[new])
            self._gram[: new.stop, new] = self._products(new)
            self._passes += 1

    def _products(self, new: slice) -> torch.Tensor:
        """Y·Yᵀ's columns `new`, summed in float64 with `exact`."""
        y, last = self._y[: new.stop], self._y[new]
        return y.double() @ last.double().T if self._exact else multiply(y, last.T).double()

    def _triplets(self) -> tuple[_core.RitzTriplets, Array]:
        size = self._passes * self._schedule.block
        gram = self._gram[:size, :size]
        gram = gram.triu() + gram.triu(1).T
        return ritz(gram, self._spec.rank, self._schedule.block, self._exact, self._note)

    def _drowned(self, first: float, least: float) -> bool:
        """Whether the last direction, or what W has beyond the basis, as Y's last block tells, drowns in rounding."""
        if self._element != torch.bfloat16:
            return False
        if self._x.householder:
            return True
        size = self._passes * self._schedule.block
        squares = self._gram.diagonal()[size - self._schedule.block : size]
        return min(least, math.sqrt(float(squares.mean()))) < _DROWNED * first

    def _combine(self, sigma: Array, vectors: Array, deficit: float) -> Factors:
        """X is orthonormal up to its rounding only: W·(X·v) = σ·u holds, and σ is less by the length of X·v."""
        inverse = np.divide(1.0, sigma, out=np.zeros_like(sigma), where=sigma > 0)
        size = self._passes * self._schedule.block
        left = _combination(vectors * inverse[:, None], self._y[:size])
        right = _combination(vectors, self._x.rows[:size])
        length = torch.linalg.vector_norm(right, dim=1, dtype=torch.float64).cpu().numpy()
        scale = math.ldexp(1.0, self._weight.exponent)
        values = np.divide(sigma * scale, length, out=np.zeros_like(sigma), where=sigma > 0)
        order = np.argsort(-values, kind="stable")
        index = torch.from_numpy(order).to(left.device)
        return Factors(left[index], right[index], length[order], values[order], self._passes, deficit)


def _combination(vectors: Array, rows: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(vectors).to(rows.device, torch.float32) @ rows.float()


def check_finite(weight: Matrix) -> float:
    """The largest magnitude.

    Raises:
        WeightError: a value is not finite.
    """
    largest = weight.largest()
    if not math.isfinite(largest):
        raise WeightError("the weight holds NaN or infinity", fix="repair the checkpoint, or exclude the module")
    return largest


def _nothing(weight: Matrix, spec: SplitSpec) -> Factors:
    left, right = (
        torch.zeros(spec.rank, count, dtype=torch.float32, device=weight.values.device)
        for count in (spec.rows, spec.cols)
    )
    return Factors(left, right, np.zeros(spec.rank), np.zeros(spec.rank), 0, 0.0)


def _factor_exactly(weight: Matrix, rank: int, note: Note) -> Factors:
    """All singular directions of the smaller side, from its Gram matrix in float64."""
    check_finite(weight)
    values = weight.values
    is_wide = values.shape[0] <= values.shape[1]
    if is_wide:
        values = values.T
    large, small = values.shape  # views: nothing is copied
    pieces = [slice(at, at + PIECE) for at in range(0, large, PIECE)]
    gram = torch.zeros(small, small, dtype=torch.float64, device=values.device)
    for piece in pieces:
        part = values[piece].double()
        gram.addmm_(part.T, part)
    _, vectors = ritz(gram, rank, small, True, note)
    basis = torch.from_numpy(vectors).to(values.device)
    image = torch.cat([basis @ values[piece].double().T for piece in pieces], 1)
    length = torch.linalg.vector_norm(image, dim=1)
    unit = (image / torch.where(length > 0, length, 1.0)[:, None]).float()
    left, right = (basis.float(), unit) if is_wide else (unit, basis.float())
    return Factors(left, right, np.ones(rank), length.cpu().numpy(), 0, 0.0)
