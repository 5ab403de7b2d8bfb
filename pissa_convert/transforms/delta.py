"""ΔW = s′·B′·A′ − s·B·A as the factors of an ordinary LoRA, without ever forming ΔW.

Side by side, [s′B′, −sB] and [A′; A] are factors of ΔW already, but bad ones: ΔW is the small difference of two large
products, and whoever rounds such factors, or adds up their products in float32 or bfloat16, loses the difference in the
rounding. So the factors are made orthogonal (QR of both sides, then an SVD of the small product of the two R): at rank
r′ + r they hold the same ΔW in numbers of its own size, and at a smaller rank the best approximation there is
(Eckart–Young). Everything is float64 until the result is stored.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from pissa_convert.errors import WeightError
from pissa_convert.transforms import bfloat16

Array = np.ndarray[Any, np.dtype[np.float64]]

_NEARLY_ORTHONORMAL = 0.1
"""‖QᵀQ − I‖ after one round of CholeskyQR, from which a second one reaches the rounding of float64."""

UNRELATED = 0.5
"""‖ΔW‖ / √(‖s′B′A′‖² + ‖sBA‖²) is 1 for two adapters that have nothing to do with one another, and a training that
keeps what it began with stays far below this."""


@dataclass(frozen=True)
class Product:
    """left·right, float64: left (out × k) holds the scaling, right (k × in)."""

    left: Array
    right: Array

    @property
    def norm(self) -> float:
        """‖left·right‖, Frobenius, by way of the k × k Gram matrices."""
        return float(np.sqrt(max(0.0, np.vdot(self.left.T @ self.left, self.right @ self.right.T))))


def difference(first: Product, second: Product) -> Product:
    """first − second, of the two ranks' sum."""
    return Product(np.hstack([first.left, -second.left]), np.vstack([first.right, second.right]))


@dataclass(frozen=True)
class Decomposition:
    """The SVD of a product, U·diag(σ)·Vᵀ, with U = left_basis·left_small and Vᵀ = right_small·right_basis."""

    left_basis: Array
    left_small: Array
    singular_values: Array
    right_small: Array
    right_basis: Array

    def tail(self, rank: int) -> float:
        """‖what lies beyond the leading `rank` directions‖."""
        return float(np.linalg.norm(self.singular_values[rank:]))

    def rounding(self, exact: Product, stored: Product) -> float:
        """‖B·A − what was stored of it‖, for `exact` factors that this has given.

        To the first order in the rounding it is ‖dB·A + B·dA‖, and BᵀB = A·Aᵀ = diag(σ): no cancellation, no product
        larger than k × k.
        """
        left, right = exact.left - stored.left, exact.right - stored.right
        sigma = np.zeros(left.shape[1])
        sigma[: len(self.singular_values)] = self.singular_values[: len(sigma)]
        squares = sigma @ (np.einsum("ij,ij->j", left, left) + np.einsum("ij,ij->i", right, right))
        both = np.vdot(left.T @ exact.left, exact.right @ right.T)
        return float(np.sqrt(max(0.0, squares + 2 * both)))

    def factors(self, rank: int) -> Product:
        """B (out × rank) and A (rank × in) of the leading directions, σ shared out as √σ to both.

        Signs are fixed: the entry of largest magnitude of each row of A is positive. Directions that there are not are
        zero.
        """
        count = min(rank, len(self.singular_values))
        root = np.sqrt(self.singular_values[:count])
        left = (self.left_basis @ self.left_small[:, :count]) * root
        right = root[:, None] * (self.right_small[:count] @ self.right_basis)
        largest = np.take_along_axis(right, np.abs(right).argmax(axis=1)[:, None], axis=1)
        sign = np.where(largest < 0, -1.0, 1.0)
        left, right = left * sign.T, right * sign
        missing = rank - count
        return Product(np.pad(left, ((0, 0), (0, missing))), np.pad(right, ((0, missing), (0, 0))))


