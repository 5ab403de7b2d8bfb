"""One matrix as W = W_res + s·B·A, in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pissa_convert.errors import RequestError
from pissa_convert.linalg import SplitSpec, tensor_key
from pissa_convert.linalg.select import select_backend
from pissa_convert.options import ADAPTER_DTYPES, split_options

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Split:
    """One matrix as W = residual + scaling·B·A.

    Attributes:
        residual: (out, in), dtype of W.
        A: (rank, in) and B: (out, rank), adapter dtype; bfloat16 comes as torch tensors, or from numpy as
            ml_dtypes.bfloat16 where W was that, else as raw uint16 patterns.
        scaling: s.
        singular_values: σ₁ ≥ … ≥ σ_rank of W, float32 (rank,).
        captured_energy: Σσ² / ‖W‖².
        relative_error: ‖W − (residual + s·B·A)‖ / ‖W‖, Frobenius, from the rounding of the stored residual.
        estimated_deficit: estimate of 1 − Σσ̂²/Σσ² against an exact SVD of the same rank.
    """

    residual: Any
    A: Any
    B: Any
    scaling: float
    singular_values: np.ndarray[tuple[int], np.dtype[np.float32]]
    captured_energy: float
    relative_error: float
    estimated_deficit: float


_CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def split(
    weight: np.ndarray[Any, np.dtype[Any]] | torch.Tensor,
    rank: int = 16,
    *,
    alpha: float | None = None,
    rslora: bool = False,
    adapter_dtype: str = "float32",
    passes: int | str = "auto",
    seed: int = 0,
    name: str = "",
    threads: int | None = None,
    device: str = "auto",
) -> Split:
    """Split one matrix; `weight` is left as it is.

    Args:
        weight: (out, in); numpy float32, float16 or ml_dtypes.bfloat16, or a torch tensor of the same dtypes.
        name: with `seed`, the key of the random start: with a tensor's name, the bytes are those of `convert`.
        rank, alpha, rslora, adapter_dtype, passes, seed, threads, device: as for `convert`.

    Returns:
        A `Split` of numpy arrays or torch tensors, as `weight` was.

    Raises:
        RequestError: the matrix is not 2-D, its dtype is not supported, or the rank is too large for it.
        WeightError: it holds NaN or infinity.
    """
    options = split_options(
        rank=rank, alpha=alpha, rslora=rslora, adapter_dtype=adapter_dtype, passes=passes, seed=seed
    )
    dtype = str(weight.dtype).removeprefix("torch.")
    if weight.ndim != 2 or dtype not in _CODES:
        raise RequestError(
            "the weight cannot be split", expected=f"2-D {', '.join(_CODES)}", found=f"{weight.ndim}-D {dtype}"
        )
    rows, cols = (int(size) for size in weight.shape)
    if rank > min(rows, cols):
        raise RequestError("rank is larger than the weight allows", expected=f"at most {min(rows, cols)}", found=rank)
    spec = SplitSpec(
        rows=rows,
        cols=cols,
        dtype=_CODES[dtype],
        rank=rank,
        scaling=options.scaling,
        adapter_dtype=ADAPTER_DTYPES[adapter_dtype],
        fan_in_fan_out=False,
        passes=options.passes,
        key=tensor_key(seed, name),
    )
    residual = _raw_copy(weight)
    a = np.empty(spec.a_shape, _RAW[adapter_dtype])
    b = np.empty(spec.b_shape, _RAW[adapter_dtype])
    stats = select_backend(device, threads).split(residual.data, a.data, b.data, spec)
    like: Any = weight
    return Split(
        residual=_dressed(residual, dtype, like),
        A=_dressed(a, adapter_dtype, like),
        B=_dressed(b, adapter_dtype, like),
        scaling=options.scaling,
        singular_values=np.array(stats.singular_values, np.float32),
        captured_energy=stats.captured_energy,
        relative_error=stats.relative_error,
        estimated_deficit=stats.estimated_deficit,
    )


_RAW: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}
"""numpy has no bfloat16: its bit patterns travel as uint16."""


def _raw_copy(weight: Any) -> np.ndarray[Any, np.dtype[Any]]:
    if isinstance(weight, np.ndarray):
        raw = weight.view(np.uint16) if weight.dtype.name == "bfloat16" else weight
    else:
        import torch

        host = weight.detach().cpu().contiguous()
        raw = (host.view(torch.uint16) if host.dtype == torch.bfloat16 else host).numpy()
    return np.array(raw, order="C", copy=True)


def _dressed(array: np.ndarray[Any, np.dtype[Any]], dtype: str, like: Any) -> Any:
    """`array` as the kind of thing that the caller gave."""
    if not isinstance(like, np.ndarray):
        import torch

        tensor = torch.from_numpy(array)
        return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor
    if dtype == "bfloat16" and like.dtype.name == "bfloat16":
        return array.view(like.dtype)
    return array
