"""What a conversion was asked to do. Everything here decides the bytes that come out; nothing else may.

How fast or in how much memory the work runs (threads, device, budget) is `RunOptions`, and changes no byte.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from pissa_convert.errors import RequestError

ADAPTER_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True)
class SplitOptions:
    """Options of `--to pissa`; names and meanings are PEFT's where PEFT has them.

    Attributes:
        rank: r, the number of singular directions moved into the adapter.
        alpha: lora_alpha; the adapter is applied with scaling `alpha / rank`.
        rslora: scaling is `alpha / sqrt(rank)` instead.
        target_modules: "all-linear", a regular expression matched against the whole module name, or a tuple of
            name suffixes.
        exclude_modules: the same, for what to leave out; wins over target_modules.
        adapter_dtype: "float32", "bfloat16" or "float16": how A and B are stored.
        passes: passes over each weight, or None to stop when the estimated error is small enough.
        seed: of the random start of the range finder.
    """

    rank: int = 16
    alpha: float = 16.0
    rslora: bool = False
    target_modules: str | tuple[str, ...] = "all-linear"
    exclude_modules: str | tuple[str, ...] | None = None
    adapter_dtype: str = "float32"
    passes: int | None = None
    seed: int = 0

    @property
    def scaling(self) -> float:
        """s in W = W_res + s·B·A."""
        return self.alpha / math.sqrt(self.rank) if self.rslora else self.alpha / self.rank

    def as_json(self) -> dict[str, Any]:
        """JSON-ready values, in declaration order (for the manifest and the fingerprint)."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _is_count(value: object, minimum: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def split_options(
    *,
    rank: int = 16,
    alpha: float | None = None,
    rslora: bool = False,
    target_modules: str | Sequence[str] = "all-linear",
    exclude_modules: str | Sequence[str] | None = None,
    adapter_dtype: str = "float32",
    passes: int | str = "auto",
    seed: int = 0,
) -> SplitOptions:
    """Check the options' own values (not yet against a model) and fill in the defaults that depend on others.

    Raises:
        RequestError: a value is out of range; the message names the option.
    """
    if not _is_count(rank, 1):
        raise RequestError("--rank is out of range", expected="an integer of at least 1", found=rank)
    alpha = float(rank) if alpha is None else float(alpha)
    if not (math.isfinite(alpha) and alpha > 0):
        raise RequestError("--alpha is out of range", expected="a number greater than 0", found=alpha)
    if adapter_dtype not in ADAPTER_DTYPES:
        raise RequestError("--adapter-dtype is unknown", expected=" or ".join(ADAPTER_DTYPES), found=adapter_dtype)
    if passes != "auto" and not _is_count(passes, 1):
        raise RequestError("--passes is out of range", expected="auto or an integer of at least 1", found=passes)
    if not (_is_count(seed, 0) and seed < 2**64):
        raise RequestError("--seed is out of range", expected="an integer from 0 to 2^64 - 1", found=seed)
    return SplitOptions(
        rank=rank,
        alpha=alpha,
        rslora=rslora,
        target_modules=target_modules if isinstance(target_modules, str) else tuple(target_modules),
        exclude_modules=(
            exclude_modules if exclude_modules is None or isinstance(exclude_modules, str) else tuple(exclude_modules)
        ),
        adapter_dtype=adapter_dtype,
        passes=passes if isinstance(passes, int) else None,
        seed=seed,
    )


@dataclass(frozen=True)
class QuantOptions:
    """Options of `--to qpissa`, those of the split apart.

    Attributes:
        iterations: T, how often the residual is quantised at most, the adapter being refitted after each.
        quant: "nf4" or "fp4".
        double_quant: the blocks' absmaxes are stored in 8 bits.
        compute_dtype: "bfloat16", "float16" or "float32": what bitsandbytes multiplies in.
        quantize_only_targets: linear layers without an adapter stay as they are.
        compare_loftq: report what LoftQ's order of the same steps would have reached.
    """

    split: SplitOptions
    iterations: int = 5
    quant: str = "nf4"
    double_quant: bool = True
    compute_dtype: str = "bfloat16"
    quantize_only_targets: bool = False
    compare_loftq: bool = False

    def as_json(self) -> dict[str, Any]:
        """JSON-ready values, those of the split first (for the manifest and the fingerprint)."""
        own = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "split"}
        return self.split.as_json() | own


QUANT_OPTIONS = tuple(field.name for field in fields(QuantOptions) if field.name != "split")
"""Beside those of `split_options`."""

CODES = ("nf4", "fp4")


