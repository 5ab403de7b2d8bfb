"""From the keyword arguments of `convert`, which are the command's options, to a plan.

Each target's planning is imported when it is asked for; `--to pissa` needs no numpy.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pissa_convert.errors import RequestError
from pissa_convert.linalg import Backend
from pissa_convert.linalg.native import NativeBackend
from pissa_convert.linalg.select import select_backend
from pissa_convert.options import QUANT_OPTIONS, RunOptions, lora_options, merge_options, quant_options, split_options
from pissa_convert.plans.split_plan import Plan, make_plan

if TYPE_CHECKING:
    from pissa_convert.plans.gguf.adapter_plan import GgufAdapterPlan
    from pissa_convert.plans.gguf.plan import GgufPlan
    from pissa_convert.plans.lora_plan import LoraPlan
    from pissa_convert.plans.merge_plan import MergePlan
    from pissa_convert.plans.quant_plan import QuantPlan

    AnyPlan = Plan | QuantPlan | LoraPlan | MergePlan | GgufAdapterPlan | GgufPlan

_Path = str | os.PathLike[str]


def plan_request(
    source: _Path, dest: _Path, to: str, options: dict[str, Any], run_options: RunOptions, backend: Backend
) -> AnyPlan:
    """Plan a conversion.

    Args:
        options: the target's own, by name; those that it does not have are refused.

    Raises:
        RequestError: the request is wrong in itself or does not fit the files.
    """
    if to == "gguf" or (to in ("pissa", "merged") and _is_gguf(source)):
        from pissa_convert.plans.gguf.requests import plan_gguf_request

        return plan_gguf_request(source, dest, to, options, run_options, backend)
    if to == "pissa":
        _check_options(to, options, split_options)
        return make_plan(source, dest, to, split_options(**options), run_options, backend)
    if to == "qpissa":
        from pissa_convert.plans.quant_planning import plan_quantised

        _check_options(to, options, split_options, QUANT_OPTIONS)
        return plan_quantised(source, dest, quant_options(**options), run_options, backend)
    if to == "lora":
        _check_options(to, options, lora_options, _INIT)
        return _plan_lora(Path(source), dest, options, run_options, backend)
    if to == "merged":
        _check_options(to, options, merge_options, ("adapter", "exact_base"))
        return _plan_merged(source, dest, options, run_options, backend)
    raise RequestError("--to is unknown", expected="pissa, qpissa, lora, merged or gguf", found=to)


def _is_gguf(source: _Path) -> bool:
    return Path(source).suffix == ".gguf" and Path(source).is_file()


def choose_backend(to: str, options: Mapping[str, Any], run_options: RunOptions) -> Backend:
    """What splits; where nothing is split, the CPU.

    Raises:
        RequestError: a device is asked for that cannot be used, or has nothing to do.
    """
    if to in ("pissa", "qpissa") or (to == "lora" and options.get("base") is not None):
        return select_backend(run_options.device, run_options.threads, run_options.max_vram)
    for name, is_given in (("device", run_options.device not in ("auto", "cpu")), ("max-vram", run_options.max_vram)):
        if is_given:
            raise RequestError(f"--{name} does not apply to --to {to}: it splits no weight", fix="leave it out")
    return NativeBackend(run_options.threads)


_INIT = ("init", "base", "seed", "passes", "adapter_dtype")


def _check_options(to: str, options: Mapping[str, Any], takes: Callable[..., Any], more: tuple[str, ...] = ()) -> None:
    for name in options:
        if name not in (*inspect.signature(takes).parameters, *more):
            raise RequestError(f"--{name.replace('_', '-')} does not apply to --to {to}")


def _plan_lora(
    source: Path, dest: _Path, options: dict[str, Any], run_options: RunOptions, backend: Backend
) -> LoraPlan:
    from pissa_convert.formats.adapter_folder import open_adapter
    from pissa_convert.plans.init_planning import derived_init, stored_init
    from pissa_convert.plans.lora_planning import plan_lora

    origin = {name: options.pop(name) for name in _INIT if options.get(name) is not None}
    chosen = lora_options(**{name: value for name, value in options.items() if name not in _INIT})
    trained = open_adapter(source, "SOURCE")
    kept, base = (Path(origin.pop(name)) if name in origin else None for name in ("init", "base"))
    if base is not None:
        init = derived_init(base, trained, kept, origin)
    elif kept is None:
        fix = "give --init, or --base with the original model to derive it again"
        raise RequestError("--to lora needs the adapter as it was before training", fix=fix)
    elif origin:
        raise RequestError(f"--{next(iter(origin)).replace('_', '-')} goes with --base")
    else:
        init = stored_init(kept)
    derived = init.derivations.values()
    again = (backend.workspace_bytes(split.spec, backend.threads) + split.tensor.nbytes for split in derived)
    return plan_lora(trained, init, dest, chosen, run_options, backend.threads, max(again, default=0))


def _plan_merged(
    source: _Path, dest: _Path, options: dict[str, Any], run_options: RunOptions, backend: Backend
) -> MergePlan:
    from pissa_convert.engine.base_check import check_base
    from pissa_convert.plans.merge_planning import plan_merge

    adapter, exact_base = options.pop("adapter", None), options.pop("exact_base", False)
    if adapter is None and not exact_base:
        raise RequestError("--to merged needs what to add to the model", fix="give --adapter")
    if adapter is not None and exact_base:
        raise RequestError("--exact-base adds no adapter", fix="give --adapter or --exact-base")
    return check_base(plan_merge(source, adapter, dest, merge_options(**options), run_options, backend.threads))
