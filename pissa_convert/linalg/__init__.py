"""One protocol for splitting a matrix, and what goes in and comes out of it.

`native` is the C++ core on the CPU, `torch_backend` works on GPUs. A backend works on bytes in place and knows nothing
of files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol

from pissa_convert.formats.manifest import Fixed, FixedCount


@dataclass(frozen=True)
class SplitSpec:
    """One split, W ≈ W_res + scaling·B·A.

    Attributes:
        rows, cols: shape of the weight as stored, row-major.
        dtype: of the weight and its residual: "F32", "F16" or "BF16" (safetensors' codes).
        rank: at most min(rows, cols).
        scaling: s > 0.
        adapter_dtype: of A and B, same codes.
        fan_in_fan_out: the weight is stored (in, out), as in GPT-2's Conv1D.
        passes: over the weight, or None for as many as the error estimate asks for.
        key: 64 bits that decide the random start; see `tensor_key`.
        name: of the tensor, for messages.
        precise: A and B have the singular vectors of a float32 or float16 weight to float32's digits, and the residual
            of a float32 one is summed in float64. Else a backend may give them bfloat16's, and sum in float32.
    """

    rows: int
    cols: int
    dtype: str
    rank: int
    scaling: float
    adapter_dtype: str
    fan_in_fan_out: bool
    passes: int | None
    key: int
    name: str = ""
    precise: bool = True

    @property
    def a_shape(self) -> tuple[int, int]:
        """(rank, in)."""
        return self.rank, self.rows if self.fan_in_fan_out else self.cols

    @property
    def b_shape(self) -> tuple[int, int]:
        """(out, rank)."""
        return self.cols if self.fan_in_fan_out else self.rows, self.rank

    @property
    def factor_bytes(self) -> tuple[int, int]:
        """Bytes of A and of B."""
        width = 4 if self.adapter_dtype == "F32" else 2
        return width * self.a_shape[0] * self.a_shape[1], width * self.b_shape[0] * self.b_shape[1]


@dataclass(frozen=True)
class SplitStats:
    """What is known of a finished split; the same on every run.

    Attributes:
        singular_values: σ₁ ≥ … ≥ σ_rank of the weight.
        captured_energy: Σσ² / ‖W‖².
        relative_error: ‖W − (W_res + s·B·A)‖ / ‖W‖, Frobenius: the rounding of the stored residual.
        estimated_deficit: estimate of 1 − Σσ̂²/Σσ² against an exact SVD.
        passes: over the weight; 0 where a small matrix was done exactly.
    """

    singular_values: tuple[float, ...]
    captured_energy: float
    relative_error: float
    estimated_deficit: float
    passes: int

    @classmethod
    def of(
        cls, sigma: Sequence[float], weight_norm: float, rounding_error: float, estimated_deficit: float, passes: int
    ) -> SplitStats:
        """From ‖W‖ and ‖W − (W_res + s·B·A)‖ as they were measured."""
        energy = sum(value * value for value in sigma)
        return cls(
            singular_values=tuple(sigma),
            captured_energy=energy / (weight_norm * weight_norm) if weight_norm else 0.0,
            relative_error=rounding_error / weight_norm if weight_norm else 0.0,
            estimated_deficit=estimated_deficit,
            passes=passes,
        )

    def as_json(self) -> dict[str, Any]:
        """JSON-ready values that `from_json` turns back into an equal object."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> SplitStats:
        """The inverse of `as_json`."""
        known = {field.name: values[field.name] for field in fields(cls)}
        return cls(**known | {"singular_values": tuple(values["singular_values"])})

    def as_manifest(self) -> dict[str, Any]:
        """The manifest's entry, in numbers of fixed width."""
        return {
            "rank": len(self.singular_values),
            "passes": FixedCount(self.passes),
            "captured_energy": Fixed(self.captured_energy),
            "estimated_deficit": Fixed(self.estimated_deficit),
            "relative_error": Fixed(self.relative_error),
            "singular_values": [Fixed(value) for value in self.singular_values],
        }

    @classmethod
    def blank(cls, rank: int) -> SplitStats:
        """Stands for results that are not known yet; renders with the same width."""
        return cls((0.0,) * rank, 0.0, 0.0, 0.0, 0)


class Backend(Protocol):
    """Splits matrices, one at a time. Backends agree in accuracy, exactness and signs, not in every bit."""

    @property
    def name(self) -> str:
        """Backend and kernel: with the same name on the same kind of CPU, the same bytes come out."""

    @property
    def threads(self) -> int:
        """Threads that a split works with; how many there are changes no byte of a result."""

    @property
    def warnings(self) -> Sequence[str]:
        """What the user should know of the splits so far, by it and all that are made from it."""

    def at_once(self, specs: Iterable[SplitSpec]) -> int:
        """How many of these it and those made from it may split at the same time, at most.

        Raises:
            RequestError: its memory does not hold the largest.
        """

    def pinned(self, memory: memoryview) -> AbstractContextManager[None]:
        """Meanwhile weights lie in this memory: a device can get it ready to read from and write to."""

    def with_threads(self, threads: int) -> Backend:
        """Another of the same kind, which may split while this one does."""

    def split(self, weight: memoryview, a: memoryview, b: memoryview, spec: SplitSpec) -> SplitStats:
        """Turn the bytes of W into those of W_res, and fill A's and B's.

        Raises:
            WeightError: W holds NaN or infinity (it is then unchanged), or its residual overflows its dtype.
        """

    def workspace_bytes(self, spec: SplitSpec, threads: int) -> int:
        """Upper bound of the memory that so many threads take beside the three buffers."""

    def refit(self, difference: memoryview, a: memoryview, b: memoryview, spec: SplitSpec) -> None:
        """Fit A and B to a float32 matrix near one of which they hold these, and leave in its place what they leave.

        The search begins at them, so that one pass over the matrix is enough as a rule; where the matrix is not near
        after all, it is that of a `split`. What is left is rounded to float32 after float32 sums, or better ones. Rows
        are `out`; the spec's dtype and passes are not looked at.

        Raises:
            WeightError: see `split`.
        """

    def correct(self, difference: memoryview, a: memoryview, b: memoryview, spec: SplitSpec) -> bool:
        """Fit A and B to a matrix near the one they were fitted to, of which `difference` is what they leave, float32.

        One step of alternating least squares: B, then A, become the best beside the other as it is; and `difference`
        what they leave then, to about one part in a thousand. They are not in the form of a split: their rows and
        columns are in no order, and orthogonal no more.

        Returns:
            False, with the difference as it was, where A or B is far from having independent rows or columns: `refit`
            takes those.
        """

    def refit_workspace_bytes(self, spec: SplitSpec, threads: int) -> int:
        """Upper bound of the memory that it and `correct` take beside the three buffers."""


@dataclass(frozen=True)
class FourBitSpec:
    """How values are quantised blockwise: what bitsandbytes calls quant_type, shape, dtype, and double quantisation.

    Attributes:
        rows, cols: of the matrix, row-major; blocks of 64 values run through all of it.
        dtype: of the values ("F32", "F16" or "BF16"), and of what is read back.
        code: "nf4" or "fp4".
        nested: the blocks' absmaxes are themselves stored in 8 bits.
    """

    rows: int
    cols: int
    dtype: str
    code: str
    nested: bool

    @property
    def value_bytes(self) -> int:
        """Of the values, before they are quantised."""
        return self.rows * self.cols * (4 if self.dtype == "F32" else 2)

    @property
    def packed_bytes(self) -> int:
        """Two codes in a byte."""
        return (self.rows * self.cols + 1) // 2

    @property
    def blocks(self) -> int:
        """Blocks of 64 values."""
        return -(-self.rows * self.cols // 64)

    @property
    def nested_blocks(self) -> int:
        """Blocks of 256 absmaxes; 0 where they are not nested."""
        return -(-self.blocks // 256) if self.nested else 0


@dataclass
class FourBit:
    """A quantised matrix in memory; Q is what it reads back as.

    Attributes:
        packed: `packed_bytes` bytes.
        absmax: of each block, float32: with double quantisation, what the stored ones mean.
        nested_codes: the 8-bit absmaxes; empty without double quantisation.
        nested_absmax: float32, of each nested block; empty without double quantisation.
        offset: the absmaxes' mean, which is added to what the 8 bits say.
    """

    spec: FourBitSpec
    packed: memoryview
    absmax: memoryview
    nested_codes: memoryview
    nested_absmax: memoryview
    offset: float = 0.0

    @classmethod
    def empty(cls, spec: FourBitSpec) -> FourBit:
        """In buffers of its own."""
        codes = spec.blocks if spec.nested else 0
        packed, absmax, nested_codes, nested_absmax = (
            memoryview(bytearray(size)) for size in (spec.packed_bytes, 4 * spec.blocks, codes, 4 * spec.nested_blocks)
        )
        return cls(spec, packed, absmax, nested_codes, nested_absmax)

    @staticmethod
    def nbytes(spec: FourBitSpec) -> int:
        """Bytes of `empty`."""
        return spec.packed_bytes + (5 if spec.nested else 4) * spec.blocks + 4 * spec.nested_blocks


def tensor_key(seed: int, name: str) -> int:
    """The key of a tensor's random start: 64 bits of SHA-256 over seed and name.

    So a tensor's result depends on neither the order of the work nor what else is in the checkpoint.
    """
    return int.from_bytes(hashlib.sha256(f"{seed}\0{name}".encode()).digest()[:8], "little")
