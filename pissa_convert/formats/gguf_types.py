"""The types that GGUF stores values in: blocks of values along a row, each as long as its type says (ggml.h)."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class GgmlType:
    """How values are stored.

    Attributes:
        number: in a file.
        block: values that are stored together, along a row.
        nbytes: of a block.
    """

    number: int
    block: int
    nbytes: int

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row; `columns` is a multiple of the block."""
        return columns // self.block * self.nbytes


_SUPER = 256

TYPES: dict[str, GgmlType] = {
    "F32": GgmlType(0, 1, 4),
    "F16": GgmlType(1, 1, 2),
    "Q4_0": GgmlType(2, 32, 18),
    "Q4_1": GgmlType(3, 32, 20),
    "Q5_0": GgmlType(6, 32, 22),
    "Q5_1": GgmlType(7, 32, 24),
    "Q8_0": GgmlType(8, 32, 34),
    "Q2_K": GgmlType(10, _SUPER, 84),
    "Q3_K": GgmlType(11, _SUPER, 110),
    "Q4_K": GgmlType(12, _SUPER, 144),
    "Q5_K": GgmlType(13, _SUPER, 176),
    "Q6_K": GgmlType(14, _SUPER, 210),
    "IQ2_XXS": GgmlType(16, _SUPER, 66),
    "IQ2_XS": GgmlType(17, _SUPER, 74),
    "IQ3_XXS": GgmlType(18, _SUPER, 98),
    "IQ1_S": GgmlType(19, _SUPER, 50),
    "IQ4_NL": GgmlType(20, 32, 18),
    "IQ3_S": GgmlType(21, _SUPER, 110),
    "IQ2_S": GgmlType(22, _SUPER, 82),
    "IQ4_XS": GgmlType(23, _SUPER, 136),
    "I8": GgmlType(24, 1, 1),
    "I16": GgmlType(25, 1, 2),
    "I32": GgmlType(26, 1, 4),
    "I64": GgmlType(27, 1, 8),
    "F64": GgmlType(28, 1, 8),
    "IQ1_M": GgmlType(29, _SUPER, 56),
    "BF16": GgmlType(30, 1, 2),
    "TQ1_0": GgmlType(34, _SUPER, 54),
    "TQ2_0": GgmlType(35, _SUPER, 66),
    "MXFP4": GgmlType(39, 32, 17),
}

NAMES = {kind.number: name for name, kind in TYPES.items()}

PLAIN = ("F32", "F16", "BF16")
"""One value at a time."""


def type_bytes(name: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor; the last dimension is a multiple of the type's block."""
    kind = TYPES[name]
    return math.prod(shape) // kind.block * kind.nbytes
