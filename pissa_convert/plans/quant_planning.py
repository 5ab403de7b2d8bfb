"""`--to qpissa`: what becomes of every tensor, decided from headers alone."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from pissa_convert.errors import RequestError
from pissa_convert.formats.checkpoint import open_checkpoint
from pissa_convert.formats.safetensors import TensorInfo
from pissa_convert.linalg import Backend, FourBitSpec, SplitSpec
from pissa_convert.linalg.native import NativeBackend
from pissa_convert.memory import Widths, plan_memory
from pissa_convert.options import QuantOptions, RunOptions
from pissa_convert.plans.quant_plan import QuantPlan
from pissa_convert.plans.quant_steps import Quantise, Treatment, lay_out_shard, quant_steps
from pissa_convert.plans.quant_targets import decide_plain, kept_whole, skipped_modules
from pissa_convert.plans.split_plan import check_destination, check_not_residual, check_rank, plan_adapter, split_spec
from pissa_convert.plans.steps import ShardPlan, flights
from pissa_convert.plans.targets import Action, Decision, decide
from pissa_convert.transforms.quantise import workspace_bytes


def plan_quantised(
    source: str | os.PathLike[str],
    dest: str | os.PathLike[str],
    options: QuantOptions,
    run: RunOptions,
    backend: Backend,
) -> QuantPlan:
    """Read the headers of `source` and decide everything.

    Raises:
        RequestError: the request and the model do not fit (also its subclass FormatError: a file is malformed).
    """
    root, target = Path(source).resolve(), Path(os.path.abspath(dest))
    check_destination(root, target)
    checkpoint = open_checkpoint(root)
    check_not_residual(checkpoint)
    if "config.json" not in checkpoint.auxiliary:
        raise RequestError("there is no config.json that could say how the model is quantised", file=root)
    split = options.split
    tensors = [(tensor.name, tensor.dtype, tensor.shape) for tensor in checkpoint.tensors]
    decisions = tuple(
        _kept(decision) if kept_whole(decision.module, checkpoint.config) else decision
        for decision in decide(tensors, checkpoint.config, split.target_modules, split.exclude_modules)
    )
    chosen = {decision.tensor: decision for decision in decisions if decision.action is Action.SPLIT}
    if not chosen:
        raise RequestError(
            "no weight is left to quantise: transformers keeps all linear layers of this model in full precision",
            file=root,
            found=f"model type {checkpoint.config.get('model_type')}",
            fix="use --to pissa",
        )
    plain = {} if options.quantize_only_targets else decide_plain(tensors, decisions, checkpoint.config)
    decisions = tuple(plain.get(decision.tensor, decision) for decision in decisions)
    specs: dict[str, SplitSpec] = {}
    for shard in checkpoint.shards:
        for tensor in shard.tensors:
            if tensor.name in chosen:
                check_rank(shard.path, tensor, split.rank)
                specs[tensor.name] = _out_by_in(split_spec(tensor, chosen[tensor.name], split))
    adapter, slots = plan_adapter(checkpoint, decisions, specs, split)
    treatments = {
        tensor.name: _treatment(tensor, (chosen | plain)[tensor.name], options, specs, slots)
        for tensor in checkpoint.tensors
        if tensor.name in chosen or tensor.name in plain
    }
    layouts = {shard.path.name: lay_out_shard(shard, treatments) for shard in checkpoint.shards}
    shards = tuple(
        ShardPlan(
            shard,
            layouts[shard.path.name].header,
            layouts[shard.path.name].size,
            tuple(quant_steps(shard, layouts[shard.path.name], treatments)),
        )
        for shard in checkpoint.shards
    )
    at_once = backend.at_once(replace(spec, dtype="F32") for spec in specs.values())  # what is refitted
    return QuantPlan(
        source=root,
        dest=target,
        options=options,
        checkpoint=checkpoint,
        decisions=decisions,
        shards=shards,
        places={name: layout.places for name, layout in layouts.items()},
        adapter=adapter,
        skipped=skipped_modules(tensors, decisions, chosen | plain, checkpoint.config),
        memory=plan_memory(
            flights(shards), partial(_workspace, shards, backend, options.compare_loftq), at_once, run.max_memory
        ),
        backend=backend.name,
    )


def _kept(decision: Decision) -> Decision:
    reason = "transformers keeps this layer in full precision: neither quantised nor adapted"
    return replace(decision, action=Action.COPY, reason=reason)


def _out_by_in(spec: SplitSpec) -> SplitSpec:
    """bitsandbytes stores out × in, whichever way the source does."""
    if not spec.fan_in_fan_out:
        return spec
    return replace(spec, rows=spec.cols, cols=spec.rows, fan_in_fan_out=False)


def _treatment(
    tensor: TensorInfo,
    decision: Decision,
    options: QuantOptions,
    specs: Mapping[str, SplitSpec],
    slots: Mapping[str, tuple[TensorInfo, TensorInfo]],
) -> Treatment:
    rows, cols = reversed(tensor.shape) if decision.fan_in_fan_out else tensor.shape
    form = FourBitSpec(rows, cols, tensor.dtype, options.quant, options.double_quant)
    return Treatment(form, decision.fan_in_fan_out, specs.get(tensor.name), slots.get(tensor.name, ()))


def _workspace(shards: Iterable[ShardPlan], backend: Backend, compare_loftq: bool, widths: Widths) -> int:
    """Bytes that the lanes take beside the steps' buffers."""

    def own(step: Quantise, threads: int) -> int:
        split, form = step.treatment.split, step.treatment.format
        if split is None:
            return 0
        norm = NativeBackend.nuclear_norm_workspace_bytes(form.rows, form.cols, threads, split.rank)
        return max(backend.workspace_bytes(split, threads), backend.refit_workspace_bytes(split, threads), norm)

    steps = [step for shard in shards for step in shard.steps if isinstance(step, Quantise)]
    return widths.total((step.nbytes, partial(own, step)) for step in steps) + widths.passing(
        (step.nbytes, workspace_bytes(step.treatment, compare_loftq=compare_loftq)) for step in steps
    )
