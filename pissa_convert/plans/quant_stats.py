"""What is known of a quantised weight, and of all of them together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pissa_convert.formats.manifest import Fixed, FixedCount


@dataclass(frozen=True)
class QuantStats:
    """Of one weight; the same on every run. Q is the base as bitsandbytes reads it back.

    Attributes:
        norm: ‖W‖, Frobenius.
        error: ‖W − (Q + s·B·A)‖ as stored, or ‖W − Q‖ without an adapter.
        plain_error: ‖W − Q(W)‖, of quantising W itself.
        nuclear: sum of the singular values of W − (Q + s·B·A); 0 without an adapter, and so the next.
        plain_nuclear: of W − Q(W).
        loftq_error, loftq_nuclear: of what LoftQ's order would have reached; 0 where it was not asked for.
        iterations: quantisations until the result was found; 0 without an adapter.
        estimated: the sums of singular values are estimates.
    """

    norm: float = 0.0
    error: float = 0.0
    plain_error: float = 0.0
    nuclear: float = 0.0
    plain_nuclear: float = 0.0
    loftq_error: float = 0.0
    loftq_nuclear: float = 0.0
    iterations: int = 0
    estimated: bool = False

    @property
    def relative_error(self) -> float:
        """‖W − (Q + s·B·A)‖ / ‖W‖."""
        return self.error / self.norm if self.norm else 0.0

    @property
    def reduction(self) -> float:
        """The paper's: 1 − ‖W − (Q + s·B·A)‖_* / ‖W − Q(W)‖_*."""
        return 1 - self.nuclear / self.plain_nuclear if self.plain_nuclear else 0.0

    @property
    def loftq_reduction(self) -> float:
        """The same for LoftQ's order."""
        return 1 - self.loftq_nuclear / self.plain_nuclear if self.plain_nuclear else 0.0

    def as_json(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)

    def as_manifest(self, adapted: bool, compared: bool) -> dict[str, Any]:
        """The manifest's entry, in numbers of fixed width."""
        entry: dict[str, Any] = {"norm": Fixed(self.norm), "relative_error": Fixed(self.relative_error)}
        if not adapted:
            return entry
        entry |= {
            "plain_relative_error": Fixed(self.plain_error / self.norm if self.norm else 0.0),
            "iterations": FixedCount(self.iterations),
            "nuclear_norm": Fixed(self.nuclear),
            "plain_nuclear_norm": Fixed(self.plain_nuclear),
            "reduction": Fixed(self.reduction),
            "estimated": FixedCount(int(self.estimated)),
        }
        if compared:
            entry |= {
                "loftq_relative_error": Fixed(self.loftq_error / self.norm if self.norm else 0.0),
                "loftq_reduction": Fixed(self.loftq_reduction),
            }
        return entry


@dataclass(frozen=True)
class Overall:
    """Of some weights together.

    Attributes:
        weights: how many.
        relative_error, plain_relative_error: √Σ‖·‖² / √Σ‖W‖².
        reduction, loftq_reduction: means over the weights, as in the paper's tables; None where there is none.
    """

    weights: int
    relative_error: float
    plain_relative_error: float
    reduction: float
    loftq_reduction: float | None


def overall(entries: Iterable[Mapping[str, Any]]) -> Overall:
    """Add up the manifest's entries of weights with an adapter."""
    kept = list(entries)
    norm = math.sqrt(sum(entry["norm"] ** 2 for entry in kept)) or 1.0
    loftq = [entry["loftq_reduction"] for entry in kept if "loftq_reduction" in entry]
    return Overall(
        len(kept),
        math.sqrt(sum((entry["relative_error"] * entry["norm"]) ** 2 for entry in kept)) / norm,
        math.sqrt(sum((entry["plain_relative_error"] * entry["norm"]) ** 2 for entry in kept)) / norm,
        sum(entry["reduction"] for entry in kept) / max(1, len(kept)),
        sum(loftq) / len(loftq) if loftq else None,
    )
