"""From the keyword arguments of `convert` to a plan, where the result or the source is a GGUF."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pissa_convert.errors import RequestError
from pissa_convert.formats.adapter_folder import AdapterFolder, open_adapter
from pissa_convert.gguf_adapter_plan import GgufAdapterPlan
from pissa_convert.gguf_adapter_planning import plan_gguf_adapter, target_from, target_of
from pissa_convert.gguf_model import open_base
from pissa_convert.gguf_options import ADAPTER_TYPES, gguf_options
from pissa_convert.init_planning import stored_init
from pissa_convert.lora_plan import LoraPlan
from pissa_convert.lora_planning import plan_lora
from pissa_convert.options import RunOptions, lora_options

_DELTA = ("rank", "tolerance", "uniform_rank")

_Path = str | os.PathLike[str]


def plan_to_gguf(
    source: _Path, dest: _Path, options: Mapping[str, Any], run: RunOptions, threads: int
) -> GgufAdapterPlan:
    """Plan `--to gguf`.

    Raises:
        RequestError: the request is wrong in itself or does not fit the files.
    """
    root = Path(source)
    return _plan_adapter(root, dest, options, run, threads)


def _refuse_others(options: Mapping[str, Any], taken: tuple[str, ...], what: str) -> None:
    for name in options:
        if name not in taken:
            raise RequestError(f"--{name.replace('_', '-')} does not apply to --to gguf {what}".rstrip())


def _plan_adapter(
    root: Path, dest: _Path, options: Mapping[str, Any], run: RunOptions, threads: int
) -> GgufAdapterPlan:
    _refuse_others(options, ("base_gguf", "base", "init", "outtype", *_DELTA), "of an adapter")
    if ("base_gguf" in options) == ("base" in options):
        fix = "give --base-gguf with a GGUF of the base model, or --base with its folder, for its config alone"
        raise RequestError("--to gguf needs the base model that an adapter is for", fix=fix)
    chosen = gguf_options(outtype=options.get("outtype"), known=ADAPTER_TYPES)
    adapter = open_adapter(root, "SOURCE")
    if "base_gguf" in options:
        target = target_of(open_base(Path(options["base_gguf"]), "--base-gguf"))
    else:
        target = target_from(Path(options["base"]))
    lora = _plan_delta(adapter, dest, options, run, threads)
    return plan_gguf_adapter(adapter, target, dest, chosen, run, threads, lora)


def _plan_delta(
    adapter: AdapterFolder, dest: _Path, options: Mapping[str, Any], run: RunOptions, threads: int
) -> LoraPlan | None:
    """What makes ΔW of a trained adapter on the way."""
    given = {name: options[name] for name in _DELTA if name in options}
    if "init" not in options:
        if given:
            raise RequestError(f"--{next(iter(given)).replace('_', '-')} goes with --init")
        return None
    return plan_lora(adapter, stored_init(Path(options["init"])), dest, lora_options(**given), run, threads)