def quant_options(
    *,
    iterations: int = 5,
    quant: str = "nf4",
    double_quant: bool = True,
    compute_dtype: str = "bfloat16",
    quantize_only_targets: bool = False,
    compare_loftq: bool = False,
    **split: Any,
) -> QuantOptions:
    """Check the values of `--to qpissa`.

    Args:
        split: what `split_options` takes.

    Raises:
        RequestError: a value is out of range; the message names the option.
    """
    if not _is_count(iterations, 1):
        raise RequestError("--iterations is out of range", expected="an integer of at least 1", found=iterations)
    if quant not in CODES:
        raise RequestError("--quant is unknown", expected=" or ".join(CODES), found=quant)
    if compute_dtype not in ADAPTER_DTYPES:
        raise RequestError("--compute-dtype is unknown", expected=" or ".join(ADAPTER_DTYPES), found=compute_dtype)
    return QuantOptions(
        split_options(**split),
        iterations,
        quant,
        bool(double_quant),
        compute_dtype,
        bool(quantize_only_targets),
        bool(compare_loftq),
    )


@dataclass(frozen=True)
class LoraOptions:
    """Options of `--to lora`.

    Attributes:
        rank: of every module, at most; None to lose nothing, "auto" for the smallest that `tolerance` allows.
        tolerance: with "auto", each module's ‖ΔW − B·A‖ / ‖ΔW‖ before rounding; None otherwise.
        uniform_rank: give every module the largest module's rank.
        dtype: "float32", "bfloat16" or "float16": how A and B are stored.
    """

    rank: int | str | None = None
    tolerance: float | None = None
    uniform_rank: bool = False
    dtype: str = "float32"

    def as_json(self) -> dict[str, Any]:
        """JSON-ready values, in declaration order (for the manifest and the fingerprint)."""
        return asdict(self)


def lora_options(
    *,
    rank: int | str | None = None,
    tolerance: float | None = None,
    uniform_rank: bool = False,
    dtype: str = "float32",
) -> LoraOptions:
    """Check the values of `--to lora` and fill in the tolerance.

    Raises:
        RequestError: a value is out of range; the message names the option.
    """
    if rank is not None and rank != "auto" and not _is_count(rank, 1):
        raise RequestError("--rank is out of range", expected="auto or an integer of at least 1", found=rank)
    if tolerance is not None and rank != "auto":
        raise RequestError("--tolerance goes with --rank auto", fix="give both, or --rank K alone")
    if rank == "auto":
        tolerance = 1e-3 if tolerance is None else float(tolerance)
        if not 0 < tolerance < 1:
            raise RequestError("--tolerance is out of range", expected="between 0 and 1", found=tolerance)
    if dtype not in ADAPTER_DTYPES:
        raise RequestError("--dtype is unknown", expected=" or ".join(ADAPTER_DTYPES), found=dtype)
    return LoraOptions(rank, tolerance, bool(uniform_rank), dtype)


@dataclass(frozen=True)
class MergeOptions:
    """Options of `--to merged`.

    Attributes:
        dtype: "float32", "bfloat16" or "float16" for every floating-point tensor; None to keep each one's own.
    """

    dtype: str | None = None

    def as_json(self) -> dict[str, Any]:
        """JSON-ready values (for the manifest and the fingerprint)."""
        return asdict(self)


def merge_options(*, dtype: str | None = None) -> MergeOptions:
    """Check the values of `--to merged`.

    Raises:
        RequestError: a value is out of range; the message names the option.
    """
    if dtype is not None and dtype not in ADAPTER_DTYPES:
        raise RequestError("--dtype is unknown", expected=" or ".join(ADAPTER_DTYPES), found=dtype)
    return MergeOptions(dtype)


@dataclass(frozen=True)
class RunOptions:
    """How the work is carried out; no byte of the result depends on these, but on the kind of device.

    Attributes:
        threads: compute threads, or None for every CPU that this process may use.
        max_memory: bytes of resident memory the whole process may peak at, or None for a default that keeps two of
            the largest tensors in flight.
        overwrite: replace an earlier conversion in the destination.
        device: that splits: "auto", "cpu", "cuda" or "cuda:N".
        max_vram: bytes of each GPU's memory that may be taken, or None for most of what is free.
    """

    threads: int | None = None
    max_memory: int | None = None
    overwrite: bool = False
    device: str = "auto"
    max_vram: int | None = None

    def __post_init__(self) -> None:
        if self.threads is not None and not _is_count(self.threads, 1):
            raise RequestError("--threads is out of range", expected="an integer of at least 1", found=self.threads)
        if self.max_memory is not None and not _is_count(self.max_memory, 1):
            raise RequestError("--max-memory is out of range", expected="bytes", found=self.max_memory)
        if self.max_vram is not None and not _is_count(self.max_vram, 1):
            raise RequestError("--max-vram is out of range", expected="bytes", found=self.max_vram)
