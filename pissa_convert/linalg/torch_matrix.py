"""A weight on a device: its products and its residual, never with a float32 copy of the whole of it.

Bases are kept as rows: a block of b vectors of length n is b × n, so that a basis of several blocks is one matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

CHUNK = 8 << 20
"""Values of a weight that are widened at a time."""

_COMMON_EXPONENT = 60
"""Of a weight's scale: within it, no product of such weights and factors comes near float32's limits."""


def multiply(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a·b in float32. Factors in bfloat16 stay so: their products are exact, and their sums float32.

    Only CUDA has such a product in one call; elsewhere the factors are widened.
    """
    if a.is_cuda and a.dtype == b.dtype == torch.bfloat16:
        return torch.mm(a, b, out_dtype=torch.float32)  # type: ignore[call-overload,no-any-return,unused-ignore]
    return a.float() @ b.float()


@dataclass(frozen=True)
class Matrix:
    """W (rows × cols) as it lies on its device, and 2^-exponent, by which every product is scaled.

    Attributes:
        values: W in its own dtype.
        exponent: ‖W‖ is near 2^exponent.
        chunk: values that are widened at a time.
    """

    values: torch.Tensor
    exponent: int = 0
    chunk: int = CHUNK

    def at(self, exponent: int) -> Matrix:
        """The same at the scale of 2^exponent."""
        return replace(self, exponent=max(-120, min(exponent, 120)))

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """(W·Xᵀ)ᵀ·2^-exponent for x of b × cols: b × rows, float32."""
        if self._takes(x):
            return multiply(x, self.values.T).mul_(self.scale)
        x = x.float()
        return torch.cat([x @ part.T for _, part in self._widened()], 1)

    def transposed_product(self, y: torch.Tensor) -> torch.Tensor:
        """(Wᵀ·Yᵀ)ᵀ·2^-exponent for y of b × rows: b × cols, float32."""
        if self._takes(y):
            return multiply(y, self.values).mul_(self.scale)
        y = y.float()
        result = y.new_zeros(len(y), self.values.shape[1])
        for rows, part in self._widened():
            result.addmm_(y[:, rows], part)
        return result

    @property
    def scale(self) -> float:
        return math.ldexp(1.0, -self.exponent)

    @property
    def is_common(self) -> bool:
        """Scaling may follow a product instead of preceding it."""
        return abs(self.exponent) < _COMMON_EXPONENT

    def _takes(self, factor: torch.Tensor) -> bool:
        """Whether the factor is multiplied with W as it lies."""
        same = factor.dtype == self.values.dtype and (factor.is_cuda or factor.dtype == torch.float32)
        return same and self.is_common

    def _widened(self) -> Iterator[tuple[slice, torch.Tensor]]:
        for rows in self.row_chunks():
            yield rows, self.values[rows].float() * self.scale

    def row_chunks(self) -> Iterator[slice]:
        """Rows that are widened at a time."""
        count = max(1, self.chunk // self.values.shape[1])
        for begin in range(0, len(self.values), count):
            yield slice(begin, min(begin + count, len(self.values)))

    def largest(self) -> float:
        """Largest magnitude; NaN or infinity where a value is."""
        return max((float(self.values[rows].abs().max()) for rows in self.row_chunks()), key=_nan_last)

    def subtract(self, left: torch.Tensor, right: torch.Tensor, scaling: float) -> tuple[float, float]:
        """W ← round(W − scaling·leftᵀ·right), left rank × rows and right rank × cols, as `split.cpp` does it.

        Sums are float32 for W of 2 bytes, and float64 for float32, where float32 sums would add an error as large as
        the rounding itself. Factors of a bfloat16 W must be representable in it.

        Returns:
            Frobenius norms of W and of the rounding error; the error is not finite where a stored value is not.
        """
        wide = torch.float64 if self.values.dtype == torch.float32 else torch.float32
        operand = torch.bfloat16 if self.values.dtype == torch.bfloat16 and self.is_common else wide
        left, right = left.to(operand), right.to(operand)
        square = torch.zeros(2, dtype=torch.float64, device=left.device)
        for rows in self.row_chunks():
            part = self.values[rows].to(wide)
            square[0] += (part * self.scale).square_().sum(dtype=torch.float64)
            if operand == torch.float64:
                part.addmm_(left[:, rows].T, right, alpha=-scaling)
            else:
                part.sub_(multiply(left[:, rows].T, right).mul_(scaling))
            self.values[rows] = part.to(self.values.dtype)
            part.sub_(self.values[rows]).mul_(self.scale)
            square[1] += part.square_().sum(dtype=torch.float64)
        weight, error = square.sqrt().mul_(math.ldexp(1.0, self.exponent)).tolist()
        return weight, error


def _nan_last(value: float) -> float:
    return math.inf if math.isnan(value) else value
