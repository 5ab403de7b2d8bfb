"""A split that begins at the A of a matrix near by, as the alternation of `--to qpissa` does it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from checkpoints import llm_like
from four_bit import plainly_quantised

from pissa_convert.errors import WeightError
from pissa_convert.linalg import Backend, SplitSpec, tensor_key
from pissa_convert.linalg.native import NativeBackend
from pissa_convert.linalg.torch_backend import TorchBackend
from pissa_convert.linalg.torch_device import Device

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@pytest.fixture(params=["1 thread", "3 threads", "torch"])
def backend(request: pytest.FixtureRequest) -> Backend:
    """torch's arithmetic is that of a GPU, done by the CPU."""
    if request.param == "torch":
        return TorchBackend([Device(torch.device("cpu"), 1 << 40)])
    return NativeBackend(int(request.param[0]))


def spec_of(shape: tuple[int, int], rank: int, adapter_dtype: str = "F32", scaling: float = 2.0) -> SplitSpec:
    return SplitSpec(*shape, "F32", rank, scaling, adapter_dtype, False, None, tensor_key(0, "w"), "w")


def empty_factors(spec: SplitSpec) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = DTYPES[spec.adapter_dtype]
    return torch.zeros(spec.a_shape, dtype=dtype), torch.zeros(spec.b_shape, dtype=dtype)


def raw(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())


def near(weight: torch.Tensor, rank: int) -> torch.Tensor:
    """What the alternation refits: W − Q, where Q is the quantised rest of W."""
    left, sigma, right = torch.linalg.svd(weight, full_matrices=False)
    return weight - plainly_quantised(weight - (left[:, :rank] * sigma[:rank]) @ right[:rank])


