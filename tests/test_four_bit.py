"""Our 4-bit quantiser against bitsandbytes': the same bytes, on every instruction set that this CPU has."""

from __future__ import annotations

import math
from collections.abc import Iterator

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from checkpoints import llm_like

from pissa_convert import _core
from pissa_convert.errors import WeightError
from pissa_convert.formats.bitsandbytes import quant_state
from pissa_convert.linalg import FourBit, FourBitSpec
from pissa_convert.linalg.native import NativeBackend

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
SHAPES = [(64, 64), (1, 63), (7, 9), (1, 1), (3, 1000), (577, 333), (512, 1024), (1, 128)]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """bitsandbytes' mean of more than 32768 absmaxes is torch's, whose last bit depends on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def raw(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def quantised(values: torch.Tensor, code: str, nested: bool) -> FourBit:
    dtype = next(name for name, kind in DTYPES.items() if kind == values.dtype)
    found = FourBit.empty(FourBitSpec(*values.shape, dtype, code, nested))
    NativeBackend(2).quantise(raw(values), found)
    return found


def samples(shape: tuple[int, int]) -> Iterator[torch.Tensor]:
    """Ordinary weights; weights with zeros and a block of nothing else; few distinct values of all magnitudes."""
    generator = torch.Generator().manual_seed(shape[0])
    yield 0.02 * torch.randn(shape, generator=generator)
    sparse = 0.02 * torch.randn(shape, generator=generator)
    sparse[sparse.abs() < 0.01] = 0
    sparse[0, :64] = 0
    yield sparse
    magnitude = 10.0 ** torch.randint(-6, 4, (shape[0], 1), generator=generator)
    yield torch.randn(shape, generator=generator).bfloat16().float() * magnitude


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("code", ["nf4", "fp4"])
@pytest.mark.parametrize("kernel", _core.kernels())
def test_the_stored_bytes_are_bitsandbytes(
    monkeypatch: pytest.MonkeyPatch, kernel: str, code: str, dtype: str, nested: bool
) -> None:
    monkeypatch.setenv("PISSA_CONVERT_KERNEL", kernel)
    for shape in SHAPES:
        for sample in samples(shape):
            values = sample.to(DTYPES[dtype])
            packed, state = bnb.quantize_4bit(values, quant_type=code, compress_statistics=nested)
            found = quantised(values, code, nested)
            assert bytes(found.packed) == packed.numpy().tobytes()
            if nested:
                assert bytes(found.nested_codes) == state.absmax.numpy().tobytes()
                assert bytes(found.nested_absmax) == state.state2.absmax.numpy().tobytes()
                assert found.offset == state.offset.item()
            else:
                assert bytes(found.absmax) == state.absmax.numpy().tobytes()
            blob = state.as_dict(packed=True)[f"quant_state.bitsandbytes__{code}"]
            assert quant_state(found.spec, found.offset) == blob.numpy().tobytes()


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("code", ["nf4", "fp4"])
def test_it_is_read_back_as_bitsandbytes_reads_it(code: str, dtype: str, nested: bool) -> None:
    for shape in [(64, 64), (3, 1000), (256, 1024)]:
        for sample in samples(shape):
            values = sample.to(DTYPES[dtype])
            wanted = bnb.dequantize_4bit(*bnb.quantize_4bit(values, quant_type=code, compress_statistics=nested))
            found, difference = torch.empty_like(values), torch.empty(shape)
            stored, backend = quantised(values, code, nested), NativeBackend(2)
            backend.dequantise(stored, raw(found))
            assert torch.equal(found, wanted)
            backend.subtract(raw(values), stored.spec.dtype, stored, raw(difference))
            assert torch.equal(difference, values.float() - wanted.float())


def test_the_mean_of_many_absmaxes_is_added_up_as_torch_adds_it_up() -> None:
    """The offset is one float32 mean of all blocks; 100,003 of them pass every level of torch's cascade."""
    for blocks in (1, 5, 7, 8, 33, 1000, 32768, 100_003):
        values = torch.rand(1, 64 * blocks, generator=torch.Generator().manual_seed(blocks)) + 0.5
        _, state = bnb.quantize_4bit(values, quant_type="nf4", compress_statistics=True)
        assert quantised(values, "nf4", True).offset == state.offset.item()


def test_the_tables_are_bitsandbytes() -> None:
    assert np.array_equal(np.array(_core.dynamic_map(), np.float32), bnb.create_dynamic_map().numpy())
    for code in ("nf4", "fp4"):
        assert np.array_equal(np.array(_core.code_values(code), np.float32), bnb.get_4bit_type(code, "cpu").numpy())


