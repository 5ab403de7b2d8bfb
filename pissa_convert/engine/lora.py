"""`--to lora` from lock to manifest: module by module, each written once, in the memory of a few modules.

The work is short and its order is that of the output's bytes, so an interrupted run is done again from its start;
what the destination shows meanwhile is a `.partial` file, and the folder loads only when it is whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from threadpoolctl import threadpool_limits

from pissa_convert.engine import destination
from pissa_convert.engine.conduct import Entries, Outcome, conduct
from pissa_convert.engine.destination import Work
from pissa_convert.engine.factors import FactorFile, InitFactors
from pissa_convert.engine.files import PartialFile, write_file
from pissa_convert.engine.journal import Journal
from pissa_convert.engine.ordered import Appender, ProgressCallback, in_order
from pissa_convert.engine.reading import hash_file
from pissa_convert.errors import ConversionError, RequestError
from pissa_convert.formats.adapter import WEIGHTS_NAME
from pissa_convert.formats.manifest import MANIFEST_NAME, FileRecord
from pissa_convert.linalg import Backend
from pissa_convert.memory import chunks
from pissa_convert.plans.lora_plan import INIT_WEIGHTS, LoraPlan, Module, ModuleResult, lora_manifest
from pissa_convert.plans.lora_planning import choose_ranks
from pissa_convert.report import LoraReport, Timings
from pissa_convert.transforms.delta import UNRELATED
from pissa_convert.transforms.lora import ModuleInput, new_factors, wanted_rank

_T = TypeVar("_T")


def run_lora(
    plan: LoraPlan, backend: Backend | None, *, overwrite: bool = False, progress: ProgressCallback | None = None
) -> LoraReport:
    """Carry out a plan.

    Args:
        backend: makes the splits again, where the plan asks for that.
        overwrite: replace an earlier conversion in the destination.
        progress: called from this thread as work is finished.

    Raises:
        PissaError: see the family.
    """
    destination.check(plan, overwrite)
    before = plan.fingerprint
    sources = {name: hash_file(path) for name, path in plan.sources.items()}
    _check_recorded(plan, sources)

    def convert(journal: Journal, timings: Timings) -> Entries:
        # One BLAS thread and whole modules beside one another: so the number of threads changes no byte.
        with threadpool_limits(1, user_api="blas"):
            results = _convert(plan, backend, before, sources, timings, progress)
        return {name: vars(result) for name, result in results.items()}

    return _report(plan, conduct(plan, overwrite, convert, [INIT_WEIGHTS] if plan.init.derivations else []))


def _check_recorded(plan: LoraPlan, sources: Mapping[str, FileRecord]) -> None:
    found = sources.get(INIT_WEIGHTS)
    if found is not None and plan.init.recorded not in (None, found):
        raise RequestError(
            "the initial adapter has changed since the split",
            file=plan.init.file,
            expected=f"blake3 {plan.init.recorded.digest}" if plan.init.recorded else None,
            found=found.digest,
            fix="restore it, or add --base MODEL to derive it again",
        )


def _convert(
    plan: LoraPlan,
    backend: Backend | None,
    before: Mapping[str, Any],
    sources: dict[str, FileRecord],
    timings: Timings,
    progress: ProgressCallback | None,
) -> dict[str, ModuleResult]:
    if plan.options.rank == "auto":
        wanted = dict(lora_results(plan, wanted_rank, backend, timings))
        plan = replace(plan, ranks=choose_ranks(plan.modules, wanted, plan.options))
    results: dict[str, ModuleResult] = {}
    with PartialFile(plan.dest / WEIGHTS_NAME, plan.size) as file, FactorFile(plan.trained.file.path) as trained:
        output = Appender(file, timings, progress)
        output.write(plan.header, 0)
        for name, (result, stored) in lora_results(plan, new_factors, backend, timings, sources):
            results[name] = result
            for slot, data in zip(plan.slots[name], stored, strict=True):
                output.write(data, slot.begin)
        for slot, tensor in zip(plan.carried_slots, plan.trained.carried.values(), strict=True):
            for begin, end in chunks(0, tensor.nbytes):
                output.write(trained.raw(tensor, begin, end), slot.begin + begin)
        check_unchanged(plan, before)
        file.commit()
    outputs = {WEIGHTS_NAME: output.record}
    texts = {name: (plan.trained.root / name).read_bytes() for name in plan.companions} | plan.texts
    for name, text in texts.items():
        outputs[name] = write_file(plan.dest / name, text)
    write_file(plan.dest / MANIFEST_NAME, lora_manifest(plan, sources, outputs, results))
    return results


def lora_results(
    plan: LoraPlan,
    work: Callable[[LoraPlan, ModuleInput], _T],
    backend: Backend | None,
    timings: Timings,
    sources: dict[str, FileRecord] | None = None,
) -> Iterator[tuple[str, _T]]:
    """`work` on every module, by name, in the plan's order, a few at once; `sources` gets a derived init's record."""
    with InitFactors(plan.init, backend) as init, FactorFile(plan.trained.file.path) as trained:
        for module, made in in_order(
            plan.modules, lambda module: _read(module, trained, init), partial(work, plan), plan.in_flight, timings
        ):
            yield module.name, made
        if plan.init.derivations and sources is not None:
            sources[INIT_WEIGHTS] = init.record()


def _read(module: Module, trained: FactorFile, init: InitFactors) -> ModuleInput:
    has_bias = module.trained.bias is not None
    return ModuleInput(
        module,
        trained.product(module.trained),
        init.product(module.init),
        trained.bias(module.trained) - init.bias(module.init) if has_bias else None,
    )


def check_unchanged(plan: Work, before: Mapping[str, Any]) -> None:
    """What was read while working is what was hashed: nothing has changed since before either."""
    now = plan.fingerprint
    for name, value in before.items():
        if now[name] != value:
            raise ConversionError(
                f"{name} has changed during the work", file=plan.dest, fix="run the same command again"
            )


def _report(plan: LoraPlan, done: Outcome) -> LoraReport:
    entries = done.tensors

    def total(key: str) -> float:
        return math.sqrt(sum(entry[key] ** 2 for entry in entries.values()))

    norm = total("norm")
    error = math.sqrt(sum((entry["relative_error"] * entry["norm"]) ** 2 for entry in entries.values()))
    return LoraReport(
        **done.report(plan.dest, _warnings(plan, norm, total("trained_norm"), total("init_norm"))),
        modules={name: dict(entry) for name, entry in entries.items()},
        exact_rank=max(module.exact_rank for module in plan.modules),
        relative_error=error / norm if norm else 0.0,
        relative_change=norm / total("init_norm") if total("init_norm") else None,
    )


def _warnings(plan: LoraPlan, norm: float, trained: float, init: float) -> tuple[str, ...]:
    found = []
    if norm == 0:
        found.append("TRAINED is the initial adapter itself: nothing was trained, and the LoRA changes nothing")
    elif init and norm > UNRELATED * math.hypot(trained, init):
        found.append(
            f"TRAINED does not look like it began as {plan.init.file}: ‖ΔW‖ is {norm / init:.2f} of the initial "
            f"adapter's ‖s·B·A‖, which training hardly ever changes that much"
        )
    if plan.init.base_error is not None:
        found.append(
            f"the training ran on a 4-bit base: the original with this LoRA is {plan.init.base_error:.1e} of ‖W‖ away "
            f"from what was trained; --to merged with the 4-bit base gives that exactly"
        )
    if plan.init.derivations and plan.init.recorded is None:
        said = ", ".join(f"{name} {value or 'auto'}" for name, value in plan.init.options.items() if name != "seed")
        found.append(
            f"the initial adapter was split again with seed {plan.init.options['seed']}, {said}, and no manifest "
            f"proves that it is the same: give the options of the split, or its folder as --init too"
        )
    return tuple(found)
