"""Which weights are split: PEFT's meaning of target modules, decided from headers alone.

Every tensor gets a decision with a reason. What PEFT finds by looking at live modules ("all-linear" is every
nn.Linear and Conv1D except the output head) is told here from names, shapes and config: `architectures` knows
how. Patterns are matched against run-time module names, as PEFT matches them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from pissa_convert.errors import RequestError
from pissa_convert.plans.architectures import Architecture, Kind, kind_of, read_architecture

ALL_LINEAR = "all-linear"
SPLITTABLE = ("BF16", "F16", "F32")

Tensor = tuple[str, str, tuple[int, ...]]
Match = Callable[[str], bool]


class Action(str, Enum):
    """What becomes of a tensor; what cannot be done is refused with a RequestError."""

    SPLIT = "split"
    COPY = "copy"
    QUANTISE = "quantise"


@dataclass(frozen=True)
class Decision:
    """What becomes of one tensor.

    Attributes:
        tensor: its name in the checkpoint.
        action: split or copy.
        reason: why, in a few words.
        module: run-time name of the module it belongs to, which is what an adapter calls it.
        fan_in_fan_out: the weight is stored in × out.
    """

    tensor: str
    action: Action
    reason: str
    module: str
    fan_in_fan_out: bool = False


def parse_targets(values: Sequence[str]) -> str | list[str]:
    """Read the words given to --target-modules in the form that PEFT would be given.

    One word is a regular expression if it has such characters (other than the dot, which module names have
    too) or is "all-linear"; anything else is a list of names and name endings.
    """
    if len(values) == 1 and (values[0].lower() == ALL_LINEAR or re.search(r"[*+?^$|()\[\]{}\\]", values[0])):
        return values[0]
    return list(values)


def decide(
    tensors: Iterable[Tensor],
    config: Mapping[str, Any],
    targets: str | Sequence[str] = ALL_LINEAR,
    exclude: str | Sequence[str] | None = None,
) -> tuple[Decision, ...]:
    """Decide what becomes of every tensor.

    Args:
        tensors: (name, safetensors dtype, shape) of each.
        config: the model's config.json.
        targets: "all-linear", a regular expression for whole module names, or names and name endings.
        exclude: the same, for what to leave alone; wins over `targets`.

    Returns:
        One decision for each tensor, in the given order.

    Raises:
        RequestError: the model is quantised already, a pattern is no regular expression, a module was asked
            for that cannot be split, a weight has a dtype that cannot be split, or nothing is left to split.
    """
    known = tuple(tensors)
    architecture = read_architecture(config, [name for name, _, _ in known])
    kinds = [kind_of(name, shape, architecture) for name, _, shape in known]
    refuse_quantised(known, config)
    everything = isinstance(targets, str) and targets.lower() == ALL_LINEAR
    wanted = None if everything else matcher("--target-modules", targets)
    unwanted = matcher("--exclude-modules", exclude) if exclude else lambda module: False
    if wanted is not None:
        _refuse_absent_head(known, architecture, wanted, unwanted)
    decisions = tuple(
        _decide(tensor, kind, architecture.module(tensor[0]), wanted, unwanted)
        for tensor, kind in zip(known, kinds, strict=True)
    )
    if not any(decision.action is Action.SPLIT for decision in decisions):
        raise _nothing_left(known, kinds, architecture, targets, exclude)
    return decisions


def _decide(tensor: Tensor, kind: Kind, module: str, wanted: Match | None, unwanted: Match) -> Decision:
    name, dtype, shape = tensor
    if unwanted(module):
        return Decision(name, Action.COPY, "excluded by --exclude-modules", module)
    if wanted is None and not kind.is_linear:
        return Decision(name, Action.COPY, kind.value, module)
    if wanted is not None:
        if not wanted(module):
            return Decision(name, Action.COPY, "not among --target-modules", module)
        if not name.endswith(".weight") and kind not in (Kind.EXPERT, Kind.FUSED_EXPERTS):
            return Decision(name, Action.COPY, "bias or other parameter of a module", module)
        if not kind.is_linear and kind is not Kind.HEAD:
            raise RequestError(
                f"cannot be split: {kind.value}",
                tensor=name,
                found=f"shape {list(shape)}",
                fix="narrow --target-modules or leave it out with --exclude-modules",
            )
    if dtype not in SPLITTABLE:
        raise RequestError(
            "the weight cannot be split in its dtype",
            tensor=name,
            expected=" or ".join(SPLITTABLE),
            found=dtype,
            fix="dequantise or cast the model first, or leave the module out with --exclude-modules",
        )
    return Decision(name, Action.SPLIT, kind.value, module, kind is Kind.CONV1D)


def matcher(option: str, given: str | Sequence[str]) -> Match:
    """Whether a module is among those of --target-modules or --exclude-modules.

    Raises:
        RequestError: `given` is no regular expression; names the option.
    """
    if not isinstance(given, str):
        names = tuple(given)
        return lambda module: any(module == name or module.endswith(f".{name}") for name in names)
    try:
        pattern = re.compile(given)
    except re.error as error:
        raise RequestError(f"{option} is not a regular expression: {error}", found=given) from error
    return lambda module: pattern.fullmatch(module) is not None


_PACKED = re.compile(r"(.*\.)?(qweight|qzeros|weight_packed|\w+_blocks|weight\.(absmax|quant_map|quant_state\..*)|SCB)")


def refuse_quantised(tensors: Sequence[Tensor], config: Mapping[str, Any]) -> None:
    """Refuse a model that is quantised already.

    Raises:
        RequestError: it is; names the method or the first packed tensor.
    """
    for holder in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        quantisation = holder.get("quantization_config")
        if quantisation:
            method = quantisation.get("quant_method") if isinstance(quantisation, Mapping) else None
            raise RequestError(
                "the model is quantised already",
                expected="full-precision weights",
                found=f"quantization_config, {method or 'method not named'}",
                fix="start from the full-precision model, or dequantise it first",
            )
    for name, dtype, _ in tensors:
        if _PACKED.fullmatch(name):
            raise RequestError(
                "the weight is quantised already",
                tensor=name,
                expected="full-precision weights",
                found=f"packed {dtype}",
                fix="start from the full-precision model, or dequantise it first",
            )


def _refuse_absent_head(tensors: Sequence[Tensor], architecture: Architecture, wanted: Match, unwanted: Match) -> None:
    """A tied head has no tensor of its own, so asking for it would otherwise pass in silence."""
    head = "lm_head"
    stored = any(architecture.module(name) == head for name, _, _ in tensors)
    if architecture.tied and not stored and wanted(head) and not unwanted(head):
        raise RequestError(
            f"cannot be split: {Kind.TIED_HEAD.value}",
            tensor=f"{head}.weight",
            fix="narrow --target-modules or leave it out with --exclude-modules",
        )


def _nothing_left(
    tensors: Sequence[Tensor],
    kinds: Sequence[Kind],
    architecture: Architecture,
    targets: str | Sequence[str],
    exclude: str | Sequence[str] | None,
) -> RequestError:
    linear = [architecture.module(tensor[0]) for tensor, kind in zip(tensors, kinds, strict=True) if kind.is_linear]
    if linear:
        endings = dict.fromkeys(module.rpartition(".")[2] for module in linear)
        return RequestError(
            "no weight is left to split",
            expected=f"modules such as {', '.join([*endings][:8])} (in full {linear[0]})",
            found=" ".join([_words(targets), "without", _words(exclude)] if exclude else [_words(targets)]),
            fix="correct --target-modules or --exclude-modules",
        )
    doubtful = [tensor[0] for tensor, kind in zip(tensors, kinds, strict=True) if kind is Kind.RENAMED]
    if doubtful:
        return RequestError(
            f"no weight can be split: {Kind.RENAMED.value}",
            tensor=doubtful[0],
            found=f"model type {architecture.model_type}",
        )
    return RequestError("no weight can be split: the model has no linear layers")


def _words(names: str | Sequence[str]) -> str:
    return names if isinstance(names, str) else " ".join(names)


def compact_target_modules(all_modules: Iterable[str], selected: Collection[str]) -> list[str]:
    """The shortest list of names that PEFT expands to exactly `selected`.

    A last component stands for every module that ends in it; where some of those are not selected, the
    selected ones are listed in full.

    Args:
        all_modules: every module that holds a tensor, by run-time name; the containers around them are
            derived.
        selected: the modules to name.

    Returns:
        Names in sorted order.
    """
    chosen = set(selected)
    modules: set[str] = set()
    for module in (*all_modules, *chosen):
        while module and module not in modules:
            modules.add(module)
            module = module.rpartition(".")[0]
    spoilt = {module.rpartition(".")[2] for module in modules - chosen}
    endings = {module: module.rpartition(".")[2] for module in chosen}
    return sorted({module if ending in spoilt else ending for module, ending in endings.items()})
