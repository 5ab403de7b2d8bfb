"""Which weights are split: PEFT's meaning of target modules, decided from names, dtypes and shapes alone.

PEFT asks a live model for its `nn.Linear` and `Conv1D` modules; a checkpoint's header only has tensors. A
two-dimensional floating `X.weight` is a linear layer unless its name says otherwise, and the names below are those of
the transformers library. Every tensor gets a decision with its reason; nothing is decided by default.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from pissa_convert.errors import RequestError

ALL_LINEAR = "all-linear"
_SPLITTABLE = ("F32", "F16", "BF16")

_EMBEDDINGS = re.compile(
    r"(?:embed_tokens|embed_positions|embed_in|embeddings?|\w+_embeddings?|\w+_embed|wte|wpe|shared"
    r"|relative_attention_bias|embed_tokens_per_layer|position_embeddings_table|lang_embed)"
)
_HEADS = re.compile(
    r"(?:.*\.)?(?:lm_head|embed_out|lm_head\.decoder|cls\.predictions\.decoder|predictions\.decoder"
    r"|generator_lm_head|vocab_projector|pred_layer\.proj|lm_loss)"
)
_CLASSIFIER = re.compile(r"score|classifier")
_NORMS = re.compile(r"(?:.*_)?(?:norm|layernorm|layer_norm|ln_?\w*)\d*", re.IGNORECASE)
_EXPERT = re.compile(r"(?:.*\.)?experts(?:\.\d+)?(?:\..*)?")
_ROUTER = re.compile(r"(?:.*\.)?(?:gate|router|router\.classifier|router\.layer|wg)")

# The model types whose blocks are built from transformers' Conv1D, which stores (in, out), and the layers that are.
_CONV1D_MODELS = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder"}
_CONV1D_LAYERS = {"c_attn", "c_proj", "c_fc", "q_attn"}


class Action(str, Enum):
    """What becomes of a tensor."""

    SPLIT = "split"
    COPY = "copy"


@dataclass(frozen=True)
class Decision:
    """What becomes of one tensor and why.

    Attributes:
        module: name of the linear layer, for a split.
        fan_in_fan_out: the weight is stored (in, out).
    """

    tensor: str
    action: Action
    reason: str
    module: str | None = None
    fan_in_fan_out: bool = False


def parse_targets(values: Sequence[str]) -> str | list[str]:
    """Tell the three forms apart that a command line can give.

    A single "all-linear", or a single value with a regular expression's characters, stays a string, which means what
    it means to PEFT; anything else is a list of names or name endings.
    """
    if len(values) == 1 and (values[0] == ALL_LINEAR or not re.fullmatch(r"[\w.\-]+", values[0])):
        return values[0]
    return list(values)


def decide(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]],
    config: Mapping[str, Any],
    targets: str | Sequence[str] = ALL_LINEAR,
    exclude: str | Sequence[str] | None = None,
) -> tuple[Decision, ...]:
    """Decide about every tensor, in the given order.

    Args:
        tensors: (name, safetensors dtype, shape) of each.
        config: the model's config.json.
        targets: "all-linear", a regular expression for whole module names, or a list of names or name endings.
        exclude: the same without "all-linear"; wins over `targets`.

    Raises:
        RequestError: nothing matches, a pattern is no regular expression, or a module was asked for that cannot be
            split; the message names the tensor.
    """
    tensors = list(tensors)
    _check_not_quantized(config, tensors)
    chosen = _matcher(targets, "--target-modules") if targets != ALL_LINEAR else None
    excluded = _matcher(exclude, "--exclude-modules") if exclude else None
    layout = _Layout(config, tensors)
    decisions = []
    for name, dtype, shape in tensors:
        module = name.removesuffix(".weight")
        if module == name:
            decisions.append(Decision(name, Action.COPY, "not a weight matrix"))
        elif excluded is not None and excluded(module):
            decisions.append(Decision(name, Action.COPY, "excluded"))
        elif chosen is None:
            decisions.append(layout.decide(module, dtype, shape))
        elif not chosen(module):
            decisions.append(Decision(name, Action.COPY, "not a target"))
        else:
            decisions.append(_insist(layout.decide(module, dtype, shape, explicit=True), dtype, shape))
    splits = [decision for decision in decisions if decision.action is Action.SPLIT]
    if not splits:
        modules = sorted({name.removesuffix(".weight") for name, _, shape in tensors if len(shape) == 2})
        raise RequestError(
            "no tensor matches --target-modules",
            expected=targets if isinstance(targets, str) else " ".join(targets),
            found=f"modules such as {', '.join(modules[:3])}" if modules else "no weight matrices at all",
            fix="see --plan for every tensor's decision",
        )
    if len({decision.fan_in_fan_out for decision in splits}) > 1:
        odd = next(decision for decision in splits if not decision.fan_in_fan_out)
        raise RequestError(
            "Conv1D and Linear layers cannot share one adapter: PEFT's fan_in_fan_out holds for all of them",
            tensor=odd.tensor,
            fix="split one kind, and leave the other out with --exclude-modules",
        )
    return tuple(decisions)


class _Layout:
    """What the names of one checkpoint mean."""

    def __init__(self, config: Mapping[str, Any], tensors: Sequence[tuple[str, str, tuple[int, ...]]]) -> None:
        architectures = [str(name) for name in config.get("architectures") or []]
        self._classifies = any(name.endswith("ForSequenceClassification") for name in architectures)
        self._tied = bool(config.get("tie_word_embeddings", True))
        self._conv1d = config.get("model_type") in _CONV1D_MODELS
        self._has_experts = any(_EXPERT.fullmatch(name.removesuffix(".weight")) for name, _, _ in tensors)

    def decide(self, module: str, dtype: str, shape: tuple[int, ...], explicit: bool = False) -> Decision:
        name, leaf = f"{module}.weight", module.rpartition(".")[2]

        def copy(reason: str) -> Decision:
            return Decision(name, Action.COPY, reason)

        if _EXPERT.fullmatch(module) and not _inside_shared_expert(module):
            return copy("expert of a mixture: transformers fuses experts at load, an adapter of one would not load")
        if len(shape) > 2:
            return copy("fused or convolutional: not a matrix")
        if len(shape) < 2:
            return copy("norm or vector")
        if _EMBEDDINGS.fullmatch(leaf):
            return copy("embedding")
        if self._has_experts and _ROUTER.fullmatch(module):
            return copy("router of a mixture: not a linear layer in transformers")
        if _HEADS.fullmatch(module) and not (explicit and not self._tied):
            return copy("output head, tied to the embedding" if self._tied else "output head")
        if self._classifies and _CLASSIFIER.fullmatch(leaf) and "." not in module and not explicit:
            return copy("classification head")
        if _NORMS.fullmatch(leaf):
            return copy("norm")
        if dtype not in _SPLITTABLE:
            raise RequestError(
                "the weight cannot be split in its dtype",
                tensor=name,
                expected=" or ".join(_SPLITTABLE),
                found=dtype,
                fix="convert the model to bfloat16 first, or leave the module out with --exclude-modules",
            )
        stored_in_out = self._conv1d and leaf in _CONV1D_LAYERS
        return Decision(name, Action.SPLIT, "linear (Conv1D)" if stored_in_out else "linear", module, stored_in_out)


def _inside_shared_expert(module: str) -> bool:
    return re.search(r"(?:^|\.)shared_experts?\.", module) is not None


def _insist(decision: Decision, dtype: str, shape: tuple[int, ...]) -> Decision:
    """A module that was asked for by name is split or refused, never passed over."""
    if decision.action is Action.COPY:
        raise RequestError(
            "the module was asked for, but cannot be split",
            tensor=decision.tensor,
            expected="a linear layer",
            found=f"{decision.reason} ({dtype} {list(shape)})",
            fix="leave it out with --exclude-modules",
        )
    return decision


def _check_not_quantized(config: Mapping[str, Any], tensors: Sequence[tuple[str, str, tuple[int, ...]]]) -> None:
    quantization = config.get("quantization_config")
    if isinstance(quantization, dict):
        raise RequestError(
            "the model is quantised already",
            expected="full-precision weights",
            found=str(quantization.get("quant_method", "quantization_config in config.json")),
            fix="start from the full-precision model, or dequantise it first",
        )


def _matcher(pattern: str | Sequence[str], option: str) -> Any:
    if not isinstance(pattern, str):
        names = set(pattern)
        return lambda module: module in names or any(module.endswith(f".{name}") for name in names)
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise RequestError(f"{option} is not a regular expression: {error}", found=pattern) from error
    return lambda module: expression.fullmatch(module) is not None


def compact_target_modules(modules: Iterable[str], selected: Collection[str]) -> list[str]:
    """The shortest list that PEFT expands to exactly the selected modules.

    Args:
        modules: every module that the checkpoint's tensors belong to.
        selected: those that are split.

    Returns:
        Last components of names where they select nothing else, full names otherwise; sorted.
    """
    every = set()
    for module in modules:
        while module and module not in every:  # containers are modules too
            every.add(module)
            module = module.rpartition(".")[0]
    endings = {module.rpartition(".")[2] for module in selected}
    hit = {module for module in every if module.rpartition(".")[2] in endings}
    return sorted(endings if hit == set(selected) else selected)
