"""An adapter for a GGUF base model, planned from the headers of both."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from pissa_convert.errors import RequestError
from pissa_convert.formats.adapter_folder import AdapterFolder
from pissa_convert.formats.strict_json import read_object
from pissa_convert.memory import plan_memory
from pissa_convert.options import RunOptions
from pissa_convert.plans.gguf.adapter import Target, place_adapter
from pissa_convert.plans.gguf.adapter_plan import GgufAdapterPlan
from pissa_convert.plans.gguf.model import BaseGguf
from pissa_convert.plans.gguf.names import APPLIES_ADAPTERS, Layout, layout_from_config, layout_of
from pissa_convert.plans.gguf.options import GgufOptions
from pissa_convert.plans.lora_plan import LoraPlan

_MAX_CONFIG = 16_000_000


def target_of(base: BaseGguf) -> Target:
    """The model of a GGUF."""
    return Target(layout_of(base), {name: tensor.shape for name, tensor in base.tensors.items()}, base.file.path)


def target_from(model: Path) -> Target:
    """The GGUF that a Hugging Face model would make, from its config.json alone.

    Raises:
        RequestError: there is no config.json, or none of a model whose layout is known.
    """
    path = model / "config.json"
    if not path.is_file():
        raise RequestError("--base has no config.json", file=model, fix="give the folder of the base model")
    return Target(layout_from_config(read_object(path, _MAX_CONFIG, "the config"), path), None, path)


def check_known(layout: Layout, file: Path) -> None:
    """Refuse an architecture for which an adapter cannot be placed with certainty.

    Raises:
        RequestError: it is one.
    """
    if not layout.is_known:
        raise RequestError(
            "how this architecture orders the rows of its weights is not known here",
            file=file,
            found=layout.architecture[:40],
            fix="merge the adapter into the model's own folder with --to merged, and convert that with --to gguf",
        )


def check_applied(architecture: str, file: Path) -> None:
    """Refuse an architecture for which llama.cpp would ignore a part of an adapter.

    Raises:
        RequestError: it is one.
    """
    if architecture not in APPLIES_ADAPTERS:
        raise RequestError(
            "llama.cpp does not add adapters to every weight of this architecture",
            file=file,
            found=architecture[:40],
            fix="merge the adapter instead",
        )


def file_dest(dest: str | os.PathLike[str], *sources: Path) -> Path:
    """DEST where it is the name of a file to make.

    Raises:
        RequestError: it is no such name, or lies in what is read.
    """
    path = Path(os.path.abspath(dest))
    real = Path(os.path.realpath(path))
    if path.suffix != ".gguf":
        raise RequestError("DEST is no name for a GGUF", file=path, expected="a name that ends in .gguf")
    for source in sources:
        origin = source.resolve()
        if real == origin or origin in real.parents:
            raise RequestError(f"DEST is {source} or lies inside it", file=path, fix="choose another place")
    return path


def plan_gguf_adapter(
    adapter: AdapterFolder,
    target: Target,
    dest: str | os.PathLike[str],
    options: GgufOptions,
    run: RunOptions,
    threads: int,
    lora: LoraPlan | None,
) -> GgufAdapterPlan:
    """Decide everything.

    Args:
        lora: makes ΔW of the adapter on the way, if it is to be made.

    Raises:
        RequestError: the adapter has no place in the base model, or llama.cpp would not use it as it is.
    """
    path = file_dest(dest, adapter.root, target.file, *([] if lora is None else [lora.init.folder]))
    check_known(target.layout, target.file)
    check_applied(target.layout.architecture, target.file)
    ranks = {name: pair.rank for name, pair in adapter.pairs.items()} if lora is None else lora.ranks
    tensors = place_adapter(adapter, ranks, target)
    # Both factors in float64, and as much again while they are compared with what is stored.
    largest = max(8 * 4 * tensor.size for tensor in tensors)
    if lora is not None:
        largest += max(module.workspace for module in lora.modules)
    memory = plan_memory([largest] * min(threads, len(tensors)), lambda lanes: 0, 1, run.max_memory)
    return GgufAdapterPlan(
        dest=path.parent,
        alone=path.name,
        options=options,
        adapter=adapter,
        lora=lora,
        target=target,
        tensors=tensors,
        in_flight=max(1, min(threads, memory.budget // largest)),
        memory=memory,
    )


def with_ranks(plan: GgufAdapterPlan, ranks: Mapping[str, int]) -> GgufAdapterPlan:
    """The plan once `--rank auto` has told the modules' ranks."""
    assert plan.lora is not None
    tensors = place_adapter(plan.adapter, ranks, plan.target)
    return replace(plan, lora=replace(plan.lora, ranks=ranks), tensors=tensors)
