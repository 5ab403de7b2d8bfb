"""The leading singular triplets of a matrix near one whose triplets are known, on a device: see cpp/refit.hpp."""

from __future__ import annotations

import math

import numpy as np
import torch

from pissa_convert.linalg.torch_basis import Array, cholesky, on_host
from pissa_convert.linalg.torch_krylov import TARGET_DEFICIT, Factors, check_finite
from pissa_convert.linalg.torch_matrix import Matrix

_MAX_PASSES = 4


def follow(weight: Matrix, a: torch.Tensor) -> Factors | None:
    """Subspace iteration from the rows of `a` (rank × cols, float32).

    None where W has no such many directions, or too many passes would be needed: W is then not near.

    Raises:
        WeightError: W holds a value that is not finite.
    """
    largest = check_finite(weight)
    if largest == 0:
        return None
    weight = weight.at(math.frexp(largest)[1])
    length = torch.linalg.vector_norm(a, dim=1, keepdim=True)
    x = a / torch.where(length > 0, length, 1.0)
    for passes in range(1, _MAX_PASSES + 1):
        y = weight.product(x)
        z = weight.transposed_product(y)
        y_gram, z_gram = _gram(y), _gram(z)
        triangle = cholesky(y_gram)
        if triangle is None:
            return None
        inverse = np.linalg.inv(triangle)
        squares, vectors = np.linalg.eigh(inverse.T @ z_gram @ inverse)
        squares, to_basis = squares[::-1].copy(), (inverse @ vectors)[:, ::-1].copy()
        if not squares[-1] > 0:
            return None
        right, sigma = _combined(to_basis, z), np.sqrt(squares)
        deficit = max(0.0, 1 - float(np.trace(y_gram)) / float(squares.sum()))
        if deficit <= TARGET_DEFICIT:
            scale = math.ldexp(1.0, weight.exponent)
            return Factors(_combined(to_basis, y), right, sigma, sigma * scale, passes, deficit)
        x = right / torch.from_numpy(sigma).to(right)[:, None]
    return None


def _gram(rows: torch.Tensor) -> Array:
    wide = rows.double()
    return on_host(wide @ wide.T)


def _combined(to_basis: Array, rows: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(to_basis).to(rows).T @ rows
