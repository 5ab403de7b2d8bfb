"""What a run did and what bound it. Not the manifest: that holds no times and is the same from run to run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pissa_convert.plans.quant_stats import Overall


@dataclass
class Timings:
    """Seconds that each stage was busy, and bytes that passed it. The stages overlap.

    Attributes:
        read_seconds, write_seconds: moving bytes between the disk and memory; writing includes making it durable.
        hash_seconds: digests of the source and of the output: of the busier thread.
        compute_seconds: splitting.
        source_bytes: read from the source's weights.
        written_bytes: of weights and adapter, written in this run.
    """

    read_seconds: float = 0.0
    compute_seconds: float = 0.0
    write_seconds: float = 0.0
    hash_seconds: float = 0.0
    source_bytes: int = 0
    written_bytes: int = 0

    @property
    def bottleneck(self) -> str:
        """The stage that was busy longest."""
        stages = {
            "read": self.read_seconds,
            "compute": self.compute_seconds,
            "write": self.write_seconds,
            "hash": self.hash_seconds,
        }
        return max(stages, key=lambda stage: stages[stage])


@dataclass(frozen=True, kw_only=True)
class Report:
    """The result of `convert`; each target's has more.

    Attributes:
        dest: the finished folder or file.
        resumed: an earlier, interrupted run was continued.
        complete_before: nothing was left to do; digests of source and result were compared.
        wall_seconds: of the whole conversion.
        timings: of its stages.
        peak_memory: largest resident set of this process so far, in bytes, or None where it cannot be read.
        warnings: what the user should look into.
    """

    dest: Path
    resumed: bool
    complete_before: bool
    wall_seconds: float
    timings: Timings
    peak_memory: int | None
    warnings: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {**asdict(self), "dest": str(self.dest), "bottleneck": self.timings.bottleneck}


@dataclass(frozen=True, kw_only=True)
class SplitReport(Report):
    """The result of a split into residual and adapter.

    Attributes:
        tensors: weights that were split.
        relative_error: largest ‖W − (W_res + s·B·A)‖ / ‖W‖ over the weights, as stored.
        estimated_deficit: largest estimate of the captured energy that a full SVD would have added, relative.
    """

    tensors: int
    relative_error: float
    estimated_deficit: float


@dataclass(frozen=True, kw_only=True)
class QuantReport(Report):
    """The result of `convert` to a 4-bit base and its adapter.

    Attributes:
        tensors: the manifest's entry of each weight that was quantised.
        adapted: all weights with an adapter together.
        by_type: the same by the last part of the module's name.
    """

    tensors: dict[str, dict[str, Any]]
    adapted: Overall
    by_type: dict[str, Overall]


@dataclass(frozen=True, kw_only=True)
class LoraReport(Report):
    """The result of `convert` to an ordinary LoRA.

    Attributes:
        modules: of each module its rank, relative_error ‖ΔW − B·A‖ / ‖ΔW‖ as stored, and the norms ‖ΔW‖ (norm),
            ‖s′·B′·A′‖ (trained_norm) and ‖s·B·A‖ (init_norm).
        exact_rank: at which no module loses anything.
        relative_error: the same over all modules together.
        relative_change: ‖ΔW‖ / ‖s·B·A‖ over all modules together: how far training went; None from zero.
    """

    modules: dict[str, dict[str, Any]]
    exact_rank: int
    relative_error: float
    relative_change: float | None


@dataclass(frozen=True, kw_only=True)
class MergeReport(Report):
    """The result of `convert` to a merged model.

    Attributes:
        tensors: weights that the adapter changed.
        relative_error: largest ‖stored − (W + s·B·A)‖ / ‖W + s·B·A‖ over them: the rounding to their dtype.
    """

    tensors: int
    relative_error: float


@dataclass(frozen=True)
class SizeLine:
    """A model in a type.

    Attributes:
        what: the type, or what was made.
        nbytes: of all its files.
        relative_error: ‖W − stored‖ / ‖W‖, root mean square over its weights or a sample of them.
    """

    what: str
    nbytes: int
    relative_error: float


@dataclass(frozen=True, kw_only=True)
class GgufReport(Report):
    """The result of `convert` to a GGUF, or of one.

    Attributes:
        tensors: adapted tensors of an adapter, or tensors of a model that were encoded.
        relative_error: largest ‖stored − exact‖ / ‖exact‖ over them; for an adapter of the products B·A.
        usage: the commands that use the result.
        sizes: what was made, where it is quantised, and then the same weights in other types.
    """

    tensors: int
    relative_error: float
    usage: str
    sizes: tuple[SizeLine, ...] = ()
