"""From the keyword arguments of `convert` to a plan, where the result or the source is a GGUF."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pissa_convert.engine.gguf_base_check import check_gguf_base
from pissa_convert.engine.template_check import proven_origins
from pissa_convert.errors import RequestError
from pissa_convert.formats.adapter import CONFIG_NAME
from pissa_convert.formats.adapter_folder import AdapterFolder, open_adapter
from pissa_convert.formats.checkpoint import open_checkpoint
from pissa_convert.linalg import Backend
from pissa_convert.options import RunOptions, lora_options, split_options
from pissa_convert.plans.gguf.adapter_plan import GgufAdapterPlan
from pissa_convert.plans.gguf.adapter_planning import plan_gguf_adapter, target_from, target_of
from pissa_convert.plans.gguf.merging import plan_gguf_merge
from pissa_convert.plans.gguf.model import open_base
from pissa_convert.plans.gguf.names import layout_of
from pissa_convert.plans.gguf.options import ADAPTER_TYPES, MERGED_TYPES, MODEL_TYPES, GgufSplitOptions, gguf_options
from pissa_convert.plans.gguf.origins import find_origins
from pissa_convert.plans.gguf.plan import GgufPlan
from pissa_convert.plans.gguf.planning import plan_gguf_model
from pissa_convert.plans.gguf.splitting import plan_gguf_split
from pissa_convert.plans.init_planning import split_manifest, stored_init
from pissa_convert.plans.lora_plan import LoraPlan
from pissa_convert.plans.lora_planning import plan_lora
from pissa_convert.plans.targets import refuse_quantised

_DELTA = ("rank", "tolerance", "uniform_rank")

_Path = str | os.PathLike[str]


def plan_gguf_request(
    source: _Path, dest: _Path, to: str, options: dict[str, Any], run: RunOptions, backend: Backend
) -> GgufAdapterPlan | GgufPlan:
    """Plan `--to gguf`, or `--to pissa` or `--to merged` of a GGUF; as `plan_request`."""
    if to == "pissa":
        return plan_split_gguf(source, dest, options, run, backend)
    if to == "merged":
        return plan_merged_gguf(source, dest, options, run, backend.threads)
    return plan_to_gguf(source, dest, options, run, backend.threads)


def plan_to_gguf(
    source: _Path, dest: _Path, options: Mapping[str, Any], run: RunOptions, threads: int
) -> GgufAdapterPlan | GgufPlan:
    """Plan `--to gguf`.

    Raises:
        RequestError: the request is wrong in itself or does not fit the files.
    """
    root = Path(source)
    if (root / CONFIG_NAME).is_file():
        return _plan_adapter(root, dest, options, run, threads)
    return _plan_model(root, dest, options, run, threads)


def _plan_model(root: Path, dest: _Path, options: Mapping[str, Any], run: RunOptions, threads: int) -> GgufPlan:
    _refuse_others(options, ("base_gguf", "outtype"), "gguf", "a model")
    if "base_gguf" not in options:
        fix = "give --base-gguf with a GGUF of the model, or of the one that it was trained from, of any type"
        raise RequestError("--to gguf takes the tokenizer and all keys of a model from a template", fix=fix)
    chosen = gguf_options(outtype=options.get("outtype"), known=MODEL_TYPES)
    checkpoint = open_checkpoint(root.resolve())
    refuse_quantised([(tensor.name, tensor.dtype, tensor.shape) for tensor in checkpoint.tensors], checkpoint.config)
    template = open_base(Path(options["base_gguf"]), "--base-gguf")
    layout = layout_of(template)
    origins = proven_origins(template, find_origins(checkpoint, template, layout), layout)
    residual = split_manifest(root) is not None
    return plan_gguf_model(checkpoint, template, origins, dest, chosen, run, threads, residual)


def _refuse_others(options: Mapping[str, Any], taken: tuple[str, ...], to: str, what: str) -> None:
    for name in options:
        if name not in taken:
            raise RequestError(f"--{name.replace('_', '-')} does not apply to --to {to} of {what}")


def _plan_adapter(
    root: Path, dest: _Path, options: Mapping[str, Any], run: RunOptions, threads: int
) -> GgufAdapterPlan:
    _refuse_others(options, ("base_gguf", "base", "init", "outtype", *_DELTA), "gguf", "an adapter")
    if ("base_gguf" in options) == ("base" in options):
        fix = "give --base-gguf with a GGUF of the base model, or --base with its folder, for its config alone"
        raise RequestError("--to gguf needs the base model that an adapter is for", fix=fix)
    chosen = gguf_options(outtype=options.get("outtype"), known=ADAPTER_TYPES)
    adapter = open_adapter(root, "SOURCE")
    base = open_base(Path(options["base_gguf"]), "--base-gguf", whole=False) if "base_gguf" in options else None
    target = target_from(Path(options["base"])) if base is None else target_of(base)
    lora = _plan_delta(adapter, dest, options, run, threads)
    plan = plan_gguf_adapter(adapter, target, dest, chosen, run, threads, lora)
    if base is not None and lora is None:
        check_gguf_base(base, adapter, plan.tensors)
    return plan


def plan_merged_gguf(source: _Path, dest: _Path, options: Mapping[str, Any], run: RunOptions, threads: int) -> GgufPlan:
    """Plan `--to merged` of a GGUF.

    Raises:
        RequestError: the request is wrong in itself or does not fit the files.
    """
    _refuse_others(options, ("adapter", "outtype"), "merged", "a GGUF")
    if "adapter" not in options:
        raise RequestError("--to merged needs what to add to the model", fix="give --adapter")
    chosen = gguf_options(outtype=options.get("outtype"), known=MERGED_TYPES)
    base, adapter = open_base(Path(source), "SOURCE"), open_adapter(Path(options["adapter"]), "--adapter")
    plan = plan_gguf_merge(base, adapter, dest, chosen, run, threads)
    check_gguf_base(
        base, adapter, [step.treatment.added for step in plan.encodings if step.treatment.added is not None]
    )
    return plan


def plan_split_gguf(
    source: _Path, dest: _Path, options: Mapping[str, Any], run: RunOptions, backend: Backend
) -> GgufPlan:
    """Plan `--to pissa` of a GGUF.

    Raises:
        RequestError: the request is wrong in itself or does not fit the file.
    """
    _refuse_others(options, (*inspect.signature(split_options).parameters, "outtype"), "pissa", "a GGUF")
    outtype = gguf_options(outtype=options.get("outtype"), known=MERGED_TYPES).outtype
    split = split_options(**{name: value for name, value in options.items() if name != "outtype"})
    return plan_gguf_split(open_base(Path(source), "SOURCE"), dest, GgufSplitOptions(split, outtype), run, backend)


def _plan_delta(
    adapter: AdapterFolder, dest: _Path, options: Mapping[str, Any], run: RunOptions, threads: int
) -> LoraPlan | None:
    """What makes ΔW of a trained adapter on the way."""
    given = {name: options[name] for name in _DELTA if name in options}
    if "init" not in options:
        if given:
            raise RequestError(f"--{next(iter(given)).replace('_', '-')} goes with --init")
        return None
    folder = Path(os.path.abspath(dest)).parent  # DEST itself is a file
    return plan_lora(adapter, stored_init(Path(options["init"])), folder, lora_options(**given), run, threads)
