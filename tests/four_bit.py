"""4-bit folders read by bitsandbytes, from the files alone."""

from __future__ import annotations

from pathlib import Path

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from checkpoints import load_all


def bases(folder: Path) -> dict[str, torch.Tensor]:
    """Every quantised weight as bitsandbytes reads it back."""
    tensors = load_all(folder)
    found = {}
    for name in tensors:
        if name.endswith(".weight.quant_map"):
            weight = name.removesuffix(".quant_map")
            parts = {key: value for key, value in tensors.items() if key.startswith(f"{weight}.")}
            found[weight] = dequantize_4bit(tensors[weight], QuantState.from_dict(parts, torch.device("cpu")))
    return found


def plainly_quantised(weight: torch.Tensor) -> torch.Tensor:
    """NF4 with double quantisation, and back."""
    return dequantize_4bit(*quantize_4bit(weight, quant_type="nf4", compress_statistics=True))
