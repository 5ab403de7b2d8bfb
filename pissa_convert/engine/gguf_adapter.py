"""An adapter's GGUF from lock to manifest: tensor by tensor, each written once.

As with `--to lora` the work is short, and what was interrupted is made again from its start.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial

import numpy as np
from threadpoolctl import threadpool_limits

from pissa_convert.engine import destination
from pissa_convert.engine.conduct import Entries, conduct
from pissa_convert.engine.factors import FactorFile, InitFactors
from pissa_convert.engine.files import PartialFile, write_file
from pissa_convert.engine.journal import Journal
from pissa_convert.engine.lora import check_unchanged, lora_results
from pissa_convert.engine.ordered import Appender, ProgressCallback, in_order
from pissa_convert.engine.reading import hash_file
from pissa_convert.errors import WeightError
from pissa_convert.formats.manifest import FileRecord, manifest_name
from pissa_convert.formats.safetensors import TensorInfo
from pissa_convert.plans.gguf.adapter import AdaptedTensor
from pissa_convert.plans.gguf.adapter_plan import FactorStats, GgufAdapterPlan
from pissa_convert.plans.gguf.adapter_planning import with_ranks
from pissa_convert.plans.lora_planning import choose_ranks
from pissa_convert.report import GgufReport, Timings
from pissa_convert.transforms.delta import Array, Product, decompose, difference, exact_norm
from pissa_convert.transforms.ggml import decode, encode
from pissa_convert.transforms.lora import wanted_rank

Products = Callable[[str], tuple[Product, float]]
"""s·B and A of a module, by its name, and the norm of what its rank leaves out."""

_Made = tuple[FactorStats, tuple[memoryview, memoryview]]


def run_gguf_adapter(
    plan: GgufAdapterPlan, *, overwrite: bool = False, progress: ProgressCallback | None = None
) -> GgufReport:
    """Carry out a plan.

    Args:
        overwrite: replace an earlier conversion.
        progress: called from this thread as work is finished.

    Raises:
        PissaError: see the family.
    """
    destination.check(plan, overwrite)
    before = plan.fingerprint
    sources = {name: hash_file(path) for name, path in plan.sources.items()}

    def convert(journal: Journal, timings: Timings) -> Entries:
        # One BLAS thread and whole tensors beside one another: so the number of threads changes no byte.
        with threadpool_limits(1, user_api="blas"):
            return {name: vars(found) for name, found in _convert(plan, sources, before, timings, progress).items()}

    done = conduct(plan, overwrite, convert)
    return GgufReport(
        **done.report(plan.dest / plan.alone, plan.warnings),
        tensors=len(done.tensors),
        relative_error=max(entry["relative_error"] for entry in done.tensors.values()),
        usage=plan.usage,
    )


def _convert(
    plan: GgufAdapterPlan,
    sources: Mapping[str, FileRecord],
    before: Mapping[str, object],
    timings: Timings,
    progress: ProgressCallback | None,
) -> dict[str, FactorStats]:
    plan = with_known_ranks(plan, timings)
    stats: dict[str, FactorStats] = {}
    with PartialFile(plan.dest / plan.alone, plan.size) as file, products_of(plan) as products:
        output = Appender(file, timings, progress)
        output.write(plan.header, 0)
        work = partial(_factors, plan)
        for tensor, (found, stored) in in_order(
            plan.tensors, lambda tensor: (tensor, products), work, plan.in_flight, timings
        ):
            stats[tensor.name] = found
            for slot, data in zip(plan.slots[tensor.name], stored, strict=True):
                output.write(data, slot.begin)
        output.write(b"", plan.size)
        check_unchanged(plan, before)
        file.commit()
    text = plan.manifest(sources, {plan.alone: output.record}, stats)
    write_file(plan.dest / manifest_name(plan.alone), text)
    return stats


def with_known_ranks(plan: GgufAdapterPlan, timings: Timings) -> GgufAdapterPlan:
    """The plan with the ranks that `--rank auto` chooses, which only the values can tell."""
    if plan.lora is None or plan.lora.options.rank != "auto":
        return plan
    wanted = dict(lora_results(plan.lora, wanted_rank, None, timings))
    return with_ranks(plan, choose_ranks(plan.lora.modules, wanted, plan.lora.options))


@contextmanager
def products_of(plan: GgufAdapterPlan) -> Iterator[Products]:
    """What each module adds: what the adapter holds, or what training changed."""
    with ExitStack() as stack:
        adapter = stack.enter_context(FactorFile(plan.adapter.file.path))
        if plan.lora is None:
            yield lambda module: (adapter.product(plan.adapter.pairs[module]), 0.0)
            return
        lora = plan.lora
        init = stack.enter_context(InitFactors(lora.init, None))

        def delta(module: str) -> tuple[Product, float]:
            change = difference(adapter.product(lora.trained.pairs[module]), init.product(lora.init.pairs[module]))
            parts, rank = decompose(change), lora.ranks[module]
            return parts.factors(rank), parts.tail(rank)

        yield delta


def _factors(plan: GgufAdapterPlan, given: tuple[AdaptedTensor, Products]) -> _Made:
    """The bytes of A and B, and how far their product is from what it should be.

    Raises:
        WeightError: a value does not fit the type; names the tensor.
    """
    tensor, products = given
    lost = 0.0

    def product(module: str) -> Product:
        nonlocal lost
        made, tail = products(module)
        lost += tail**2
        return made

    factors = tensor.factors(product)
    try:
        stored = [_stored(values, slot) for values, slot in zip(factors, plan.slots[tensor.name], strict=True)]
    except WeightError as error:
        raise WeightError(
            error.what, file=plan.adapter.file.path, tensor=tensor.name, found=error.found, fix=error.fix
        ) from error
    (a, a_meant), (b, b_meant) = stored
    norm = off = lost
    for exact, meant in zip(matrices(*factors), matrices(a_meant, b_meant), strict=True):
        norm += exact.norm**2
        off += exact_norm(difference(exact, meant)) ** 2
    return FactorStats(math.sqrt(off / norm) if norm else 0.0, math.sqrt(norm)), (a, b)


def matrices(a: Array, b: Array) -> Iterator[Product]:
    """B·A, or one for each expert."""
    if a.ndim == 2:
        yield Product(b, a)
    else:
        yield from (Product(left, right) for left, right in zip(b, a, strict=True))


def _stored(values: Array, slot: TensorInfo) -> tuple[memoryview, Array]:
    """Values as they are stored, and what that means."""
    data = memoryview(bytearray(slot.nbytes))
    columns = slot.shape[-1]
    with np.errstate(over="ignore"):
        single = values.reshape(-1, columns).astype(np.float32)
    encode(single, slot.dtype, data)
    return data, decode(data, slot.dtype, columns).astype(np.float64).reshape(slot.shape)
