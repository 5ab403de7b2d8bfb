"""The alternation of `--to qpissa`: what it ends with, and when."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from checkpoints import llm_like

from pissa_convert.linalg import FourBit, FourBitSpec, SplitSpec, tensor_key
from pissa_convert.linalg.native import NativeBackend
from pissa_convert.transforms.alternate import Adapted, alternate, loftq

SHAPE, RANK = (192, 320), 24
FORM = FourBitSpec(*SHAPE, "F32", "nf4", True)
SPLIT = SplitSpec(*SHAPE, "F32", RANK, 1.0, "F32", False, None, tensor_key(0, "w"), "w")
WEIGHT = llm_like(*SHAPE)
RAW = memoryview(WEIGHT.view(-1).view(torch.uint8).numpy())


def run(iterations: int) -> Adapted:
    return alternate(RAW, SPLIT, FORM, iterations, NativeBackend(1), NativeBackend(1))


def values(buffer: memoryview, *shape: int) -> torch.Tensor:
    return torch.frombuffer(buffer, dtype=torch.float32).view(shape)


def read_back(base: FourBit) -> torch.Tensor:
    out = torch.empty(SHAPE)
    NativeBackend(1).dequantise(base, memoryview(out.view(-1).view(torch.uint8).numpy()))
    return out


@pytest.mark.parametrize("iterations", [1, 5])
def test_the_adapter_is_the_best_for_the_base_that_is_stored(iterations: int) -> None:
    """It ends on a refit: no other A and B of this rank leave less of W − Q."""
    found = run(iterations)
    missing = WEIGHT.double() - read_back(found.base).double()
    left = missing - values(found.b, SHAPE[0], RANK).double() @ values(found.a, RANK, SHAPE[1]).double()
    best = float((torch.linalg.svdvals(missing)[RANK:] ** 2).sum() ** 0.5)
    assert best <= float(left.norm()) <= 1.001 * best
    assert found.error == pytest.approx(float(left.norm()), rel=1e-5)
    assert torch.allclose(values(found.difference, *SHAPE).double(), left, atol=1e-6)


def test_more_turns_leave_less_until_they_do_not() -> None:
    errors = [run(turns).error for turns in range(1, 6)]
    assert all(after <= before for before, after in pairwise(errors))
    assert errors[4] < 0.95 * errors[0]
    stopped = run(500)
    assert stopped.iterations < 499
    assert stopped.error <= errors[4]


def test_it_ends_below_loftq() -> None:
    assert run(5).error < loftq(RAW, SPLIT, FORM, 5, NativeBackend(1), NativeBackend(1)).error
