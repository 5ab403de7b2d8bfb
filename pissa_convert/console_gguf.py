"""What the command shows of conversions to and of GGUF."""

from __future__ import annotations

import sys

from pissa_convert.console import amount, finished, stages
from pissa_convert.plans.gguf.adapter_plan import GgufAdapterPlan
from pissa_convert.plans.gguf.plan import GgufPlan
from pissa_convert.report import GgufReport


def print_adapter_plan(plan: GgufAdapterPlan) -> None:
    """Every adapted tensor, and what the file will be."""
    width = max(len(tensor.name) for tensor in plan.tensors)
    at_most = "at most " if plan.lora is not None and plan.lora.options.rank == "auto" else ""
    for tensor in plan.tensors:
        a, b = plan.slots[tensor.name]
        kinds = a.dtype if a.dtype == b.dtype else f"A {a.dtype}, B {b.dtype}"
        modules = ", ".join(piece.module for piece in tensor.pieces[:3]) + (", …" if len(tensor.pieces) > 3 else "")
        print(f"{'adapt':6} {tensor.name:{width}}  {at_most}rank {tensor.rank}, {kinds}, from {modules}")
    print(
        f"""
adapter    {len(plan.tensors)} tensors for {plan.target.layout.architecture}, as {plan.target.file} has it
disk       {at_most}{sum(plan.output_sizes.values())} bytes in {len(plan.output_sizes)} files
memory     {plan.memory.peak} bytes at peak, {plan.in_flight} tensors at once"""
    )


def print_gguf_report(report: GgufReport) -> None:
    """The closing lines."""
    print(
        f"""{finished(report, f"{report.tensors} tensors")}
{stages(report.timings)}
within {report.relative_error:.1e} at worst
{_sizes(report)}{report.usage}""",
        file=sys.stderr,
    )


def _sizes(report: GgufReport) -> str:
    """The size-and-error table, and what it says of the result."""
    if not report.sizes:
        return ""
    made, *others = report.sizes
    width = max(len(line.what) for line in report.sizes)
    lines = ["size and error, ‖W − stored‖/‖W‖, beside a sample of the same weights in other types:"]
    lines += [f"    {line.what:{width}}  {amount(line.nbytes):>8}  {line.relative_error:.1e}" for line in report.sizes]
    better = [line for line in others if line.nbytes <= made.nbytes and line.relative_error < made.relative_error]
    if better:
        line = min(better, key=lambda line: line.relative_error)
        lines.append(f"not worth it for its size: {line.what} is no larger and closer to the exact weights")
    return "\n".join(lines) + "\n"


def print_model_plan(plan: GgufPlan, device: str) -> None:
    """Every tensor's decision, and what the files will be."""
    from pissa_convert.linalg.select import select_backend
    from pissa_convert.plans.estimate import estimate_gguf_seconds

    known = {tensor.name: tensor.dtype for tensor in plan.base.file.tensors}
    width = max(map(len, known))
    copied, encoded = set(plan.copied), {step.tensor: step.treatment for step in plan.encodings}
    split = {step.tensor: step for step in plan.splits}
    reasons = {decision.tensor: f", {decision.reason}" for decision in plan.decisions}
    for name, kind in known.items():
        if name in split:
            step = split[name]
            ranks = f"rank {step.spec.rank}, residual {kind} → {step.stored_kind}"
            print(f"{'split':6} {name:{width}}  {ranks}{reasons[name]}")
            continue
        if name in copied:
            print(f"{'copy':6} {name:{width}}  {kind}{reasons.get(name, '')}")
            continue
        treatment = encoded[name]
        parts = [] if treatment.origin is None else [part.name for _, part in treatment.origin.parts]
        said = [kind if not parts else ", ".join(parts[:2]) + (", …" if len(parts) > 2 else "")]
        if treatment.origin is not None and treatment.origin.heads:
            said.append("rows permuted")
        if treatment.added is not None:
            said.append(f"and s·B·A of rank {treatment.added.rank}")
        print(f"{'encode':6} {name:{width}}  {' '.join(said)} → {treatment.kind}")
    moved = sum(path.stat().st_size for path in plan.sources.values()) + sum(plan.output_sizes.values())
    compute = estimate_gguf_seconds(plan, select_backend(device))
    print(
        f"""
change     {len(encoded) + len(split)} of {len(known)} tensors, {len(split)} of them split
disk       {sum(plan.output_sizes.values())} bytes in {len(plan.output_sizes)} files
memory     {plan.memory.peak} bytes at peak ({amount(plan.memory.budget)} in flight at most)
time       about {compute:.1f} s of computing, beside moving {amount(moved)}"""
    )
