"""Which weights `--to qpissa` quantises: every nn.Linear that transformers would, told from headers alone.

transformers turns every linear layer into a 4-bit one except the output head, those that it keeps in full precision for
their type, and those that `llm_int8_skip_modules` names. What is not certain to be an ordinary linear layer at run
time (a router, an expert that is fused with others, a layer whose weight is read directly) is left as it is, and named
there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pissa_convert.errors import RequestError
from pissa_convert.plans.architectures import Kind, kind_of, read_architecture
from pissa_convert.plans.naming import has_head, model_types
from pissa_convert.plans.targets import SPLITTABLE, Action, Decision, Tensor

QUANTISED = "linear layer without an adapter"

_KEPT = {
    **dict.fromkeys(("falcon", "idefics"), r".*"),
    **dict.fromkeys(("t5", "mt5", "umt5", "udop", "pop2piano"), r"(.*\.)?wo"),
    **dict.fromkeys(("blip-2", "instructblip", "instructblipvideo"), r"(.*\.)?qformer\..*"),
    **dict.fromkeys(("deepseek_v32", "glm_moe_dsa", "axk2"), r".*indexer\.weights_proj"),
}
"""Linear layers that transformers 5.24 keeps in full precision (`_keep_in_fp32_modules`, or a class derived from
nn.Linear, which it does not replace), by model type."""

_LINEAR = (Kind.LINEAR, Kind.CONV1D, Kind.NAMED_AS_EXPERT)
_HEADS = (Kind.HEAD, Kind.TIED_HEAD)
_NO_LINEAR = (
    Kind.EMBEDDING,
    Kind.FUSED_EXPERTS,
    Kind.EXPERT,
    Kind.CONVOLUTION,
    Kind.VECTOR,
    Kind.OTHER,
    Kind.UNUSED,
)


def kept_whole(module: str, config: Mapping[str, Any]) -> bool:
    """Whether transformers keeps a module in full precision whatever the config asks for."""
    return any(re.fullmatch(_KEPT[kind], module) for kind in model_types(config) if kind in _KEPT)


def decide_plain(
    tensors: Iterable[Tensor], decisions: Sequence[Decision], config: Mapping[str, Any]
) -> dict[str, Decision]:
    """Weights without an adapter that are quantised, by tensor name.

    Raises:
        RequestError: one has a dtype that bitsandbytes cannot quantise.
    """
    known = list(tensors)
    architecture = read_architecture(config, [name for name, _, _ in known])
    found = {}
    for (name, dtype, shape), decision in zip(known, decisions, strict=True):
        kind = kind_of(name, shape, architecture)
        if decision.action is Action.SPLIT or kind not in _LINEAR or kept_whole(decision.module, config):
            continue
        if dtype not in SPLITTABLE:
            raise RequestError(
                "a linear layer without an adapter cannot be quantised in its dtype",
                tensor=name,
                expected=" or ".join(SPLITTABLE),
                found=dtype,
                fix="cast the model first, or add --quantize-only-targets",
            )
        found[name] = Decision(name, Action.QUANTISE, QUANTISED, decision.module, kind is Kind.CONV1D)
    return found


def skipped_modules(
    tensors: Iterable[Tensor],
    decisions: Sequence[Decision],
    quantised: Mapping[str, Decision],
    config: Mapping[str, Any],
) -> list[str] | None:
    """`llm_int8_skip_modules`: the linear layers that are not quantised; None where transformers' default says so.

    Raises:
        RequestError: the names cannot be told from those of quantised modules as transformers reads the list.
    """
    known = list(tensors)
    architecture = read_architecture(config, [name for name, _, _ in known])
    left: dict[str, Kind] = {}
    for (name, _, shape), decision in zip(known, decisions, strict=True):
        kind = kind_of(name, shape, architecture)
        if name not in quantised and kind not in _NO_LINEAR:
            left[decision.module] = kind
    head = "lm_head"
    if has_head(config) and all(kind in _HEADS for kind in left.values()) and not _head_quantised(quantised, head):
        return None
    if has_head(config) and head not in left and not _head_quantised(quantised, head):
        left[head] = Kind.TIED_HEAD
    for decision in quantised.values():
        if not _is_converted(decision.module, left):
            raise RequestError(
                "transformers would not quantise it, because its name ends as that of a module which is left as it is",
                tensor=decision.tensor,
                found=decision.module,
                fix="leave it out with --exclude-modules and --quantize-only-targets",
            )
    return sorted(left)


def _head_quantised(quantised: Mapping[str, Decision], head: str) -> bool:
    return any(decision.module == head for decision in quantised.values())


def _is_converted(module: str, skipped: Iterable[str]) -> bool:
    """transformers' rule: a name in the list is the start of a module's up to a dot, as a pattern, or its end."""
    return not any(re.match(rf"(?:{name})(?:(?<=\.)|(?=\.|$))", module) or module.endswith(name) for name in skipped)
