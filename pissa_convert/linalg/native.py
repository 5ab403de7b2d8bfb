"""The C++ core as a backend."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

from pissa_convert import _core
from pissa_convert.errors import RequestError, WeightError
from pissa_convert.linalg import FourBit, SplitSpec, SplitStats


def usable_cpus() -> int:
    """CPUs this process may use: its affinity, or less where a cgroup's quota allows less."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_quota()
    return count if quota is None else max(1, min(count, math.ceil(quota)))


def _cgroup_quota(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """CPUs' worth of time that the cgroup grants (version 2, or version 1's cpu controller)."""
    try:
        quota, period = (root / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (root / "cpu" / "cpu.cfs_quota_us").read_text().strip()
            period = (root / "cpu" / "cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    return None if quota in ("max", "-1") else int(quota) / int(period)


class NativeBackend:
    """Splits on the CPU, and quantises: blockwise to 4 bits, to the bit as bitsandbytes does it.

    The number of threads changes no byte of a result.
    """

    def __init__(self, threads: int | None = None) -> None:
        """Start the threads.

        Raises:
            RequestError: PISSA_CONVERT_KERNEL names a kernel that this CPU does not have.
        """
        self._threads = threads or usable_cpus()
        try:
            self._splitter = _core.Splitter(self._threads)
        except ValueError as error:
            raise RequestError(str(error)) from error

    @property
    def name(self) -> str:
        """ "native/" and the kernel's instruction set."""
        return f"native/{self._splitter.kernel}"

    @property
    def threads(self) -> int:
        """See `Backend.threads`."""
        return self._threads

    @property
    def warnings(self) -> Sequence[str]:
        """None: there is one way."""
        return ()

    def at_once(self, specs: Iterable[SplitSpec]) -> int:
        """See `Backend.at_once`: one for each thread."""
        return self._threads

    def pinned(self, memory: memoryview) -> AbstractContextManager[None]:
        """See `Backend.pinned`: there is nothing to do."""
        return nullcontext()

    def with_threads(self, threads: int) -> NativeBackend:
        """See `Backend.with_threads`."""
        return NativeBackend(threads)

    def split(self, weight: memoryview, a: memoryview, b: memoryview, spec: SplitSpec) -> SplitStats:
        """See `Backend.split`."""
        return as_stats(self.split_with_timings(weight, a, b, spec))

    def refit(self, difference: memoryview, a: memoryview, b: memoryview, spec: SplitSpec) -> None:
        """See `Backend.refit`."""
        self.split_with_timings(difference, a, b, replace(spec, dtype="F32"), near=True)

    def correct(self, difference: memoryview, a: memoryview, b: memoryview, spec: SplitSpec) -> bool:
        """See `Backend.correct`."""
        return self._splitter.correct(
            difference, spec.rows, spec.cols, spec.rank, spec.scaling, a, b, spec.adapter_dtype
        )

    def split_with_timings(
        self, weight: memoryview, a: memoryview, b: memoryview, spec: SplitSpec, *, near: bool = False
    ) -> _core.SplitResult:
        """The same with the core's own result, which also holds the seconds of its phases."""
        try:
            return self._splitter.split(
                weight=weight,
                rows=spec.rows,
                cols=spec.cols,
                dtype=spec.dtype,
                rank=spec.rank,
                scaling=spec.scaling,
                fan_in_fan_out=spec.fan_in_fan_out,
                a=a,
                b=b,
                adapter_dtype=spec.adapter_dtype,
                passes=spec.passes or 0,
                key=spec.key,
                near=near,
                precise=spec.precise,
            )
        except (ValueError, OverflowError) as error:
            raise WeightError(f"the weight {error}", fix="repair the checkpoint, or exclude the module") from error

    def quantise(self, values: memoryview, to: FourBit) -> None:
        """Fill `to` with the codes of a matrix.

        Raises:
            WeightError: it holds NaN or infinity.
        """
        spec = to.spec
        try:
            to.offset = self._splitter.quantise(
                values, spec.dtype, spec.code, to.packed, to.absmax, to.nested_codes, to.nested_absmax
            )
        except ValueError as error:
            raise WeightError(f"the weight {error}", fix="repair the checkpoint, or exclude the module") from error

    def dequantise(self, stored: FourBit, out: memoryview) -> None:
        """out ← Q."""
        self._splitter.dequantise(out, stored.spec.dtype, stored.spec.code, stored.packed, stored.absmax)

    def subtract(self, values: memoryview, dtype: str, stored: FourBit, out: memoryview) -> None:
        """out ← values − Q, float32.

        Args:
            dtype: of the values: that of `stored`, or "F32"; these may lie in `out`.
        """
        spec = stored.spec
        self._splitter.subtract_stored(values, dtype, out, spec.dtype, spec.code, stored.packed, stored.absmax)

    def norm(self, values: memoryview, dtype: str) -> float:
        """Frobenius norm of values in "F32", "F16" or "BF16"."""
        return self._splitter.norm(values, dtype)

    def nuclear_norm(
        self, values: memoryview, rows: int, cols: int, *, zeros: int = 0, outside: memoryview | None = None
    ) -> tuple[float, bool]:
        """Sum of the singular values of a float32 matrix, and whether that is an estimate.

        Args:
            zeros: so many of the singular values are known to be zero but for rounding. The sum is the same, and found
                sooner.
            outside: their singular vectors of the shorter side, where they are known, or others of that span, float32:
                orthogonal columns, rows × zeros, or orthogonal rows, zeros × cols, of a matrix with more rows than
                columns. The sum is the same, and found sooner still.

        Returns:
            What is no estimate is within 2e-5 of the sum.
        """
        return self._splitter.nuclear_norm(values, rows, cols, "F32", zeros, outside or memoryview(b""))

    def relax(self, stored: FourBit, difference: memoryview, relaxation: float, target: memoryview) -> None:
        """difference ← difference + Q, float32, and target ← target + relaxation·(difference − target), in the dtype of
        `stored`."""
        spec = stored.spec
        self._splitter.relax_towards(
            target, difference, relaxation, spec.dtype, spec.code, stored.packed, stored.absmax
        )

    def refit_workspace_bytes(self, spec: SplitSpec, threads: int) -> int:
        """See `Backend.refit_workspace_bytes`."""
        return _core.refit_workspace_bytes(spec.rows, spec.cols, spec.rank, threads)

    @staticmethod
    def nuclear_norm_workspace_bytes(rows: int, cols: int, threads: int, zeros: int) -> int:
        """Upper bound of the memory that `nuclear_norm` takes."""
        return _core.nuclear_norm_workspace_bytes(rows, cols, threads, zeros)

    def workspace_bytes(self, spec: SplitSpec, threads: int) -> int:
        """See `Backend.workspace_bytes`."""
        return _core.workspace_bytes(spec.rows, spec.cols, spec.dtype, spec.rank, spec.passes or 0, threads)


def as_stats(result: _core.SplitResult) -> SplitStats:
    """The part of the core's result that is the same on every run."""
    return SplitStats.of(
        result.singular_values, result.weight_norm, result.rounding_error, result.estimated_deficit, result.passes
    )
