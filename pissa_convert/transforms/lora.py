"""One module of a LoRA: from both adapters' values to the bytes of its new factors."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pissa_convert.errors import WeightError
from pissa_convert.options import ADAPTER_DTYPES
from pissa_convert.plans.lora_plan import LoraPlan, Module, ModuleResult
from pissa_convert.transforms.delta import (
    Array,
    Product,
    decompose,
    difference,
    rounded,
    singular_values,
    smallest_rank,
)


@dataclass(frozen=True)
class ModuleInput:
    """A module's values: both products, and s′·b′ − s·b where B has a bias."""

    module: Module
    after: Product
    before: Product
    bias: Array | None


def wanted_rank(plan: LoraPlan, given: ModuleInput) -> int:
    """The smallest rank that the plan's tolerance allows."""
    assert plan.options.tolerance is not None
    return smallest_rank(singular_values(difference(given.after, given.before)), plan.options.tolerance)


def new_factors(plan: LoraPlan, given: ModuleInput) -> tuple[ModuleResult, tuple[bytes, ...]]:
    """What is known of a module's new factors, and the bytes of A, B and the bias.

    Raises:
        WeightError: a value overflows the dtype.
    """
    name, dtype = given.module.name, ADAPTER_DTYPES[plan.options.dtype]
    rank = plan.ranks[name]
    parts = decompose(difference(given.after, given.before))
    exact = parts.factors(rank)
    try:
        (a, right), (b, left) = rounded(exact.right, dtype), rounded(exact.left, dtype)
        bias = () if given.bias is None else (rounded(given.bias, dtype)[0],)
    except WeightError as error:
        raise WeightError(f"{name}: {error.what}", found=error.found, fix=error.fix) from error
    rounding = parts.rounding(exact, Product(left, right))
    norm = parts.tail(0)
    result = ModuleResult(
        rank=rank,
        relative_error=math.hypot(parts.tail(rank), rounding) / norm if norm else 0.0,
        norm=norm,
        trained_norm=given.after.norm,
        init_norm=given.before.norm,
    )
    return result, (a, b, *bias)
