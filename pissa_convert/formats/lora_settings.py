"""What a LoRA's configuration says of ranks and scalings, with PEFT's (0.21) meaning; and which is no plain LoRA."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pissa_convert.errors import FormatError, RequestError

REFUSED = {
    "use_dora": "DoRA scales each weight's columns, which no LoRA of another base can say",
    "use_qalora": "QA-LoRA pools the inputs of its factors",
    "use_bdlora": "BD-LoRA's factors are block-diagonal",
    "velora_config": "VeLoRA projects the inputs of its factors",
    "kasa_config": "KaSA's adapter is not B·A alone",
    "monteclora_config": "MonteCLoRA samples its factors",
    "arrow_config": "Arrow routes between adapters",
    "alora_invocation_tokens": "aLoRA applies only after its invocation tokens",
    "layer_replication": "the adapter makes a model with more layers",
    "megatron_config": "the factors of a Megatron model are sharded",
    "target_parameters": "factors of 3-D parameters (fused experts) are not supported",
}
"""Settings of a LoRA configuration that make the adapter more than s·B·A on whole modules."""


@dataclass(frozen=True)
class LoraSettings:
    """What the configuration says of ranks and scalings."""

    rank: int
    alpha: float
    rslora: bool
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]

    def rank_of(self, module: str) -> int:
        """Rank of a module's factors."""
        return int(_by_pattern(self.ranks, module, self.rank))

    def scaling_of(self, module: str) -> float:
        """s in ΔW = s·B·A."""
        rank, alpha = self.rank_of(module), float(_by_pattern(self.alphas, module, self.alpha))
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value whose pattern is the first to match the module's name or its ending, as PEFT matches."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return patterns.get(module, default)


def read_settings(config: Mapping[str, Any], path: Path) -> LoraSettings:
    """Check the configuration that lies at `path`.

    Raises:
        RequestError: it is of no LoRA, or of one that is more than s·B·A.
        FormatError: a value is malformed.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise RequestError("the adapter is no LoRA", file=path, expected="peft_type LORA", found=kind)
    for name, reason in REFUSED.items():
        if config.get(name):
            raise RequestError(f"{name} is set: {reason}", file=path, fix="such an adapter cannot be converted")
    rank, alpha, rslora = config.get("r", 8), config.get("lora_alpha", 8), config.get("use_rslora", False)
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    for name, value, fits in (
        ("r", rank, _is_rank(rank)),
        ("lora_alpha", alpha, _is_alpha(alpha)),
        ("use_rslora", rslora, isinstance(rslora, bool)),
        ("rank_pattern", ranks, isinstance(ranks, dict) and all(map(_is_rank, ranks.values()))),
        ("alpha_pattern", alphas, isinstance(alphas, dict) and all(map(_is_alpha, alphas.values()))),
    ):
        if not fits:
            raise FormatError(f"{name} is malformed", file=path, found=str(value)[:80])
    for pattern in (*ranks, *alphas):
        try:
            re.compile(pattern)
        except re.error as error:
            raise FormatError(f"a pattern is no regular expression: {error}", file=path, found=pattern[:80]) from error
    return LoraSettings(rank, float(alpha), rslora, ranks, {key: float(value) for key, value in alphas.items()})


def _is_rank(value: object) -> bool:
    return type(value) is int and 0 < value < 2**31


def _is_alpha(value: object) -> bool:
    return type(value) in (int, float) and 0 < float(value) < math.inf  # type: ignore[arg-type]
