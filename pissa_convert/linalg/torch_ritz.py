"""The Rayleigh–Ritz step for a basis on a device, by the core's rule: cpp/rayleigh_ritz.hpp."""

from __future__ import annotations

import numpy as np
import torch

from pissa_convert import _core
from pissa_convert.linalg.torch_basis import Array, Note, on_host, solve_safely

_ON_DEVICE = 512
"""Size from which a GPU finds eigenvectors faster than one thread of a CPU."""


def is_fast_on(device: torch.device, size: int) -> bool:
    """Whether eigenvectors of this size are found there sooner than by a thread of the CPU."""
    return device.type == "cuda" and size >= _ON_DEVICE


def ritz(gram: torch.Tensor, rank: int, block: int, exact: bool, note: Note) -> tuple[_core.RitzTriplets, Array]:
    """Triplets of a symmetric float64 matrix on a device, and the `rank` × size vectors, by the core's rule.

    A large one's eigenvectors are found on its GPU.
    """
    size = len(gram)
    if size >= rank and is_fast_on(gram.device, size):
        values, columns = solve_safely(torch.linalg.eigh, gram, f"an eigenvalue problem of size {size}", note)
        vectors = on_host(columns.T[-rank:].flip(0).contiguous())
        largest = values[-rank:].flip(0).tolist()
        return _core.ritz_triplets(on_host(gram).data, size, block, largest, vectors.data), vectors
    vectors = np.zeros((rank, size))
    found = _core.rayleigh_ritz(on_host(gram).data, size, rank, block, exact, vectors.data)
    return found, vectors
