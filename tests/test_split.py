"""One matrix, by every backend: exactness, accuracy, signs, and the corners of the number formats."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from checkpoints import DTYPES, llm_like
from hypothesis import given, settings
from hypothesis import strategies as st

from pissa_convert import split
from pissa_convert.errors import RequestError, WeightError
from pissa_convert.linalg import Backend, SplitSpec
from pissa_convert.linalg.native import NativeBackend
from pissa_convert.linalg.torch_backend import TorchBackend
from pissa_convert.linalg.torch_device import Device

UNIT_ROUNDOFF = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}
FACTOR_ROUNDING = {torch.float32: 1e-6, torch.float16: 1e-6, torch.bfloat16: 2**-8}
"""Of the factors: those of a bf16 weight have its 8 bits in whatever dtype they are stored."""


@pytest.fixture(params=["native", "torch"], scope="module", autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """What `split` works with; torch's arithmetic is that of a GPU, done by the CPU."""
    chosen: Backend = NativeBackend()
    if request.param == "torch":
        chosen = TorchBackend([Device(torch.device("cpu"), 1 << 40)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pissa_convert.matrix.select_backend", lambda device, threads: chosen)
        yield chosen


def norm(matrix: torch.Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix.double()))


def deficit(weight: torch.Tensor, sigma: np.ndarray) -> float:
    exact = torch.linalg.svdvals(weight.double()).numpy()[: len(sigma)]
    energy, found = np.sum(exact**2), np.sum(sigma.astype(float) ** 2)
    return float(1 - found / energy if energy else found)


def error_over_rounding(weight: torch.Tensor, result) -> tuple[float, float]:
    """‖W − (W_res + sBA)‖, and what rounding the exact residual to W's dtype alone costs."""
    product = result.scaling * (result.B.double() @ result.A.double())
    exact = weight.double() - product
    return norm(exact - result.residual.double()), norm(exact - exact.to(weight.dtype).double())


@pytest.mark.parametrize("adapter_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", list(DTYPES.values()))
@pytest.mark.parametrize("shape", [(300, 500), (500, 300), (257, 391)])
def test_the_error_is_that_of_storing_the_residual(
    shape: tuple[int, int], dtype: torch.dtype, adapter_dtype: str
) -> None:
    weight = llm_like(*shape, dtype=dtype)
    result = split(weight, 16, adapter_dtype=adapter_dtype)
    error, rounding = error_over_rounding(weight, result)
    assert error <= 1.02 * rounding
    assert result.relative_error * norm(weight) == pytest.approx(error, rel=0.02)
    if dtype == torch.float32:
        assert error <= 1e-7 * norm(weight)


@pytest.mark.parametrize(
    ("alpha", "rslora", "scaling"), [(None, False, 1.0), (32, False, 4.0), (1, False, 0.125), (16, True, 16 / 8**0.5)]
)
def test_scaling_is_pefts(alpha: float | None, rslora: bool, scaling: float) -> None:
    weight = llm_like(120, 90)
    result = split(weight, 8, alpha=alpha, rslora=rslora)
    assert result.scaling == pytest.approx(scaling)
    error, rounding = error_over_rounding(weight, result)
    assert error <= 1.02 * rounding
    # The square root of sigma over s goes to each side.
    sigma = torch.from_numpy(result.singular_values).double()
    assert torch.allclose(result.A.double().norm(dim=1), (sigma / scaling).sqrt(), rtol=1e-4)
    assert torch.allclose(result.B.double().norm(dim=0), (sigma / scaling).sqrt(), rtol=1e-4)


@pytest.mark.parametrize(
    ("shape", "rank"),
    [
        ((1, 77), 1),
        ((77, 1), 1),
        ((1, 1), 1),
        ((2, 3), 2),
        ((64, 64), 64),
        ((40, 600), 40),
        ((600, 40), 40),
        ((513, 255), 1),
        ((1031, 130), 17),
        ((130, 1031), 17),
        ((400, 400), 300),
    ],
)
@pytest.mark.parametrize("dtype", list(DTYPES.values()))
def test_any_shape_and_rank(shape: tuple[int, int], rank: int, dtype: torch.dtype) -> None:
    weight = llm_like(*shape, dtype=dtype)
    result = split(weight, rank)
    assert result.A.shape == (rank, shape[1])
    assert result.B.shape == (shape[0], rank)
    assert deficit(weight, result.singular_values) < 2e-3
    error, rounding = error_over_rounding(weight, result)
    # At full rank the residual is nothing but the rounding of A and B, and float's own errors show beside it.
    assert error <= 1.02 * rounding + 3e-7 * norm(weight)
    if rank == min(shape):
        assert norm(result.residual) < FACTOR_ROUNDING[dtype] * norm(weight)


@pytest.mark.parametrize("dtype", list(DTYPES.values()))
def test_singular_vectors_are_orthogonal_and_signs_are_fixed(dtype: torch.dtype) -> None:
    weight = llm_like(400, 700, dtype=dtype)
    result = split(weight, 24)
    for vectors in (result.A.double(), result.B.double().T):
        unit = vectors / vectors.norm(dim=1, keepdim=True)
        atol = 2e-5 if dtype != torch.bfloat16 else UNIT_ROUNDOFF[dtype]
        assert torch.allclose(unit @ unit.T, torch.eye(24, dtype=torch.float64), atol=atol)
    largest = result.A.gather(1, result.A.abs().argmax(1, keepdim=True))
    assert (largest > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_triplets_of_a_float_weight_are_its_own_and_not_those_of_its_rounding(dtype: torch.dtype) -> None:
    """However its range was found: a basis in bfloat16 would leave 1e-3."""
    weight = llm_like(700, 500, dtype=dtype)
    result = split(weight, 20)
    wide, sigma = weight.double(), torch.from_numpy(result.singular_values).double()
    left = result.B.double() / result.B.double().norm(dim=0)
    right = result.A.double().T / result.A.double().norm(dim=1)[None]
    off = [norm(wide @ right - left * sigma), norm(wide.T @ left - right * sigma)]
    assert min(off) < 1e-5 * norm(sigma[None])


def test_sigma_descends_and_matches_an_exact_svd() -> None:
    weight = llm_like(500, 420)
    exact = torch.linalg.svdvals(weight.double()).numpy()
    result = split(weight, 20, passes=14)
    assert np.all(np.diff(result.singular_values) <= 0)
    np.testing.assert_allclose(result.singular_values, exact[:20], rtol=1e-4)


def test_a_matrix_and_its_transpose_have_the_same_triplets() -> None:
    weight = llm_like(350, 600)
    one, other = split(weight, 12, passes=14), split(weight.T.contiguous(), 12, passes=14)
    np.testing.assert_allclose(one.singular_values, other.singular_values, rtol=1e-5)
    assert torch.allclose(one.B @ one.A, (other.B @ other.A).T, atol=2e-4 * float(one.singular_values[0]))


def test_an_exact_low_rank_matrix_is_captured_whole() -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(600, 13, generator=generator) @ torch.randn(13, 500, generator=generator)
    result = split(weight, 20)
    assert norm(result.residual) < 1e-5 * norm(weight)
    assert np.all(result.singular_values[13:] < 1e-5 * result.singular_values[0])


def test_noise_over_a_low_rank_matrix_does_not_hide_it() -> None:
    generator = torch.Generator().manual_seed(4)
    signal = torch.randn(700, 8, generator=generator) @ torch.randn(8, 900, generator=generator)
    weight = signal + 0.5 * torch.randn(700, 900, generator=generator)
    assert deficit(weight, split(weight, 8).singular_values) < 1e-3


def test_the_accuracy_test_can_fail() -> None:
    """What a range finder without power iterations captures of such a spectrum is far from enough."""
    weight = llm_like(500, 600).double()
    sketch = torch.randn(600, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    basis = torch.linalg.qr(weight @ sketch)[0]
    sigma = torch.linalg.svdvals(basis.T @ weight)[:16].numpy()
    assert deficit(weight, sigma) > 0.1
    assert deficit(weight, split(weight.float(), 16).singular_values) < 1e-3


def test_a_weight_so_wide_that_blocks_are_too() -> None:
    weight = llm_like(700, 22016, dtype=torch.bfloat16)
    result = split(weight, 128)
    exact = torch.linalg.eigvalsh(weight.double() @ weight.double().T).flip(0)[:128]
    taken = weight.double() - result.B.double() @ result.A.double()
    assert 1 - (norm(weight) ** 2 - norm(taken) ** 2) / float(exact.sum()) < 5e-3
    error, rounding = error_over_rounding(weight, result)
    assert error <= 1.02 * rounding


def test_more_passes_capture_more() -> None:
    weight = llm_like(800, 700)
    deficits = [deficit(weight, split(weight, 32, passes=passes).singular_values) for passes in (3, 5, 8)]
    assert deficits[0] > deficits[1] > deficits[2]


@pytest.mark.parametrize("shape", [(40, 30), (300, 260)])
@pytest.mark.parametrize("dtype", list(DTYPES.values()))
def test_zero_stays_zero(shape: tuple[int, int], dtype: torch.dtype) -> None:
    result = split(torch.zeros(shape, dtype=dtype), 8)
    assert not result.residual.any()
    assert not result.A.any()
    assert not result.B.any()
    assert not result.singular_values.any()


SPECIAL = {
    "constant": torch.full((300, 260), 0.7),
    "repeated singular values": torch.eye(300)[:, :260] * 3,
    "rows of zeros": llm_like(300, 260) * (torch.arange(300) % 3 == 0)[:, None],
    "one entry": torch.zeros(300, 260).index_put((torch.tensor(7), torch.tensor(9)), torch.tensor(5.0)),
    "one heavy column": llm_like(300, 260) + 50 * (torch.arange(260) == 11),
    "fast decay": torch.linalg.qr(llm_like(300, 260))[0] * 10.0 ** -torch.arange(260).clamp(max=30),
}


@pytest.mark.parametrize("dtype", list(DTYPES.values()))
@pytest.mark.parametrize("name", SPECIAL)
def test_special_matrices(name: str, dtype: torch.dtype) -> None:
    weight = SPECIAL[name].to(dtype)
    result = split(weight, 8)
    for tensor in (result.residual, result.A, result.B):
        assert torch.isfinite(tensor).all()
    assert deficit(weight, result.singular_values) < 2e-3
    error, rounding = error_over_rounding(weight, result)
    assert error <= 1.02 * rounding + 3e-7 * norm(weight)


@pytest.mark.parametrize("dtype", list(DTYPES.values()))
def test_singular_values_repeated_more_often_than_a_block_is_wide_are_all_found(dtype: torch.dtype) -> None:
    weight = (torch.eye(600)[:, :520] * 3).to(dtype)
    result = split(weight, 64)
    # Of a bf16 weight X and Y are rounded, and among equals those that this makes larger are chosen.
    np.testing.assert_allclose(result.singular_values, 3, rtol=5e-3 if dtype == torch.bfloat16 else 2e-3)
    taken = result.B.double() @ result.A.double()
    captured = norm(weight) ** 2 - norm(weight.double() - taken) ** 2
    assert captured == pytest.approx(64 * 9, rel=1e-4)


@pytest.mark.parametrize("dtype", list(DTYPES.values()))
@pytest.mark.parametrize("passes", [4, 8, "auto"])
def test_low_rank_above_rounding_noise_gives_no_ghosts(dtype: torch.dtype, passes: int | str) -> None:
    """W spans three decades within the rank: more than products rounded to bf16 can resolve."""
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(700, 40, generator=generator) @ torch.randn(40, 600, generator=generator)).to(dtype)
    result = split(weight, 64, passes=passes)
    exact = torch.linalg.svdvals(weight.double()).numpy()
    np.testing.assert_allclose(result.singular_values[:40], exact[:40], rtol=1e-3)
    assert np.all(result.singular_values[40:] <= 1.01 * exact[40] + 1e-4 * exact[0])
    assert norm(result.residual) < 5e-3 * norm(weight)


@pytest.mark.parametrize("dtype", list(DTYPES.values()))
@pytest.mark.parametrize("passes", ["auto", 24])
def test_what_lies_beyond_the_rank_may_be_as_small_as_the_rounding_of_bfloat16(
    dtype: torch.dtype, passes: int | str
) -> None:
    """A weight less what a quantiser kept of it: r directions, and noise below 2^-8 of the first."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(576, 576, generator=generator).double())[0] for _ in range(2))
    sigma = torch.cat([torch.logspace(1.9, 0.6, 128), torch.linspace(0.26, 0.001, 448)]).double()
    weight = ((left * sigma) @ right.T).to(dtype)
    best = norm(torch.linalg.svdvals(weight.double())[128:, None])
    for seed in (0, 17, 33):  # in the latter two, vectors of bfloat16 leave many times as much
        result = split(weight, rank=128, passes=passes, seed=seed)
        assert norm(weight.double() - result.B.double() @ result.A.double()) < 1.2 * best


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.float32, 1e18),
        (torch.float32, 1e-18),
        (torch.float32, 1e30),
        (torch.float32, 1e-36),
        (torch.bfloat16, 1e30),
        (torch.bfloat16, 1e-30),
        (torch.float16, 3e4),
        (torch.float16, 1e-4),
    ],
)
@pytest.mark.parametrize("shape", [(300, 260), (50, 60)])
def test_extreme_scales(shape: tuple[int, int], dtype: torch.dtype, scale: float) -> None:
    weight = llm_like(*shape, seed=5)
    weight = (weight / weight.abs().max() * scale).to(dtype)
    result = split(weight, 8)
    assert deficit(weight.double() / scale, result.singular_values / np.float32(scale)) < 2e-3
    error, rounding = error_over_rounding(weight, result)
    assert error <= 1.02 * rounding + 3e-7 * norm(weight)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", list(DTYPES.values()))
@pytest.mark.parametrize("shape", [(300, 260), (20, 30)])
def test_values_that_are_not_finite_are_refused_and_the_weight_is_untouched(
    shape: tuple[int, int], dtype: torch.dtype, bad: float, backend: Backend
) -> None:
    weight = llm_like(*shape, dtype=dtype)
    weight[3, 5] = bad
    raw = weight.view(torch.int16 if weight.itemsize == 2 else torch.int32).numpy().copy()
    before = raw.copy()
    spec = SplitSpec(*shape, {v: k for k, v in DTYPES.items()}[dtype], 4, 1.0, "F32", False, None, 0)
    a, b = np.zeros(spec.a_shape, np.float32), np.zeros(spec.b_shape, np.float32)
    with pytest.raises(WeightError, match="NaN or infinity"):
        backend.split(raw.data, a.data, b.data, spec)
    assert np.array_equal(raw, before)


def test_float16_factors_that_overflow_are_refused() -> None:
    with pytest.raises(WeightError, match="overflow"):
        split(llm_like(64, 64) * 1e12, 4, adapter_dtype="float16")


def test_conv1d_weights_are_stored_the_other_way_round(backend: Backend) -> None:
    weight = llm_like(90, 140).contiguous()
    raw = weight.numpy().copy()
    spec = SplitSpec(90, 140, "F32", 6, 1.0, "F32", True, None, 0)
    a, b = np.zeros((6, 90), np.float32), np.zeros((140, 6), np.float32)
    backend.split(raw.data, a.data, b.data, spec)
    np.testing.assert_allclose((b @ a).T + raw, weight.numpy(), atol=1e-6)
    assert (np.take_along_axis(a, np.abs(a).argmax(1)[:, None], 1) > 0).all()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_matrix_is_residual_plus_product(data: st.DataObject) -> None:
    rows, cols = data.draw(st.integers(1, 90)), data.draw(st.integers(1, 90))
    rank = data.draw(st.integers(1, min(rows, cols)))
    dtype = data.draw(st.sampled_from(list(DTYPES.values())))
    alpha = data.draw(st.floats(0.1, 64))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    weight = torch.randn(rows, cols, generator=generator) * torch.rand(1, cols, generator=generator) ** 4
    weight = weight.to(dtype)
    result = split(weight, rank, alpha=alpha)
    error, rounding = error_over_rounding(weight, result)
    assert error <= 1.02 * rounding + 3e-7 * norm(weight)
    assert np.all(np.diff(result.singular_values) <= 1e-6 * max(result.singular_values[0], 1e-30))
    assert deficit(weight, result.singular_values) < 2e-3


def test_the_input_is_left_as_it_is_and_numpy_gives_numpy() -> None:
    weight = llm_like(60, 50).numpy()
    before = weight.copy()
    result = split(weight, 4)
    assert np.array_equal(weight, before)
    assert isinstance(result.residual, np.ndarray)
    assert isinstance(result.A, np.ndarray)


@pytest.mark.parametrize(
    "weight", [torch.zeros(3), torch.zeros(3, 3, dtype=torch.float64), torch.zeros(3, 3, dtype=torch.int8)]
)
def test_what_cannot_be_split_is_refused(weight: torch.Tensor) -> None:
    with pytest.raises(RequestError, match="cannot be split"):
        split(weight, 1)


def test_a_rank_beyond_the_matrix_is_refused() -> None:
    with pytest.raises(RequestError, match="at most 3"):
        split(torch.zeros(3, 9), 4)
