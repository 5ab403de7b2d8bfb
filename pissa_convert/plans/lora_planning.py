"""`--to lora`: what becomes of every module of two adapters, decided from their headers alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from pissa_convert.errors import FormatError, RequestError
from pissa_convert.formats.adapter_folder import AdapterFolder, Pair
from pissa_convert.formats.checkpoint import check_inside
from pissa_convert.memory import plan_memory
from pissa_convert.options import LoraOptions, RunOptions
from pissa_convert.plans.init_planning import Init
from pissa_convert.plans.lora_plan import COMPANIONS, LoraPlan, Module
from pissa_convert.plans.split_plan import check_destination


def plan_lora(
    trained: AdapterFolder,
    init: Init,
    dest: str | os.PathLike[str],
    options: LoraOptions,
    run: RunOptions,
    threads: int,
    workspace: int = 0,
) -> LoraPlan:
    """Decide everything that headers can tell.

    Args:
        threads: modules that may be worked on at once.
        workspace: bytes that splitting one weight again takes, where that is asked for.

    Raises:
        RequestError: the two adapters do not belong together, or DEST cannot be used.
    """
    target = Path(os.path.abspath(dest))
    for folder in (trained.root.resolve(), init.folder.resolve()):
        check_destination(folder, target)
    modules = _matched(trained, init)
    companions = tuple(name for name in COMPANIONS if (trained.root / name).is_file())
    for name in companions:
        check_inside(trained.root, trained.root / name)
    largest = max(module.workspace for module in modules)
    memory = plan_memory([largest] * min(threads, len(modules)), lambda widths: workspace, 1, run.max_memory)
    return LoraPlan(
        dest=target,
        options=options,
        trained=trained,
        init=init,
        modules=modules,
        ranks=choose_ranks(modules, {module.name: module.exact_rank for module in modules}, options),
        companions=companions,
        in_flight=max(1, min(threads, memory.budget // largest)),
        memory=memory,
    )


def choose_ranks(modules: tuple[Module, ...], wanted: Mapping[str, int], options: LoraOptions) -> dict[str, int]:
    """Each module's rank: as wanted, within what was asked for, and the same for all with `--uniform-rank`."""
    limit = options.rank if isinstance(options.rank, int) else max(wanted.values())
    ranks = {module.name: min(wanted[module.name], limit) for module in modules}
    return dict.fromkeys(ranks, max(ranks.values())) if options.uniform_rank else ranks


def _matched(trained: AdapterFolder, init: Init) -> tuple[Module, ...]:
    for one, other, where in (
        (init.pairs, trained.pairs, trained.file.path),
        (trained.pairs, init.pairs, init.file),
    ):
        missing = sorted(one.keys() - other.keys())
        if missing:
            raise RequestError(
                f"lacks {len(missing)} modules that the other adapter has" if len(missing) > 1 else "lacks a module",
                file=where,
                found=", ".join(missing[:2]) + ("…" if len(missing) > 2 else ""),
                fix="give the adapter that the training began with",
            )
    return tuple(_module(pair, trained.pairs[name], trained.file.path) for name, pair in init.pairs.items())


def _module(init: Pair, trained: Pair, path: Path) -> Module:
    before, after = (
        (pair.is_embedding, pair.size_out, pair.size_in, pair.bias is not None) for pair in (init, trained)
    )
    if before != after:
        raise FormatError(
            "its shape is not that of the initial adapter's",
            file=path,
            tensor=trained.a.name,
            expected=f"in {init.size_in}, out {init.size_out}" + (", with a bias" if init.bias else ""),
            found=f"in {trained.size_in}, out {trained.size_out}" + (", with a bias" if trained.bias else ""),
            fix="give the adapter that the training began with",
        )
    return Module(trained, init)