@pytest.mark.parametrize("place", [0, 63, 64, 99])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(bad: float, place: int) -> None:
    values = torch.ones(1, 100)
    values[0, place] = bad
    with pytest.raises(WeightError, match="NaN or infinity"):
        quantised(values, "nf4", True)


def test_the_frobenius_norm() -> None:
    values = torch.randn(70, 300, generator=torch.Generator().manual_seed(0))
    assert NativeBackend(2).norm(raw(values), "F32") == pytest.approx(float(values.double().norm()), rel=1e-12)


SMALL_SHAPES = [(70, 300), (300, 70), (131, 131), (1, 90), (90, 1), (2, 2), (1023, 37), (37, 1601)]


def spectra(rows: int, cols: int) -> Iterator[torch.Tensor]:
    """Matrices of every kind of spectrum: those that float is enough for, those that it is not, and those between."""
    generator = torch.Generator().manual_seed(rows)
    noise = torch.randn(rows, cols, generator=generator, dtype=torch.float64)
    left, values, right = torch.linalg.svd(noise, full_matrices=False)
    size = len(values)
    yield from (noise * 10.0**exponent for exponent in (0, -38, -30, -15, -11, 11, 15, 30, 36))
    yield torch.zeros(rows, cols)
    yield from (noise + mean for mean in (1, 30, 1e4))
    for power in (0.25, 0.5, 0.75, 1, 2, 4):
        yield (left * torch.arange(1.0, size + 1).double() ** -power) @ right
    for rank in {1, min(3, size), (size + 1) // 2, max(1, size - 8)}:
        yield (left[:, :rank] * values[:rank]) @ right[:rank]
    for large in (3, 10, 30, 100, 300, 1e3, 1e4, 1e6):
        few = torch.where(torch.arange(size) < 3, large, 1.0).double()
        yield (left * few) @ right
        yield (left * (few * values)) @ right
        yield noise * torch.logspace(0, math.log10(large), rows, dtype=torch.float64)[:, None]


@pytest.mark.parametrize("shape", SMALL_SHAPES)
def test_the_nuclear_norm_of_a_small_matrix(shape: tuple[int, int]) -> None:
    backend = NativeBackend(2)
    for wide in spectra(*shape):
        matrix = wide.float()
        nuclear = float(torch.linalg.svdvals(matrix.double()).sum())
        found, estimated = backend.nuclear_norm(raw(matrix), *shape)
        assert found == pytest.approx(nuclear, rel=2e-5)
        assert not estimated


@pytest.mark.parametrize("shape", [(320, 512), (512, 320), (448, 448), (100, 500)])
def test_the_nuclear_norm_of_what_a_quantiser_and_a_refit_leave(shape: tuple[int, int]) -> None:
    """It lacks the directions of the adapter, which makes no difference but in time, and so do wrong ones."""
    weight = llm_like(*shape)
    left = weight - bnb.dequantize_4bit(*bnb.quantize_4bit(weight, quant_type="nf4"))
    u, s, v = torch.linalg.svd(left.double(), full_matrices=False)
    for rank in (0, 1, 16, 64, 96):
        matrix = ((u[:, rank:] * s[rank:]) @ v[rank:]).float()
        nuclear = float(torch.linalg.svdvals(matrix.double()).sum())
        missing = (u[:, :rank] if shape[0] <= shape[1] else v[:rank]).float().contiguous()
        others = (u[:, -rank:] if shape[0] <= shape[1] else v[-rank:]).float().contiguous()
        dependent = missing.clone()
        dependent[:, : rank // 2] += 0.5
        for zeros, outside in (
            (0, None),
            (rank, None),
            *((rank, raw(m)) for m in (missing, others, dependent) if rank),
        ):
            found, _ = NativeBackend(1).nuclear_norm(raw(matrix), *shape, zeros=zeros, outside=outside)
            assert found == pytest.approx(nuclear, rel=2e-5)


@pytest.mark.parametrize("shape", [(1088, 1408), (1408, 1088)])
def test_the_nuclear_norm_of_a_large_matrix_is_estimated(shape: tuple[int, int]) -> None:
    """Of what a quantiser leaves of a weight, and of noise."""
    weight = llm_like(*shape)
    left = weight - bnb.dequantize_4bit(*bnb.quantize_4bit(weight, quant_type="nf4"))
    for matrix in (left, torch.randn(shape, generator=torch.Generator().manual_seed(1))):
        found, estimated = NativeBackend(2).nuclear_norm(raw(matrix), *shape)
        assert estimated
        assert found == pytest.approx(float(torch.linalg.svdvals(matrix).sum()), rel=0.01)
