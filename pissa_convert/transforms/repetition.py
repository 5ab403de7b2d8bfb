"""Does a weight still hold what an adapter took out of it? A principal adapter repeats what its original holds."""

from __future__ import annotations

import numpy as np

from pissa_convert.transforms.delta import Array, Product

REPEATED = 0.5
"""The distance is 0 where s·B·A is a part of W that is still in W, 1 where it was taken out, and far larger for a
change that training made."""


def distance_from_part(weight: Array, product: Product) -> float | None:
    """‖W·Aᵀ − s·B·A·Aᵀ‖ / ‖s·B·A·Aᵀ‖ over the first rows of W (k × in); None where s·B·A is zero there."""
    expected = product.left[: len(weight)] @ (product.right @ product.right.T)
    norm = float(np.linalg.norm(expected))
    return float(np.linalg.norm(weight @ product.right.T - expected)) / norm if norm else None
