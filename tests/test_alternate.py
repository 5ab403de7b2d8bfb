"""The alternation of `--to qpissa`: what it ends with, and when."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from checkpoints import llm_like

from pissa_convert.linalg import FourBit, FourBitSpec, SplitSpec, tensor_key
from pissa_convert.linalg.native import NativeBackend
from pissa_convert.plans.quant_steps import Treatment
from pissa_convert.transforms.alternate import Adapted, alternate, loftq
from pissa_convert.transforms.quantise import QuantiseLane, workspace_bytes

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
    assert_best(run(iterations))


def test_what_is_left_is_of_the_turn_that_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pissa_convert.transforms.alternate._RELAXATION", 20.0)
    found = run(5)
    assert found.iterations == 1  # the second overshot
    assert_best(found)


def assert_best(found: Adapted) -> None:
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


@pytest.mark.parametrize("gain", [0.3, 0.1, 0.05, 0.03, 0.02, 0.01])
def test_wherever_it_stops_it_ends_on_a_refit(monkeypatch: pytest.MonkeyPatch, gain: float) -> None:
    """Also where a turn long before had to be refitted, as LoftQ's first is."""
    monkeypatch.setattr("pissa_convert.transforms.alternate._GAIN", gain)
    assert_best(loftq(RAW, SPLIT, FORM, 20, NativeBackend(1), NativeBackend(1)))
    assert_best(run(20))


@pytest.mark.parametrize("compare_loftq", [False, True])
@pytest.mark.parametrize("split", [None, SPLIT], ids=["plain", "adapted"])
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_it_holds_what_is_planned(dtype: str, split: SplitSpec | None, compare_loftq: bool) -> None:
    form = replace(FORM, dtype=dtype)
    split = split and replace(split, dtype=dtype)
    raw = WEIGHT.to(torch.float32 if dtype == "F32" else torch.bfloat16).view(-1).view(torch.uint8).numpy()
    lane = QuantiseLane(NativeBackend(1), NativeBackend(1), 5, compare_loftq)
    planned = workspace_bytes(Treatment(form, False, split, ()), compare_loftq=compare_loftq)
    tracemalloc.start()
    lane.quantise(memoryview(raw), form, split)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 0.95 * planned < peak < planned + 20_000  # small objects
    copied = workspace_bytes(Treatment(form, True, split, ()), compare_loftq=compare_loftq)
    assert copied - planned == len(raw)
