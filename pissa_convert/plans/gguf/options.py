"""What a conversion to or of GGUF was asked to do. Everything here decides the bytes that come out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pissa_convert.errors import RequestError
from pissa_convert.options import SplitOptions

ADAPTER_TYPES = ("f16", "f32", "bf16", "q8_0")
"""What an adapter's factors may be stored in."""

WEIGHT_TYPES = (
    *("f32", "f16", "bf16", "q8_0", "q5_0", "q5_1", "q4_0", "q4_1"),
    *("q2_k", "q3_k", "q4_k", "q5_k", "q6_k"),
)
"""What a model's weights may be stored in."""

MODEL_TYPES = ("template", *WEIGHT_TYPES)
"""For a model with a template: also each tensor's type there."""

MERGED_TYPES = ("same", *WEIGHT_TYPES)
"""For a GGUF that is merged or split: also each tensor's own type."""

KEEPING = ("template", "same")


@dataclass(frozen=True)
class GgufOptions:
    """Options of `--to gguf`, and of `--to merged` where a GGUF is merged.

    Attributes:
        outtype: of an adapter's factors, or a model's weights; one of KEEPING for the type that each tensor has.
    """

    outtype: str

    def as_json(self) -> dict[str, Any]:
        """JSON-ready values (for the manifest and the fingerprint)."""
        return asdict(self)


def gguf_options(*, outtype: str | None = None, known: Sequence[str]) -> GgufOptions:
    """Check the values.

    Args:
        outtype: one of `known`, the first of which is the default.

    Raises:
        RequestError: it is not.
    """
    outtype = known[0] if outtype is None else outtype.lower()
    if outtype not in known:
        raise RequestError("--outtype is unknown", expected=", ".join(known), found=outtype[:40])
    return GgufOptions(outtype)


@dataclass(frozen=True)
class GgufSplitOptions:
    """Options of `--to pissa` where a GGUF is split.

    Attributes:
        split: those of every split.
        outtype: of the residual; "same" for each tensor's own type.
    """

    split: SplitOptions
    outtype: str

    def as_json(self) -> dict[str, Any]:
        """JSON-ready values (for the manifest and the fingerprint)."""
        return {**self.split.as_json(), "outtype": self.outtype}