def exact_norm(product: Product) -> float:
    """‖left·right‖ to the rounding of float64 even where the terms of the product all but cancel (by QR, not Gram)."""
    return float(np.linalg.norm(_orthonormal(product.left)[1] @ _orthonormal(product.right.T)[1].T))


def decompose(product: Product) -> Decomposition:
    """The SVD of a product: QR of both factors, then an SVD no larger than k × k."""
    left_basis, left_small = _orthonormal(product.left)
    right_basis, right_small = _orthonormal(product.right.T)
    left, values, right = np.linalg.svd(left_small @ right_small.T, full_matrices=False)
    return Decomposition(left_basis, left, _without_noise(values, left_small, right_small), right, right_basis.T)


def singular_values(product: Product) -> Array:
    """Those of a product alone, for choosing a rank before there is a place for the factors."""
    left, right = _orthonormal(product.left)[1], _orthonormal(product.right.T)[1]
    return _without_noise(np.linalg.svd(left @ right.T, full_matrices=False, compute_uv=False), left, right)


def _orthonormal(matrix: Array) -> tuple[Array, Array]:
    """Q with orthonormal columns and R with matrix = Q·R.

    CholeskyQR2 (Yamamoto, Nakatsukasa, Yanagisawa, Fukaya 2015), which is all matrix products; Householder's QR where
    the columns are too nearly dependent for it, as those of a module are that training left as it was.
    """
    if matrix.shape[0] > matrix.shape[1]:
        with suppress(np.linalg.LinAlgError):
            basis, outer = _cholesky_qr(matrix)
            gram = basis.T @ basis
            if np.linalg.norm(gram - np.eye(len(gram))) < _NEARLY_ORTHONORMAL:
                basis, inner = _cholesky_qr(basis, gram)
                return basis, inner @ outer
    basis, small = np.linalg.qr(matrix)
    return basis, small


def _cholesky_qr(matrix: Array, gram: Array | None = None) -> tuple[Array, Array]:
    upper = np.linalg.cholesky(matrix.T @ matrix if gram is None else gram).T
    return matrix @ np.linalg.inv(upper), upper


def _without_noise(values: Array, left: Array, right: Array) -> Array:
    """Singular values that the rounding of float64 alone accounts for are zero: a module that training left as it was
    has ΔW = 0, and not 32 directions of nothing."""
    noise = 4 * np.finfo(np.float64).eps * np.linalg.norm(left) * np.linalg.norm(right)
    return np.where(values > noise, values, 0.0)


def smallest_rank(values: Array, tolerance: float) -> int:
    """The smallest rank of at least 1 whose relative error, in the Frobenius norm, is at most `tolerance`."""
    energy = np.cumsum(values[::-1] ** 2)[::-1]  # added up from the small end
    kept = np.flatnonzero(energy > tolerance**2 * energy[0])
    return int(kept[-1]) + 1 if len(kept) else 1


def exact_rank(size_out: int, size_in: int, ranks: int) -> int:
    """At this rank nothing is lost: the ranks' sum, or the smaller side of the weight."""
    return min(size_out, size_in, ranks)


def rounded(values: Array, dtype: str) -> tuple[bytes, Array]:
    """`values` as "F32", "F16" or "BF16" bytes (to the nearest, ties to even), and what these bytes mean.

    Raises:
        WeightError: a value overflows the dtype.
    """
    if dtype == "F16":
        with np.errstate(over="ignore"):
            stored: Any = values.astype(np.float16)
        meant = stored.astype(np.float64)
    else:
        with np.errstate(over="ignore"):
            stored = values.astype(np.float32)
        if dtype == "BF16":
            # From float32: rounding twice differs from once only where float32 hit a tie of bfloat16 exactly.
            stored = bfloat16.narrow(stored)
            meant = bfloat16.widen(stored).astype(np.float64)
        else:
            meant = stored.astype(np.float64)
    if not np.isfinite(meant).all():
        raise WeightError("a factor's values overflow the dtype", found=dtype, fix="choose another --dtype")
    return stored.tobytes(), meant
