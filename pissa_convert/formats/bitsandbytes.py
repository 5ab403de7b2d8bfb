"""How bitsandbytes and transformers store a 4-bit weight: six tensors (four without double quantisation) and a config.

Where a weight X was, there are X (two codes a byte), X.absmax, X.quant_state.bitsandbytes__nf4 (JSON as bytes), and
float32 tables. They are laid one after the other, bytes first. The JSON is what bitsandbytes writes, with blanks behind
it: one number in it is known only when the work is done, so its room is that of the longest, and more until the tables
end at a multiple of eight. Then they are aligned, and whatever follows is as it was.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from pissa_convert import _core
from pissa_convert.errors import WeightError
from pissa_convert.linalg import FourBit, FourBitSpec

Tensor = tuple[str, str, tuple[int, ...]]
"""Name, safetensors dtype, shape."""

BLOCK, NESTED_BLOCK = 64, 256
_TORCH = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_LONGEST = -1.2345678901234567e-38
"""No float32 has a longer representation."""


def stored_tensors(name: str, spec: FourBitSpec, at: int) -> list[Tensor]:
    """What takes the place of the weight `name`, in the order of the bytes from `at` on, an offset in the file."""
    state = f"{name}.quant_state.bitsandbytes__{spec.code}"
    tables = _tables(name, spec)
    codes: list[Tensor] = [(name, "U8", (spec.packed_bytes, 1))]
    if spec.nested:
        codes.append((f"{name}.absmax", "U8", (spec.blocks,)))
    begin = at + sum(shape[0] for _, _, shape in codes)
    size = len(quant_state(spec, _LONGEST)) + 4 * sum(shape[0] for _, _, shape in tables)
    blanks = -(begin + size) % 8
    return [*codes, (state, "U8", (len(quant_state(spec, _LONGEST)) + blanks,)), *tables]


def _tables(name: str, spec: FourBitSpec) -> list[Tensor]:
    codes: Tensor = (f"{name}.quant_map", "F32", (16,))
    if not spec.nested:
        return [(f"{name}.absmax", "F32", (spec.blocks,)), codes]
    nested: list[Tensor] = [
        (f"{name}.nested_absmax", "F32", (spec.nested_blocks,)),
        (f"{name}.nested_quant_map", "F32", (256,)),
    ]
    return [*nested, codes]


def quant_state(spec: FourBitSpec, offset: float) -> bytes:
    """The JSON of everything about a weight that is not a tensor, as bitsandbytes writes it."""
    values: dict[str, Any] = {
        "quant_type": spec.code,
        "blocksize": BLOCK,
        "dtype": _TORCH[spec.dtype],
        "shape": [spec.rows, spec.cols],
    }
    if spec.nested:
        values |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
    return json.dumps(values).encode()


def fill(out: memoryview, tensors: Sequence[Tensor], stored: FourBit) -> None:
    """Write a quantised weight into its place, laid out as `stored_tensors` says."""
    spec = stored.spec
    name = tensors[0][0]
    contents: Mapping[str, bytes | memoryview] = {
        name: stored.packed,
        f"{name}.absmax": stored.nested_codes if spec.nested else stored.absmax,
        f"{name}.nested_absmax": stored.nested_absmax,
        f"{name}.nested_quant_map": struct.pack("<256f", *_core.dynamic_map()),
        f"{name}.quant_map": struct.pack("<16f", *_core.code_values(spec.code)),
    }
    at = 0
    for tensor, dtype, shape in tensors:
        size = shape[0] * (4 if dtype == "F32" else 1)
        data = contents.get(tensor) or quant_state(spec, stored.offset).ljust(size)
        out[at : at + size] = data
        at += size


def unpack(data: memoryview, tensors: Sequence[Tensor], spec: FourBitSpec) -> FourBit:
    """The inverse of `fill`: a quantised weight from the bytes of its tensors, with the tables that are stored there.

    Raises:
        WeightError: what is stored of it is damaged.
    """
    import numpy as np  # takes as long to load as a small model to quantise

    parts, at = {}, 0
    for name, dtype, shape in tensors:
        size = shape[0] * (4 if dtype == "F32" else 1)
        parts[name.removeprefix(tensors[0][0])] = data[at : at + size]
        at += size
    if not spec.nested:
        absmax = parts[".absmax"]
        return FourBit(spec, parts[""], absmax, absmax[:0], absmax[:0])
    codes, largest, table = parts[".absmax"], parts[".nested_absmax"], parts[".nested_quant_map"]
    try:
        offset = json.loads(bytes(parts[f".quant_state.bitsandbytes__{spec.code}"]))["nested_offset"]
        values = np.frombuffer(table, np.float32)[np.frombuffer(codes, np.uint8)]
        scales = np.repeat(np.frombuffer(largest, np.float32), NESTED_BLOCK)[: spec.blocks]
        absmax = memoryview((values * scales + np.float32(offset)).tobytes())
    except (ValueError, KeyError, TypeError) as error:
        raise WeightError(f"its quant_state is damaged ({error})", fix="make the conversion again") from error
    return FourBit(spec, parts[""], absmax, codes, largest, offset)


def quantization_config(code: str, nested: bool, compute_dtype: str, skipped: Sequence[str] | None) -> dict[str, Any]:
    """The `quantization_config` of config.json, as transformers writes it.

    Args:
        skipped: modules that are not quantised; None for transformers' default, the output head.
    """
    return {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": compute_dtype,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": code,
        "bnb_4bit_use_double_quant": nested,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": None if skipped is None else list(skipped),
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }
