"""What the command shows: progress and closing lines on stderr, the plan on stdout. `cli` decides when."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, NoReturn

from pissa_convert.report import GgufReport, LoraReport, MergeReport, QuantReport, Report, SplitReport

if TYPE_CHECKING:
    from pathlib import Path

    from tqdm import tqdm

    from pissa_convert.engine.verify import Verification
    from pissa_convert.plans.lora_plan import LoraPlan
    from pissa_convert.plans.merge_plan import MergePlan
    from pissa_convert.plans.quant_plan import QuantPlan
    from pissa_convert.plans.requests import AnyPlan
    from pissa_convert.plans.split_plan import Plan
    from pissa_convert.report import Timings


class ProgressBar:
    """A bar in bytes, for `convert` and `verify`; it opens at the first call and closes at the last byte."""

    def __init__(self) -> None:
        self._bar: tqdm[NoReturn] | None = None

    def __call__(self, done: int, total: int, timings: Timings | None = None) -> None:
        from tqdm import tqdm

        if self._bar is None:
            self._bar = tqdm(total=total, initial=done, unit="B", unit_scale=True, dynamic_ncols=True)
        if timings is not None:
            self._bar.set_postfix_str(f"bound by {timings.bottleneck}", refresh=False)
        self._bar.update(done - self._bar.n)
        if done == total:
            self._bar.close()


def amount(nbytes: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"


def print_plan(plan: AnyPlan, device: str) -> None:
    """The plan on stdout: it is what was asked for, so it can be piped."""
    from pissa_convert import console_gguf
    from pissa_convert.plans.gguf.adapter_plan import GgufAdapterPlan
    from pissa_convert.plans.gguf.plan import GgufPlan
    from pissa_convert.plans.lora_plan import LoraPlan
    from pissa_convert.plans.merge_plan import MergePlan
    from pissa_convert.plans.quant_plan import QuantPlan

    if isinstance(plan, QuantPlan):
        _print_quant_plan(plan)
    elif isinstance(plan, LoraPlan):
        _print_lora_plan(plan)
    elif isinstance(plan, MergePlan):
        _print_merge_plan(plan)
    elif isinstance(plan, GgufAdapterPlan):
        console_gguf.print_adapter_plan(plan)
    elif isinstance(plan, GgufPlan):
        console_gguf.print_model_plan(plan, device)
    else:
        _print_split_plan(plan, device)


def _print_lora_plan(plan: LoraPlan) -> None:
    from pissa_convert.plans.estimate import estimate_lora_seconds

    width = max(map(len, plan.ranks))
    at_most = "at most " if plan.options.rank == "auto" else ""
    for module in plan.modules:
        ranks = f"rank {module.trained.rank} − rank {module.init.rank} → {at_most}rank {plan.ranks[module.name]}"
        print(f"{'lora':6} {module.name:{width}}  {ranks}")
    for key in plan.trained.carried:
        print(f"{'copy':6} {key:{width}}  trained whole")
    compute = estimate_lora_seconds(plan)
    origin = "split again from" if plan.init.derivations else "as it is in"
    print(
        f"""
modules    {len(plan.modules)}, and {len(plan.trained.carried)} tensors that were trained whole
init       {origin} {plan.init.file}
disk       {at_most}{sum(plan.output_sizes.values())} bytes in {len(plan.output_sizes)} files
memory     {plan.memory.peak} bytes at peak, {plan.in_flight} modules at once
time       about {compute:.1f} s of computing"""
    )


def _print_merge_plan(plan: MergePlan) -> None:
    from pissa_convert.plans.estimate import estimate_merge_seconds
    from pissa_convert.plans.merge_plan import describe, shard_tensors

    tensors = [tensor for shard in plan.shards for tensor in shard.source.tensors]
    places = [place for shard in plan.checkpoint.shards for place in shard_tensors(shard, plan.options.dtype)[1]]
    width = max(len(tensor.name) for tensor in tensors)
    for tensor, place in zip(tensors, places, strict=True):
        change = plan.changes.tensors.get(tensor.name)
        action = "merge" if change is not None else "copy" if place.dtype == tensor.dtype else "cast"
        dtype = "" if place.dtype == tensor.dtype else f"{tensor.dtype} → {place.dtype}"
        said = [text for text in (describe(change) if change else "", dtype) if text]
        print(f"{action:6} {tensor.name:{width}}  {', '.join(said)}")
    compute = estimate_merge_seconds(plan)
    moved = sum(shard.source.size + shard.size for shard in plan.shards)
    if plan.beside is not None and plan.changes.head is not None:
        untied = f"tied to {plan.changes.tied_to} no longer: {describe(plan.changes.head)}"
        print(f"{'add':6} {'lm_head.weight':{width}}  {untied}")
    print(
        f"""
merge      {len(plan.changes.tensors)} of {len(tensors)} tensors
disk       {sum(plan.output_sizes.values())} bytes in {len(plan.output_sizes)} files
memory     {plan.memory.peak} bytes at peak ({amount(plan.memory.budget)} in flight at most)
time       about {compute:.1f} s of computing, beside moving {amount(moved)}"""
    )
    for warning in plan.warnings:
        print(f"warning: {warning}", file=sys.stderr)


def _print_decisions(plan: Plan | QuantPlan) -> None:
    width = max(len(decision.tensor) for decision in plan.decisions)
    for decision in plan.decisions:
        print(f"{decision.action.value:8} {decision.tensor:{width}}  {decision.reason}")
    for skipped in plan.checkpoint.skipped:
        print(f"{'skip':8} {skipped.path:{width}}  {skipped.reason}")


def _print_split_plan(plan: Plan, device: str) -> None:
    from pissa_convert.linalg.select import select_backend
    from pissa_convert.plans.estimate import estimate_seconds

    _print_decisions(plan)
    split = list(plan.splits)
    split_bytes = sum(step.end - step.begin for step in split)
    compute = estimate_seconds(plan, select_backend(device))
    print(
        f"""
split      {len(split)} of {len(plan.decisions)} tensors, {amount(split_bytes)} of {amount(plan.source_bytes)}
adapter    {plan.adapter.name}, rank {plan.options.rank}, {amount(plan.adapter.size)}
disk       {sum(plan.output_sizes.values())} bytes in {len(plan.output_sizes)} files
memory     {plan.memory.peak} bytes at peak ({amount(plan.memory.budget)} in flight at most)
time       about {compute:.0f} s of computing with {plan.backend}, beside moving {amount(plan.source_bytes)}"""
    )


def _print_quant_plan(plan: QuantPlan) -> None:
    from pissa_convert.plans.estimate import estimate_quant_seconds

    _print_decisions(plan)
    weights = list(plan.weights)
    before, after = (sum(sizes) for sizes in zip(*((w.end - w.begin, w.stop - w.at) for w in weights), strict=True))
    adapted = sum(weight.treatment.split is not None for weight in weights)
    print(
        f"""
quantise   {len(weights)} of {len(plan.decisions)} tensors, {amount(before)} to {amount(after)}
adapter    {plan.adapter.name}, {adapted} layers, rank {plan.options.split.rank}, {amount(plan.adapter.size)}
disk       {sum(plan.output_sizes.values())} bytes in {len(plan.output_sizes)} files
memory     {plan.memory.peak} bytes at peak ({amount(plan.memory.budget)} in flight at most)
time       about {estimate_quant_seconds(plan):.0f} s of computing with {plan.backend}"""
    )


def print_report(report: Report) -> None:
    if report.complete_before:
        print(f"{report.dest} is complete already; every digest fits", file=sys.stderr)
    elif isinstance(report, SplitReport):
        _print_split_report(report)
    elif isinstance(report, QuantReport):
        _print_quant_report(report)
    elif isinstance(report, LoraReport):
        _print_lora_report(report)
    elif isinstance(report, GgufReport):
        from pissa_convert import console_gguf

        console_gguf.print_gguf_report(report)
    elif isinstance(report, MergeReport):
        _print_merge_report(report)


def _print_merge_report(report: MergeReport) -> None:
    print(
        f"""{finished(report, f"{report.tensors} tensors changed")}
{stages(report.timings)}
W + s·B·A within {report.relative_error:.1e}, its rounding""",
        file=sys.stderr,
    )


def finished(report: Report, what: str) -> str:
    continued = report.resumed and not isinstance(report, LoraReport)  # whose work is done again from its start
    verb = "continued and finished" if continued else "finished"
    return f"{verb} {report.dest} in {report.wall_seconds:.1f} s: {what}{peak(report.peak_memory)}"


def peak(nbytes: int | None) -> str:
    return f", peak memory {amount(nbytes)}" if nbytes else ""


def stages(timings: Timings) -> str:
    return (
        f"read {amount(timings.source_bytes)} in {timings.read_seconds:.1f} s, "
        f"computed {timings.compute_seconds:.1f} s, "
        f"wrote {amount(timings.written_bytes)} in {timings.write_seconds:.1f} s, "
        f"all at once; bound by {timings.bottleneck}"
    )


def _print_lora_report(report: LoraReport) -> None:
    ranks = [entry["rank"] for entry in report.modules.values()]
    worst = max(report.modules, key=lambda name: report.modules[name]["relative_error"])
    shown = f"{min(ranks)}" if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"
    why = ""
    if max(ranks) == report.exact_rank:
        why = ": s′·B′·A′ − s·B·A has the rank of both adapters together; --rank K makes it smaller"
    moved = (
        f"; training moved the adapter by {report.relative_change:.1e} of its norm" if report.relative_change else ""
    )
    print(
        f"""{finished(report, f"{len(ranks)} modules")}
rank {shown}{why}
within {report.relative_error:.1e} of ‖ΔW‖, at worst {report.modules[worst]["relative_error"]:.1e} in {worst}{moved}
load it with PEFT onto the original model""",
        file=sys.stderr,
    )


def _print_split_report(report: SplitReport) -> None:
    print(
        f"""{finished(report, f"{report.tensors} weights split")}
{stages(report.timings)}
W = W_res + s·B·A within {report.relative_error:.1e} of ‖W‖; \
a full SVD would capture at most about {report.estimated_deficit:.2%} more
the residual needs its adapter: load {report.dest} with PEFT and subfolder="pissa_init\"""",
        file=sys.stderr,
    )


def _print_quant_report(report: QuantReport) -> None:
    rows = {**report.by_type, "all": report.adapted}
    width = max(map(len, rows))
    did = f"{len(report.tensors)} weights quantised, {report.adapted.weights} of them with an adapter"
    loftq = "  LoftQ's" if report.adapted.loftq_reduction is not None else ""
    lines = [finished(report, did), stages(report.timings)]
    lines.append(f"{'':{width}}  weights  ‖W−(Q+s·B·A)‖/‖W‖  ‖W−Q(W)‖/‖W‖  reduction in nuclear norm{loftq}")
    for name, row in rows.items():
        compared = f"{row.loftq_reduction:9.1%}" if row.loftq_reduction is not None else ""
        lines.append(
            f"{name:{width}}  {row.weights:7}  {row.relative_error:18.4f}  {row.plain_relative_error:12.4f}"
            f"  {row.reduction:25.1%}{compared}"
        )
    lines.append(f'the base needs its adapter: load {report.dest} with transformers and PEFT, subfolder="pissa_init"')
    print("\n".join(lines), file=sys.stderr)


_COMPARED = {
    "pissa": "W = W_res + s·B·A within {:.1e} of ‖W‖ for {} weights",
    "qpissa": "W = Q + s·B·A within {:.1e} of ‖W‖ for {} weights",
    "lora": "ΔW = B·A within {:.1e} of ‖ΔW‖ for {} modules",
    "merged": "W + s·B·A within {:.1e} of its norm for {} weights",
    "gguf": "what is stored within {:.1e} of what it was made from for {} tensors",
}


def print_verification(found: Verification, source: Path | str | None) -> None:
    compared = ""
    if source is not None:
        what = _COMPARED[found.to]
        compared = ", and " + what.format(found.relative_error or 0, found.tensors)
    took = f"{found.wall_seconds:.1f} s{peak(found.peak_memory)}"
    print(f"{found.dest}: every digest of {found.files} files fits{compared}; {took}", file=sys.stderr)
    if found.unexpected:
        shown = ", ".join(found.unexpected[:5]) + (", …" if len(found.unexpected) > 5 else "")
        print(f"note: {len(found.unexpected)} files are no part of the conversion: {shown}", file=sys.stderr)
