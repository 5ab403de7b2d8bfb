"""A GGUF split in its own layout: a residual GGUF and a principal adapter's GGUF, without knowing the architecture."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from pissa_convert.errors import RequestError
from pissa_convert.formats.gguf import padded
from pissa_convert.formats.gguf_layout import lay_out as lay_out_gguf
from pissa_convert.formats.gguf_types import PLAIN, TYPES
from pissa_convert.formats.safetensors import TensorInfo
from pissa_convert.linalg import Backend, SplitSpec, tensor_key
from pissa_convert.memory import Widths, plan_memory
from pissa_convert.options import ADAPTER_DTYPES, RunOptions
from pissa_convert.plans.gguf.adapter_plan import ALIGNMENT, adapter_pairs
from pissa_convert.plans.gguf.adapter_planning import check_applied
from pissa_convert.plans.gguf.model import RESIDUAL_MARK, BaseGguf
from pissa_convert.plans.gguf.names import block_kind
from pissa_convert.plans.gguf.options import GgufSplitOptions
from pissa_convert.plans.gguf.plan import AdapterFile, GgufPlan
from pissa_convert.plans.gguf.planning import WORKSPACE, check_decodable, chosen_type, new_header
from pissa_convert.plans.gguf.steps import GgufSplit, Treatment, encode_steps, gguf_steps
from pissa_convert.plans.split_plan import check_destination
from pissa_convert.plans.steps import Change, ShardPlan, changes_of, flights
from pissa_convert.plans.targets import ALL_LINEAR, Action, Decision, matcher
from pissa_convert.transforms.ggml import check_encodable

_ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output")
_FEED_FORWARD = tuple(f"ffn_{side}{rest}" for side in ("gate", "up", "down") for rest in ("", "_exps", "_shexp"))

_LINEAR = frozenset((*_ATTENTION, *_FEED_FORWARD))
"""Weights of a layer that llama.cpp multiplies by through the function that adds adapters, and that are no routers."""

_HEAD = "output"


def plan_gguf_split(
    base: BaseGguf, dest: str | os.PathLike[str], options: GgufSplitOptions, run: RunOptions, backend: Backend
) -> GgufPlan:
    """Decide everything.

    Raises:
        RequestError: a weight cannot be split as asked, llama.cpp would not apply the adapter, or DEST cannot be used.
    """
    file, target = base.file, Path(os.path.abspath(dest))
    check_destination(file.path.resolve(), target)
    check_applied(base.architecture, file.path)
    if base.is_residual:
        raise RequestError("SOURCE is itself the residual of a split", file=file.path, fix="split the original model")
    decisions = _decide(base, options)
    chosen = [base.tensors[decision.tensor] for decision in decisions if decision.action is Action.SPLIT]
    kinds = {tensor.name: chosen_type(tensor, options.outtype) for tensor in file.tensors}
    for tensor in file.tensors:
        if tensor in chosen or kinds[tensor.name] != tensor.dtype:
            check_decodable(tensor, file.path)
            check_encodable(kinds[tensor.name])
    header, places = new_header(file, kinds, options.outtype, residual=True)
    adapter_header, slots = _lay_out_adapter(base, chosen, options)

    def changes(tensor: TensorInfo) -> Iterator[Change]:
        place = places[tensor.name]
        if tensor.name in slots:
            yield from _split_steps(place, tensor, kinds[tensor.name], slots[tensor.name], options, file.alignment)
        elif kinds[tensor.name] != tensor.dtype:
            yield from encode_steps(place, tensor, Treatment(kinds[tensor.name]), file.alignment)

    steps = gguf_steps(file, places, changes)
    stem = file.path.stem
    shard = ShardPlan(file, header, steps[-1].stop, steps, f"{stem}-{RESIDUAL_MARK}.gguf")
    splits = [step.spec for step in steps if isinstance(step, GgufSplit)]
    size = padded(max(slot.end for pair in slots.values() for slot in pair), ALIGNMENT)
    return GgufPlan(
        to="pissa",
        dest=target,
        alone=None,
        options=options,
        base=base,
        shard=shard,
        read={},
        memory=plan_memory(
            flights([shard]), partial(_workspace, shard, backend), backend.at_once(splits), run.max_memory
        ),
        beside=AdapterFile(f"{stem}-principal-adapter.gguf", adapter_header, size),
        backend=backend.name,
        decisions=decisions,
    )


def _workspace(shard: ShardPlan, backend: Backend, widths: Widths) -> int:
    """Bytes of the splits' workspaces, and of the arrays that rows are decoded and encoded in."""

    def needed(step: Change, threads: int) -> int:
        return WORKSPACE + (backend.workspace_bytes(step.spec, threads) if isinstance(step, GgufSplit) else 0)

    return widths.total((step.nbytes, partial(needed, step)) for step in changes_of([shard]))


