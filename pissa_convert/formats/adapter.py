"""A PEFT adapter folder: the names of its files and tensors, and its configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"

PREFIX = "base_model.model."
"""What PEFT puts before every name of the base model."""

# fmt: off
_TEXT_TO_TEXT = frozenset((
    "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "led", "longt5", "m2m_100", "marian",
    "mbart", "mt5", "mvp", "nllb-moe", "pegasus", "pegasus_x", "plbart", "switch_transformers", "t5", "umt5",
))
# fmt: on


def adapter_keys(module: str) -> tuple[str, str]:
    """Names of a module's A (rank × in) and B (out × rank) in `adapter_model.safetensors`.

    Args:
        module: its run-time name in the base model.
    """
    return f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight"


def task_type(config: Mapping[str, Any]) -> str | None:
    """PEFT's task type for the model of this config.json, or None where a task type would do harm.

    A task type makes PEFT 0.21 call the model with a text model's arguments, which speech and image models do
    not take. For classification and question answering it also makes PEFT look for the task's head in the
    adapter, and fail to load one that has none.
    """
    names = config.get("architectures")
    architecture = str(names[0]) if isinstance(names, list) and names else ""
    if architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    generates = architecture.endswith(("ForConditionalGeneration", "MTModel"))
    return "SEQ_2_SEQ_LM" if generates and str(config.get("model_type")) in _TEXT_TO_TEXT else None


def adapter_config(
    *,
    rank: int,
    alpha: float,
    rslora: bool,
    target_modules: Sequence[str],
    fan_in_fan_out: bool,
    model_config: Mapping[str, Any],
    base: str | None = None,
) -> str:
    """The text of `adapter_config.json` for a LoRA adapter, as PEFT reads it.

    `init_lora_weights` is true: with "pissa" PEFT would run its SVD again at loading and change the base.

    Args:
        rank: r.
        alpha: lora_alpha; the scaling is alpha / r, or alpha / √r with `rslora`.
        target_modules: names or name endings of the adapted modules.
        fan_in_fan_out: an adapted weight is stored in × out. PEFT has one flag for all modules; where they
            differ it corrects the flag module by module and says so.
        model_config: the base model's config.json, for the task type.
        base: where PEFT may look for the base model. Left open by default, because a path would be wrong as
            soon as the folder moves, and PEFT does not need it to load onto a model.
    """
    values = {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": sorted(target_modules),
        "task_type": task_type(model_config),
        "use_dora": False,
        "use_rslora": rslora,
    }
    return json.dumps(values, indent=2, sort_keys=True) + "\n"
