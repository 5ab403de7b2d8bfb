"""Extending an orthonormal basis by a block on a device; the small matrices are factored on the CPU, in float64.

Block Gram–Schmidt twice with a Cholesky QR after each projection, and Householder reflections where the triangle is
ill-conditioned: the method, limits and deviations of cpp/orthonormalize.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pissa_convert.linalg.torch_matrix import multiply

Array = np.ndarray[Any, np.dtype[np.float64]]
Note = Callable[[str], None]
"""Takes what the user should know of."""

_SMALLEST_DIAGONAL = 1e-2
"""Of a Cholesky factor of columns of length one: float32's Gram matrices mean nothing further down."""

_EXHAUSTED = 1e-6
"""What projection leaves of a block that lies in the basis: the rounding of float32."""

_CANCELLATION = 1 / 64
"""Of a vector's square, below which what is left of it is not taken from a difference."""

_MAX_ROUNDS = 6


@dataclass
class Basis:
    """Orthonormal rows, blocks of which are appended.

    Attributes:
        rows: room for all of them, max_rows × n; the first `size` are filled.
        note: is told when a solver of the device fails.
        householder: whether a block was too ill-conditioned for Cholesky.
    """

    rows: torch.Tensor
    note: Note
    size: int = 0
    householder: bool = False

    @property
    def filled(self) -> torch.Tensor:
        return self.rows[: self.size]

    def extend(self, z: torch.Tensor, recent: int) -> bool:
        """Append what z (b × n, float32) adds; false where that is nothing.

        `recent` says how many of the last rows z is known to have components in, up to rounding: a first projection
        need not take the others.
        """
        block = self.rows[self.size : self.size + len(z)]
        block.copy_(z)
        share = 1.0  # of z's square that the rounds so far have left
        for turn in range(_MAX_ROUNDS):
            before = self.rows[self.size - (recent if turn == 0 else self.size) : self.size]
            taken, full = _inner(before, block), on_host(_inner(block, block))
            gram, trace = full, float(np.trace(full))
            # What is left without these rows, by Pythagoras; where that is next to nothing, taken from what is left.
            if len(before):
                gram = full - on_host(taken.T @ taken)
                if np.any(np.diag(gram) < _CANCELLATION * np.diag(full)):
                    z = z - taken.T.float() @ before.float()
                    block.copy_(z)
                    before, gram = before[:0], on_host(_inner(block, block))
            share *= float(np.trace(gram)) / trace if trace > 0 else 0.0
            if not share > _EXHAUSTED**2:
                return False
            triangle = cholesky(gram)
            if triangle is None:
                if len(before):
                    z = z - taken.T.float() @ before.float()
                self.householder = True
                z, diagonal = self._householder(z)
            else:
                inverse = torch.from_numpy(np.linalg.inv(triangle)).to(z.device)
                projected = z
                z = inverse.T.float() @ projected
                if len(before):
                    z -= (taken @ inverse).T.float() @ before.float()
                diagonal = np.diag(triangle)
            block.copy_(z)
            # A second round keeps the basis orthogonal; a third is due to vectors of which that left little.
            if turn > 0 and np.abs(diagonal).min() > 0.5:
                self.size += len(z)
                return True
        return False  # what is left is the basis again, as it was rounded

    def _householder(self, z: torch.Tensor) -> tuple[torch.Tensor, Array]:
        q, r = solve_safely(torch.linalg.qr, z.T, "a QR", self.note)
        return q.T.contiguous(), on_host(r.diagonal())


def solve_safely(
    solve: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]], matrix: torch.Tensor, what: str, note: Note
) -> tuple[torch.Tensor, torch.Tensor]:
    """A solver's two results on the matrix' device; where it fails there, the CPU's, and `note` is told."""
    try:
        return solve(matrix)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        note(f"{what} failed on {matrix.device} and was done by the CPU: {str(error).splitlines()[0]}")
        first, second = solve(matrix.cpu())
        return first.to(matrix.device), second.to(matrix.device)


def _inner(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a·bᵀ, float64 from float32 sums."""
    return multiply(a, b.T).double()


def on_host(values: torch.Tensor) -> Array:
    """In float64 on the CPU."""
    return values.double().cpu().numpy()


def cholesky(gram: Array) -> Array | None:
    """Upper triangular R with gram = Rᵀ·R; None where the vectors are too dependent for it."""
    length = np.sqrt(np.diag(gram).clip(min=0))
    if not np.all(length > 0):
        return None
    try:
        factor = np.linalg.cholesky(gram / np.outer(length, length)).T
    except np.linalg.LinAlgError:
        return None
    if np.diag(factor).min() < _SMALLEST_DIAGONAL:
        return None
    triangle: Array = factor * length
    return triangle
