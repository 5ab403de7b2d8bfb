"""The types of GGUF: bit-identical to llama.cpp's own library."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from pissa_convert.formats.gguf_types import TYPES
from pissa_convert.transforms import ggml

TYPES_WRITTEN = ("f32", "f16", "bf16", "q8_0", "q5_0", "q5_1", "q4_0", "q4_1", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k")


def by_llama_cpp(values: Any, kind: str) -> Any:
    library = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
    quantize = library.ggml_quantize_chunk
    quantize.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    rows, columns = values.shape
    blocks = np.zeros(rows * TYPES[kind].row_bytes(columns), np.uint8)
    quantize(TYPES[kind].number, values.ctypes.data, blocks.ctypes.data, 0, rows, columns, None)
    return blocks


def encoded(values: Any, kind: str) -> Any:
    out = np.empty(values.shape[0] * TYPES[kind].row_bytes(values.shape[1]), np.uint8)
    ggml.encode(values, kind, out.data)
    return out


@pytest.mark.parametrize("kind", [kind.upper() for kind in TYPES_WRITTEN])
@pytest.mark.parametrize("scale", [1e-7, 0.02, 3.0, 1e3])
def test_every_type_is_bit_identical_to_llama_cpps(kind: str, scale: float) -> None:
    values = np.random.default_rng(1).standard_normal((12, 512)).astype(np.float32) * np.float32(scale)
    values[0] = 0
    values[1, ::2] = 0
    values[2] = values[2, 0]
    values[3] *= np.geomspace(1e-3, 1, 512, dtype=np.float32)
    assert (encoded(values, kind) == by_llama_cpp(values, kind)).all()


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q5_0", "Q5_1", "Q4_0", "Q4_1"])
@given(
    values=arrays.arrays(
        np.float32,
        (2, 32),
        elements=st.floats(-60000, 60000, width=32).map(lambda value: value if abs(value) > 1e-30 else 0.0),
        fill=st.nothing(),
    )
)
@settings(max_examples=60, deadline=None)
def test_any_values_are_stored_as_llama_cpp_stores_them(kind: str, values: Any) -> None:
    assert (encoded(values, kind) == by_llama_cpp(values, kind)).all()


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_0", "Q5_1", "Q4_0", "Q4_1"])
def test_values_that_are_next_to_nothing_are_nothing(kind: str) -> None:
    stored = encoded(np.full((1, 32), 1.2e-38, np.float32), kind)
    assert (ggml.decode(stored.data, kind, 32) == 0).all()


def test_the_types_are_those_of_the_gguf_package() -> None:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    for name, kind in TYPES.items():
        assert GGML_QUANT_SIZES[GGMLQuantizationType[name]] == (kind.block, kind.nbytes)
        assert GGMLQuantizationType[name] == kind.number