def _decide(base: BaseGguf, options: GgufSplitOptions) -> tuple[Decision, ...]:
    """What becomes of every tensor; its module is its name without ".weight"."""
    targets, exclude = options.split.target_modules, options.split.exclude_modules
    everything = isinstance(targets, str) and targets.lower() == ALL_LINEAR
    wanted = None if everything else matcher("--target-modules", targets)
    unwanted = matcher("--exclude-modules", exclude) if exclude else lambda module: False
    decisions = []
    for tensor in base.file.tensors:
        module, _, leaf = tensor.name.rpartition(".")
        kind = block_kind(module)
        is_linear = leaf == "weight" and kind in _LINEAR and len(tensor.shape) in (2, 3)
        if unwanted(module):
            action, reason = Action.COPY, "excluded by --exclude-modules"
        elif wanted is not None and not (wanted(module) and leaf == "weight"):
            action, reason = Action.COPY, "not among --target-modules"
        elif is_linear or (wanted is not None and kind == _HEAD):
            action, reason = Action.SPLIT, "linear layer" if len(tensor.shape) == 2 else "stack of experts"
            _check_rank(tensor, base, options.split.rank)
        elif wanted is not None:
            raise RequestError(
                "cannot be split: llama.cpp would not add an adapter to it",
                file=base.file.path,
                tensor=tensor.name,
                found=f"shape {list(tensor.shape)}",
                fix="narrow --target-modules or leave it out with --exclude-modules",
            )
        else:
            action, reason = Action.COPY, "no linear layer that takes an adapter"
        decisions.append(Decision(tensor.name, action, reason, module))
    if not any(decision.action is Action.SPLIT for decision in decisions):
        raise RequestError(
            "no weight is left to split",
            file=base.file.path,
            expected="modules such as attn_q, ffn_down (in full blk.0.attn_q)",
            fix="correct --target-modules or --exclude-modules",
        )
    return tuple(decisions)


def _check_rank(tensor: TensorInfo, base: BaseGguf, rank: int) -> None:
    if rank > min(tensor.shape[-2:]):
        raise RequestError(
            "--rank is larger than the weight allows",
            file=base.file.path,
            tensor=tensor.name,
            expected=f"at most {min(tensor.shape[-2:])} for shape {list(tensor.shape)}",
            found=rank,
            fix="lower --rank or leave the module out with --exclude-modules",
        )


def _lay_out_adapter(
    base: BaseGguf, chosen: list[TensorInfo], options: GgufSplitOptions
) -> tuple[bytes, dict[str, tuple[TensorInfo, TensorInfo]]]:
    """llama.cpp's scaling is alpha over the rank, so alpha says s whatever the options call it."""
    rank, kind = options.split.rank, ADAPTER_DTYPES[options.split.adapter_dtype]
    tensors = []
    for tensor in chosen:
        *experts, rows, columns = tensor.shape
        tensors.append((f"{tensor.name}.lora_a", kind, (*experts, rank, columns)))
        tensors.append((f"{tensor.name}.lora_b", kind, (*experts, rows, rank)))
    pairs = adapter_pairs(base.architecture, options.split.scaling * rank)
    header, places = lay_out_gguf(pairs, tensors, ALIGNMENT)
    return header, {tensor.name: (places[2 * i], places[2 * i + 1]) for i, tensor in enumerate(chosen)}


def _split_steps(
    place: TensorInfo,
    tensor: TensorInfo,
    kind: str,
    slots: tuple[TensorInfo, TensorInfo],
    options: GgufSplitOptions,
    alignment: int,
) -> Iterator[GgufSplit]:
    """One step for a weight, or one for each expert; `tensor` is its span with padding."""
    *experts, rows, columns = tensor.shape
    count = experts[0] if experts else 1
    old, new = (rows * TYPES[name].row_bytes(columns) for name in (tensor.dtype, kind))
    split = options.split
    for number in range(count):
        key = f"{tensor.name}[{number}]" if experts else tensor.name
        is_last = number == count - 1
        a, b = (_part(slot, number, count) for slot in slots)
        yield GgufSplit(
            begin=tensor.begin + number * old,
            end=tensor.end if is_last else tensor.begin + (number + 1) * old,
            at=place.begin + number * new,
            tensor=tensor.name,
            key=key,
            spec=SplitSpec(
                rows=rows,
                cols=columns,
                dtype=kind if kind == tensor.dtype and kind in PLAIN else "F32",
                rank=split.rank,
                scaling=split.scaling,
                adapter_dtype=ADAPTER_DTYPES[split.adapter_dtype],
                fan_in_fan_out=False,
                passes=split.passes,
                key=tensor_key(split.seed, key),
            ),
            kind=tensor.dtype,
            stored_kind=kind,
            padding=padded(place.end, alignment) - place.end if is_last else 0,
            a=a,
            b=b,
        )


def _part(slot: TensorInfo, number: int, count: int) -> TensorInfo:
    """The place of one expert's factor."""
    size = slot.nbytes // count
    return TensorInfo(
        slot.name, slot.dtype, slot.shape[-2:], slot.begin + number * size, slot.begin + (number + 1) * size
    )
