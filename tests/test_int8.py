"""Large bfloat16 weights, which CPUs with AVX-512 VNNI copy in 8-bit integers to find what is then W's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from checkpoints import llm_like

from pissa_convert import _core
from pissa_convert.linalg import SplitSpec
from pissa_convert.linalg.native import NativeBackend

KERNELS = [kernel for kernel in ("avx512vnni", "avx512bf16") if kernel in _core.kernels()]
pytestmark = pytest.mark.skipif(not KERNELS, reason="no products of bytes")


class Found:
    """A split by the core, with what it says of its way."""

    def __init__(self, weight: torch.Tensor, rank: int, threads: int = 2, passes: int | None = None) -> None:
        rows, cols = weight.shape
        spec = SplitSpec(rows, cols, "BF16", rank, 1.0, "F32", False, passes, 42)
        self.residual = weight.contiguous().clone()
        self.a, self.b = torch.empty(spec.a_shape), torch.empty(spec.b_shape)
        memory = [
            t.view(torch.int16 if t.itemsize == 2 else torch.int32).numpy() for t in (self.residual, self.a, self.b)
        ]
        self.stats = NativeBackend(threads).split_with_timings(*(array.data for array in memory), spec)

    def missed(self, weight: torch.Tensor) -> float:
        """The share of the best energy of its rank that A and B do not capture."""
        exact = torch.linalg.svdvals(weight.double())[: self.a.shape[0]].square().sum()
        left = (weight.double() - self.b.double() @ self.a.double()).square().sum()
        return float(1 - (weight.double().square().sum() - left) / exact)


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("PISSA_CONVERT_KERNEL", request.param)
    return str(request.param)


def localised(rows: int, cols: int) -> torch.Tensor:
    """Leading singular vectors of few entries, in rows whose largest values make their rounding coarse."""
    weight = llm_like(rows, cols, seed=1)
    for i in range(24):
        weight[7 * i, 11 * i] += 2 - 0.03 * i
    return weight


def rows_of_all_sizes(rows: int, cols: int) -> torch.Tensor:
    return (
        llm_like(rows, cols)
        * torch.logspace(-3, 3, rows)[torch.randperm(rows, generator=torch.Generator().manual_seed(0)), None]
    )


def low_rank(rows: int, cols: int, rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(rows, rank, generator=generator) @ torch.randn(rank, cols, generator=generator)


@pytest.mark.parametrize(("shape", "rank"), [((700, 900), 24), ((1100, 520), 16), ((515, 2050), 100)])
def test_it_captures_what_products_of_bfloat16_do(kernel: str, shape: tuple[int, int], rank: int) -> None:
    weight = llm_like(*shape, dtype=torch.bfloat16)
    found = Found(weight, rank)
    assert found.stats.int8
    assert found.missed(weight) < 3e-3
    exact = torch.linalg.svdvals(weight.double())[:rank].numpy()
    np.testing.assert_allclose(found.stats.singular_values, exact, rtol=4e-3)


@pytest.mark.parametrize("passes", [3, 5])
def test_as_many_passes_find_as_much(kernel: str, passes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = llm_like(800, 1200, dtype=torch.bfloat16)
    missed = Found(weight, 32, passes=passes).missed(weight)
    monkeypatch.setenv("PISSA_CONVERT_KERNEL", "avx512")
    without = Found(weight, 32, passes=passes)
    assert not without.stats.int8
    assert missed < 1.02 * without.missed(weight) + 1e-4


LARGE = {
    "rows of zeros": llm_like(620, 600) * (torch.arange(620) % 3 == 0)[:, None],
    "rows of all sizes": rows_of_all_sizes(620, 600),
    "noise over a low rank": low_rank(620, 600, 8)
    + 2 * torch.randn(620, 600, generator=torch.Generator().manual_seed(4)),
    "sparse": llm_like(620, 600) * (torch.rand(620, 600, generator=torch.Generator().manual_seed(5)) < 0.1),
}
TOO_FINE = {
    "constant": torch.full((620, 600), 0.7),
    "repeated singular values": torch.eye(620)[:, :600] * 3,
    "localised singular vectors": localised(620, 600),
    "a heavy row": llm_like(620, 600) + 50 * (torch.arange(620) == 11)[:, None],
    "a heavy column": llm_like(620, 600) + 50 * (torch.arange(600) == 11),
    "fast decay": torch.linalg.qr(llm_like(620, 600))[0] * 10.0 ** -torch.arange(600).clamp(max=30),
    "low rank": low_rank(620, 600, 16),
    "tiny": llm_like(620, 600) * 1e-30,
}


@pytest.mark.parametrize("name", [*LARGE, *TOO_FINE])
def test_special_matrices(kernel: str, name: str) -> None:
    """What bytes are too coarse for is found without them."""
    weight = {**LARGE, **TOO_FINE}[name].bfloat16()
    found = Found(weight, 16)
    assert found.stats.int8 == (name in LARGE)
    assert found.missed(weight) < 3e-3
    for tensor in (found.residual, found.a, found.b):
        assert torch.isfinite(tensor).all()
    exact = weight.double() - found.b.double() @ found.a.double()
    error = torch.linalg.matrix_norm(exact - found.residual.double())
    assert error <= 1.02 * torch.linalg.matrix_norm(exact - exact.bfloat16().double())


def test_threads_change_nothing(kernel: str) -> None:
    weight = llm_like(1030, 777, dtype=torch.bfloat16)
    one = Found(weight, 20, threads=1)
    for threads in (2, 3):
        other = Found(weight, 20, threads=threads)
        assert torch.equal(one.residual, other.residual)
        assert torch.equal(one.a, other.a)
        assert torch.equal(one.b, other.b)


def test_zeros_and_what_is_not_finite(kernel: str) -> None:
    found = Found(torch.zeros(600, 600, dtype=torch.bfloat16), 16)
    assert not found.a.any()
    weight = llm_like(600, 600, dtype=torch.bfloat16)
    weight[599, 599] = float("nan")
    with pytest.raises(Exception, match="NaN or infinity"):
        Found(weight, 16)
