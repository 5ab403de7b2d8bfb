"""A LoRA added to a GGUF: what the adapter changes is decoded, added to and encoded again; the rest is copied."""

from __future__ import annotations

import os
from functools import partial

from pissa_convert.formats.adapter import CONFIG_NAME, WEIGHTS_NAME
from pissa_convert.formats.adapter_folder import AdapterFolder
from pissa_convert.memory import plan_memory
from pissa_convert.options import RunOptions
from pissa_convert.plans.gguf.adapter import place_adapter
from pissa_convert.plans.gguf.adapter_planning import check_known, file_dest, target_of
from pissa_convert.plans.gguf.model import BaseGguf
from pissa_convert.plans.gguf.options import GgufOptions
from pissa_convert.plans.gguf.plan import GgufPlan
from pissa_convert.plans.gguf.planning import WORKSPACE, check_decodable, chosen_type, shard_of, workspace
from pissa_convert.plans.gguf.steps import Treatment
from pissa_convert.plans.merge_plan import ADAPTER_PREFIX
from pissa_convert.plans.steps import flights


def plan_gguf_merge(
    base: BaseGguf,
    adapter: AdapterFolder,
    dest: str | os.PathLike[str],
    options: GgufOptions,
    run: RunOptions,
    threads: int,
) -> GgufPlan:
    """Decide everything.

    Raises:
        RequestError: the adapter has no place in the model, or a type cannot be read or written.
    """
    path = file_dest(dest, base.file.path, adapter.root)
    target = target_of(base)
    check_known(target.layout, base.file.path)
    ranks = {name: pair.rank for name, pair in adapter.pairs.items()}
    added = {tensor.name: tensor for tensor in place_adapter(adapter, ranks, target)}
    treatments = {}
    for tensor in base.file.tensors:
        kind = chosen_type(tensor, options.outtype)
        if tensor.name in added or kind != tensor.dtype:
            check_decodable(tensor, base.file.path)
            treatments[tensor.name] = Treatment(kind, added=added.get(tensor.name))
    shard = shard_of(base.file, treatments, options.outtype, path.name)
    # Each lane holds a tensor's factors, in float64 while they are read.
    factors = max(3 * 8 * tensor.size for tensor in added.values())
    return GgufPlan(
        to="merged",
        dest=path.parent,
        alone=path.name,
        options=options,
        base=base,
        shard=shard,
        read={f"{ADAPTER_PREFIX}{name}": adapter.root / name for name in (CONFIG_NAME, WEIGHTS_NAME)},
        memory=plan_memory(flights([shard]), partial(workspace, shard, WORKSPACE + factors), threads, run.max_memory),
        adapter=adapter,
    )