def split_then_refit(
    backend: Backend, spec: SplitSpec, first: torch.Tensor, second: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A and B of `second`, from the A of `first`, and what they leave."""
    a, b = empty_factors(spec)
    backend.split(raw(first.clone()), raw(a), raw(b), spec)
    left = second.clone()
    backend.refit(raw(left), raw(a), raw(b), spec)
    return a, b, left


def missed(matrix: torch.Tensor, product: torch.Tensor, rank: int) -> float:
    """Of the energy that the best product of this rank leaves nothing of."""
    exact = float((torch.linalg.svdvals(matrix.double())[:rank] ** 2).sum())
    energy = float((matrix.double() ** 2).sum() - ((matrix.double() - product) ** 2).sum())
    return 1 - energy / exact


@pytest.mark.parametrize("adapter_dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "rank"),
    [((300, 500), 16), ((500, 300), 40), ((257, 391), 5), ((700, 650), 96), ((64, 64), 64), ((9, 1), 1)],
)
def test_it_captures_what_a_split_captures(
    backend: Backend, shape: tuple[int, int], rank: int, adapter_dtype: str
) -> None:
    weight, spec = llm_like(*shape), spec_of(shape, rank, adapter_dtype)
    matrix = near(weight, rank)
    a, b, left = split_then_refit(backend, spec, weight, matrix)
    product = spec.scaling * b.double() @ a.double()
    rounding = {"F32": 1e-6, "F16": 1e-5, "BF16": 1e-4}[adapter_dtype]
    assert missed(matrix, product, rank) < 1e-3 + rounding
    assert torch.allclose(left.double(), matrix.double() - product, atol=1e-6 * float(matrix.norm()))


def fitted(matrix: torch.Tensor, rank: int, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of the best product."""
    left, sigma, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    root = (sigma[:rank] / scaling).sqrt()
    return root[:, None] * right[:rank], left[:, :rank] * root


def least_squares(matrix: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """The product nearest to the matrix, after B and then A were solved for from this A; float64."""
    b = torch.linalg.lstsq(a.double().T, matrix.double().T).solution.T
    return b @ torch.linalg.lstsq(b, matrix.double()).solution


@pytest.mark.parametrize("adapter_dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "rank"),
    [((300, 500), 16), ((500, 300), 40), ((257, 391), 5), ((700, 650), 96), ((64, 64), 60), ((20, 30), 3)],
)
def test_a_correction_is_a_step_of_least_squares(
    backend: Backend, shape: tuple[int, int], rank: int, adapter_dtype: str
) -> None:
    weight, spec = llm_like(*shape), spec_of(shape, rank, adapter_dtype)
    matrix = near(weight, rank)
    a, b = (part.to(DTYPES[adapter_dtype]).contiguous() for part in fitted(weight, rank, spec.scaling))
    expected = least_squares(matrix, a)
    difference = (matrix - spec.scaling * b.float() @ a.float()).contiguous()
    before = float(difference.norm())
    assert (spec.scaling * b.double() @ a.double() - expected).norm() > 0.1 * before
    assert backend.correct(raw(difference), raw(a), raw(b), spec)
    product, best = spec.scaling * b.double() @ a.double(), float((matrix.double() - expected).norm())
    rounding = {"F32": 0, "F16": 5e-4, "BF16": 4e-3}[adapter_dtype] * float(matrix.norm())
    assert (product - expected).norm() < 4e-3 * before + rounding
    assert (matrix.double() - product).norm() < best + 1e-5 * before + rounding
    assert (difference - (matrix.double() - product)).norm() < 4e-3 * before + rounding


@pytest.mark.parametrize("bad", ["A of zeros", "dependent rows of A", "NaN", "infinity"])
def test_what_cannot_be_corrected_is_left_as_it_was(backend: Backend, bad: str) -> None:
    spec = spec_of((200, 300), 8)
    a, b = (part.float().contiguous() for part in fitted(llm_like(200, 300), 8, spec.scaling))
    difference = 0.1 * torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
    if bad == "A of zeros":
        a.zero_()
    elif bad == "dependent rows of A":
        a[1] = a[0] + 0.01 * a[1]
    else:
        difference[3, 4] = float(bad)
    before = difference.clone()
    assert not backend.correct(raw(difference), raw(a), raw(b), spec)
    assert torch.equal(difference.view(torch.int32), before.view(torch.int32))


def test_where_nothing_is_left_nothing_is_corrected(backend: Backend) -> None:
    spec = spec_of((200, 300), 8)
    a, b = (part.float().contiguous() for part in fitted(llm_like(200, 300), 8, spec.scaling))
    product, difference = b @ a, torch.zeros(200, 300)
    assert backend.correct(raw(difference), raw(a), raw(b), spec)
    assert not difference.any()
    assert torch.allclose(b @ a, product, atol=1e-6)


@pytest.mark.parametrize("exponent", [-100, 100])
def test_scale_is_of_no_account_to_a_correction(backend: Backend, exponent: int) -> None:
    weight, spec = llm_like(200, 300), spec_of((200, 300), 8)
    first_a, first_b = fitted(weight, 8, spec.scaling)
    left, found = near(weight, 8) - spec.scaling * first_b @ first_a, []
    for power in (0, exponent // 2):
        a, b, difference = (
            torch.ldexp(part, torch.tensor(scale)).float().contiguous()
            for part, scale in ((first_a, power), (first_b, power), (left, 2 * power))
        )
        assert backend.correct(raw(difference), raw(a), raw(b), spec)
        found.append(torch.ldexp(a.double(), torch.tensor(-power)))
    assert torch.allclose(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_threads_change_no_byte_of_a_correction() -> None:
    weight, spec = llm_like(700, 520), spec_of((700, 520), 40)
    matrix, found = near(weight, 40), []
    for threads in (1, 3):
        a, b = (part.float().contiguous() for part in fitted(weight, 40, spec.scaling))
        difference = matrix - spec.scaling * b @ a
        assert NativeBackend(threads).correct(raw(difference), raw(a), raw(b), spec)
        found.append((a, b, difference))
    assert all(torch.equal(one, many) for one, many in zip(*found, strict=True))


def test_it_takes_fewer_products_than_a_split() -> None:
    backend, weight, spec = NativeBackend(2), llm_like(600, 800), spec_of((600, 800), 64)
    matrix = near(weight, 64)
    found = {}
    for is_near in (False, True):
        a, b = empty_factors(spec)
        backend.split(raw(weight.clone()), raw(a), raw(b), spec)
        result = backend.split_with_timings(raw(matrix.clone()), raw(a), raw(b), spec, near=is_near)
        width = spec.rank if is_near else result.block
        found[is_near] = result.passes * width, missed(matrix, spec.scaling * b.double() @ a.double(), 64)
    (columns, deficit), (columns_near, deficit_near) = found[False], found[True]
    assert columns_near < columns
    assert max(deficit, deficit_near) < 1e-6


def test_the_factors_are_those_of_a_split(backend: Backend) -> None:
    """σ/s is shared as a square root, in descending order, and the signs are fixed."""
    weight, spec = llm_like(320, 448), spec_of((320, 448), 24)
    matrix = near(weight, 24)
    a, b, _ = split_then_refit(backend, spec, weight, matrix)
    sigma = torch.linalg.svdvals(matrix)[:24]
    for lengths in (a.norm(dim=1), b.norm(dim=0)):
        assert torch.allclose(lengths**2 * spec.scaling, sigma, rtol=2e-3)
    assert (a.gather(1, a.abs().argmax(1, keepdim=True)) > 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "rank"), [((300, 500), 16), ((192, 576), 64), ((384, 384), 128)])
def test_a_split_that_need_not_be_precise_loses_next_to_nothing(shape: tuple[int, int], rank: int, dtype: str) -> None:
    """What the alternation begins with: of all the energy some millionths, and of W no more than float32 sums do."""
    spec, backend = replace(spec_of(shape, rank), dtype=dtype), NativeBackend(2)
    weight, found = llm_like(*shape).to(DTYPES[dtype]), []
    for precise in (True, False):
        a, b = empty_factors(spec)
        left = weight.clone()
        backend.split(raw(left), raw(a), raw(b), replace(spec, precise=precise))
        product = spec.scaling * b.double() @ a.double()
        found.append(missed(weight, product, rank))
        rounding = {"F32": 1e-6, "F16": 1e-3, "BF16": 8e-3}[dtype]
        assert (weight.double() - product - left.double()).norm() < rounding * weight.double().norm()
    assert abs(found[0] - found[1]) < 2e-5


@pytest.mark.parametrize("start", ["nothing", "another matrix'"])
def test_where_the_start_is_no_good_the_search_is_that_of_a_split(backend: Backend, start: str) -> None:
    matrix, spec = llm_like(300, 500), spec_of((300, 500), 16)
    a, b = empty_factors(spec)
    if start != "nothing":
        backend.split(raw(torch.randn(300, 500, generator=torch.Generator().manual_seed(5))), raw(a), raw(b), spec)
    backend.refit(raw(matrix.clone()), raw(a), raw(b), spec)
    assert missed(matrix, spec.scaling * b.double() @ a.double(), 16) < 3e-3


@pytest.mark.parametrize("exponent", [-100, 100])
def test_scale_is_of_no_account(backend: Backend, exponent: int) -> None:
    weight, spec = llm_like(200, 300), spec_of((200, 300), 8)
    matrix = near(weight, 8)
    plain, _, _ = split_then_refit(backend, spec, weight, matrix)
    scaled, _, _ = split_then_refit(
        backend, spec, torch.ldexp(weight, torch.tensor(exponent)), torch.ldexp(matrix, torch.tensor(exponent))
    )
    assert torch.allclose(
        scaled, torch.ldexp(plain, torch.tensor(exponent // 2)), rtol=1e-4, atol=1e-6 * 2.0 ** (exponent // 2)
    )


def test_a_matrix_of_zeros_leaves_nothing(backend: Backend) -> None:
    spec = spec_of((200, 300), 8)
    a, b, left = split_then_refit(backend, spec, llm_like(200, 300), torch.zeros(200, 300))
    assert not a.any()
    assert not b.any()
    assert not left.any()


def test_what_is_not_finite_is_refused(backend: Backend) -> None:
    matrix, spec = llm_like(200, 300), spec_of((200, 300), 8)
    matrix[3, 4] = float("nan")
    with pytest.raises(WeightError, match="NaN or infinity"):
        split_then_refit(backend, spec, llm_like(200, 300), matrix)


def test_threads_change_no_byte() -> None:
    weight, spec = llm_like(700, 520), spec_of((700, 520), 40)
    matrix = near(weight, 40)
    one, many = (split_then_refit(NativeBackend(threads), spec, weight, matrix) for threads in (1, 3))
    assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))


def test_the_memory_is_within_what_is_said() -> None:
    """The plan of `--to qpissa` counts on it."""
    backend = NativeBackend(1)
    for rank in (8, 96):
        spec = spec_of((700, 650), rank)
        width = -(-rank // 16) * 16
        assert backend.refit_workspace_bytes(spec, 1) >= 4 * width * (700 + 2 * 650)
        assert backend.refit_workspace_bytes(replace(spec, rows=1400), 1) > backend.refit_workspace_bytes(spec, 1)
