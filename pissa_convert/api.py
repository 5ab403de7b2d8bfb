"""The Python API: `convert`, `plan` and `split`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pissa_convert.engine import verify as verification
from pissa_convert.engine.run import ProgressCallback, run
from pissa_convert.errors import RequestError
from pissa_convert.linalg import SplitSpec, tensor_key
from pissa_convert.linalg.native import NativeBackend, usable_cpus
from pissa_convert.options import ADAPTER_DTYPES, RunOptions, split_options
from pissa_convert.planning import Plan, make_plan
from pissa_convert.report import Report

if TYPE_CHECKING:
    import torch


def plan(
    source: str | os.PathLike[str],
    dest: str | os.PathLike[str],
    to: str = "pissa",
    *,
    rank: int = 16,
    alpha: float | None = None,
    rslora: bool = False,
    target_modules: str | Sequence[str] = "all-linear",
    exclude_modules: str | Sequence[str] | None = None,
    adapter_dtype: str = "float32",
    passes: int | str = "auto",
    seed: int = 0,
    threads: int | None = None,
    max_memory: int | None = None,
) -> Plan:
    """Say what `convert` would do, from the headers of `source` alone. Writes nothing.

    The arguments are those of `convert`.

    Returns:
        The decision for every tensor with its reason, the layout of every output file, exact output sizes in bytes
        (`Plan.output_sizes`), and the predicted peak of resident memory in bytes (`Plan.memory.peak`).

    Raises:
        RequestError: the request is wrong in itself or does not fit the model; FormatError (a RequestError): a file
            of `source` is malformed.
    """
    options = split_options(
        rank=rank,
        alpha=alpha,
        rslora=rslora,
        target_modules=target_modules,
        exclude_modules=exclude_modules,
        adapter_dtype=adapter_dtype,
        passes=passes,
        seed=seed,
    )
    return make_plan(source, dest, to, options, RunOptions(threads, max_memory), NativeBackend(threads))


def convert(
    source: str | os.PathLike[str],
    dest: str | os.PathLike[str],
    to: str = "pissa",
    *,
    rank: int = 16,
    alpha: float | None = None,
    rslora: bool = False,
    target_modules: str | Sequence[str] = "all-linear",
    exclude_modules: str | Sequence[str] | None = None,
    adapter_dtype: str = "float32",
    passes: int | str = "auto",
    seed: int = 0,
    threads: int | None = None,
    max_memory: int | None = None,
    overwrite: bool = False,
    progress: ProgressCallback | None = None,
) -> Report:
    """Split the linear weights of a model folder into residual and principal adapter (PiSSA, arXiv 2404.02948).

    Streams the safetensors files of `source`, one tensor at a time, into `dest`: the residual model with the same
    file names, dtypes and headers, and the adapter in `dest/pissa_init/`, which PEFT loads as it is. For every chosen
    weight W = W_res + s·B·A holds to the rounding of storing W_res. Interrupted at any moment, the same call
    continues; the result is the same bytes.

    Args:
        source: a Hugging Face model folder; never written to.
        dest: the folder to make; must be empty, absent, or hold an interrupted run of the same conversion.
        to: the target; "pissa".
        rank: r, the number of singular directions moved into the adapter; at most min(shape) of each chosen weight.
        alpha: lora_alpha, by default the rank (so that s = 1); s = alpha / rank.
        rslora: s = alpha / sqrt(rank) instead.
        target_modules: "all-linear" (every linear layer but the output head), a regular expression for whole module
            names, or a sequence of module names or name endings: PEFT's meaning.
        exclude_modules: the same, for what to leave as it is.
        adapter_dtype: "float32", "bfloat16" or "float16".
        passes: passes over each weight, or "auto": until the estimated loss of captured energy is small.
        seed: of the random start; with the tensor's name it decides all randomness.
        threads: compute threads; by default every CPU this process may use. The result does not depend on it.
        max_memory: bytes of resident memory to stay under; by default two of the largest tensors and some room.
        overwrite: replace an earlier conversion in `dest`.
        progress: called as `progress(bytes_done, bytes_in_all, timings)` from the calling thread.

    Raises:
        RequestError: nothing was done because the request or the model is wrong; the message says what to change.
        WeightError: a weight holds NaN or infinity, or its residual overflows its dtype.
        ConversionError: reading or writing failed; the same call continues.
    """
    work = plan(
        source,
        dest,
        to,
        rank=rank,
        alpha=alpha,
        rslora=rslora,
        target_modules=target_modules,
        exclude_modules=exclude_modules,
        adapter_dtype=adapter_dtype,
        passes=passes,
        seed=seed,
        threads=threads,
        max_memory=max_memory,
    )
    return run(work, NativeBackend(threads), overwrite=overwrite, progress=progress)


def verify(
    dest: str | os.PathLike[str],
    source: str | os.PathLike[str] | None = None,
    *,
    threads: int | None = None,
    progress: verification.Progress | None = None,
) -> verification.Verification:
    """Check a finished conversion against its manifest and, where it is given, the model that it was made from.

    Every file's size and SHA-256 is compared with the manifest's, and the manifest's with its own. With `source`, its
    files are compared with their records too, what was copied is compared byte by byte, and for every split weight
    ‖W − (W_res + s·B·A)‖/‖W‖ is measured and must be what the manifest records. Memory does not grow with the model.

    Args:
        dest: the folder that `convert` made; nothing is written to it.
        source: the folder of the original model.
        threads: files that are read at once, at most; by default as many as CPUs, up to four.
        progress: called as `progress(bytes_done, bytes_in_all)`, from worker threads, one call at a time.

    Raises:
        RequestError: there is no finished conversion in `dest`, or `source` is no folder.
        DamageError: something differs; its `findings` name every file and tensor that does.
    """
    return verification.verify(
        Path(dest), None if source is None else Path(source), threads=threads or usable_cpus(), progress=progress
    )


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
) -> Split:
    """Split one matrix; `weight` is left as it is.

    Args:
        weight: (out, in); numpy float32, float16 or ml_dtypes.bfloat16, or a CPU torch tensor of the same dtypes.
        name: with `seed`, the key of the random start: with a tensor's name, the bytes are those of `convert`.
        rank, alpha, rslora, adapter_dtype, passes, seed, threads: as for `convert`.

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
    stats = NativeBackend(threads).split(residual.data, a.data, b.data, spec)
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
