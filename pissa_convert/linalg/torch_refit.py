"""A and B after a change of the matrix they were fitted to, on a device: see cpp/refit.hpp and cpp/correction.hpp."""

from __future__ import annotations

import math
from typing import cast

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


_INDEPENDENT = 0.25
"""Of a Cholesky factor's diagonal, for rows of length one: see correction.cpp."""


def correct(
    difference: Matrix, a: torch.Tensor, b: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """One step of alternating least squares, where `difference` (out × in) is what A and B leave of a matrix.

    Args:
        difference: its values, float32, become what they leave then.
        a, b: rank × in and out × rank.
        scaling: of their product.

    Returns:
        A and B, all float32. None where the difference is not finite, or their rows or columns are far from
        independent; then nothing has changed.
    """
    length = torch.linalg.vector_norm(a, dim=1, keepdim=True)
    largest = float((length[:, 0] * torch.linalg.vector_norm(b, dim=0)).max()) * scaling
    if not (largest > 0 and math.isfinite(largest)):
        return None
    exponent = max(-120, min(math.frexp(largest)[1], 120))
    x = a / torch.where(length > 0, length, 1.0)
    y = b.T * length * math.ldexp(scaling, -exponent)
    matrix = difference.at(exponent)
    x_inverse = _inverse(_gram(x))
    if x_inverse is None:
        return None
    y_step = _combined(x_inverse, matrix.product(x))
    y = y + y_step
    y_inverse = _inverse(_gram(y))
    if y_inverse is None:
        return None
    x_step = _combined(y_inverse, matrix.transposed_product(y) - (y @ y_step.T) @ x)
    matrix.values.addmm_(torch.cat((y_step, y)).T, torch.cat((x, x_step)), alpha=-math.ldexp(1.0, exponent))
    x = x + x_step
    x_length, y_length = (torch.linalg.vector_norm(rows, dim=1, keepdim=True) for rows in (x, y))
    shared = (x_length * y_length * math.ldexp(1.0, exponent) / scaling).sqrt()
    return x / x_length * shared, (y / y_length * shared).T


def _inverse(gram: Array) -> Array | None:
    length = np.sqrt(np.diag(gram))
    if not np.isfinite(gram).all() or not (length > 0).all():
        return None
    triangle = cholesky(gram)
    if triangle is None or (np.diag(triangle) < _INDEPENDENT * length).any():
        return None
    inverse = np.linalg.inv(triangle)
    return cast(Array, inverse @ inverse.T)


def _gram(rows: torch.Tensor) -> Array:
    wide = rows.double()
    return on_host(wide @ wide.T)


def _combined(to_basis: Array, rows: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(to_basis).to(rows).T @ rows
